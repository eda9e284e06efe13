"""Scores and encodings against the definition, and the identities of the method."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scoring import Draft, draft_response, score_chunks
from pdllm_jax.method.selection import select_top_k
from tests.oracles.definition import Definition
from tests.support.method import BOS, CHUNKS, MASK, copies_score, first_state, greedy, pieces

SELECT = SelectionConfig(top_k=2, masked_copies=3, encode_batch=2)
DRAFT = Draft(jnp.array([[17, MASK, 99, MASK]], jnp.int32), jnp.array([[True, False, True, False]]))


def defined_scores(model, prompt, parts, draft_tokens, confirmed, copies) -> np.ndarray:
    prefix, _, query = parts
    slots = [*query, *draft_tokens]
    scored = [*range(len(query)), *(len(query) + i for i in confirmed)]
    copies = len(scored) if copies is None else copies
    definition = Definition(model)
    return np.array(
        [copies_score(definition, prefix, chunk, slots, scored, copies) for chunk in pieces(prompt)]
    )


@pytest.mark.parametrize("copies", [1, 3, None], ids=["1 copy", "3 copies", "leave-one-out"])
def test_scores_are_the_defined_ones(model, parts, copies):
    prompt = chunk_prompt(*parts, CHUNKS)
    config = dataclasses.replace(SELECT, masked_copies=copies)
    _, (scores,) = prefill(model, prompt, config, draft=DRAFT)
    want = defined_scores(model, prompt, parts, [17, MASK, 99, MASK], [0, 2], copies)
    np.testing.assert_allclose(scores[: len(want)], want, rtol=2e-5)
    assert np.isneginf(scores[len(want) :]).all()
    assert np.ptp(want) > 0.1


def test_confidence_is_that_of_the_masks_behind_the_query(model, parts):
    prompt = chunk_prompt(*parts, CHUNKS)
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


def test_query_scorer_and_empty_prefix(model, parts):
    prompt = chunk_prompt([], *parts[1:], CHUNKS, bos_id=BOS)
    config = dataclasses.replace(SELECT, scorer="query", masked_copies=3)
    _, (scores,) = prefill(model, prompt, config)
    want = defined_scores(model, prompt, ([], *parts[1:]), [], [], 3)
    np.testing.assert_allclose(scores[: len(want)], want, rtol=2e-5)


def test_leave_one_out_equals_as_many_copies_as_scored_slots(model, parts):
    prompt = chunk_prompt(*parts, CHUNKS)
    slots = len(parts[2]) + 2
    exact, copies = (
        prefill(model, prompt, dataclasses.replace(SELECT, masked_copies=r), draft=DRAFT)[1][0]
        for r in (None, slots)
    )
    np.testing.assert_allclose(exact, copies, rtol=1e-5)
    fewer = dataclasses.replace(SELECT, masked_copies=slots - 1)
    _, (other,) = prefill(model, prompt, fewer, draft=DRAFT)
    assert not np.allclose(exact[:3], other[:3], rtol=1e-5)


def test_draft_is_the_defined_one(model, parts):
    prefix, _, query = parts
    prompt = chunk_prompt(*parts, CHUNKS)
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


def test_draft_is_made_where_none_is_given(model, parts):
    prompt = chunk_prompt(*parts, CHUNKS)
    given = prefill(model, prompt, SELECT, draft=draft_response(model, prompt, SELECT))[1]
    np.testing.assert_array_equal(prefill(model, prompt, SELECT)[1], given)


def test_scores_do_not_depend_on_groups_or_padding(model, parts):
    prompt = chunk_prompt(*parts, CHUNKS)
    want = prefill(model, prompt, SELECT, draft=DRAFT)[1][0]
    n = prompt.n_chunks
    for size in (1, 64):
        config = dataclasses.replace(SELECT, encode_batch=size)
        got = prefill(model, prompt, config, draft=DRAFT)[1][0]
        np.testing.assert_allclose(got[:n], want[:n], rtol=1e-5)
    wider = dataclasses.replace(
        prompt,
        chunks=jnp.pad(prompt.chunks, ((0, 0), (0, 5), (0, 0)), constant_values=7),
        chunk_lengths=jnp.pad(prompt.chunk_lengths, ((0, 0), (0, 5))),
        query=jnp.pad(prompt.query, ((0, 0), (0, 8)), constant_values=9),
        prefix=jnp.pad(prompt.prefix, ((0, 0), (0, 8)), constant_values=9),
    )
    got = prefill(model, wider, SELECT, draft=DRAFT)[1][0]
    np.testing.assert_allclose(got[:n], want[:n], rtol=1e-5)


def prefilling(model, parts, chunking, select, decode, query_pad=0, prefix_pad=0):
    prompt = chunk_prompt(*parts, chunking)
    if query_pad or prefix_pad:
        prompt = dataclasses.replace(
            prompt,
            query=jnp.pad(prompt.query, ((0, 0), (0, query_pad)), constant_values=5),
            prefix=jnp.pad(prompt.prefix, ((0, 0), (0, prefix_pad)), constant_values=5),
        )
    cache, scores = prefill(model, prompt, select, draft=DRAFT)
    chosen = select_top_k(scores, min(select.top_k, prompt.n_chunks))
    state = first_state(model, cache, chosen, prompt, decode, encoding=select.encoding)
    return prompt, cache, chosen, state


@pytest.mark.parametrize("pads", [(0, 0), (16, 8)], ids=["exact", "padded"])
def test_joint_encoding_without_anchors_is_the_whole_prompt(model, parts, pads):
    """Identity 1: all chunks kept; first evaluation of plain LLaDA, then Fast-dLLM's dual cache."""
    prefix, context, query = parts[0], parts[1][:48], parts[2]
    select = dataclasses.replace(SELECT, top_k=99, scorer="all")
    decode = DecodeConfig(gen_length=8, block_length=8)
    whole = [*prefix, *context, *query]
    _, _, _, state = prefilling(
        model, (prefix, context, query), ChunkConfig(12, anchors=False), select, decode, *pads
    )
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
    prompt, _, chosen, state = prefilling(
        model, (parts[0], parts[1][:44], parts[2]), CHUNKS, SELECT, decode
    )
    kept = [token for i in chosen.chunk_ids[0].tolist() for token in pieces(prompt)[i]]
    assert len(kept) == 24
    whole = jnp.asarray([[*parts[0], *kept, *parts[2]]])
    want = denoise(
        model, None, init_denoise(model, None, None, whole, decode, jax.random.key(0)),
        config=decode,
    )  # fmt: skip
    got = denoise(model, None, state, config=decode)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.evaluations.tolist() == want.evaluations.tolist() == [8]


