"""Scores and encodings against the definition, and the identities of the method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scorers import Draft
from pdllm_jax.method.scorers.controls import FirstScorer
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import select_top_k
from tests.oracles.definition import Definition
from tests.support.method import (
    BOS,
    CHUNKS,
    MASK,
    copies_score,
    first_state,
    greedy,
    pieces,
    widened,
)

SELECT = SelectionConfig(top_k=2, masked_copies=3, encode_batch=2)
DRAFT = Draft(jnp.array([[17, MASK, 99, MASK]], jnp.int32), jnp.array([[True, False, True, False]]))


COPIES = [("draft", copies) for copies in (1, 3, 9, None)] + [("query", 3)]


@pytest.mark.parametrize(("scorer", "copies"), COPIES)
def test_scores_are_the_defined_ones(model, parts, scorer, copies):
    """Of query and draft (9 slots are scored: leave-one-out); of the query without a prefix."""
    prefix, context, query = parts
    slots, scored = [*query, 17, MASK, 99, MASK], [*range(7), 7, 9]
    if scorer == "query":
        prefix, slots, scored = [], query, [*range(7)]
    prompt = chunk_prompt(prefix, context, query, CHUNKS, bos_id=BOS)
    config = dataclasses.replace(SELECT, scorer=scorer, masked_copies=copies)
    _, (scores,) = prefill(model, prompt, config, draft=DRAFT)
    definition = Definition(model)
    want = [
        copies_score(definition, prefix, chunk, slots, scored, copies or 9)
        for chunk in pieces(prompt)
    ]
    np.testing.assert_allclose(scores[: len(want)], want, rtol=2e-5)
    assert np.isneginf(scores[len(want) :]).all()
    assert np.ptp(want) > 0.1


def test_confidence_is_that_of_the_masks_behind_the_query(model, parts, prompt):
    config = dataclasses.replace(SELECT, scorer="confidence", draft_length=3)
    _, (scores,) = prefill(model, prompt, config)
    prefix, _, query = parts
    slots, definition = [*query, MASK, MASK, MASK], Definition(model)
    want = [
        definition.slot_scores(prefix, (chunk, CHUNKS.chunk_size), slots, set())[-3:].max(-1).mean()
        for chunk in pieces(prompt)
    ]
    np.testing.assert_allclose(scores[: len(want)], want, rtol=2e-5)
    assert np.isneginf(scores[len(want) :]).all()
    assert np.ptp(want) > 1e-3


def test_draft_is_the_defined_one(model, parts, prompt):
    prefix, _, query = parts
    got = draft_response(model, prompt, SELECT)
    definition, draft = Definition(model), [MASK] * 4
    for step in range(2):
        logits = definition.plain([*prefix, *query, *draft])[-4:]
        guess = logits.argmax(-1)
        sure = (np.exp(logits - logits.max(-1, keepdims=True))).sum(-1) ** -1
        open_slots = [i for i in range(4) if draft[i] == MASK]
        slot = 0 if step == 0 else max(open_slots, key=lambda i: sure[i])
        draft[slot] = int(guess[slot])
    assert got.tokens[0].tolist() == draft
    assert got.confirmed[0].tolist() == [token != MASK for token in draft]


def test_draft_is_made_where_none_is_given(model, prompt):
    given = prefill(model, prompt, SELECT, draft=draft_response(model, prompt, SELECT))[1]
    np.testing.assert_array_equal(prefill(model, prompt, SELECT)[1], given)


def test_scores_do_not_depend_on_groups_or_padding(model, prompt):
    want, n = prefill(model, prompt, SELECT, draft=DRAFT)[1][0], prompt.n_chunks
    wide = widened(prompt, chunks=5, query=8, prefix=8)
    for given, group in ((prompt, 1), (prompt, 64), (wide, 2)):
        config = dataclasses.replace(SELECT, encode_batch=group)
        got = prefill(model, given, config, draft=DRAFT)[1][0]
        np.testing.assert_allclose(got[:n], want[:n], rtol=1e-5)


def prefilling(model, prompt, select, decode):
    cache, scores = prefill(model, prompt, select, draft=DRAFT)
    chosen = select_top_k(scores, min(select.top_k, prompt.n_chunks))
    return (
        cache,
        chosen,
        first_state(model, cache, chosen, prompt, decode, encoding=select.encoding),
    )


PADS = pytest.mark.parametrize("pads", [{}, {"query": 16, "prefix": 8}], ids=["exact", "padded"])


@PADS
def test_joint_encoding_without_anchors_is_the_whole_prompt(model, parts, pads):
    """Identity 1: all chunks kept; first evaluation of plain LLaDA, then Fast-dLLM's dual cache."""
    prefix, context, query = parts[0], parts[1][:48], parts[2]
    select = dataclasses.replace(SELECT, top_k=99, scorer="all")
    decode = DecodeConfig(gen_length=8, block_length=8)
    whole = [*prefix, *context, *query]
    prompt = chunk_prompt(prefix, context, query, ChunkConfig(12, anchors=False))
    _, _, state = prefilling(model, widened(prompt, **pads), select, decode)
    other = init_denoise(model, None, None, jnp.asarray([whole]), decode, jax.random.key(0))

    logits = Definition(model).plain([*whole, *[MASK] * 8])[-8:]
    first = int((np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)).argmin())
    for _ in range(8):
        state = denoise_step(model, None, state, config=decode)
        other = denoise_step(model, None, other, config=decode)
        np.testing.assert_array_equal(state.tokens, other.tokens)
        if first is not None:
            assert np.flatnonzero(np.asarray(state.tokens[0]) != MASK).tolist() == [first]
            assert int(state.tokens[0, first]) == int(logits[first].argmax())
            first = None
    assert int(state.block[0]) == 1


