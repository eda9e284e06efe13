"""Steps 2 and 4: the pass over documents. It computes chunk KV, and scores of query copies.

Chunk rows attend to prefix and chunk. Copies of the query (`scorers/copies.py`) go through the
network behind them. A group of chunks, also from several requests, goes through together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Partial
from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.cache import ChunkCache, ChunkPool, KVFormat, init_pool, write_chunks
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.encodings.base import slot_ids
from pdllm_jax.method.scorers.base import Draft, QueryCopies, ScoreRequest
from pdllm_jax.method.scorers.copies import for_groups
from pdllm_jax.method.scorers.prefix import Keys, Prefix, encode_prefix, rotated_keys
from pdllm_jax.method.scoring import run_scorer, scoring_keys
from pdllm_jax.method.selection import EMPTY_SLOT, Selection, ranking, select
from pdllm_jax.network.rope import rotate, rotation, rows_of
from pdllm_jax.network.sharding import attention, constrain, whole_groups
from pdllm_jax.network.transformer import MaskPredictor


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
      The cache, and the scores [B, N], float32, natural log, -inf for empty chunks. A scorer that
      needs the pool and does not score in the pass keeps it in any case.
    """
    pooling = config.needs_pool if keep_pool is None else keep_pool
    pooling |= config.scorer.needs_pool and not config.scorer.in_pass
    keeps_prefix = pooling or config.encoding.keeps_prefix
    inputs = {"draft": draft, "keys": scoring_keys(key), "oracle": oracle}
    run = _Pass.of(model, prompt, config, keeps_prefix, **inputs)
    pool = scores = None
    if pooling or run.copies is not None:
        pool, scores, _ = run.encode(pooling)
    cache = run.cache(pool, keeps_prefix)
    if scores is None or run.copies is None:
        scores = run_scorer(config.scorer, model, cache, run.request)
    return cache, constrain(model.mesh, scores)


@functools.partial(jax.jit, static_argnames=("encode_batch", "kv_format"))
def encode_document(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    *,
    encode_batch: int = 8,
    kv_format: KVFormat = "full",
) -> ChunkCache:
    """Returns the document's cache with KV of every chunk, which no question has changed.

    For `score_chunks` and `init_denoise` with any number of questions. Does not read the prompt's
    query. Compiles once for each shape of the prompt. encode_batch, kv_format: as of
    `SelectionConfig`.
    """
    settings: Any = {"encode_batch": encode_batch, "kv_format": kv_format}
    config = SelectionConfig(scorer="first", encoding="independent", **settings)
    return prefill(model, prompt, config)[0]


@functools.partial(jax.jit, static_argnames=("config",))
def prefill_top_k(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "B M"] | None = None,
) -> tuple[ChunkCache, Selection, Float[Array, "B N"]]:
    """Encodes, scores and selects, and keeps the KV of the top K alone.

    A scorer with copies of the query scores in the pass that encodes the document, which keeps the
    running top K: the device holds the KV of config.slots + encode_batch chunks for any length of
    the document. Other scorers run before it, and only the chosen chunks are encoded. Selection,
    scores and KV equal `prefill` with encoding "independent" and `select_top_k`, bit for bit; of
    "attention" and "heads" up to the order of sums.

    Returns:
      The cache, whose pool holds the kept chunks in any order; the selection, with their places in
      the pool; the scores [B, N].

    Raises:
      ValueError: a batch of prompts with a scorer that scores in the pass; a scorer that needs the
        KV of all chunks at once; re-selection, which may need a chunk that was not kept.
    """
    if config.scorer.needs_pool and not config.scorer.in_pass:
        raise ValueError(
            f"scorer {config.scorer.name!r} reads all chunks' KV: the document cannot be streamed"
        )
    if config.reselects:
        raise ValueError("re-selection reads all chunks' KV: the document cannot be streamed")
    batch, n = prompt.chunks.shape[:2]
    if batch > 1 and config.scorer.in_pass:
        raise ValueError(f"one document is streamed at a time, got {batch}")
    inputs = {"draft": draft, "keys": scoring_keys(key), "oracle": oracle}
    run = _Pass.of(model, prompt, config, True, **inputs)
    if run.copies is None:
        cache = run.cache(None, True)
        scores = run_scorer(config.scorer, model, cache, run.request)
        selection = select(scores, config)
        chunks, lengths = cache.chosen(selection.chunk_ids)
        chosen = dataclasses.replace(prompt, chunks=chunks, chunk_lengths=lengths)
        pool, *_ = dataclasses.replace(run, prompt=chosen).encode(True)
        selection = dataclasses.replace(selection, slots=slot_ids(selection.chunk_ids))
        cache = dataclasses.replace(cache, pool=pool, streamed=True)
        return constrain(model.mesh, (cache, selection, scores))
    places = min(config.slots, n) + run.group
    empty = jnp.full((places,), -jnp.inf, jnp.float32)
    kept = _Kept(jnp.full((places,), n, jnp.int32), empty, jnp.arange(places))
    pool, scores, best = run.encode(True, kept)
    assert best is not None
    scores = constrain(model.mesh, scores)
    selection = select(scores, config)
    at = selection.chunk_ids[..., None] == best.ids
    slots = jnp.where(at.any(axis=-1), best.slots[at.argmax(axis=-1)], EMPTY_SLOT)
    selection = constrain(model.mesh, dataclasses.replace(selection, slots=slots))
    return run.cache(pool, True, streamed=True), selection, scores


