"""The denoising state, and how it begins: with the document's pool, or with a joint encoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pdllm_jax.attention import attention
from pdllm_jax.cache import (
    ChunkCache,
    ChunkPool,
    LiveCache,
    init_live,
    init_pool,
    write_chunks,
    write_rows,
)
from pdllm_jax.config import ConfigError, DecodeConfig, Encoding
from pdllm_jax.model import LLaDA
from pdllm_jax.rope import rotate, rotation
from pdllm_jax.selection import Selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoiseState:
    """Everything that changes while a response is denoised; B requests, G response tokens each.

    tokens [B, G] int32: the response; masked slots hold the mask token.
    query [B, Q], query_length [B], prefix_length [B]: the other live rows.
    query_start [B]: position of the query's first row, behind the last chunk's full slot.
    chunk_ids [B, K]: chunks of the pool attended to, negative for an empty slot.
    chunk_starts [B, K]: position of each chunk's first row.
    live: KV of the live rows; None where nothing is ever read from it.
    pool: the joint encoding's own chunks; None where the document's cache serves.
    block [B], step [B]: block being denoised (all done at gen_length / block_length), and the
      evaluations made in it.
    stale [B]: live KV must be recomputed before it is used.
    evaluations [B]: denoising evaluations so far; joint encoding is not one of them.
    keys [B]: PRNG key of each request.
    """

    tokens: Int[Array, "B G"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    prefix_length: Int[Array, "B"]
    query_start: Int[Array, "B"]
    chunk_ids: Int[Array, "B K"]
    chunk_starts: Int[Array, "B K"]
    live: LiveCache | None
    pool: ChunkPool | None
    block: Int[Array, "B"]
    step: Int[Array, "B"]
    stale: Bool[Array, "B"]
    evaluations: Int[Array, "B"]
    keys: Array


def slices(x: Array, start: Int[Array, "B"], size: int) -> Array:
    """x[b, start[b] : start[b] + size] for every request."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, size))(x, start)


def overlay(x: Array, start: Int[Array, "B"], values: Array) -> Array:
    """x with values[b] written from start[b] on."""
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(lambda row, s, v: put(row, v.astype(row.dtype), s))(x, start, values)


@functools.partial(jax.jit, static_argnames=("config", "encoding"))
def init_denoise(
    model: LLaDA,
    cache: ChunkCache | None,
    selection: Selection | None,
    query_ids: Int[Array, "*B Q"],
    config: DecodeConfig,
    key: Array,
    *,
    query_length: Int[Array, "*B"] | None = None,
    encoding: Encoding | None = None,
) -> DenoiseState:
    """The state before the first step: everything masked, the chosen chunks placed.

    Compiles once for each (shapes, config, encoding).

    Args:
      cache, selection: from `prefill` and `select_top_k`; selection.chunk_ids [K] or [B, K]. Both
        None for generation without a document's cache, where query_ids is the whole prompt.
      query_ids: [Q] or [B, Q], padded behind query_length where that is given.
      config: lengths and sampling rule.
      key: PRNG key; request b uses fold_in(key, b).
      encoding: "joint" makes the context's KV here, with one forward over prefix, chosen chunks,
        query and masked response, full attention among all of them; "independent" uses the
        cache's pool. By default whichever the cache was made for.

    Raises:
      ValueError: independent encoding asked of a cache without pool; cache without selection;
        guidance with a cache.
    """
    query_ids = jnp.atleast_2d(query_ids).astype(jnp.int32)
    batch, q_rows = query_ids.shape
    if query_length is None:
        query_length = jnp.full((batch,), q_rows, jnp.int32)
    query_length = jnp.broadcast_to(jnp.atleast_1d(query_length), (batch,)).astype(jnp.int32)
    if (cache is None) != (selection is None):
        raise ValueError("cache and selection go together: give both or neither")
    if cache is not None and config.guidance > 0:
        raise ConfigError("guidance is implemented for generation without a document's cache")
    mask_id = model.config.mask_token_id
    zeros = jnp.zeros((batch,), jnp.int32)
    state = DenoiseState(
        tokens=jnp.full((batch, config.gen_length), mask_id, jnp.int32),
        query=query_ids,
        query_length=query_length,
        prefix_length=zeros,
        query_start=zeros,
        chunk_ids=jnp.zeros((batch, 0), jnp.int32),
        chunk_starts=jnp.zeros((batch, 0), jnp.int32),
        live=None,
        pool=None,
        block=zeros,
        step=zeros,
        stale=jnp.ones((batch,), bool),
        evaluations=zeros,
        keys=jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)),
    )
    prefix_rows = 0 if cache is None else cache.prefix_ids.shape[0]
    if config.recompute != "response" or prefix_rows:
        rows = prefix_rows + q_rows + config.gen_length
        state = dataclasses.replace(state, live=init_live(model.config, batch, rows, model.dtype))
    if cache is None or selection is None:
        return state

    chunk_ids = jnp.broadcast_to(
        jnp.atleast_2d(selection.chunk_ids), (batch, selection.chunk_ids.shape[-1])
    ).astype(jnp.int32)
    size, slots = cache.tokens.shape[1], chunk_ids.shape[1]
    prefix_length = jnp.broadcast_to(cache.prefix_length, (batch,))
    placed = jnp.count_nonzero(chunk_ids >= 0, axis=1)
    state = dataclasses.replace(
        state,
        prefix_length=prefix_length,
        query_start=prefix_length + placed * size,
        chunk_ids=chunk_ids,
        chunk_starts=prefix_length[:, None] + jnp.arange(slots) * size,
    )
    encoding = encoding or ("joint" if cache.pool is None else "independent")
    if encoding == "joint":
        return _encode_jointly(model, cache, state)
    if cache.pool is None:
        raise ValueError("the cache holds no chunk KV: prefill with encoding='independent'")
    if (selection.slots is not None) != cache.streamed:
        raise ValueError("cache and selection are not from the same call of prefill_top_k")
    if selection.slots is not None:
        slots_of = jnp.broadcast_to(jnp.atleast_2d(selection.slots), chunk_ids.shape)
        state = dataclasses.replace(state, chunk_ids=slots_of.astype(jnp.int32))
    if cache.prefix_k is not None and cache.prefix_v is not None and state.live is not None:
        n = cache.prefix_k.shape[1]
        live = LiveCache(
            state.live.k.at[:, :, :n].set(cache.prefix_k[:, None]),
            state.live.v.at[:, :, :n].set(cache.prefix_v[:, None]),
        )
        state = dataclasses.replace(state, live=live)
    return state


