"""Steps 2 and 4: the pass over documents. It computes chunk KV, and scores of query copies.

Chunk rows attend to prefix and chunk. Copies of the query (`scorers/copies.py`) go through the
network behind them. A group of chunks, also from several requests, goes through together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import Partial, merge
from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.cache import ChunkCache, ChunkPool, init_pool, write_chunks
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.scorers import ScoreRequest
from pdllm_jax.method.scorers.copies import Draft, QueryCopies, attend_copies, read_scores
from pdllm_jax.method.scoring import run_scorer
from pdllm_jax.method.selection import EMPTY_SLOT, Selection, ranking, within_margin
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention, constrain, whole_groups
from pdllm_jax.network.transformer import MaskPredictor


class _Prefix(NamedTuple):
    """KV of the prefixes, layer by layer, keys unrotated; no layer where they are empty."""

    k: tuple[Float[Array, "B P G D"], ...]
    v: tuple[Float[Array, "B P G D"], ...]


def _encode_prefix(model: MaskPredictor, prompt: ChunkedPrompt) -> _Prefix:
    rows = prompt.prefix.shape[1]
    if rows == 0:
        return _Prefix((), ())
    by = rotation(model.config, jnp.arange(rows))

    def attend(layer: int, q: Array, k: Array, v: Array, carry: _Prefix) -> tuple[Array, _Prefix]:
        turned = rotate(q, by), rotate(k, by)
        out = attention(model.mesh, *turned, v, prompt.prefix_length).out
        return out, _Prefix((*carry.k, k), (*carry.v, v))

    _, prefix = model.run(prompt.prefix, attend, _Prefix((), ()))
    return prefix


@functools.partial(jax.jit, static_argnames=("config", "keep_pool"))
def prefill(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig = SelectionConfig(),
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "B M"] | None = None,
    keep_pool: bool | None = None,
) -> tuple[ChunkCache, Float[Array, "B N"]]:
    """Encodes and scores every chunk of a document, or of a batch of them, in one pass.

    Pure; compiles once for each (shapes of prompt, config). Empty chunks cost nothing.

    Args:
      prompt: from `chunk_prompt`, or `batch_prompts`.
      config: scorer, masked copies, encoding, chunks per group.
      draft: from `draft_response`; by default computed here if the scorer needs one.
      key: PRNG key of the scorer "random", one for all requests or [B].
      oracle: ids of the chunks that the scorer "oracle" keeps; other ids are ignored.
      keep_pool: whether the chunks' KV is kept, for decoding with encodings that start from it
        ("independent", "bridge"; also for re-selection) and for `score_chunks` with later
        questions. By default where the config needs it.

    Returns:
      The cache, and the scores [B, N], float32, natural log, -inf for empty chunks. The scorer
      "attention" reads the pool, so the cache then always has one.
    """
    pooling = config.needs_pool if keep_pool is None else keep_pool
    pooling |= config.scorer.needs_pool and not config.scorer.in_pass
    keeps_prefix = pooling or config.encoding.keeps_prefix
    request = _request(prompt, config, draft, key, oracle)
    query_copies = config.scorer.query_copies(model, request)
    prefix = _Prefix((), ())
    if query_copies is not None or keeps_prefix:
        prefix = _encode_prefix(model, prompt)
    pool, scores = None, None
    if pooling or query_copies is not None:
        pool, scores = _encode_all(model, prompt, config, prefix, query_copies, pooling)
    cache = _cache(model, prompt, prefix, pool, keeps_prefix)
    if scores is None:
        scores = run_scorer(config.scorer, model, cache, request)
    return cache, constrain(model.mesh, scores)


def _request(
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    draft: Draft | None,
    key: Array | None,
    oracle: Int[Array, "B M"] | None,
) -> ScoreRequest:
    return ScoreRequest(
        prompt.question,
        prompt.chunk_lengths > 0,
        draft=draft,
        keys=key,
        oracle=oracle,
        encode_batch=config.encode_batch,
    )


@functools.partial(jax.jit, static_argnames=("encode_batch",))
def encode_document(
    model: MaskPredictor, prompt: ChunkedPrompt, *, encode_batch: int = 8
) -> ChunkCache:
    """Returns the document's cache with KV of every chunk, which no question has changed.

    For `score_chunks` and `init_denoise` with any number of questions. Does not read the prompt's
    query. Compiles once for each shape of the prompt.
    """
    config = SelectionConfig(scorer="first", encoding="independent", encode_batch=encode_batch)
    return prefill(model, prompt, config)[0]


@functools.partial(jax.jit, static_argnames=("config",))
def prefill_top_k(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "1 M"] | None = None,
) -> tuple[ChunkCache, Selection, Float[Array, "1 N"]]:
    """Encodes, scores and selects in one pass that keeps the KV of the running top K alone.

    The device holds the KV of config.slots + encode_batch chunks for any length of the document.
    Selection, scores and KV equal `prefill` with encoding "independent" and `select_top_k`, bit
    for bit.

    Returns:
      The cache, whose pool holds the kept chunks in any order; the selection, with their places in
      the pool; the scores [1, N].

    Raises:
      ValueError: a batch of prompts; scorer "attention", which compares all chunks' KV at once;
        re-selection, which may need a chunk that was not kept.
    """
    if config.scorer.needs_pool and not config.scorer.in_pass:
        raise ValueError(
            f"scorer {config.scorer.name!r} reads all chunks' KV: the document cannot be streamed"
        )
    if config.reselects:
        raise ValueError("re-selection reads all chunks' KV: the document cannot be streamed")
    if prompt.chunks.shape[0] > 1:
        raise ValueError(f"one document is streamed at a time, got {prompt.chunks.shape[0]}")
    request = _request(prompt, config, draft, key, oracle)
    query_copies = config.scorer.query_copies(model, request)
    prefix = _encode_prefix(model, prompt)
    scores = jnp.full(prompt.chunks.shape[:2], -jnp.inf, jnp.float32)
    if query_copies is None:
        tokens = _cache(model, prompt, prefix, None, False)
        scores = run_scorer(config.scorer, model, tokens, request)
    pool, scores, selection = _encode_streaming(
        model, prompt, config, prefix, query_copies, scores[0]
    )
    cache = _cache(model, prompt, prefix, pool, True, streamed=True)
    return cache, *constrain(model.mesh, (selection, scores))


def _cache(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    prefix: _Prefix,
    pool: ChunkPool | None,
    keep_prefix: bool,
    streamed: bool = False,
) -> ChunkCache:
    k, v = None, None
    if keep_prefix and prefix.k:
        by = rotation(model.config, jnp.arange(prefix.k[0].shape[1]))
        k, v = rotate(jnp.stack(prefix.k), by), jnp.stack(prefix.v)
    cache = ChunkCache(
        pool=pool,
        tokens=prompt.chunks,
        lengths=prompt.chunk_lengths,
        prefix_ids=prompt.prefix,
        prefix_length=prompt.prefix_length,
        prefix_k=k,
        prefix_v=v,
        streamed=streamed,
        anchors=prompt.anchors,
    )
    return constrain(model.mesh, cache)


class _Kept(NamedTuple):
    """The running top K: ids and scores by rank, then dropped ids; the pool place of each."""

    ids: Int[Array, "S"]
    scores: Float[Array, "S"]
    slots: Int[Array, "S"]


def _row_rotation(
    model: MaskPredictor, chunk_size: int, query_copies: QueryCopies | None
) -> Rotation:
    """Returns the rotation of a chunk's rows and of the copies behind them."""
    positions = jnp.arange(chunk_size)
    if query_copies is not None:
        _, repeats, rows = query_copies.ids.shape
        positions = jnp.concatenate([positions, jnp.tile(chunk_size + jnp.arange(rows), repeats)])
    return rotation(model.config, positions)


