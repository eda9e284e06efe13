"""The pass over a document: chunk KV, and scores of the rows that ride along.

Chunk rows attend to the prefix and their own chunk; what rides behind them is in `scoring.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import merge
from pallas_kernels.partial import Partial
from pdllm_jax.attention import attention
from pdllm_jax.cache import ChunkCache, ChunkPool, init_pool, write_chunks
from pdllm_jax.chunking import ChunkedPrompt
from pdllm_jax.config import SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.rope import Rotation, rotate, rotation
from pdllm_jax.scoring import (
    CONTROLS,
    RIDING,
    Draft,
    Riders,
    make_riders,
    place,
    read_scores,
    ride,
    score_chunks,
)
from pdllm_jax.selection import EMPTY_SLOT, Selection, control_scores, ranking


class _Prefix(NamedTuple):
    """Per-layer KV of the prefix, keys unrotated."""

    k: tuple[Float[Array, "P G D"], ...]
    v: tuple[Float[Array, "P G D"], ...]


def _encode_prefix(model: LLaDA, prompt: ChunkedPrompt) -> _Prefix:
    rows = prompt.prefix.shape[0]
    if rows == 0:
        return _Prefix((), ())
    by = rotation(model.config, jnp.arange(rows))

    def attend(layer: int, q: Array, k: Array, v: Array, carry: _Prefix) -> tuple[Array, _Prefix]:
        out = attention(rotate(q, by), rotate(k, by), v, prompt.prefix_length[None]).out
        return out, _Prefix((*carry.k, k[0]), (*carry.v, v[0]))

    _, prefix = model.run(prompt.prefix[None], attend, _Prefix((), ()))
    return prefix


def _chunk_attend(
    by: Rotation,
    chunk_size: int,
    lengths: Array,
    prefix: _Prefix,
    prefix_by: Rotation,
    prefix_length: Array,
    riders: Riders | None,
    where: Array,
):
    """Attention of a group of chunks with riders behind them; the carry is the pool or None.

    where: pool index of the first chunk, or of each.
    """

    def attend(layer: int, q: Array, k: Array, v: Array, pool: ChunkPool | None):
        group, rows, heads, dim = q.shape
        q, k = rotate(q, by), rotate(k, by)
        chunk_k, chunk_v = k[:, :chunk_size], v[:, :chunk_size]
        seen = attention(q, chunk_k, chunk_v, lengths, need_lse=True)
        if prefix.k:
            # All rows against one copy of the prefix.
            part = attention(
                q.reshape(1, group * rows, heads, dim),
                rotate(prefix.k[layer], prefix_by)[None],
                prefix.v[layer][None],
                prefix_length[None],
                need_lse=True,
            )
            lse = part.lse.reshape(heads, group, rows).swapaxes(0, 1)
            seen = merge(seen, Partial(part.out.reshape(q.shape), lse))
        out = seen.out
        if riders is not None:
            behind = Partial(out[:, chunk_size:], seen.lse[..., chunk_size:])
            own_q, own_k, own_v = (x[:, chunk_size:] for x in (q, k, v))
            own = ride(behind, own_q, own_k, own_v, riders)
            out = jnp.concatenate([out[:, :chunk_size], own], axis=1)
        return out, None if pool is None else write_chunks(pool, layer, chunk_k, chunk_v, where)

    return attend


@functools.partial(jax.jit, static_argnames=("config", "keep_pool"))
def prefill(
    model: LLaDA,
    prompt: ChunkedPrompt,
    config: SelectionConfig = SelectionConfig(),
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "M"] | None = None,
    keep_pool: bool | None = None,
) -> tuple[ChunkCache, Float[Array, "N"]]:
    """Encodes and scores every chunk of a document in one pass over it.

    Pure; compiles once for each (shapes of prompt, config). Chunks that are padding cost nothing.

    Args:
      prompt: from `chunk_prompt`.
      config: scorer, masked copies, encoding, chunks per group.
      draft: from `draft_response`; made here where the scorer needs one and none is given.
      key: PRNG key of the scorer "random".
      oracle: ids of the chunks that the scorer "oracle" keeps; ids of no chunk name nothing.
      keep_pool: whether the chunks' KV is kept, for decoding with independent encoding and for
        `score_chunks` with later questions. By default where config.encoding is "independent".

    Returns:
      The cache, and the scores [N], float32, natural log, -inf for chunks that are padding. The
      scorer "attention" reads the pool, which is then kept in any case.
    """
    pooling = config.encoding == "independent" if keep_pool is None else keep_pool
    pooling |= config.scorer == "attention"
    riders = make_riders(model, prompt, config, draft) if config.scorer in RIDING else None
    prefix = _Prefix((), ())
    if pooling or riders is not None:
        prefix = _encode_prefix(model, prompt)
    pool, scores = None, None
    if pooling or riders is not None:
        pool, scores, _ = _encode_chunks(model, prompt, config, prefix, riders, pooling)
    cache = _cache(model, prompt, prefix, pool)
    if config.scorer == "attention":
        scores = score_chunks(model, cache, prompt.query, config, query_length=prompt.query_length)
    elif config.scorer in CONTROLS:
        scores = control_scores(config, prompt.chunk_lengths > 0, key, oracle)
    assert scores is not None
    return cache, scores


@functools.partial(jax.jit, static_argnames=("encode_batch",))
def encode_document(model: LLaDA, prompt: ChunkedPrompt, *, encode_batch: int = 8) -> ChunkCache:
    """The document's cache with KV of every chunk, untouched by any question.

    For `score_chunks` and `init_denoise` with as many questions as there are. The prompt's query
    is not read. Compiles once for each shape of the prompt.
    """
    config = SelectionConfig(scorer="first", encoding="independent", encode_batch=encode_batch)
    return prefill(model, prompt, config)[0]


@functools.partial(jax.jit, static_argnames=("config",))
def prefill_top_k(
    model: LLaDA,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "M"] | None = None,
) -> tuple[ChunkCache, Selection, Float[Array, "N"]]:
    """`prefill` and `select_top_k` in one pass that keeps the KV of the running top K alone.

    The device holds K + encode_batch chunks' KV, however long the document is. Selection, scores
    and KV are those of `prefill` with encoding "independent" and `select_top_k`, bit for bit.

    Returns:
      The cache, whose pool holds the kept chunks in no order; the selection, with their places in
      the pool; the scores [N].

    Raises:
      ValueError: scorer "attention", which compares all chunks' KV at once.
    """
    if config.scorer == "attention":
        raise ValueError("scorer 'attention' compares all chunks' KV: it cannot be streamed")
    riders = make_riders(model, prompt, config, draft) if config.scorer in RIDING else None
    known = None
    if riders is None:
        known = control_scores(config, prompt.chunk_lengths > 0, key, oracle)
    prefix = _encode_prefix(model, prompt)
    pool, scores, selection = _encode_chunks(
        model, prompt, config, prefix, riders, True, streaming=True, known=known
    )
    assert selection is not None
    assert scores is not None
    return _cache(model, prompt, prefix, pool, streamed=True), selection, scores


def _cache(
    model: LLaDA,
    prompt: ChunkedPrompt,
    prefix: _Prefix,
    pool: ChunkPool | None,
    streamed: bool = False,
) -> ChunkCache:
    keep_prefix = pool is not None and bool(prefix.k)
    return ChunkCache(
        pool=pool,
        tokens=prompt.chunks,
        lengths=prompt.chunk_lengths,
        prefix_ids=prompt.prefix,
        prefix_length=prompt.prefix_length,
        prefix_k=_prefix_keys(model, prefix) if keep_prefix else None,
        prefix_v=jnp.stack(prefix.v) if keep_prefix else None,
        streamed=streamed,
    )


def _prefix_keys(model: LLaDA, prefix: _Prefix) -> Float[Array, "L P G D"]:
    k = jnp.stack(prefix.k)
    return rotate(k, rotation(model.config, jnp.arange(k.shape[1])))


class _Kept(NamedTuple):
    """The running top K: chunk ids and scores by rank, then the ids that are out; pool places."""

    ids: Int[Array, "S"]
    scores: Float[Array, "S"]
    slots: Int[Array, "S"]


def _encode_chunks(
    model: LLaDA,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    prefix: _Prefix,
    riders: Riders | None,
    pooling: bool,
    *,
    streaming: bool = False,
    known: Float[Array, "N"] | None = None,
) -> tuple[ChunkPool | None, Float[Array, "N"] | None, Selection | None]:
    """streaming: the pool has K + group places; those that are free take the next group's KV.

    known: scores that need no pass. Scores are None where there are neither these nor riders.
    """
    n, size = prompt.chunks.shape
    group, k = min(config.encode_batch, n), min(config.top_k, n)
    padded = -(-n // group) * group
    chunks = jnp.pad(prompt.chunks, ((0, padded - n), (0, 0)))
    lengths = jnp.pad(prompt.chunk_lengths, (0, padded - n))

    positions = jnp.arange(size)
    rider_ids = jnp.zeros((0,), jnp.int32)
    if riders is not None:
        repeats, rows = riders.ids.shape
        positions = jnp.concatenate([positions, jnp.tile(size + jnp.arange(rows), repeats)])
        rider_ids = riders.ids.reshape(-1)
    by = rotation(model.config, positions)
    # Chunk rows sit at 0..C-1, so the prefix ends at -1.
    prefix_by = rotation(model.config, jnp.arange(prompt.prefix.shape[0]) - prompt.prefix_length)

    def encode_group(i: Array, carry):
        pool, scores, kept = carry
        first = i * group
        tokens = lax.dynamic_slice_in_dim(chunks, first, group)
        here = lax.dynamic_slice_in_dim(lengths, first, group)
        behind = jnp.broadcast_to(rider_ids, (group, rider_ids.shape[0]))
        where = kept.slots[k:] if streaming else first
        attend = _chunk_attend(
            by, size, here, prefix, prefix_by, prompt.prefix_length, riders, where
        )
        x, pool = model.run(jnp.concatenate([tokens, behind], axis=1), attend, pool)
        if riders is not None:
            found = read_scores(model, x[:, size:], riders)
            scores = place(scores, first, jnp.where(here > 0, found, -jnp.inf))
        if streaming:
            new = lax.dynamic_slice_in_dim(scores, first, group)
            pool = dataclasses.replace(pool, lengths=pool.lengths.at[where].set(here))
            kept = _merge_kept(kept, new, first + jnp.arange(group), k, config.keep_first)
        return pool, scores, kept

    pool, kept = None, None
    scores = jnp.full((padded,), -jnp.inf, jnp.float32)
    if known is not None:
        scores = place(scores, jnp.int32(0), known)
    if pooling:
        places = k + group if streaming else padded
        pool = init_pool(model.config, places, size, model.dtype)
        if streaming:
            empty = jnp.full((places,), -jnp.inf, jnp.float32)
            kept = _Kept(jnp.full((places,), padded, jnp.int32), empty, jnp.arange(places))
        else:
            pool = dataclasses.replace(pool, lengths=lengths)
    groups = -(-jnp.count_nonzero(lengths) // group)
    pool, scores, kept = lax.fori_loop(0, groups, encode_group, (pool, scores, kept))
    selection = None
    if kept is not None:
        found = kept.scores[:k] > -jnp.inf
        found |= jnp.isnan(kept.scores[:k])
        order = jnp.argsort(jnp.where(found, kept.ids[:k], padded))
        found = found[order]
        selection = Selection(
            chunk_ids=jnp.where(found, kept.ids[order], EMPTY_SLOT),
            scores=jnp.where(found, kept.scores[order], -jnp.inf),
            slots=jnp.where(found, kept.slots[order], EMPTY_SLOT),
        )
    scored = riders is not None or known is not None
    return pool, scores[:n] if scored else None, selection


def _merge_kept(kept: _Kept, scores: Array, ids: Array, k: int, keep_first: bool) -> _Kept:
    """The best k of those kept and a new group, whose KV lies in the places that were free."""
    ids = jnp.concatenate([kept.ids[:k], ids]).astype(jnp.int32)
    scores = jnp.concatenate([kept.scores[:k], scores])
    # Those kept come first, by rank: of equal scores the lower chunk id stays in front.
    _, order = lax.top_k(ranking(scores, ids, keep_first), ids.shape[0])
    return _Kept(ids[order], scores[order], kept.slots[order])
