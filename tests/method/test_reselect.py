"""Re-selection: scores from the denoising state against the definition; what it leaves alone."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.reselect import reselect
from pdllm_jax.method.selection import select
from tests.oracles.definition import Definition
from tests.support.method import CHUNKS, MASK, copies_score, copy, first_state, pieces, prompt_parts

DECODE = DecodeConfig(gen_length=8, block_length=4)
SELECT = SelectionConfig(
    top_k=2, encoding="independent", masked_copies=3, encode_batch=2, reselect="step"
)


@pytest.fixture(scope="module")
def prompt():
    return chunk_prompt(*prompt_parts(), CHUNKS)


def start(model, prompt, selecting, decode=DECODE, scores=None):
    cache, found = prefill(model, prompt, selecting, keep_pool=True)
    chosen = select(found if scores is None else scores, selecting)
    state = first_state(model, cache, chosen, prompt, decode, settings=selecting)
    return cache, state


def defined(model, prompt, state, scorer, copies=3) -> np.ndarray:
    """Scores of every chunk from the formulas in reselect.py, in float64."""
    prefix = prompt.prefix[0, : int(prompt.prefix_length[0])].tolist()
    query = prompt.query[0, : int(prompt.query_length[0])].tolist()
    response = state.tokens[0].tolist()
    slots, q = [*query, *response], len(query)
    scored = [*range(q)]
    if scorer == "draft":
        scored += [q + i for i, token in enumerate(response) if token != MASK]
    block = int(state.block[0])
    open_slots = [q + i for i in range(4 * block, 4 * block + 4) if response[i] == MASK]
    definition, result = Definition(model), []
    for chunk in pieces(prompt):
        if scorer == "confidence":
            logp = definition.slot_scores(prefix, (chunk, CHUNKS.chunk_size), slots, set())
            result.append(np.mean([logp[slot].max() for slot in open_slots]))
            continue
        result.append(copies_score(definition, prefix, chunk, slots, scored, copies))
    return np.array(result)


@pytest.mark.parametrize("scorer", ["draft", "query", "confidence"])
def test_the_best_chunks_of_the_state_are_the_defined_ones(model, prompt, scorer):
    selecting = SelectionConfig.from_flat(**SELECT.to_flat() | {"scorer": scorer})
    # Begin with the worst chunks, so that there is something to change.
    first = prefill(model, prompt, selecting, keep_pool=True)[1]
    worst = jnp.where(jnp.isfinite(first), -first, first)
    cache, state = start(model, prompt, selecting, scores=worst)
    for _ in range(6):  # into the second block
        state = denoise_step(model, cache, state, config=DECODE)
    assert int(state.block[0]) == 1
    before = copy(state)
    want = np.sort(np.argsort(-defined(model, prompt, before, scorer), kind="stable")[:2])
    state = reselect(model, cache, state, settings=selecting, config=DECODE)
    assert state.selected[0].tolist() == want.tolist()
    assert state.chunk_ids[0].tolist() == want.tolist()
    assert int(state.rescored[0]) == 1
    np.testing.assert_array_equal(state.tokens, before.tokens)
    changed = before.selected[0].tolist() != want.tolist()
    assert changed
    assert bool(state.stale[0])


def test_attention_counts_query_and_unmasked_response(model, prompt):
    """Slots that are still masked do not count, but are there; a chunk's share is of the K kept."""
    selecting = dataclasses.replace(SELECT, scorer="attention", top_k=1)
    cache, state = start(model, prompt, selecting)
    for _ in range(3):
        state = denoise_step(model, cache, state, config=DECODE)
    before = copy(state)
    state = reselect(model, cache, state, settings=selecting, config=DECODE)
    prefix = prompt.prefix[0, : int(prompt.prefix_length[0])].tolist()
    query, response = prompt.query[0, :7].tolist(), before.tokens[0].tolist()
    chunks, size = pieces(prompt), CHUNKS.chunk_size
    # Every chunk as if it lay just before the query, which sees them all.
    p, n, live = len(prefix), len(chunks), [*query, *response]
    ids = [*prefix, *(t for chunk in chunks for t in chunk), *live]
    group = [0] * p + [1 + j for j, chunk in enumerate(chunks) for _ in chunk]
    position = [*range(p), *(p + i for chunk in chunks for i in range(len(chunk)))]
    position += [p + size + i for i in range(len(live))]
    group, position = np.array(group + [1 + n] * len(live)), np.array(position)
    own = group == 1 + n
    sees = (group == group[:, None]) | (group == 0) | own[:, None]
    definition = Definition(model)
    definition.logits(ids, sees, position - position[:, None])
    counted = np.flatnonzero(own)[[i for i, t in enumerate(live) if i < 7 or t != MASK]]
    weights = definition.weights[:, :, counted]
    mass = np.stack([weights[..., group == 1 + j].sum(-1) for j in range(n)], axis=-1)
    share = (mass / mass.sum(-1, keepdims=True)).mean(axis=(0, 1, 2))
    assert state.selected[0].tolist() == [int(share.argmax())]