def _encode_all(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    prefix: _Prefix,
    query_copies: QueryCopies | None,
    pooling: bool,
) -> tuple[ChunkPool | None, Float[Array, "B N"] | None]:
    """Encodes every chunk. Returns the pool if `pooling`, and scores if there are copies."""
    batch, n, size = prompt.chunks.shape
    pairs = batch * n
    group = whole_groups(model.mesh, min(config.encode_batch, pairs))
    lengths = prompt.chunk_lengths.reshape(pairs)
    order = jnp.argsort(lengths == 0, stable=True)
    by = _row_rotation(model, size, query_copies)
    pool, scores = None, jnp.full((pairs,), -jnp.inf, jnp.float32)
    if pooling:
        places = -(-pairs // group) * group
        pool = init_pool(model.config, places, size, model.dtype, model.mesh)
        pool = dataclasses.replace(pool, lengths=jnp.pad(lengths, (0, places - pairs)))

    def encode_group(i: Array, carry):
        pool, scores = carry
        at = i * group + jnp.arange(group)
        pair = order[jnp.minimum(at, pairs - 1)]
        length = jnp.where(at < pairs, lengths[pair], 0)
        # The chunks of one document are consecutive. Rows beyond the end go behind the last place.
        where = i * group if batch == 1 else jnp.where(at < pairs, pair, pairs)
        values, pool = _encode_group(
            model, prompt, prefix, query_copies, by, pair, length, where, pool
        )
        if values is not None:
            scores = scores.at[jnp.where(length > 0, pair, pairs)].set(values, mode="drop")
        return constrain(model.mesh, pool, "pool"), scores

    groups = -(-jnp.count_nonzero(lengths) // group)
    pool, scores = lax.fori_loop(0, groups, encode_group, (pool, scores))
    return pool, None if query_copies is None else scores.reshape(batch, n)


def _encode_streaming(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    prefix: _Prefix,
    query_copies: QueryCopies | None,
    scores: Float[Array, "N"],
) -> tuple[ChunkPool, Float[Array, "1 N"], Selection]:
    """Encodes every chunk of one document and keeps the KV of the best.

    The pool has K + group places; the next group overwrites the free ones. scores: of chunks that
    need no copies.
    """
    n, size = prompt.chunks.shape[1:]
    group, k = whole_groups(model.mesh, min(config.encode_batch, n)), min(config.slots, n)
    lengths = prompt.chunk_lengths[0]
    by = _row_rotation(model, size, query_copies)
    pool = init_pool(model.config, k + group, size, model.dtype, model.mesh)
    empty = jnp.full((k + group,), -jnp.inf, jnp.float32)
    kept = _Kept(jnp.full((k + group,), n, jnp.int32), empty, jnp.arange(k + group))

    def encode_group(i: Array, carry):
        pool, scores, kept = carry
        at = i * group + jnp.arange(group)
        chunk = jnp.minimum(at, n - 1)
        length = jnp.where(at < n, lengths[chunk], 0)
        where = kept.slots[k:]
        values, pool = _encode_group(
            model, prompt, prefix, query_copies, by, chunk, length, where, pool
        )
        if values is not None:
            scores = scores.at[jnp.where(length > 0, chunk, n)].set(values, mode="drop")
        assert pool is not None
        pool = dataclasses.replace(pool, lengths=pool.lengths.at[where].set(length))
        new = jnp.where(at < n, scores[chunk], -jnp.inf)
        kept = _merge_kept(kept, new, jnp.where(at < n, chunk, n), k, config.keep_first)
        return constrain(model.mesh, pool, "pool"), scores, kept

    groups = -(-jnp.count_nonzero(lengths) // group)
    pool, scores, kept = lax.fori_loop(0, groups, encode_group, (pool, scores, kept))
    return pool, scores[None], _kept_selection(kept, k, n, config)


def _encode_group(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    prefix: _Prefix,
    query_copies: QueryCopies | None,
    by: Rotation,
    pair: Int[Array, "g"],
    lengths: Int[Array, "g"],
    where: Int[Array, "*g"],
    pool: ChunkPool | None,
) -> tuple[Float[Array, "g"] | None, ChunkPool | None]:
    """Runs a group of chunks, with copies behind them if there are any.

    pair: request * N + chunk; lengths: 0 for padding; where: places in the pool, or the first one.
    """
    n, size = prompt.chunks.shape[1:]
    request, tokens = pair // n, prompt.chunks.reshape(-1, size)[pair]
    copies = None
    if query_copies is not None:
        copies = query_copies.of(request)
        tokens = jnp.concatenate([tokens, copies.ids.reshape(pair.size, -1)], axis=1)
    attend = _chunk_attend(
        by, size, lengths, prefix, prompt.prefix_length[request], request, copies, where, model
    )
    x, pool = model.run(tokens, attend, pool)
    if copies is None:
        return None, pool
    return constrain(model.mesh, read_scores(model, x[:, size:], copies)), pool


def _chunk_attend(
    by: Rotation,
    chunk_size: int,
    lengths: Int[Array, "g"],
    prefix: _Prefix,
    prefix_length: Int[Array, "g"],
    owner: Int[Array, "g"],
    query_copies: QueryCopies | None,
    where: Int[Array, "*g"],
    model: MaskPredictor,
):
    """Returns the attention of a group of chunks with copies behind them; carries the pool.

    owner: request of each chunk; where: its place in the pool, or the first chunk's.
    """
    if prefix.k:
        # Chunk rows sit at 0..C-1, so the prefix ends at -1.
        row = jnp.arange(prefix.k[0].shape[1])
        prefix_by = rotation(model.config, row - prefix_length[:, None])

    def attend(layer: int, q: Array, k: Array, v: Array, pool: ChunkPool | None):
        q, k = rotate(q, by), rotate(k, by)
        chunk_k, chunk_v = k[:, :chunk_size], v[:, :chunk_size]
        seen = attention(model.mesh, q, chunk_k, chunk_v, lengths, need_lse=True)
        if prefix.k:
            before = attention(
                model.mesh,
                q,
                rotate(prefix.k[layer][owner], prefix_by),
                prefix.v[layer][owner],
                prefix_length,
                need_lse=True,
            )
            seen = merge(seen, before)
        out = seen.out
        if query_copies is not None:
            behind = Partial(out[:, chunk_size:], seen.lse[..., chunk_size:])
            copy_q, copy_k, copy_v = (x[:, chunk_size:] for x in (q, k, v))
            copy_out = attend_copies(model.mesh, behind, copy_q, copy_k, copy_v, query_copies)
            out = jnp.concatenate([out[:, :chunk_size], copy_out], axis=1)
        return out, None if pool is None else write_chunks(pool, layer, chunk_k, chunk_v, where)

    return attend


def _kept_selection(kept: _Kept, k: int, n: int, config: SelectionConfig) -> Selection:
    ids, scores, slots = (x[:k] for x in kept)
    ranked = ranking(scores, ids, config.keep_first)
    chosen = ranked > -jnp.inf
    if config.max_k is not None:
        chosen = within_margin(ranked, config.top_k, config.margin)
    order = jnp.argsort(jnp.where(chosen, ids, n))
    chosen = chosen[order]
    return Selection(
        chunk_ids=jnp.where(chosen, ids[order], EMPTY_SLOT)[None],
        scores=jnp.where(chosen, scores[order], -jnp.inf)[None],
        slots=jnp.where(chosen, slots[order], EMPTY_SLOT)[None],
    )


def _merge_kept(kept: _Kept, scores: Array, ids: Array, k: int, keep_first: bool) -> _Kept:
    """Returns the best k of the kept chunks and a new group, whose KV is in the free places."""
    ids = jnp.concatenate([kept.ids[:k], ids]).astype(jnp.int32)
    scores = jnp.concatenate([kept.scores[:k], scores])
    # Kept chunks come first, by rank, so ties go to the lower chunk id. A sort, because XLA crashes
    # on a top_k whose operand it shards over "data".
    order = jnp.argsort(ranking(scores, ids, keep_first), descending=True, stable=True)
    return _Kept(ids[order], scores[order], kept.slots[order])