def _encode_jointly(model: LLaDA, cache: ChunkCache, state: DenoiseState) -> DenoiseState:
    """One forward over prefix, chosen chunks, query and response, laid without gaps.

    Fills the state's own pool (slot j of request b at b K + j, keys rotated chunk-locally) and its
    live KV, which is then fresh.
    """
    batch, slots = state.chunk_ids.shape
    size, prefix_rows = cache.tokens.shape[1], cache.prefix_ids.shape[0]
    context_rows = slots * size
    own_rows = state.query.shape[1] + state.tokens.shape[1]
    there = state.chunk_ids >= 0
    ids = jnp.maximum(state.chunk_ids, 0)
    lengths = jnp.where(there, cache.lengths[ids], 0)  # [B, K]
    ends = jnp.cumsum(lengths, axis=1)
    context = ends[:, -1]
    own_length = state.query_length + state.tokens.shape[1]

    # Rows and positions: each part overwrites the padding of the one before it.
    own = jnp.pad(state.query, ((0, 0), (0, state.tokens.shape[1])))
    own = overlay(own, state.query_length, state.tokens)
    rows = jnp.zeros((batch, prefix_rows + context_rows + own_rows), jnp.int32)
    rows = rows.at[:, :prefix_rows].set(cache.prefix_ids)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    inside = jnp.arange(size)
    starts = state.prefix_length[:, None] + ends - lengths  # first row of each chunk, [B, K]
    for j in range(slots):
        rows = overlay(rows, starts[:, j], cache.tokens[ids[:, j]])
        positions = overlay(positions, starts[:, j], state.chunk_starts[:, j, None] + inside)
    own_start = state.prefix_length + context
    rows = overlay(rows, own_start, own)
    positions = overlay(positions, own_start, state.query_start[:, None] + jnp.arange(own_rows))
    by = rotation(model.config, positions)
    local = rotation(model.config, inside)
    total = own_start + own_length

    live_row = jnp.arange(prefix_rows + own_rows)
    behind = jnp.where(live_row < state.prefix_length[:, None], 0, context[:, None])
    live_from = jnp.minimum(live_row + behind, rows.shape[1] - 1)
    chunk_from = jnp.minimum(starts[..., None] + inside, rows.shape[1] - 1).reshape(batch, -1)

    def pick(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[..., None, None], axis=1)

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        pool, live = carry
        turned = rotate(k, by)
        out = attention(rotate(q, by), turned, v, total).out
        shape = (batch * slots, size, *k.shape[2:])
        chunk_k = rotate(pick(k, chunk_from).reshape(shape), local)
        pool = write_chunks(pool, layer, chunk_k, pick(v, chunk_from).reshape(shape), 0)
        if live is not None:
            zeros = jnp.zeros((batch,), jnp.int32)
            live = LiveCache(
                write_rows(live.k, layer, pick(turned, live_from), zeros),
                write_rows(live.v, layer, pick(v, live_from), zeros),
            )
        return out, (pool, live)

    pool = init_pool(model.config, batch * slots, size, model.dtype)
    pool = dataclasses.replace(pool, lengths=lengths.reshape(-1))
    _, (pool, live) = model.run(rows, attend, (pool, state.live))
    own_ids = jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)
    return dataclasses.replace(
        state,
        live=live,
        pool=pool,
        chunk_ids=jnp.where(there, own_ids, -1),
        stale=jnp.zeros((batch,), bool),
    )
