"""Encodings, positions and kept tokens against dense forwards from the definition, in float64."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.live_forward import Context, query_rows
from pdllm_jax.method.prefill import prefill, prefill_top_k
from pdllm_jax.method.selection import select
from pdllm_jax.method.token_selection import best_tokens, token_attention
from pdllm_jax.network.config import ConfigError
from tests.oracles.definition import Definition
from tests.support.method import BOS, CHUNKS, MASK, copy, first_state, greedy, pieces

G = 6
# Everything is recomputed at every step, so that a step's logits are one dense forward's.
DECODE = DecodeConfig(gen_length=G, block_length=G, recompute="response")
SELECT = SelectionConfig(top_k=3, scorer="last", encode_batch=2)


def run(model, parts, selecting, decode=DECODE, chunking=CHUNKS, **fields):
    """(prompt, chosen chunks, state at the start, response) of the settings."""
    prompt = dataclasses.replace(chunk_prompt(*parts, chunking), **fields)
    cache, scores = prefill(model, prompt, selecting)
    chosen = select(scores, selecting)
    state = first_state(model, cache, chosen, prompt, decode, settings=selecting)
    begun = copy(state)
    tokens = denoise(model, cache, state, config=decode).tokens[0].tolist()
    return [pieces(prompt)[i] for i in chosen.chunk_ids[0].tolist()], begun, tokens


def test_query_conditioned_encoding_is_the_defined_one(model, parts):
    prefix, _, query = parts
    selecting = dataclasses.replace(SELECT, encoding="query-conditioned")
    chunks, state, tokens = run(model, parts, selecting)
    assert bool(state.stale.all())
    assert len(chunks[-1]) < CHUNKS.chunk_size
    definition = Definition(model)

    def logits(response):
        live = [*query, *response]
        return definition.conditioned(prefix, chunks, CHUNKS.chunk_size, query, live)[-G:]

    assert tokens == greedy(logits, G)
    other = run(model, parts, dataclasses.replace(SELECT, encoding="independent"))[2]
    assert tokens != other


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_bridge_recomputes_the_starts_of_chunks_with_all_in_view(model, parts, share):
    """What is recomputed saw the masked response, so the first step is what can be compared."""
    prefix, _, query = parts
    selecting = dataclasses.replace(SELECT, encoding="bridge", bridge_share=share)
    one = dataclasses.replace(DECODE, steps=1)
    chunks, state, tokens = run(model, parts, selecting, one)
    assert not bool(state.stale.any())
    count = math.ceil(share * CHUNKS.chunk_size)
    again = [list(range(min(count, len(chunk)))) for chunk in chunks]
    logits = Definition(model).bridged(
        prefix, chunks, CHUNKS.chunk_size, again, [*query, *[MASK] * G]
    )[-G:]
    assert tokens == logits.argmax(-1).tolist()
    if share == 1:
        return
    fewer = Definition(model).bridged(
        prefix, chunks, CHUNKS.chunk_size, [[]] * len(chunks), [*query, *[MASK] * G]
    )[-G:]
    assert np.abs(fewer - logits).max() > 1e-2  # the share matters


def test_a_bridge_by_attention_recomputes_what_the_query_looks_at(model, parts):
    prefix, _, query = parts
    selecting = dataclasses.replace(
        SELECT, encoding="bridge", bridge_share=0.3, bridge_tokens="attention"
    )
    chunks, _, tokens = run(model, parts, selecting, dataclasses.replace(DECODE, steps=1))
    received = received_attention(model, prefix, chunks, query).mean(axis=(0, 1))
    count = math.ceil(0.3 * CHUNKS.chunk_size)
    again = [
        sorted({0, *np.argsort(-received[j, 1 : len(chunk)], kind="stable")[: count - 1] + 1})
        for j, chunk in enumerate(chunks)
    ]
    logits = Definition(model).bridged(
        prefix, chunks, CHUNKS.chunk_size, again, [*query, *[MASK] * G]
    )[-G:]
    assert tokens == logits.argmax(-1).tolist()


def test_a_bridge_of_all_tokens_without_prefix_is_joint_encoding(model, parts):
    parts = ([], *parts[1:])
    tokens = []
    for encoding in ("joint", "bridge"):
        selecting = SelectionConfig.from_flat(
            **SELECT.to_flat() | {"encoding": encoding, "bridge_share": 1.0}
        )
        prompt = chunk_prompt(*parts, CHUNKS, bos_id=BOS)
        cache, scores = prefill(model, prompt, selecting)
        decode = dataclasses.replace(DECODE, recompute="block")
        state = first_state(
            model, cache, select(scores, selecting), prompt, decode, settings=selecting
        )
        tokens.append((state, denoise(model, cache, copy(state), config=decode)))
    (joint, a), (bridged, b) = tokens
    lengths = np.asarray(joint.pool.lengths)
    for slot, n in enumerate(lengths):
        np.testing.assert_allclose(
            joint.pool.k[:, slot, :, :n], bridged.pool.k[:, slot, :, :n], atol=2e-4
        )
    np.testing.assert_array_equal(a.tokens, b.tokens)


def received_attention(model, prefix, chunks, query, rows=8, window=7) -> np.ndarray:
    """[L, G, K, C] as sparsity.py defines it, from the weights of a dense forward; -inf: none."""
    config, size = model.config, CHUNKS.chunk_size
    definition, live = Definition(model), [*query, *[MASK] * G]
    definition.against_chunks(prefix, chunks, size, live)
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


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("anchors", [True, False])
def test_kept_tokens_are_those_that_the_query_looks_at(model, parts, count, anchors):
    prefix, _, query = parts
    chunking = dataclasses.replace(CHUNKS, anchors=anchors)
    selecting = dataclasses.replace(SELECT, encoding="independent", keep_tokens=count)
    chunks, state, tokens = run(model, parts, selecting, chunking=chunking)
    config = model.config
    assert state.pool.k.shape == (config.n_layers, 3, config.n_kv_heads, count, config.head_dim)
    received = received_attention(model, prefix, chunks, query)
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


@pytest.mark.parametrize("encoding", ["joint", "independent", "query-conditioned", "bridge"])
def test_keeping_all_tokens_is_a_no_op(model, parts, encoding):
    """Identity 6, bit for bit; and one token fewer is not."""
    selecting = SelectionConfig.from_flat(
        **SELECT.to_flat() | {"encoding": encoding, "bridge_share": 0.25}
    )
    decode = dataclasses.replace(DECODE, recompute="block")
    _, state, tokens = run(model, parts, selecting, decode)
    for count in (CHUNKS.chunk_size, 999):
        wanted = dataclasses.replace(selecting, keep_tokens=count)
        _, same, also = run(model, parts, wanted, decode)
        assert jax.tree.structure(same) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
            if a.dtype != state.keys.dtype:
                np.testing.assert_array_equal(a, b)
        assert also == tokens
    fewer = dataclasses.replace(selecting, keep_tokens=CHUNKS.chunk_size - 1)
    assert run(model, parts, fewer, decode)[1].pool.k.shape[3] == CHUNKS.chunk_size - 1


def test_best_tokens():
    scores = jnp.array([[3.0, 1.0, 4.0, 4.0, -jnp.inf], [-jnp.inf] * 5])
    assert best_tokens(scores, 3, False).tolist() == [[0, 2, 3], [5, 5, 5]]
    assert best_tokens(-scores[:1, :4], 2, True).tolist() == [[0, 1]]
    assert best_tokens(scores[:1], 1, False).tolist() == [[2]]  # a tie: the earlier


def test_attention_of_padding_and_empty_slots_is_none(model, parts):
    selecting = dataclasses.replace(SELECT, encoding="independent", top_k=99, scorer="first")
    prompt = chunk_prompt(*parts, CHUNKS)
    cache, scores = prefill(model, prompt, selecting)
    poison = jnp.arange(CHUNKS.chunk_size) >= cache.pool.lengths[:, None]
    pool = dataclasses.replace(
        cache.pool, k=jnp.where(poison[None, :, None, :, None], 1e4, cache.pool.k)
    )
    wider = jnp.pad(scores, ((0, 0), (0, 3)), constant_values=-jnp.inf)
    state = first_state(model, cache, select(wider, selecting), prompt, DECODE, settings=selecting)
    context = Context(pool, state.placement, state.live)
    found = np.asarray(token_attention(model, context, query_rows(state)))[0]
    lengths = np.array([len(piece) for piece in pieces(prompt)])
    for j in range(found.shape[0]):
        n = lengths[j] if j < len(lengths) else 0
        assert (found[j, :n] > 0).all()
        assert np.isneginf(found[j, n:]).all()


@pytest.mark.parametrize("encoding", ["joint", "independent", "query-conditioned", "bridge"])
def test_positions(model, parts, encoding):
    """Where chunks and query lie; and that a shift of everything alike changes nothing."""
    selecting = dataclasses.replace(SELECT, encoding=encoding, top_k=2)
    starts, responses = {}, {}
    for positions in ("continuous", "absolute", "reuse"):
        wanted = dataclasses.replace(selecting, positions=positions)
        _, state, responses[positions] = run(model, parts, wanted)
        assert state.selected[0].tolist() == [3, 4]
        starts[positions] = [*state.chunk_starts[0].tolist(), int(state.query_start[0])]
    p, c = 5, CHUNKS.chunk_size
    assert starts["continuous"] == [p, p + c, p + 2 * c]
    assert starts["absolute"] == [p + 3 * c, p + 4 * c, p + 5 * c]
    assert starts["reuse"] == [p, p, p + c]
    # The first two chunks lie where they are in the document in either way.
    first = dataclasses.replace(selecting, scorer="first", top_k=5)
    runs = [
        run(model, parts, dataclasses.replace(first, positions=positions))[2]
        for positions in ("continuous", "absolute")
    ]
    assert runs[0] == runs[1]


def test_absolute_positions_are_those_of_the_whole_document(model, parts):
    """Two chunks of five, joint: one dense forward with the others' places left empty."""
    prefix, _, query = parts
    selecting = dataclasses.replace(SELECT, top_k=2, positions="absolute")
    decode = dataclasses.replace(DECODE, steps=1)
    chunks, _, tokens = run(model, parts, selecting, decode)
    p, c = len(prefix), CHUNKS.chunk_size
    ids = [*prefix, *chunks[0], *chunks[1], *query, *[MASK] * G]
    position = np.array(
        [
            *range(p),
            *(p + 3 * c + i for i in range(len(chunks[0]))),
            *(p + 4 * c + i for i in range(len(chunks[1]))),
            *(p + 5 * c + i for i in range(len(query) + G)),
        ]
    )
    everyone = np.ones((len(ids), len(ids)), bool)
    logits = Definition(model).logits(ids, everyone, position - position[:, None])[-G:]
    assert tokens == logits.argmax(-1).tolist()