@pytest.mark.parametrize("pads", [(0, 0), (16, 8)], ids=["exact", "padded"])
def test_independent_encoding_is_the_defined_one(model, parts, pads):
    """Query and response recomputed at every step over chunks that saw the prefix alone.

    The last chunk is short and is among the chosen ones: the query still starts behind its slot.
    """
    prefix, _, query = parts
    select = dataclasses.replace(SELECT, encoding="independent", top_k=3, scorer="last")
    decode = DecodeConfig(gen_length=6, block_length=6, recompute="response")
    prompt, cache, chosen, state = prefilling(model, parts, CHUNKS, select, decode, *pads)
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


def test_independent_block_recompute_starts_from_the_same_logits(model, parts):
    """The first step refreshes query and response, so it cannot differ from "response"."""
    select = dataclasses.replace(SELECT, encoding="independent")
    first = []
    for recompute in ("block", "suffix", "response"):
        decode = DecodeConfig(gen_length=6, block_length=6, recompute=recompute)
        _, cache, _, state = prefilling(model, parts, CHUNKS, select, decode)
        first.append(denoise_step(model, cache, state, config=decode).tokens)
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[0], first[2])


@pytest.mark.parametrize("encoding", ["joint", "independent"])
def test_top_k_of_all_chunks_is_a_no_op(model, parts, encoding):
    decode = DecodeConfig(gen_length=8, block_length=8, steps=4)
    runs = []
    for scorer, k in (("draft", 5), ("draft", 99), ("all", 1)):
        select = dataclasses.replace(SELECT, encoding=encoding, scorer=scorer, top_k=k)
        prompt = chunk_prompt(*parts, CHUNKS)
        assert prompt.n_chunks == 5
        cache, scores = prefill(model, prompt, select, draft=DRAFT)
        chosen = select_top_k(scores, prompt.n_chunks if scorer == "all" else k)
        assert [i for i in chosen.chunk_ids[0].tolist() if i >= 0] == [0, 1, 2, 3, 4]
        state = first_state(model, cache, chosen, prompt, decode)
        runs.append(denoise(model, cache, state, config=decode).tokens)
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_chunks_that_were_not_chosen_and_padding_are_never_read(model, parts):
    """NaN in every one of them changes nothing."""
    select = dataclasses.replace(SELECT, encoding="independent")
    decode = DecodeConfig(gen_length=6, block_length=6)

    def run(poison: bool):
        _, cache, chosen, state = prefilling(model, parts, CHUNKS, select, decode)
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


def test_random_scores_follow_the_key_and_not_the_bucket(model, parts):
    config = SelectionConfig(scorer="random", top_k=2)
    prompt = chunk_prompt(*parts, CHUNKS)
    n = prompt.n_chunks
    a, b = (prefill(model, prompt, config, key=jax.random.key(i))[1][0, :n] for i in (0, 1))
    assert not np.array_equal(a, b)
    wider = dataclasses.replace(
        prompt,
        chunks=jnp.pad(prompt.chunks, ((0, 0), (0, 3), (0, 0))),
        chunk_lengths=jnp.pad(prompt.chunk_lengths, ((0, 0), (0, 3))),
    )
    again = prefill(model, wider, config, key=jax.random.key(0))[1][0]
    np.testing.assert_array_equal(again[:n], a)
    assert np.isneginf(again[n:]).all()