def test_joint_encoding_of_chosen_chunks_is_the_dual_cache_on_them(model, parts):
    """Anchors and top-K: the same as one block of the dual cache on the prompt put together."""
    decode = DecodeConfig(gen_length=8, block_length=8)
    prompt = chunk_prompt(parts[0], parts[1][:44], parts[2], CHUNKS)
    _, chosen, state = prefilling(model, prompt, SELECT, decode)
    kept = [token for i in chosen.chunk_ids[0].tolist() for token in pieces(prompt)[i]]
    assert len(kept) == 24
    whole = jnp.asarray([[*parts[0], *kept, *parts[2]]])
    other = init_denoise(model, None, None, whole, decode, jax.random.key(0))
    want = denoise(model, None, other, config=decode)
    got = denoise(model, None, state, config=decode)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.evaluations.tolist() == want.evaluations.tolist() == [8]


@PADS
def test_independent_encoding_is_the_defined_one(model, parts, prompt, pads):
    """Query and response recomputed at every step over chunks that saw the prefix alone.

    The last chunk is short and is among the chosen ones: the query still starts behind its slot.
    """
    prefix, _, query = parts
    select = dataclasses.replace(SELECT, encoding="independent", top_k=3, scorer="last")
    decode = DecodeConfig(gen_length=6, block_length=6, recompute="response")
    cache, chosen, state = prefilling(model, widened(prompt, **pads), select, decode)
    assert len(pieces(prompt)[-1]) < CHUNKS.chunk_size
    chunks = [pieces(prompt)[i] for i in chosen.chunk_ids[0].tolist()]
    assert chunks[-1] == pieces(prompt)[-1]
    definition = Definition(model)
    want = greedy(
        lambda tokens: definition.against_chunks(
            prefix, chunks, CHUNKS.chunk_size, [*query, *tokens]
        )[-6:],
        6,
    )
    got = denoise(model, cache, state, config=decode)
    assert got.tokens[0].tolist() == want
    assert len(set(want)) > 2


def test_independent_block_recompute_starts_from_the_same_logits(model, prompt):
    """The first step refreshes query and response, so it cannot differ from "response"."""
    select = dataclasses.replace(SELECT, encoding="independent")
    first = []
    for recompute in ("block", "suffix", "response"):
        decode = DecodeConfig(gen_length=6, block_length=6, recompute=recompute)
        cache, _, state = prefilling(model, prompt, select, decode)
        first.append(denoise_step(model, cache, state, config=decode).tokens)
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[0], first[2])


