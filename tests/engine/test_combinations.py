"""Settings given together: every pair against the definition in float64, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ChunkConfig, DecodeConfig, Engine, MaskPredictor, Request, SelectionConfig
from tests.oracles.method import READERS, Expected, Method, split
from tests.support.covering import Row, covering_array
from tests.support.method import BOS, MASK, copy, sharp_model

FACTORS: dict[str, list[Any]] = {
    "scorer": [*READERS, "all", "first", "last", "random", "oracle"],
    "encoding": ["independent", "query-conditioned", "joint", "bridge", "bridge by attention"],
    "positions": ["continuous", "absolute", "reuse"],
    "keep_tokens": [None, 5],
    "adaptive": [None, (3, 0.0), (4, 0.02), (9, 1e9)],  # max_k, margin
    "keep_first": [False, True],
    "masked_copies": [3, None],
    "reselect": ["never", "block", "step"],
    "recompute": ["block", "suffix", "response"],
    "rule": ["schedule", "steps", "threshold", "factor"],
    "stops": [False, True],
    "leaves_masks": [False, True],
    "requests": ["alone", "batch", "questions", "prefilled"],
    "on_block": [False, True],
    "prefix": ["given", "empty", "mixed"],
    "cut": [(True, 0), (False, 0), (True, 3)],  # anchors, overlap
}
RULES: dict[str, dict[str, Any]] = {
    "schedule": {},
    "steps": {"steps": 6},
    "threshold": {"threshold": 0.3},
    "factor": {"factor": 1.2},
}
TOLERANCE = 3e-4  # decisions of the definition are at least this clear


def allowed(row: Row) -> bool:
    """Whether values may be given together, as far as they are given."""
    rereads = row.get("reselect", "never") == "never" or row.get("scorer", "draft") in READERS
    return rereads and not (row.get("prefix") == "mixed" and row.get("requests", "batch") != "batch")


ARRAY = covering_array(FACTORS, allowed)


@functools.cache
def model_of(leaves_masks: bool) -> MaskPredictor:
    """`sharp_model`, or one that often predicts the mask token."""
    if not leaves_masks:
        return sharp_model()
    model = copy(sharp_model())
    head = model.lm_head.weight
    head[...] = head[...].at[MASK].multiply(2.5)
    return model


def settings_of(row: Row) -> tuple[ChunkConfig, SelectionConfig, DecodeConfig]:
    encoding, _, by = row["encoding"].partition(" by ")
    options = {"bridge_share": 0.25, "bridge_tokens": by or "start"} if encoding == "bridge" else {}
    max_k, margin = row["adaptive"] or (None, 0.0)
    if row["scorer"] in ("draft", "query"):
        options["masked_copies"] = row["masked_copies"]
    names = ("scorer", "positions", "keep_tokens", "keep_first", "reselect")
    options |= {"top_k": 2, "max_k": max_k, "margin": margin, "encode_batch": 3}
    selection = SelectionConfig(encoding=encoding, **options, **{name: row[name] for name in names})
    decoding = DecodeConfig(
        gen_length=12, block_length=4, recompute=row["recompute"], **RULES[row["rule"]]
    )
    anchors, overlap = row["cut"]
    return ChunkConfig(12, anchors, overlap), selection, decoding


def requests_of(row: Row, rng: np.random.Generator) -> list[Request]:
    """One request; a ragged batch of three, one with a single chunk; two questions."""
    documents = {"batch": [53, 9, 70], "questions": [53]}.get(row["requests"], [53])
    requests = []
    for i, n in enumerate(documents):
        has_prefix = row["prefix"] == "given" or (row["prefix"] == "mixed" and i != 1)
        prefix = [BOS, *rng.integers(0, 250, 3 + i).tolist()] if has_prefix else []
        oracle = sorted({0, i % 2}) if row["scorer"] == "oracle" and n > 12 else None
        if row["scorer"] == "oracle":
            oracle = oracle if n < 12 or i == 2 else [1, 3]
            oracle = oracle or [0]
        query = rng.integers(0, 250, 6 + 4 * i).tolist()
        requests.append(Request(rng.integers(0, 250, n).tolist(), query, prefix, oracle, seed=i))
    if row["requests"] == "questions":
        query = rng.integers(0, 250, 11).tolist()
        requests.append(requests[0]._replace(question=query, seed=1))
    return requests


def expected(method: Method, requests, decoding: DecodeConfig, drawn) -> list[Expected]:
    most = max(len(split(x.context, method.chunking, BOS)) for x in requests)
    return [
        method.answer(
            x.prefix, x.context, x.question, decoding, oracle=x.oracle, drawn=scores, most=most
        )
        for x, scores in zip(requests, drawn, strict=True)
    ]


def answers_of(engine: Engine, row: Row, requests, on_block):
    first = requests[0]
    if row["requests"] == "questions":
        document = engine.encode(first.context, prefix=first.prefix)
        rest: dict[str, Any] = {"oracle": [x.oracle for x in requests]} if first.oracle else {}
        seeds = [x.seed for x in requests]
        questions = [x.question for x in requests]
        return engine.ask(document, questions, seeds=seeds, on_block=on_block, **rest)
    if row["requests"] == "prefilled":
        return engine.decode(engine.prefill(**first._asdict()), on_block=on_block)
    return engine.answer_batch(requests, on_block=on_block)


def check(row: Row) -> None:
    chunking, selection, decoding = settings_of(row)
    model = model_of(row["leaves_masks"])
    engine = Engine(model, None, chunking, selection, decoding, bos_id=BOS)
    for seed in range(99):  # the first prompts whose decisions are clear
        requests = requests_of(row, np.random.default_rng(seed))
        drawn: list[Any] = [None] * len(requests)
        if row["scorer"] == "random":  # its scores are not defined but by the generator
            quick = DecodeConfig(gen_length=4, block_length=4, steps=1)
            drawing = Engine(model, None, chunking, selection, quick, bos_id=BOS)
            drawn = [x.selection["scores"] for x in answers_of(drawing, row, requests, None)]
        method = Method(model, chunking, selection, BOS)
        want = expected(method, requests, decoding, drawn)
        if row["stops"]:  # a token of the first answer's second block
            token = next((t for t in want[0].tokens[4:8] if t != MASK), 0)
            decoding = DecodeConfig(**{**vars(decoding), "stop_ids": (token,)})
            engine = Engine(model, None, chunking, selection, decoding, bos_id=BOS)
            want = expected(method, requests, decoding, drawn)
        if method.closest > TOLERANCE:
            break
    else:
        raise AssertionError("no prompts whose decisions are clear")
    handed: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    seen = (lambda i, block, piece: handed[i].extend(piece)) if row["on_block"] else None
    answers = answers_of(engine, row, requests, seen)
    for i, (answer, right) in enumerate(zip(answers, want, strict=True)):
        assert answer.selection["chunks"] == right.chunks
        if right.scores is None:
            assert answer.selection["scores"] is None
        else:
            np.testing.assert_allclose(answer.selection["scores"], right.scores, atol=3e-4)
        assert answer.tokens == right.tokens
        assert answer.evaluations == right.evaluations
        assert answer.selection.get("chunks_at_end") == right.chunks_at_end
        assert answer.selection.get("rescored") == right.rescored
        if row["on_block"]:
            assert handed[i] == right.tokens[: 4 * right.text_blocks]


@pytest.mark.parametrize("row", ARRAY, ids=lambda row: "-".join(map(str, row.values())))
def test_every_pair_of_settings_is_the_definition(row):
    check(row)