def prompt_of(parts):
    return chunk_prompt(*parts, CHUNKS)


@pytest.mark.parametrize("scorer", ["draft", "query", "confidence"])
def test_a_later_question_gets_the_scores_that_the_pass_over_the_document_gives(
    model, parts, scorer
):
    """From cached KV of the document, which another question was prefilled with."""
    prefix, context, query = parts
    config = dataclasses.replace(SELECT, scorer=scorer)
    prompt = prompt_of(parts)
    want = prefill(model, prompt, config)[1]
    other = prompt_of((prefix, context, query[::-1][:4]))
    cache = prefill(model, other, config, keep_pool=True)[0]
    got = score_chunks(model, cache, prompt.query, config, query_length=prompt.query_length)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.ptp(np.asarray(want)[np.isfinite(want)]) > 0.05
    several = score_chunks(
        model,
        encode_document(model, prompt, encode_batch=3),
        jnp.concatenate([prompt.query, other.query]),
        config,
        query_length=jnp.concatenate([prompt.query_length, other.query_length]),
    )
    np.testing.assert_allclose(several[:1], want, atol=2e-4)
    np.testing.assert_allclose(several[1:], prefill(model, other, config)[1], atol=2e-4)


def test_attention_scores_are_shares_of_the_attention_to_the_document(model, parts):
    config = dataclasses.replace(SELECT, scorer="attention")
    prompt = prompt_of(parts)
    cache, (scores,) = prefill(model, prompt, config)
    there = np.asarray(prompt.chunk_lengths[0]) > 0
    assert np.asarray(scores)[there].sum() == pytest.approx(1, abs=1e-5)
    assert (np.asarray(scores)[~there] == -np.inf).all()
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


@pytest.mark.parametrize(
    ("scorer", "keep_first", "top_k"),
    [
        ("draft", False, 1),
        ("draft", True, 3),
        ("draft", False, 9),
        ("random", True, 3),
        ("first", False, 3),
        ("last", True, 1),
    ],
)
def test_streaming_keeps_what_scoring_everything_first_keeps(
    model, parts, scorer, keep_first, top_k
):
    """Selection, scores and KV, bit for bit; the pool holds K chunks and a group."""
    config = dataclasses.replace(
        SELECT, scorer=scorer, keep_first=keep_first, top_k=top_k, encoding="independent"
    )
    prompt, key = prompt_of(parts), jax.random.key(3)
    cache, scores = prefill(model, prompt, config, key=key)
    want = select_top_k(scores, top_k, keep_first=keep_first)
    streamed, got, streamed_scores = prefill_top_k(model, prompt, config, key=key)
    np.testing.assert_array_equal(got.chunk_ids, want.chunk_ids)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(streamed_scores, scores)
    n = prompt.chunks.shape[1]
    assert streamed.pool.k.shape[1] == min(top_k, n) + config.encode_batch
    for chunk, slot in zip(got.chunk_ids[0].tolist(), got.slots[0].tolist(), strict=True):
        if chunk < 0:
            assert slot < 0
            continue
        assert streamed.pool.lengths[slot] == cache.lengths[0, chunk]
        np.testing.assert_array_equal(streamed.pool.k[:, slot], cache.pool.k[:, chunk])
        np.testing.assert_array_equal(streamed.pool.v[:, slot], cache.pool.v[:, chunk])
    if scorer != "draft":
        return
    decode = DecodeConfig(gen_length=4, block_length=4)
    tokens = [
        denoise(
            model,
            which,
            init_denoise(model, which, chosen, prompt.query, decode, key),
            config=decode,
        ).tokens
        for which, chosen in ((cache, want), (streamed, got))
    ]
    np.testing.assert_array_equal(*tokens)


def test_a_streamed_cache_refuses_what_it_cannot_answer(model, parts):
    config = dataclasses.replace(SELECT, encoding="independent")
    prompt, decode = prompt_of(parts), DecodeConfig(gen_length=4, block_length=4)
    streamed, kept, scores = prefill_top_k(model, prompt, config)
    with pytest.raises(ValueError, match="kept chunks alone"):
        score_chunks(model, streamed, prompt.query, config)
    with pytest.raises(ValueError, match="not from the same call"):
        first_state(model, streamed, select_top_k(scores, 2), prompt, decode)
    whole = prefill(model, prompt, config)[0]
    with pytest.raises(ValueError, match="not from the same call"):
        first_state(model, whole, kept, prompt, decode)
    with pytest.raises(ValueError, match="cannot be streamed"):
        prefill_top_k(model, prompt, dataclasses.replace(config, scorer="attention"))
    with pytest.raises(ValueError, match="keep_pool"):
        score_chunks(model, prefill(model, prompt, SELECT)[0], prompt.query, SELECT)