@pytest.mark.parametrize(
    ("when", "encoding"),
    [
        ("block", "independent"),
        ("block", "joint"),
        ("step", "query-conditioned"),
        ("step", "bridge"),
        *(
            pytest.param(when, encoding, marks=pytest.mark.slow)
            for when, encoding in (
                ("step", "independent"),
                ("step", "joint"),
                ("block", "query-conditioned"),
                ("block", "bridge"),
            )
        ),
    ],
)
def test_the_loop_is_the_loop_by_hand(model, prompt, encoding, when):
    """Before every step, or a block's first, once something is unmasked."""
    selecting = dataclasses.replace(SELECT, encoding=encoding, reselect=when, keep_tokens=8)
    if encoding == "bridge":
        selecting = dataclasses.replace(selecting, bridge_share=0.25)
    worst = jnp.array([[0.0, 1.0, -1.0, -2.0, -3.0]])
    cache, state = start(model, prompt, selecting, scores=worst)
    other = copy(state)
    steps, seen = 0, []
    while int(other.block[0]) < DECODE.n_blocks:
        if steps and (when == "step" or int(other.step[0]) == 0):
            other = reselect(model, cache, other, settings=selecting, config=DECODE)
            seen.append(tuple(other.selected[0].tolist()))
        other = denoise_step(model, cache, other, config=DECODE)
        steps += 1
    state = denoise(model, cache, state, config=DECODE, settings=selecting)
    np.testing.assert_array_equal(state.tokens, other.tokens)
    np.testing.assert_array_equal(state.selected, other.selected)
    assert state.rescored.tolist() == [len(seen)] == [7 if when == "step" else 1]
    assert state.evaluations.tolist() == [8]
    assert set(seen) - {(0, 1)}  # it did change


def test_a_request_that_keeps_its_chunks_keeps_its_kv(model, prompt):
    """Two requests over one document, of which one changes; beside that one or alone."""
    selecting = dataclasses.replace(SELECT, encoding="joint", top_k=3)
    cache, scores = prefill(model, prompt, selecting)

    def begin(rows):
        chosen = select(jnp.stack(rows), selecting)
        state = init_denoise(
            model, cache, chosen, jnp.repeat(prompt.query, len(rows), axis=0), DECODE,
            jnp.stack([jax.random.key(7)] * len(rows)),
            query_length=jnp.repeat(prompt.query_length, len(rows)), settings=selecting,
        )  # fmt: skip
        return denoise_step(model, cache, state, config=DECODE)

    def again(state):
        return reselect(model, cache, copy(state), settings=selecting, config=DECODE)

    # A request whose chunks are those that it would choose again, and one of which this is not so.
    choices = [
        jnp.where(jnp.isin(jnp.arange(scores.shape[1]), jnp.array(choice)), 0.0, -jnp.inf)
        for choice in itertools.combinations(range(5), 3)
    ]
    stays = [
        (begun.selected == again(begun).selected).all().item()
        for begun in (begin([choice]) for choice in choices)
    ]
    settled, worst = choices[stays.index(True)], choices[stays.index(False)]
    state = begin([settled, worst])
    before = copy(state)
    state = again(state)
    kept, moved = (before.selected == state.selected).all(axis=1).tolist()
    assert kept
    assert not moved
    np.testing.assert_array_equal(state.pool.k[:, :3], before.pool.k[:, :3])
    for now, then in zip(state.live.k, before.live.k, strict=True):
        np.testing.assert_array_equal(now[0], then[0])
    assert not np.array_equal(state.pool.k[:, 3:], before.pool.k[:, 3:])
    alone = again(begin([worst]))
    np.testing.assert_array_equal(alone.selected[0], state.selected[1])
    together = denoise(model, cache, state, config=DECODE, settings=selecting)
    apart = denoise(model, cache, alone, config=DECODE, settings=selecting)
    np.testing.assert_array_equal(together.tokens[1], apart.tokens[0])


def test_requests_that_are_done_and_untouched_ones_cost_nothing(model, prompt):
    cache, state = start(model, prompt, SELECT)
    fresh = reselect(model, cache, copy(state), settings=SELECT, config=DECODE)
    assert fresh.rescored.tolist() == [0]
    done = denoise(model, cache, state, config=DECODE)
    again = reselect(model, cache, copy(done), settings=SELECT, config=DECODE)
    assert again.rescored.tolist() == [0]
    np.testing.assert_array_equal(again.selected, done.selected)


def test_what_cannot_be_scored_anew_is_refused(model, prompt):
    joint = dataclasses.replace(SELECT, encoding="joint", reselect="never")
    cache, scores = prefill(model, prompt, joint)
    state = first_state(model, cache, select(scores, joint), prompt, DECODE)
    again = dataclasses.replace(joint, reselect="step")
    for run in (
        lambda: reselect(model, cache, state, settings=again, config=DECODE),
        lambda: denoise(model, cache, state, config=DECODE, settings=again),
    ):
        with pytest.raises(ValueError, match="keep_pool"):
            run()
    with pytest.raises(ValueError, match="needs the document's cache"):
        denoise(model, None, state, config=DECODE, settings=again)
    whole = prefill(model, prompt, joint, keep_pool=True)[0]
    with pytest.raises(ValueError, match="needs a scorer that reads"):
        reselect(
            model, whole, state, config=DECODE,
            settings=dataclasses.replace(joint, scorer="last"),
        )  # fmt: skip