@pytest.mark.parametrize("encoding", ["joint", pytest.param("independent", marks=pytest.mark.slow)])
def test_top_k_of_all_chunks_is_a_no_op(model, prompt, encoding):
    decode = DecodeConfig(gen_length=8, block_length=8, steps=4)
    runs = []
    assert prompt.n_chunks == 5
    for scorer, k in (("draft", 5), ("draft", 99), ("all", 1)):
        select = dataclasses.replace(SELECT, encoding=encoding, scorer=scorer, top_k=k)
        cache, scores = prefill(model, prompt, select, draft=DRAFT)
        chosen = select_top_k(scores, prompt.n_chunks if scorer == "all" else k)
        assert [i for i in chosen.chunk_ids[0].tolist() if i >= 0] == [0, 1, 2, 3, 4]
        state = first_state(model, cache, chosen, prompt, decode)
        runs.append(denoise(model, cache, state, config=decode).tokens)
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_chunks_that_were_not_chosen_and_padding_are_never_read(model, prompt):
    """NaN in every one of them changes nothing."""
    select = dataclasses.replace(SELECT, encoding="independent")
    decode = DecodeConfig(gen_length=6, block_length=6)

    def run(poison: bool):
        cache, chosen, state = prefilling(model, prompt, select, decode)
        if poison:
            pool = cache.pool
            used = jnp.isin(jnp.arange(pool.lengths.shape[0]), chosen.chunk_ids)
            row = jnp.arange(pool.k.shape[3])
            keep = used[:, None] & (row < pool.lengths[:, None])
            keep = keep[None, :, None, :, None]
            pool = dataclasses.replace(
                pool, k=jnp.where(keep, pool.k, jnp.nan), v=jnp.where(keep, pool.v, jnp.nan)
            )
            cache = dataclasses.replace(cache, pool=pool)
        return denoise(model, cache, state, config=decode).tokens

    np.testing.assert_array_equal(run(False), run(True))


def test_random_scores_follow_the_key_and_not_the_bucket(model, prompt):
    config, n = SelectionConfig(scorer="random", top_k=2), prompt.n_chunks
    a, b = (prefill(model, prompt, config, key=jax.random.key(i))[1][0, :n] for i in (0, 1))
    assert not np.array_equal(a, b)
    wide = prefill(model, widened(prompt, chunks=3), config, key=jax.random.key(0))[1][0]
    np.testing.assert_array_equal(wide[:n], a)
    assert np.isneginf(wide[n:]).all()


@pytest.mark.parametrize(
    "scorer", ["draft", "query", pytest.param("confidence", marks=pytest.mark.slow)]
)
def test_a_later_question_gets_the_scores_of_the_pass_over_the_document(
    model, parts, prompt, scorer
):
    """From cached KV of the document, which another question was prefilled with."""
    prefix, context, query = parts
    config = dataclasses.replace(SELECT, scorer=scorer)
    other = chunk_prompt(prefix, context, query[::-1][:4], CHUNKS)
    want = prefill(model, prompt, config)[1]
    cache, of_other = prefill(model, other, config, keep_pool=True)
    got = score_chunks(model, cache, prompt.query, config, query_length=prompt.query_length)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.ptp(np.asarray(want)[np.isfinite(want)]) > 0.05
    queries, lengths = (
        jnp.concatenate([getattr(p, name) for p in (prompt, other)])
        for name in ("query", "query_length")
    )
    document = encode_document(model, prompt, encode_batch=3)
    several = score_chunks(model, document, queries, config, query_length=lengths)
    np.testing.assert_allclose(several, jnp.concatenate([want, of_other]), atol=2e-4)


