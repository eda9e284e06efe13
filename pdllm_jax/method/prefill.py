"""The pass over documents: chunk KV, and scores of the rows that ride along.

Chunk rows attend to the prefix and their own chunk; what rides behind them is in `scoring.py`.
Groups of chunks, of whatever requests, go through the network together. Inside, everything has an
axis of requests.
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
    """Per-layer KV of the prefixes, keys unrotated; nothing where they are empty."""

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

    Pure; compiles once for each (shapes of prompt, config). Chunks that are padding cost nothing.

    Args:
      prompt: from `chunk_prompt`, or `batch_prompts`.
      config: scorer, masked copies, encoding, chunks per group.
      draft: from `draft_response`; made here where the scorer needs one and none is given.
      key: PRNG key of the scorer "random", one for all requests or [B].
      oracle: ids of the chunks that the scorer "oracle" keeps; ids of no chunk name nothing.
      keep_pool: whether the chunks' KV is kept, for decoding with encodings that start from it
        ("independent", "bridge"; also for re-selection) and for `score_chunks` with later
        questions. By default where the config needs it.

    Returns:
      The cache, and the scores [B, N], float32, natural log, -inf for chunks that are padding. The
      scorer "attention" reads the pool, which is then kept in any case.
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
        pool, scores, _ = _encode_chunks(model, prompt, config, prefix, query_copies, pooling)
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
    """The document's cache with KV of every chunk, untouched by any question.

    For `score_chunks` and `init_denoise` with as many questions as there are. The prompt's query
    is not read. Compiles once for each shape of the prompt.
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
    """`prefill` and selection in one pass that keeps the KV of the running top K alone.

    The device holds config.slots + encode_batch chunks' KV, however long the document is.
    Selection, scores and KV are those of `prefill` with encoding "independent" and `select_top_k`,
    bit for bit.

    Returns:
      The cache, whose pool holds the kept chunks in no order; the selection, with their places in
      the pool; the scores [N].

    Raises:
      ValueError: a batch of prompts; scorer "attention", which compares all chunks' KV at once;
        re-selection, which may want a chunk that was not kept.
    """
    if config.scorer.needs_pool and not config.scorer.in_pass:
        raise ValueError(
            f"scorer {config.scorer.name!r} reads all chunks' KV: the document cannot be streamed"
        )
    if config.reselects:
        raise ValueError("re-selection reads all chunks' KV: the document cannot be streamed")
    if prompt.chunks.shape[0] > 1:
        raise ValueError(f"one document is streamed at a time, got {prompt.chunks.shape[0]}")
    request, known = _request(prompt, config, draft, key, oracle), None
    query_copies = config.scorer.query_copies(model, request)
    prefix = _encode_prefix(model, prompt)
    if query_copies is None:
        tokens = _cache(model, prompt, prefix, None, False)
        known = run_scorer(config.scorer, model, tokens, request)[0]
    pool, scores, selection = _encode_chunks(
        model, prompt, config, prefix, query_copies, True, streaming=True, known=known
    )
    assert selection is not None
    assert scores is not None
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
    """The running top K: chunk ids and scores by rank, then the ids that are out; pool places."""

    ids: Int[Array, "S"]
    scores: Float[Array, "S"]
    slots: Int[Array, "S"]


