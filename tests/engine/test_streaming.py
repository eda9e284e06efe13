"""Blocks that are handed out while a batch is decoded: the answer's tokens up to its end."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ChunkConfig, DecodeConfig, Engine, Request, SelectionConfig
from pdllm_jax.engine import answer
from pdllm_jax.method.caches import Evaluation
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.step import Step
from tests.support.method import BOS, MASK, copy, sharp_model

EOS, STOP = 254, 7
# Tokens, block and blocks of the text of one request after each call of `denoise`: 3 blocks of 2.
SCRIPTS = {
    "a stop id fills a slot of an earlier block, the request goes on": (
        [([1, MASK, MASK, MASK, MASK, MASK], 1, 3), ([1, STOP, 3, 4, MASK, MASK], 2, 3)],
        ([1, STOP, 3, 4, 5, 6], 3, 3),
    ),
    "that slot is filled in the last block": (
        [([1, MASK, 3, 4, MASK, MASK], 2, 3)],
        ([1, STOP, 3, 4, EOS, EOS], 3, 3),
    ),
    "a stop id ends the text": (
        [([1, 2, MASK, MASK, MASK, MASK], 1, 3)],
        ([1, 2, STOP, 4, EOS, EOS], 3, 2),
    ),
    "a slot stays masked": (
        [([1, MASK, MASK, MASK, MASK, MASK], 1, 3), ([1, MASK, 3, 4, MASK, MASK], 2, 3)],
        ([1, MASK, 3, 4, 5, 6], 3, 3),
    ),
    "a text of EOS that no stop id has ended": ([], ([STOP, EOS, EOS, EOS, EOS, EOS], 3, 3)),
}


def states(rows):
    tokens, block, text_blocks = (jnp.array(x) for x in zip(*rows, strict=True))
    return SimpleNamespace(tokens=tokens, block=block, text_blocks=text_blocks)


def test_what_is_handed_out_comes_from_the_state(monkeypatch):
    """All scripts as one batch, whose requests are done at different times."""
    runs = [[*steps, *[last] * (3 - len(steps))] for steps, last in SCRIPTS.values()]
    calls = iter(states(rows) for rows in zip(*runs, strict=True))
    monkeypatch.setattr(answer, "denoise", lambda *_, **__: next(calls))
    config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS)
    start = states([([MASK] * 6, 0, 3)] * len(runs))
    handed: list[list[int]] = [[] for _ in runs]
    decoding = DecodeConfig(gen_length=6, block_length=2, stop_ids=(STOP,))
    answer.denoise_blocks(
        SimpleNamespace(config=config),
        None,
        start,
        lambda i, _, piece: handed[i].extend(piece),
        config=decoding,
    )
    assert handed == [last[: 2 * text_blocks] for _, (last, _, text_blocks) in SCRIPTS.values()]


def collect(pieces: list, *piece) -> None:
    pieces.append(piece)


@pytest.mark.parametrize(
    ("method", "recompute"),
    [
        ("prefilling", "block"),
        pytest.param("prefilling", "suffix", marks=pytest.mark.slow),
        pytest.param("prefilling", "response", marks=pytest.mark.slow),
        ("baseline", "block"),
        pytest.param("baseline", "suffix", marks=pytest.mark.slow),
        ("baseline", "response"),
    ],
)
def test_blocks_are_the_answer_up_to_its_end(recompute, method):
    """Of a model that often predicts the mask token, sampled; some of the answers are stopped."""
    model = copy(sharp_model())
    model.lm_head.weight[...] = model.lm_head.weight[...].at[MASK].multiply(2.5)
    decoding = DecodeConfig(
        gen_length=16,
        block_length=4,
        recompute=recompute,
        temperature=0.5,
        threshold=0.2,
        stop_ids=tuple(range(15)),
    )
    names = {"block": "dual-cache", "suffix": "prefix-cache", "response": "plain"}
    method = method if method == "prefilling" else names[recompute]
    selection = SelectionConfig(top_k=2, scorer="last", encoding="independent")
    engine = Engine(model, None, ChunkConfig(12), selection, decoding, method, bos_id=BOS)
    rng, ended = np.random.default_rng(0), 0
    for batch in [4, 4, 4]:
        requests = [
            Request(rng.integers(0, 250, 40), rng.integers(0, 250, 9), [BOS], seed=int(seed))
            for seed in rng.integers(0, 1000, batch)
        ]
        pieces: list[tuple[int, int, list[int]]] = []
        streamed = engine.answer_batch(requests, on_block=functools.partial(collect, pieces))
        handed = [[t for j, _, piece in pieces if j == i for t in piece] for i in range(batch)]
        for i, (got, whole) in enumerate(zip(streamed, engine.answer_batch(requests), strict=True)):
            text, rest = whole.tokens[: len(handed[i])], whole.tokens[len(handed[i]) :]
            assert got.tokens == whole.tokens
            assert handed[i] == text
            assert set(rest) <= {EOS}
            if rest:
                assert set(text[-4:]) & set(decoding.stop_ids)
            ended += bool(rest)
    assert 0 < ended < 12


def test_only_a_stop_id_of_the_block_under_way_ends_a_request():
    """As `DecodeConfig.stop_ids` says; the second slot was left masked by the first block."""
    config = DecodeConfig(gen_length=6, block_length=2, threshold=0.1, stop_ids=(STOP,))
    cases = [  # predicted; tokens, block and blocks of the text afterwards
        ([0, STOP, 3, 4, 0, 0], [1, STOP, 3, 4, MASK, MASK], 2, 3),
        ([0, 2, STOP, 4, 0, 0], [1, 2, STOP, 4, EOS, EOS], 3, 2),
        ([0, STOP, STOP, 4, 0, 0], [1, STOP, STOP, 4, EOS, EOS], 3, 2),
    ]
    predicted, *want = map(list, zip(*cases, strict=True))
    keys, query = jax.random.key(0), jnp.array([[1, 2, 3]] * len(cases))
    state = init_denoise(sharp_model(), None, None, query, config, keys)
    before = jnp.array([[1, *[MASK] * 5]] * len(cases))
    state = dataclasses.replace(state, tokens=before, block=jnp.ones_like(state.block))

    @jax.jit
    def advance(state):
        step, zeros = Step(sharp_model(), None, state, config, None), jnp.zeros(before.shape)
        evaluation = Evaluation(jnp.array(predicted), zeros, zeros, (None, None), 0, state.live)
        return step.advance(evaluation)

    after = advance(state)
    assert [x.tolist() for x in (after.tokens, after.block, after.text_blocks)] == want