def test_encodings_on_a_streamed_document(model, parts):
    """Only the kept chunks lie in the pool: the same tokens."""
    prompt = chunk_prompt(*parts, CHUNKS)
    for encoding in ("independent", "bridge"):
        selecting = SelectionConfig(
            top_k=2, encoding=encoding, masked_copies=2, encode_batch=2, keep_tokens=9
        )
        tokens = []
        for streamed in (False, True):
            if streamed:
                cache, chosen, _ = prefill_top_k(model, prompt, selecting)
            else:
                cache, scores = prefill(model, prompt, selecting)
                chosen = select(scores, selecting)
            state = first_state(model, cache, chosen, prompt, DECODE, settings=selecting)
            tokens.append(denoise(model, cache, state, config=DECODE).tokens)
        np.testing.assert_array_equal(*tokens)


def test_what_does_not_go_together_is_refused(model, parts):
    prompt = chunk_prompt(*parts, CHUNKS)
    key = jax.random.key(0)
    cache, scores = prefill(model, prompt, SELECT)
    chosen = select(scores, SELECT)
    for encoding in ("independent", "bridge"):
        with pytest.raises(ValueError, match=f"holds no chunk KV.*{encoding}"):
            init_denoise(model, cache, chosen, prompt.query, DECODE, key, encoding=encoding)
    with pytest.raises(ValueError, match="holds no KV of the prefix"):
        init_denoise(model, cache, chosen, prompt.query, DECODE, key, encoding="query-conditioned")
    with pytest.raises(ValueError, match="give one of the two"):
        init_denoise(
            model, cache, chosen, prompt.query, DECODE, key, encoding="joint", settings=SELECT
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "causal"}, "encoding 'causal' is not known"),
        ({"positions": "relative"}, "positions 'relative' is not known"),
        ({"reselect": "always"}, "reselect 'always' is not known"),
        ({"encoding": "bridge", "bridge_tokens": "end"}, "bridge_tokens 'end' is not known"),
        ({"encoding": "bridge", "bridge_share": 0}, r"bridge_share must lie in \(0, 1\]"),
        ({"encoding": "bridge", "bridge_share": 1.5}, r"bridge_share must lie in \(0, 1\]"),
        ({"keep_tokens": 0}, "keep_tokens must be a positive integer"),
        ({"max_k": 2}, "max_k 2 is less than top_k 4"),
        ({"margin": -1.0}, "margin must be a number of at least 0"),
        ({"margin": 1.0}, "margin needs max_k"),
        ({"margin": float("nan")}, "margin must be a number of at least 0"),
        ({"reselect": "step", "scorer": "random"}, "reselect needs a scorer that reads"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**change)