class _Kept(NamedTuple):
    """The running top K: ids and scores by rank, then dropped ids; the pool place of each."""

    ids: Int[Array, "S"]
    scores: Float[Array, "S"]
    slots: Int[Array, "S"]

    def merge(self, scores: Float[Array, "g"], ids: Int[Array, "g"], keep_first: bool) -> _Kept:
        """Returns the best of the kept chunks and a group, whose KV is in the free places."""
        k = self.ids.size - ids.size
        ids = jnp.concatenate([self.ids[:k], ids]).astype(jnp.int32)
        scores = jnp.concatenate([self.scores[:k], scores])
        # Kept chunks come first, by rank, so ties go to the lower chunk id. A sort, because XLA
        # crashes on a top_k whose operand it shards over "data".
        order = jnp.argsort(ranking(scores, ids, keep_first), descending=True, stable=True)
        return _Kept(ids[order], scores[order], self.slots[order])


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What all groups of a pass over documents share."""

    model: MaskPredictor
    prompt: ChunkedPrompt
    config: SelectionConfig
    request: ScoreRequest
    copies: QueryCopies | None
    prefix: Prefix

    @classmethod
    def of(
        cls,
        model: MaskPredictor,
        prompt: ChunkedPrompt,
        config: SelectionConfig,
        keeps_prefix: bool,
        **inputs: Any,
    ) -> _Pass:
        """Prepares a pass; inputs: of the `ScoreRequest`."""
        valid, group = prompt.chunk_lengths > 0, config.encode_batch
        request = ScoreRequest(prompt.question, valid, encode_batch=group, **inputs)
        in_pass = config.scorer.in_pass
        copies = config.scorer.query_copies(model, request) if in_pass else None
        encodes = keeps_prefix or copies is not None
        own = prompt.prefix, prompt.prefix_length
        prefix = encode_prefix(model, *own) if encodes else Prefix()
        return cls(model, prompt, config, request, copies, prefix)

    @property
    def group(self) -> int:
        """Chunks that go through the network together."""
        pairs = self.prompt.chunk_lengths.size
        return whole_groups(self.model.mesh, min(self.config.encode_batch, pairs))

    def encode(
        self, pooling: bool, kept: _Kept | None = None
    ) -> tuple[ChunkPool | None, Float[Array, "B N"], _Kept | None]:
        """Encodes every chunk, and scores it where there are copies; else the scores are -inf.

        pooling: the KV is kept, of all chunks or, with `kept`, of the best ones. Their pool then
        has K + group places, and the next group overwrites the free ones.
        """
        model, (batch, n, size) = self.model, self.prompt.chunks.shape
        pairs, group = batch * n, self.group
        lengths = self.prompt.chunk_lengths.reshape(pairs)
        pool = None
        if pooling:
            places = -(-pairs // group) * group if kept is None else kept.ids.size
            kind = self.config.kv_format
            pool = init_pool(model.config, places, size, model.dtype, model.mesh, kind)
            if kept is None:
                pool = dataclasses.replace(pool, lengths=jnp.pad(lengths, (0, places - pairs)))

        def step(pair: Int[Array, "g"], valid: Bool[Array, "g"], carry):
            pool, scores, kept = carry
            length = jnp.where(valid, lengths[pair], 0)
            # The chunks of one document are consecutive. Rows beyond the end go behind the last.
            ids = jnp.where(valid, pair, pairs)
            where = pair[0] if batch == 1 else ids
            if kept is not None:
                where = kept.slots[-group:]
            values, pool = self.encode_group(pair, length, where, pool)
            if values is not None:
                scores = scores.at[jnp.where(length > 0, pair, pairs)].set(values, mode="drop")
            if pool is not None and kept is not None:
                pool = dataclasses.replace(pool, lengths=pool.lengths.at[where].set(length))
                new = jnp.where(valid, scores[pair], -jnp.inf)
                kept = kept.merge(new, ids, self.config.keep_first)
            return constrain(model.mesh, pool, "pool"), scores, kept

        carry = pool, jnp.full((pairs,), -jnp.inf, jnp.float32), kept
        pool, scores, kept = for_groups(lengths > 0, group, step, carry)
        return pool, scores.reshape(batch, n), kept

    def encode_group(
        self, pair: Array, lengths: Array, where: Array, pool: ChunkPool | None
    ) -> tuple[Float[Array, "g"] | None, ChunkPool | None]:
        """Runs a group of chunks, with copies behind them if there are any.

        pair [g]: request * N + chunk; lengths [g]: 0 for padding; where: places in the pool [g],
        or the first one.
        """
        model, prefix, (n, size) = self.model, self.prefix, self.prompt.chunks.shape[1:]
        request, tokens = pair // n, self.prompt.chunks.reshape(-1, size)[pair]
        prefix_length, copies = self.prompt.prefix_length[request], None
        positions = jnp.arange(size)
        if self.copies is not None:
            copies = self.copies.of(request)
            ids, behind = copies.behind(tokens, lengths)
            tokens = jnp.concatenate([tokens, ids], axis=1)
            positions = jnp.broadcast_to(positions, (*behind.shape[:-1], size))
            positions = jnp.concatenate([positions, behind], axis=-1)
        by = rotation(model.config, positions)
        if prefix.k:
            # Chunk rows sit at 0..C-1, so the prefix ends at -1.
            row = jnp.arange(prefix.k[0].shape[1])
            prefix_by = rotation(model.config, row - prefix_length[:, None])

        def attend(layer: int, q: Array, k: Array, v: Array, pool: ChunkPool | None):
            # In the last layer the rows of copies alone have queries.
            q = rotate(q, rows_of(by, slice(-q.shape[1], None)))
            far = None
            if prefix.k:
                far_k = rotate(prefix.k[layer][request], prefix_by)
                far = Keys(far_k, prefix.v[layer][request], prefix_length)
            chunk = k[:, :size], v[:, :size], lengths, rows_of(by, slice(size))
            keys = rotated_keys(*chunk, far)
            seen = attention(model.mesh, q, *keys, need_lse=copies is not None, finite=True)
            out = seen.out
            if copies is not None:
                count = copies.rows
                seen = Partial(out[:, -count:], seen.lse[..., -count:])
                copy_k = rotate(k[:, size:], rows_of(by, slice(size, None)))
                copy_out = copies.attend(model.mesh, seen, q[:, -count:], copy_k, v[:, size:])
                out = jnp.concatenate([out[:, :-count], copy_out], axis=1)
            if pool is not None:
                pool = write_chunks(pool, layer, keys.k[:, :size], chunk[1], lengths, where)
            return out, pool

        read = None if copies is None else slice(size, None)
        x, pool = model.run(tokens, attend, pool, read=read)
        return None if copies is None else copies.read(model, x), pool

    def cache(
        self, pool: ChunkPool | None, keeps_prefix: bool, *, streamed: bool = False
    ) -> ChunkCache:
        """Returns the cache of the pass."""
        prompt = self.prompt
        document = prompt.chunks, prompt.chunk_lengths, prompt.prefix, prompt.prefix_length
        cache = ChunkCache(pool, *document, None, None, streamed=streamed, anchors=prompt.anchors)
        if keeps_prefix:
            cache = self.prefix.placed_in(self.model, cache)
        return constrain(self.model.mesh, cache)
