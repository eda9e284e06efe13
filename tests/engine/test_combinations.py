"""Settings given together: every pair against the definition in float64, and what is refused."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdllm_jax import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    Engine,
    MaskPredictor,
    Request,
    SelectionConfig,
    plan_memory,
)
from tests.oracles.chunks import split
from tests.oracles.method import READERS, SHIFTED, Expected, Method
from tests.support.covering import Row, covering_array
from tests.support.method import BOS, MASK, copy, sharp_model

FACTORS: dict[str, list[Any]] = {
    "family": ["llada", "dream"],
    "scorer": [*READERS, "all", "first", "last", "random", "oracle"],
    "encoding": ["independent", "query-conditioned", "joint", "bridge", "bridge by attention"],
    "positions": ["continuous", "absolute", "reuse", "contiguous"],
    "keep_tokens": [None, 5],
    "keep_by": ["query-to-chunk", "chunk-to-query", "both"],
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
    if row.get("scorer") in SHIFTED and row.get("family", "dream") != "dream":
        return False
    rereads = row.get("reselect", "never") == "never" or row.get("scorer", "draft") in READERS
    return rereads and not (
        row.get("prefix") == "mixed" and row.get("requests", "batch") != "batch"
    )


ARRAY = covering_array(FACTORS, allowed)


@functools.cache
def model_of(family: str, leaves_masks: bool) -> MaskPredictor:
    """`sharp_model`, or one that often predicts the mask token."""
    if not leaves_masks:
        return sharp_model(family)
    model = copy(sharp_model(family))
    head = model.lm_head.weight
    head[...] = head[...].at[MASK].multiply(2.5)
    return model


def settings_of(row: Row) -> tuple[ChunkConfig, SelectionConfig, DecodeConfig]:
    encoding, _, by = row["encoding"].partition(" by ")
    options = {"bridge_share": 0.25, "bridge_tokens": by or "start"} if encoding == "bridge" else {}
    max_k, margin = row["adaptive"] or (None, 0.0)
    if row["scorer"] in ("draft", "query"):
        options["masked_copies"] = row["masked_copies"]
    if row["scorer"] == "heads":
        options["heads"] = ((0, 3), (1, 0), (1, 2))
    names = ("scorer", "positions", "keep_tokens", "keep_by", "keep_first", "reselect")
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
    # Of other random scores too: given ones may have no clear order.
    offset = int(rng.integers(1000))
    return [request._replace(seed=request.seed + offset) for request in requests]


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


def random_scores(model, chunking: ChunkConfig, request: Request) -> np.ndarray:
    """Those of the request's seed, which no definition but the generator's gives."""
    selection = SelectionConfig(top_k=1, scorer="random")
    engine = Engine(model, None, chunking, selection, bos_id=BOS)
    context = request.context * 8  # one that has to be chosen from
    selected = engine.prefill(**request._replace(context=context)._asdict(), encode=False)
    return np.asarray(selected.scores)[0, : len(split(request.context, chunking, BOS))]


def check(row: Row) -> None:
    chunking, selection, decoding = settings_of(row)
    model = model_of(row["family"], row["leaves_masks"])
    engine = Engine(model, None, chunking, selection, decoding, bos_id=BOS)
    for seed in range(99):  # the first prompts whose decisions are clear
        requests = requests_of(row, np.random.default_rng(seed))
        drawn: list[Any] = [None] * len(requests)
        if row["scorer"] == "random":
            drawn = [random_scores(model, chunking, x) for x in requests]
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


QUICK = [pytest.param(row, marks=[pytest.mark.slow] * (i >= 7)) for i, row in enumerate(ARRAY)]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: "-".join(map(str, row.values())))
def test_every_pair_of_settings_is_the_definition(row):
    check(row)


BASE = {name: values[0] for name, values in FACTORS.items()} | {"masked_copies": 3}
BASE_CASE, MARGINS = ("reselect", "encoding", "adaptive"), [(4, 0.0), (4, 1e9)]
FEW_SLOTS: list[Any] = [  # adaptive K whose first selection fills fewer slots than a later one may
    {"reselect": "block", "encoding": "joint", "adaptive": (4, 0.02)},
    {"reselect": "step", "encoding": "independent", "adaptive": (4, 0.02)},
    *(
        pytest.param(dict(zip(BASE_CASE, values, strict=True)), marks=pytest.mark.slow)
        for values in (
            ("step", "bridge", (9, 1e9)),
            *itertools.product(("block", "step"), ("independent", "joint"), MARGINS),
        )
    ),
]


@pytest.mark.parametrize(
    "change", FEW_SLOTS, ids=lambda change: "-".join(map(str, change.values()))
)
def test_reselection_may_fill_slots_that_were_empty(change):
    check(BASE | change)


TRIPLES = [row for row in covering_array(FACTORS, allowed, strength=3) if row not in ARRAY]


@pytest.mark.slow
@pytest.mark.parametrize("row", TRIPLES, ids=lambda row: "-".join(map(str, row.values())))
def test_every_triple_of_settings_is_the_definition(row):
    check(row)


def planned(row: Row):
    chunking, selection, decode = settings_of(row)
    many = {"batch": {"batch": 3}, "questions": {"questions": 2}}.get(row["requests"], {})
    settings: dict[str, Any] = {"chunking": chunking, "selection": selection, "decode": decode}
    return plan_memory(sharp_model(row["family"]).config, 53, dtype=jnp.float32, **settings, **many)


@pytest.mark.parametrize("row", ARRAY[::9], ids=lambda row: "-".join(map(str, row.values())))
def test_what_may_be_given_together_is_planned(row):
    assert planned(row).phases[-1].name == "decode"


@given(
    scorer=st.sampled_from(FACTORS["scorer"]),
    top_k=st.integers(1, 9),
    extra=st.none() | st.integers(0, 5),
    n=st.integers(1, 12),
)
def test_a_short_document_clamps_ordered_settings_together(scorer, top_k, extra, n):
    max_k = None if extra is None else top_k + extra
    given = SelectionConfig(top_k=top_k, max_k=max_k, scorer=scorer)
    config = given.for_document(n, named=scorer == "oracle")
    everything = scorer == "all" or (n <= top_k and scorer != "oracle")
    assert config.top_k == (n if everything else min(top_k, n))
    assert config.max_k == (None if everything or max_k is None else min(max_k, n))


@pytest.mark.parametrize("context", [20, 90])
def test_named_chunks_of_a_document_of_fewer_than_top_k(context):
    """Of 2 and of 6 chunks; alone, beside a longer document, and in the plan."""
    rng, model = np.random.default_rng(0), sharp_model()
    selection = SelectionConfig(top_k=3, max_k=4, scorer="oracle")
    decoding, chunking = DecodeConfig(gen_length=4, block_length=4), ChunkConfig(16)
    requests = [
        Request(rng.integers(0, 250, n).tolist(), [1, 2, 3], [BOS, 1], [0]) for n in (context, 90)
    ]
    engine = Engine(model, None, chunking, selection, decoding)
    alone = engine.answer(**requests[0]._asdict())
    want = expected(Method(model, chunking, selection, BOS), requests[:1], decoding, [None])[0]
    assert alone.tokens == engine.answer_batch(requests)[0].tokens == want.tokens
    assert alone.selection == {"chunks": [0], "scores": None}
    plan = plan_memory(model.config, context, chunking=chunking, selection=selection)
    slots = min(4, -(-context // 15))
    assert plan.selection.slots == slots


def never(*args, **kwargs):
    raise AssertionError("computed something")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            ({"reselect": "step", "scorer": name}, "reselect needs")
            for name in FACTORS["scorer"][len(READERS) :]
        ],
        ({"margin": 0.5}, "margin needs max_k"),
        ({"top_k": 4, "max_k": 3}, "max_k 3 is less than top_k 4"),
        (
            {"draft_length": 1, "draft_steps": 2},
            "draft_steps must be at most draft_length 1, got 2",
        ),
        ({"encoding": "bridge", "bridge_share": 2}, "bridge_share must lie in"),
        ({"threshold": 0.5, "factor": 1.0}, "threshold and factor exclude each other"),
        ({"unmask": max, "steps": 8}, "unmask excludes steps"),
        ({"gen_length": 8, "block_length": 3}, "block_length 3 does not divide gen_length 8"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "steps 3 is not a multiple"),
        ({"guidance": 1.0}, "guidance needs recompute='response', got 'block'"),
        *[
            ({"guidance": 1.0, "recompute": "response", "method": name}, "guidance is implemented")
            for name in ("prefilling", "prefix-cache", "dual-cache")
        ],
        ({"chunk_size": 4, "overlap": 3}, "leaves no new token"),
    ],
)
def test_what_may_not_be_given_together_is_refused(monkeypatch, settings, message):
    """By one line, before anything is computed, from an engine and from the planner alike."""
    monkeypatch.setattr(MaskPredictor, "run", never)
    monkeypatch.setattr(MaskPredictor, "encode", never)

    def parts() -> dict[str, Any]:
        kinds = {"chunking": ChunkConfig, "decoding": DecodeConfig, "selection": SelectionConfig}
        names = {k: set(inspect.signature(kind).parameters) for k, kind in kinds.items()}
        chosen = {k: {n: settings[n] for n in names[k] & set(settings)} for k in kinds}
        made = {k: kind(**chosen[k]) for k, kind in kinds.items()}
        return made | {"method": settings.get("method", "prefilling")}

    def plan() -> None:
        given = parts()
        plan_memory(sharp_model().config, 50, decode=given.pop("decoding"), **given)

    for call in (lambda: Engine(sharp_model(), **parts()).answer([1], [2], prefix=[BOS]), plan):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["prefilling", "plain", "prefix-cache", "dual-cache"])
def test_a_mask_token_in_a_prompt_is_refused(monkeypatch, method):
    """The published loops would fill it, as a slot of the response."""
    monkeypatch.setattr(MaskPredictor, "run", never)
    monkeypatch.setattr(MaskPredictor, "encode", never)
    engine = Engine(sharp_model(), method=method)
    for i, name in enumerate(("context", "question", "prefix")):
        parts = [[5, 6, 7], [8, 9], [BOS, 1]]
        parts[i] = [*parts[i], MASK, 3]
        message = f"{name} has the mask token {MASK} at position {len(parts[i]) - 2}"
        with pytest.raises(ValueError, match=message):
            engine.answer_batch([Request(*parts)])
    with pytest.raises(ValueError, match=f"bos_id has the mask token {MASK}"):
        Engine(sharp_model(), method=method, bos_id=MASK)