def test_attention_scores_are_shares_of_the_attention_to_the_document(model, prompt):
    config, n = dataclasses.replace(SELECT, scorer="attention"), prompt.n_chunks
    cache, (scores,) = prefill(model, prompt, config)
    assert scores[:n].sum() == pytest.approx(1, abs=1e-5)
    assert np.isneginf(scores[n:]).all()
    # What lies behind the query's length, and chunks that are only padding, change nothing.
    longer = jnp.concatenate([prompt.query, jnp.full((1, 3), 7)], axis=1)
    got = score_chunks(model, cache, longer, config, query_length=prompt.query_length)
    np.testing.assert_allclose(got[0], scores, atol=1e-6)
    # A document of one chunk twice: each gets half.
    twice = dataclasses.replace(
        prompt,
        chunks=jnp.stack([prompt.chunks[0, 0]] * 2)[None],
        chunk_lengths=prompt.chunk_lengths[:, :1].repeat(2, axis=1),
    )
    np.testing.assert_allclose(prefill(model, twice, config)[1], 0.5, atol=1e-5)


STREAMED = [("draft", True, 3)]
STREAMED += [pytest.param("draft", False, k, marks=pytest.mark.slow) for k in (1, 9)]
STREAMED += [pytest.param("first", False, 3, marks=pytest.mark.slow)]
STREAMED += [("random", True, 3), ("last", True, 1)]


@pytest.mark.parametrize(("scorer", "keep_first", "top_k"), STREAMED)
def test_streaming_keeps_what_scoring_everything_first_keeps(
    model, prompt, scorer, keep_first, top_k
):
    """Selection, scores and KV, bit for bit; the pool holds K chunks, and a group of the pass."""
    config = dataclasses.replace(
        SELECT, scorer=scorer, keep_first=keep_first, top_k=top_k, encoding="independent"
    )
    key = jax.random.key(3)
    cache, scores = prefill(model, prompt, config, key=key)
    want = select_top_k(scores, top_k, keep_first=keep_first)
    streamed, got, streamed_scores = prefill_top_k(model, prompt, config, key=key)
    np.testing.assert_array_equal(got.chunk_ids, want.chunk_ids)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(streamed_scores, scores)
    k, group = min(top_k, prompt.chunks.shape[1]), config.encode_batch
    only_chosen = -(-k // group) * min(k, group)
    assert streamed.pool.k.shape[1] == (k + group if scorer == "draft" else only_chosen)
    chunks, slots = got.chunk_ids[0], got.slots[0]
    valid = chunks >= 0
    np.testing.assert_array_equal(slots >= 0, valid)
    chunks, slots = chunks[valid], slots[valid]
    np.testing.assert_array_equal(streamed.pool.lengths[slots], cache.lengths[0, chunks])
    np.testing.assert_array_equal(streamed.pool.k[:, slots], cache.pool.k[:, chunks])
    np.testing.assert_array_equal(streamed.pool.v[:, slots], cache.pool.v[:, chunks])
    if scorer == "draft":
        decode = DecodeConfig(gen_length=4, block_length=4)
        tokens = [
            denoise(model, where, first_state(model, where, chosen, prompt, decode), config=decode)
            for where, chosen in ((cache, want), (streamed, got))
        ]
        np.testing.assert_array_equal(*(state.tokens for state in tokens))


@dataclasses.dataclass(frozen=True)
class NeedsPool(FirstScorer):
    """Reads the KV of all chunks, as a scorer of one's own may."""

    needs_pool: ClassVar[bool] = True


def test_a_streamed_cache_refuses_what_it_cannot_answer(model, prompt):
    config = dataclasses.replace(SELECT, encoding="independent")
    decode = DecodeConfig(gen_length=4, block_length=4)
    streamed, kept, scores = prefill_top_k(model, prompt, config)
    with pytest.raises(ValueError, match="kept chunks alone"):
        score_chunks(model, streamed, prompt.query, config)
    whole = prefill(model, prompt, config)[0]
    for cache, chosen in ((streamed, select_top_k(scores, 2)), (whole, kept)):
        with pytest.raises(ValueError, match="not from the same call"):
            first_state(model, cache, chosen, prompt, decode)
    for change in ({"scorer": NeedsPool()}, {"reselect": "step"}):
        reading = dataclasses.replace(config, **change)
        with pytest.raises(ValueError, match="cannot be streamed"):
            prefill_top_k(model, prompt, reading)
    with pytest.raises(ValueError, match="keep_pool"):
        score_chunks(model, prefill(model, prompt, SELECT)[0], prompt.query, SELECT)
