"""Encodings, positions and kept tokens against dense forwards from the definition, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import Positions
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encodings import ENCODINGS
from pdllm_jax.method.live_forward import Context, query_rows
from pdllm_jax.method.prefill import prefill, prefill_top_k
from pdllm_jax.method.selection import select
from pdllm_jax.method.token_selection import best_tokens, token_attention
from pdllm_jax.rules import ConfigError
from tests.oracles.definition import Definition
from tests.support.method import BOS, CHUNKS, MASK, copy, first_state, greedy, pieces

G = 6
# Everything is recomputed at every step, so that a step's logits are one dense forward's.
DECODE = DecodeConfig(gen_length=G, block_length=G, recompute="response")
ONE_STEP = dataclasses.replace(DECODE, steps=1)
CACHED = dataclasses.replace(DECODE, recompute="block")
SELECT = SelectionConfig(top_k=3, scorer="last", encode_batch=2)


def encodings(*default: str):
    """All encodings; those that are not named are slow."""
    return pytest.mark.parametrize(
        "encoding",
        [pytest.param(x, marks=[pytest.mark.slow] * (x not in default)) for x in ENCODINGS],
    )


def begun(model, parts, decode=DECODE, chunking=CHUNKS, **changes):
    """(prompt, cache, selection, state at the start) of changed settings."""
    settings = SelectionConfig.from_flat(**SELECT.to_flat() | changes)
    prompt = chunk_prompt(*parts, chunking, bos_id=BOS)
    cache, scores = prefill(model, prompt, settings)
    chosen = select(scores, settings)
    state = first_state(model, cache, chosen, prompt, decode, settings=settings)
    return prompt, cache, chosen, state


def encoded(model, parts, decode=DECODE, **changes):
    """(ids of the chosen chunks, state at the start, response) of changed settings."""
    prompt, cache, chosen, state = begun(model, parts, decode, **changes)
    first = copy(state)
    tokens = denoise(model, cache, state, config=decode).tokens[0].tolist()
    return [pieces(prompt)[i] for i in chosen.chunk_ids[0].tolist()], first, tokens


def masked_logits(logits_of, parts, chunks, *details):
    """A definition's logits [G, V] of a response that is all masked."""
    prefix, _, query = parts
    return logits_of(prefix, chunks, CHUNKS.chunk_size, *details, [*query, *[MASK] * G])[-G:]


def test_query_conditioned_encoding_is_the_defined_one(model, parts):
    prefix, _, query = parts
    chunks, state, tokens = encoded(model, parts, encoding="query-conditioned")
    assert bool(state.stale.all())
    assert len(chunks[-1]) < CHUNKS.chunk_size
    definition = Definition(model)

    def logits(response):
        live = [*query, *response]
        return definition.conditioned(prefix, chunks, CHUNKS.chunk_size, query, live)[-G:]

    assert tokens == greedy(logits, G)
    assert tokens != encoded(model, parts, encoding="independent")[2]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_bridge_recomputes_the_starts_of_chunks_with_all_in_view(model, parts, share):
    """What is recomputed saw the masked response, so the first step is what can be compared."""
    chunks, state, tokens = encoded(model, parts, ONE_STEP, encoding="bridge", bridge_share=share)
    assert not bool(state.stale.any())
    count = math.ceil(share * CHUNKS.chunk_size)
    again = [list(range(min(count, len(chunk)))) for chunk in chunks]
    bridged = Definition(model).bridged
    logits = masked_logits(bridged, parts, chunks, again)
    assert tokens == logits.argmax(-1).tolist()
    if share < 1:  # the share matters
        fewer = masked_logits(bridged, parts, chunks, [[]] * len(chunks))
        assert np.abs(fewer - logits).max() > 1e-2