def _encode_chunks(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    prefix: _Prefix,
    query_copies: QueryCopies | None,
    pooling: bool,
    *,
    streaming: bool = False,
    known: Float[Array, "N"] | None = None,
) -> tuple[ChunkPool | None, Float[Array, "B N"] | None, Selection | None]:
    """streaming, of one document: the pool has K + group places; free ones take the next group.

    known: scores that need no pass. Scores are None where there are neither these nor riders.
    """
    batch, n, size = prompt.chunks.shape
    pairs = batch * n
    # Every device of the mesh's data axis has as many chunks of a group; padding fills it up.
    group = whole_groups(model.mesh, min(config.encode_batch, pairs))
    k = min(config.slots, n)
    lengths = prompt.chunk_lengths.reshape(pairs)
    chunks = prompt.chunks.reshape(pairs, size)
    order = jnp.argsort(lengths == 0, stable=True)  # of one document: as it is

    positions = jnp.arange(size)
    if query_copies is not None:
        _, repeats, rows = query_copies.ids.shape
        positions = jnp.concatenate([positions, jnp.tile(size + jnp.arange(rows), repeats)])
    by = rotation(model.config, positions)

    def encode_group(i: Array, carry):
        pool, scores, kept = carry
        at = i * group + jnp.arange(group)
        pair = order[jnp.minimum(at, pairs - 1)]
        here = jnp.where(at < pairs, lengths[pair], 0)
        owner = pair // n
        tokens = chunks[pair]
        some = None
        if query_copies is not None:
            some = query_copies.of(owner)
            tokens = jnp.concatenate([tokens, some.ids.reshape(group, -1)], axis=1)
        # Those of one document lie together; what hangs over the end has places behind the last.
        where = i * group if batch == 1 else jnp.where(at < pairs, pair, pairs)
        if streaming:
            where = kept.slots[k:]
        attend = _chunk_attend(
            by, size, here, prefix, prompt.prefix_length[owner], owner, some, where, model
        )
        x, pool = model.run(tokens, attend, pool)
        if some is not None:
            found = read_scores(model, x[:, size:], some)
            target = jnp.where(here > 0, pair, pairs)
            scores = scores.at[target].set(constrain(model.mesh, found), mode="drop")
        if streaming:
            new = jnp.where(at < pairs, scores[pair], -jnp.inf)
            pool = dataclasses.replace(pool, lengths=pool.lengths.at[where].set(here))
            kept = _merge_kept(kept, new, jnp.where(at < pairs, pair, pairs), k, config.keep_first)
        return constrain(model.mesh, pool, "pool"), scores, kept

    pool, kept = None, None
    scores = jnp.full((pairs,), -jnp.inf, jnp.float32) if known is None else known
    if pooling:
        places = k + group if streaming else -(-pairs // group) * group
        pool = init_pool(model.config, places, size, model.dtype, model.mesh)
        if streaming:
            empty = jnp.full((places,), -jnp.inf, jnp.float32)
            kept = _Kept(jnp.full((places,), pairs, jnp.int32), empty, jnp.arange(places))
        else:
            pool = dataclasses.replace(pool, lengths=jnp.pad(lengths, (0, places - pairs)))
    groups = -(-jnp.count_nonzero(lengths) // group)
    pool, scores, kept = lax.fori_loop(0, groups, encode_group, (pool, scores, kept))
    selection = None if kept is None else _kept_selection(kept, k, n, config)
    if query_copies is None and known is None:
        return pool, None, selection
    return pool, scores.reshape(batch, n), selection


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
    """Attention of a group of chunks with riders behind them; the carry is the pool or None.

    owner: request of each chunk; where: its place in the pool, or that of the first.
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
            own_q, own_k, own_v = (x[:, chunk_size:] for x in (q, k, v))
            own = attend_copies(model.mesh, behind, own_q, own_k, own_v, query_copies)
            out = jnp.concatenate([out[:, :chunk_size], own], axis=1)
        return out, None if pool is None else write_chunks(pool, layer, chunk_k, chunk_v, where)

    return attend


def _kept_selection(kept: _Kept, k: int, n: int, config: SelectionConfig) -> Selection:
    ids, scores, slots = (x[:k] for x in kept)
    ranked = ranking(scores, ids, config.keep_first)
    found = ranked > -jnp.inf
    if config.max_k is not None:
        found = within_margin(ranked, config.top_k, config.margin)
    order = jnp.argsort(jnp.where(found, ids, n))
    found = found[order]
    return Selection(
        chunk_ids=jnp.where(found, ids[order], EMPTY_SLOT)[None],
        scores=jnp.where(found, scores[order], -jnp.inf)[None],
        slots=jnp.where(found, slots[order], EMPTY_SLOT)[None],
    )


def _merge_kept(kept: _Kept, scores: Array, ids: Array, k: int, keep_first: bool) -> _Kept:
    """The best k of those kept and a new group, whose KV lies in the places that were free."""
    ids = jnp.concatenate([kept.ids[:k], ids]).astype(jnp.int32)
    scores = jnp.concatenate([kept.scores[:k], scores])
    # Those kept come first, by rank: of equal scores the lower chunk id stays in front. A sort, for
    # XLA dies of a top_k whose operand it lays over "data".
    order = jnp.argsort(ranking(scores, ids, keep_first), descending=True, stable=True)
    return _Kept(ids[order], scores[order], kept.slots[order])
