"""Re-selection: scores from the denoising state against the definition; what it leaves alone."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.reselect import reselect
from pdllm_jax.method.selection import select
from tests.oracles.definition import Definition
from tests.support.method import CHUNKS, MASK, copies_score, copy, first_state, pieces

DECODE = DecodeConfig(gen_length=8, block_length=4)
SELECT = SelectionConfig(
    top_k=2, encoding="independent", masked_copies=3, encode_batch=2, reselect="step"
)


def start(model, prompt, settings, scores=None):
    cache, computed = prefill(model, prompt, settings, keep_pool=True)
    chosen = select(computed if scores is None else scores, settings)
    return cache, first_state(model, cache, chosen, prompt, DECODE, settings=settings)


def defined(model, prompt, state, scorer) -> np.ndarray:
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
        else:
            result.append(copies_score(definition, prefix, chunk, slots, scored, copies=3))
    return np.array(result)


@pytest.mark.parametrize("scorer", ["draft", "query", "confidence"])
def test_the_best_chunks_of_the_state_are_the_defined_ones(model, prompt, scorer):
    settings = dataclasses.replace(SELECT, scorer=scorer, masked_copies=3)
    # Begin with the worst chunks, so that there is something to change.
    first = prefill(model, prompt, settings, keep_pool=True)[1]
    worst = jnp.where(jnp.isfinite(first), -first, first)
    cache, state = start(model, prompt, settings, scores=worst)
    for _ in range(6):  # into the second block
        state = denoise_step(model, cache, state, config=DECODE)
    assert int(state.block[0]) == 1
    before = copy(state)
    want = np.sort(np.argsort(-defined(model, prompt, before, scorer), kind="stable")[:2])
    state = reselect(model, cache, state, settings=settings, config=DECODE)
    assert state.selected[0].tolist() == want.tolist()
    assert state.chunk_ids[0].tolist() == want.tolist()
    assert int(state.rescored[0]) == 1
    np.testing.assert_array_equal(state.tokens, before.tokens)
    assert before.selected[0].tolist() != want.tolist()
    assert bool(state.stale[0])


def test_attention_counts_query_and_unmasked_response(model, prompt):
    """Slots that are still masked do not count, but are there; a chunk's share is of the K kept."""
    settings = dataclasses.replace(SELECT, scorer="attention", top_k=1)
    cache, state = start(model, prompt, settings)
    for _ in range(3):
        state = denoise_step(model, cache, state, config=DECODE)
    before = copy(state)
    state = reselect(model, cache, state, settings=settings, config=DECODE)
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


SLOW = [
    pytest.param(encoding, when, marks=pytest.mark.slow)
    for encoding in ("independent", "query-conditioned", "joint", "bridge")
    for when in ("block", "step")
    if (encoding, when) != ("joint", "block")
]


@pytest.mark.parametrize(("encoding", "when"), [("joint", "block"), *SLOW])
def test_the_loop_is_the_loop_by_hand(model, prompt, encoding, when):
    """Before every step, or a block's first, once something is unmasked."""
    settings = dataclasses.replace(
        SELECT, encoding=encoding, reselect=when, keep_tokens=8, bridge_share=0.25
    )
    worst = jnp.array([[0.0, 1.0, -1.0, -2.0, -3.0]])
    cache, state = start(model, prompt, settings, scores=worst)
    other = copy(state)
    steps, seen = 0, []
    while int(other.block[0]) < DECODE.n_blocks:
        if steps and (when == "step" or int(other.step[0]) == 0):
            other = reselect(model, cache, other, settings=settings, config=DECODE)
            seen.append(tuple(other.selected[0].tolist()))
        other = denoise_step(model, cache, other, config=DECODE)
        steps += 1
    state = denoise(model, cache, state, config=DECODE, settings=settings)
    np.testing.assert_array_equal(state.tokens, other.tokens)
    np.testing.assert_array_equal(state.selected, other.selected)
    assert state.rescored.tolist() == [len(seen)] == [7 if when == "step" else 1]
    assert state.evaluations.tolist() == [8]
    assert set(seen) - {(0, 1)}  # it did change


def test_a_request_that_keeps_its_chunks_keeps_its_kv(model, prompt):
    """Two requests over one document, of which one changes; beside that one or alone."""
    settings = dataclasses.replace(SELECT, encoding="joint", top_k=3)
    cache, scores = prefill(model, prompt, settings)

    def begin(rows):
        chosen = select(jnp.stack(rows), settings)
        query, length = (x.repeat(len(rows), axis=0) for x in (prompt.query, prompt.query_length))
        keys = jnp.stack([jax.random.key(7)] * len(rows))
        options = {"query_length": length, "settings": settings}
        state = init_denoise(model, cache, chosen, query, DECODE, keys, **options)
        return denoise_step(model, cache, state, config=DECODE)

    def again(state):
        return reselect(model, cache, copy(state), settings=settings, config=DECODE)

    # A request whose chunks are those that it would choose again, and one of which this is not so.
    choices = [
        jnp.full(scores.shape[1], -jnp.inf).at[jnp.array(choice)].set(0.0)
        for choice in itertools.combinations(range(5), 3)
    ]
    begun = [begin([choice]) for choice in choices]
    stays = [bool((state.selected == again(state).selected).all()) for state in begun]
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
    for _ in range(7):  # the loop by hand
        state, alone = (again(denoise_step(model, cache, x, config=DECODE)) for x in (state, alone))
    np.testing.assert_array_equal(state.tokens[1], alone.tokens[0])
    assert not (state.tokens == MASK).any()


def test_requests_that_are_done_and_untouched_ones_cost_nothing(model, prompt):
    cache, state = start(model, prompt, SELECT)
    for before in (copy(state), denoise(model, cache, state, config=DECODE)):
        after = reselect(model, cache, copy(before), settings=SELECT, config=DECODE)
        assert after.rescored.tolist() == [0]
        np.testing.assert_array_equal(after.selected, before.selected)


def test_what_cannot_be_scored_anew_is_refused(model, prompt):
    joint = dataclasses.replace(SELECT, encoding="joint", reselect="never")
    cache, scores = prefill(model, prompt, joint)
    state = first_state(model, cache, select(scores, joint), prompt, DECODE)
    again = dataclasses.replace(joint, reselect="step")
    for run in (reselect, denoise):
        with pytest.raises(ValueError, match="keep_pool"):
            run(model, cache, state, settings=again, config=DECODE)
    wider = dataclasses.replace(again, max_k=4)
    with pytest.raises(ValueError, match="the state has 2 slots for chunks, settings keep up to 4"):
        reselect(model, prefill(model, prompt, again)[0], state, settings=wider, config=DECODE)
    with pytest.raises(ValueError, match="needs the document's cache"):
        denoise(model, None, state, config=DECODE, settings=again)
    whole = prefill(model, prompt, joint, keep_pool=True)[0]
    last = dataclasses.replace(joint, scorer="last")
    with pytest.raises(ValueError, match="needs a scorer that reads"):
        reselect(model, whole, state, settings=last, config=DECODE)