def test_a_bridge_by_attention_recomputes_what_the_query_looks_at(model, parts):
    changes = {"encoding": "bridge", "bridge_share": 0.3, "bridge_tokens": "attention"}
    chunks, _, tokens = encoded(model, parts, ONE_STEP, **changes)
    received = received_attention(model, parts, chunks).mean(axis=(0, 1))
    count = math.ceil(0.3 * CHUNKS.chunk_size)
    again = [
        sorted({0, *np.argsort(-received[j, 1 : len(chunk)], kind="stable")[: count - 1] + 1})
        for j, chunk in enumerate(chunks)
    ]
    logits = masked_logits(Definition(model).bridged, parts, chunks, again)
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.slow
def test_a_bridge_of_all_tokens_without_prefix_is_joint_encoding(model, parts):
    (_, joint, a), (_, bridged, b) = (
        encoded(model, ([], *parts[1:]), CACHED, encoding=encoding, bridge_share=1.0)
        for encoding in ("joint", "bridge")
    )
    for slot, n in enumerate(np.asarray(joint.pool.lengths)):
        np.testing.assert_allclose(
            joint.pool.k[:, slot, :, :n], bridged.pool.k[:, slot, :, :n], atol=2e-4
        )
    assert a == b


def received_attention(model, parts, chunks, rows=8, window=7) -> np.ndarray:
    """[L, G, K, C] as token_selection.py defines it, from a dense forward's weights; -inf: none."""
    config, size, (prefix, _, query) = model.config, CHUNKS.chunk_size, parts
    definition = Definition(model)
    masked_logits(definition.against_chunks, parts, chunks)
    first_live = len(prefix) + sum(map(len, chunks))
    last = first_live + np.arange(max(0, len(query) - rows), len(query))
    groups = config.n_kv_heads
    result = np.full((config.n_layers, groups, len(chunks), size), -np.inf)
    start = len(prefix)
    for j, chunk in enumerate(chunks):
        weights = definition.weights[:, :, last, start : start + len(chunk)].sum(axis=2)
        half = window // 2
        for i in range(len(chunk)):
            highest = weights[..., max(0, i - half) : i + half + 1].max(-1)
            result[:, :, j, i] = highest.reshape(config.n_layers, groups, -1).mean(-1)
        start += len(chunk)
    return result


def given_attention(model, parts, chunks, rows=8, window=7) -> np.ndarray:
    """[L, G, K, C] as token_selection.py defines it, from a dense joint forward's weights."""
    config, size, (prefix, _, query) = model.config, CHUNKS.chunk_size, parts
    p, k = len(prefix), len(chunks)
    ids = [*prefix, *(token for chunk in chunks for token in chunk), *query, *[MASK] * G]
    position = [*range(p), *(p + j * size + i for j, x in enumerate(chunks) for i in range(len(x)))]
    position = np.array([*position, *(p + k * size + np.arange(len(query) + G))])
    definition = Definition(model)
    definition.logits(ids, np.ones((len(ids), len(ids)), bool), position - position[:, None])
    end = len(ids) - G
    result = np.full((config.n_layers, config.n_kv_heads, k, size), -np.inf)
    start, half = p, window // 2
    for j, chunk in enumerate(chunks):
        last = definition.weights[..., max(end - rows, end - len(query)) : end].sum(-1)
        weights = last[..., start : start + len(chunk)]
        for i in range(len(chunk)):
            highest = weights[..., max(0, i - half) : i + half + 1].max(-1)
            result[:, :, j, i] = highest.reshape(*result.shape[:2], -1).mean(-1)
        start += len(chunk)
    return result


BY = [(3, True, "query-to-chunk"), (8, False, "both")]
BY += [
    pytest.param(*more, marks=pytest.mark.slow)
    for more in (
        (3, False, "query-to-chunk"),
        (8, True, "query-to-chunk"),
        (8, False, "query-to-chunk"),
        (3, True, "chunk-to-query"),
    )
]


@pytest.mark.parametrize(("count", "anchors", "by"), BY)
def test_kept_tokens_are_the_defined_ones(model, parts, count, anchors, by):
    prefix, _, query = parts
    chunking = dataclasses.replace(CHUNKS, anchors=anchors)
    changes = {"encoding": "independent", "keep_tokens": count, "keep_by": by}
    chunks, state, tokens = encoded(model, parts, chunking=chunking, **changes)
    config = model.config
    assert state.pool.k.shape == (config.n_layers, 3, config.n_kv_heads, count, config.head_dim)
    directions = {"query-to-chunk": received_attention, "chunk-to-query": given_attention}
    used = [f for name, f in directions.items() if by in (name, "both")]
    received = np.sum([f(model, parts, chunks) for f in used], axis=0)
    kept = np.zeros((config.n_layers, config.n_kv_heads, 3, CHUNKS.chunk_size), bool)
    for layer, group, j in np.ndindex(*received.shape[:3]):
        scores = received[layer, group, j].copy()
        if anchors:
            scores[0] = np.inf
        best = np.argsort(-scores, kind="stable")[:count]
        kept[layer, group, j, best[scores[best] > -np.inf]] = True
    assert (kept.sum(-1) == [min(count, len(chunk)) for chunk in chunks]).all()
    # The attention matters in every layer and head, or the test could not fail.
    assert len({kept[layer, group, 0].tobytes() for layer in (0, 1) for group in (0, 1)}) > 1
    per_head = np.repeat(kept, config.n_heads // config.n_kv_heads, axis=1)
    definition = Definition(model)

    def logits(response):
        live = [*query, *response]
        return definition.against_chunks(prefix, chunks, CHUNKS.chunk_size, live, per_head)[-G:]

    assert tokens == greedy(logits, G)
    np.testing.assert_array_equal(state.pool.lengths, [min(count, len(c)) for c in chunks])


@encodings("joint", "query-conditioned")
def test_keeping_all_tokens_is_a_no_op(model, parts, encoding):
    """Identity 6, bit for bit; and one token fewer is not."""
    changes = {"encoding": encoding, "bridge_share": 0.25}
    _, state, tokens = encoded(model, parts, CACHED, **changes)
    default = 999 if encoding in ("joint", "bridge") else CHUNKS.chunk_size
    for count, by in (default, "query-to-chunk"), (999, "both"):
        kept = {"keep_tokens": count, "keep_by": by}
        _, same, also = encoded(model, parts, CACHED, **kept, **changes)
        assert jax.tree.structure(same) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
            if a.dtype != state.keys.dtype:
                np.testing.assert_array_equal(a, b)
        assert also == tokens
    fewer = CHUNKS.chunk_size - 1
    state = begun(model, parts, CACHED, keep_tokens=fewer, **changes)[-1]
    assert state.pool.k.shape[3] == fewer


def test_best_tokens():
    scores = jnp.array([[3.0, 1.0, 4.0, 4.0, -jnp.inf], [-jnp.inf] * 5])
    assert best_tokens(scores, 3, False).tolist() == [[0, 2, 3], [5, 5, 5]]
    assert best_tokens(-scores[:1, :4], 2, True).tolist() == [[0, 1]]
    assert best_tokens(scores[:1], 1, False).tolist() == [[2]]  # a tie: the earlier


def test_attention_of_padding_and_empty_slots_is_none(model, parts):
    settings = dataclasses.replace(SELECT, encoding="independent", top_k=99, scorer="first")
    prompt = chunk_prompt(*parts, CHUNKS)
    cache, scores = prefill(model, prompt, settings)
    poison = jnp.arange(CHUNKS.chunk_size) >= cache.pool.lengths[:, None]
    poisoned = jnp.where(poison[None, :, None, :, None], 1e4, cache.pool.k)
    pool = dataclasses.replace(cache.pool, k=poisoned)
    wider = jnp.pad(scores, ((0, 0), (0, 3)), constant_values=-jnp.inf)
    state = first_state(model, cache, select(wider, settings), prompt, DECODE, settings=settings)
    context = Context(pool, state.placement, state.live)
    received = np.asarray(jax.jit(lambda: token_attention(model, context, query_rows(state)))())[0]
    lengths = [len(piece) for piece in pieces(prompt)]
    assert len(received) >= len(lengths)
    for attention, n in itertools.zip_longest(received, lengths, fillvalue=0):
        assert (attention[:n] > 0).all()
        assert np.isneginf(attention[n:]).all()


@encodings("independent", "bridge")
def test_positions(model, parts, encoding):
    """Where chunks and query lie; and that a shift of everything alike changes nothing."""
    starts = {}
    for positions in get_args(Positions):
        prompt, *_, state = begun(model, parts, encoding=encoding, top_k=2, positions=positions)
        assert state.selected[0].tolist() == [3, 4]
        starts[positions] = [*state.chunk_starts[0].tolist(), int(state.query_start[0])]
    p, c = 5, CHUNKS.chunk_size
    assert starts["continuous"] == [p, p + c, p + 2 * c]
    assert starts["absolute"] == [p + 3 * c, p + 4 * c, p + 5 * c]
    assert starts["reuse"] == [p, p, p + c]
    last = len(pieces(prompt)[4])
    assert last < c
    assert starts["contiguous"] == [p, p + c, p + c + last]
    # All chunks lie where they are in the document in either way.
    first = {"encoding": encoding, "scorer": "first", "top_k": 5}
    continuous, absolute = (
        encoded(model, parts, positions=positions, **first)[2]
        for positions in ("continuous", "absolute")
    )
    assert continuous == absolute


def test_absolute_positions_are_those_of_the_whole_document(model, parts):
    """Two chunks of five, joint: one dense forward with the others' places left empty."""
    prefix, _, query = parts
    chunks, _, tokens = encoded(model, parts, ONE_STEP, top_k=2, positions="absolute")
    p, c = len(prefix), CHUNKS.chunk_size
    ids = [*prefix, *chunks[0], *chunks[1], *query, *[MASK] * G]
    starts, counts = (0, p + 3 * c, p + 4 * c, p + 5 * c), (p, *map(len, chunks), len(query) + G)
    position = np.concatenate([np.arange(n) + s for s, n in zip(starts, counts, strict=True)])
    everyone = np.ones((len(ids), len(ids)), bool)
    logits = Definition(model).logits(ids, everyone, position - position[:, None])[-G:]
    assert tokens == logits.argmax(-1).tolist()


def test_encodings_on_a_streamed_document(model, parts):
    """Only the kept chunks lie in the pool: the same tokens."""
    prompt, kept = chunk_prompt(*parts, CHUNKS), {"top_k": 2, "keep_tokens": 9}
    for encoding in ("independent", "bridge"):
        settings = SelectionConfig(encoding=encoding, masked_copies=2, encode_batch=2, **kept)
        cache, scores = prefill(model, prompt, settings)
        runs = (cache, select(scores, settings)), prefill_top_k(model, prompt, settings)[:2]
        tokens = []
        for cache, chosen in runs:
            state = first_state(model, cache, chosen, prompt, DECODE, settings=settings)
            tokens.append(denoise(model, cache, state, config=DECODE).tokens)
        np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "independent"}, "holds no chunk KV.*independent"),
        ({"encoding": "bridge"}, "holds no chunk KV.*bridge"),
        ({"encoding": "query-conditioned"}, "holds no KV of the prefix"),
        ({"encoding": "joint", "settings": SELECT}, "give one of the two"),
    ],
)
def test_what_does_not_go_together_is_refused(model, parts, options, message):
    prompt = chunk_prompt(*parts, CHUNKS)
    cache, scores = prefill(model, prompt, SELECT)
    with pytest.raises(ValueError, match=message):
        first_state(model, cache, select(scores, SELECT), prompt, DECODE, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "bridge", "bridge_tokens": "end"}, "bridge_tokens 'end' is not known"),
        ({"encoding": "bridge", "bridge_share": 0}, r"bridge_share must lie in \(0, 1\]"),
        ({"encoding": "bridge", "bridge_share": 1.5}, r"bridge_share must lie in \(0, 1\]"),
        ({"reselect": "step", "scorer": "random"}, "reselect needs a scorer that reads"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**change)
