"""Step 4: KV of the chosen chunks, by what it has seen, and step 5, which of their tokens are kept.

What has seen more than prefix and chunk is in a pool of the state's own: slot j of request b at
b K + j, keys rotated at chunk-local positions.

How denoising begins: everything masked, the chosen chunks placed and encoded.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, Encoding, SelectionConfig
from pdllm_jax.method.cache import (
    ChunkCache,
    ChunkPool,
    DenoiseState,
    chosen_chunks,
    dynamic_updates,
    init_live,
    init_pool,
    place_chunks,
    write_chunks,
)
from pdllm_jax.method.chunking import count_ids
from pdllm_jax.method.live_forward import attend_all, response_rows, row_rotations
from pdllm_jax.method.selection import Selection
from pdllm_jax.method.token_selection import best_tokens, keep_tokens, token_attention
from pdllm_jax.network.config import ConfigError
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, constrain
from pdllm_jax.network.transformer import MaskPredictor


def encode_chosen(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    config: SelectionConfig,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """The state, whose chunks are placed (`placed`), with their KV as the configuration asks.

    state.chunk_ids name chunks of the cache's pool, which the encodings "independent" and "bridge"
    start from.
    """
    fresh = config.encoding in ("joint", "bridge")
    state = dataclasses.replace(state, pool=None, stale=jnp.full(state.stale.shape, not fresh))
    if config.encoding != "joint" and state.live is not None and cache.prefix_k is not None:
        assert cache.prefix_v is not None
        live, at_start = state.live, jnp.zeros_like(state.query_length)
        for layer, (k, v) in enumerate(zip(cache.prefix_k, cache.prefix_v, strict=True)):
            shape = (state.query.shape[0], *k.shape[1:])
            live = live.write(
                layer, jnp.broadcast_to(k, shape), jnp.broadcast_to(v, shape), at_start,
                mesh=model.mesh,
            )  # fmt: skip
        state = dataclasses.replace(state, live=live)
    if config.encoding == "joint":
        state = encode_jointly(model, cache, state)
    elif config.encoding == "query-conditioned":
        state = encode_with_query(model, cache, state)
    elif config.encoding == "bridge":
        state = bridge(model, cache, state, config, implementation)
    if config.keep_tokens is not None:
        pool = state.pool if state.pool is not None else cache.pool
        assert pool is not None
        state = keep_tokens(
            model, pool, state, config.keep_tokens,
            anchors=cache.anchors, implementation=implementation,
        )  # fmt: skip
    return state


def encode_jointly(model: MaskPredictor, cache: ChunkCache, state: DenoiseState) -> DenoiseState:
    """One forward over prefix, chosen chunks, query and response, laid without gaps.

    Full attention among all of them. Gives the state its pool and fresh live KV.
    """
    batch, slots = state.selected.shape
    size, prefix_rows = cache.tokens.shape[2], cache.prefix_ids.shape[1]
    context_rows = slots * size
    own_rows = state.query.shape[1] + state.tokens.shape[1]
    tokens, lengths = chosen_chunks(cache, state.selected)
    there = state.selected >= 0
    ends = jnp.cumsum(lengths, axis=1)
    context = ends[:, -1]
    own_length = state.query_length + state.tokens.shape[1]

    # Rows and positions: each part overwrites the padding of the one before it.
    rows = jnp.zeros((batch, prefix_rows + context_rows + own_rows), jnp.int32)
    rows = rows.at[:, :prefix_rows].set(cache.prefix_ids)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    inside = jnp.arange(size)
    starts = state.prefix_length[:, None] + ends - lengths  # first row of each chunk, [B, K]
    for j in range(slots):
        rows = dynamic_updates(rows, starts[:, j], tokens[:, j])
        positions = dynamic_updates(
            positions, starts[:, j], state.chunk_starts[:, j, None] + inside
        )
    own_start = state.prefix_length + context
    rows = dynamic_updates(rows, own_start, response_rows(state))
    positions = dynamic_updates(
        positions, own_start, state.query_start[:, None] + jnp.arange(own_rows)
    )
    by = rotation(model.config, positions)
    local = rotation(model.config, inside)
    total = own_start + own_length

    live_row = jnp.arange(prefix_rows + own_rows)
    behind = jnp.where(live_row < state.prefix_length[:, None], 0, context[:, None])
    live_from = jnp.minimum(live_row + behind, rows.shape[1] - 1)
    chunk_from = jnp.minimum(starts[..., None] + inside, rows.shape[1] - 1).reshape(batch, -1)
    zeros = jnp.zeros((batch,), jnp.int32)

    def pick(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[..., None, None], axis=1)

    pool = init_pool(model.config, batch * slots, size, model.dtype, model.mesh)
    pool = dataclasses.replace(pool, lengths=lengths.reshape(-1))

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        pool, live = carry
        turned = rotate(k, by)
        out = attention(model.mesh, rotate(q, by), turned, v, total).out
        shape = (batch * slots, size, *k.shape[2:])
        chunk_k = rotate(pick(k, chunk_from).reshape(shape), local)
        chunk_v = pick(v, chunk_from).reshape(shape)
        pool = write_chunks(pool, layer, chunk_k, chunk_v, 0)
        own = None if live is None else (pick(turned, live_from), pick(v, live_from))
        # Stored before the next layer: left to itself XLA keeps all layers' until the end.
        out, pool, own = lax.optimization_barrier((out, pool, own))
        if live is not None:
            live = live.write(layer, *own, zeros, mesh=model.mesh)
        return out, (pool, live)

    _, (pool, live) = model.run(rows, attend, (pool, state.live))
    return dataclasses.replace(
        state,
        live=live,
        pool=pool,
        chunk_ids=jnp.where(there, _own_ids(state), -1),
        stale=jnp.zeros((batch,), bool),
    )


def encode_with_query(model: MaskPredictor, cache: ChunkCache, state: DenoiseState) -> DenoiseState:
    """One forward for each chosen chunk, over prefix, chunk and query, full attention among them.

    The query lies behind the chunk's full slot. Its rows and the prefix's are not kept: live KV is
    as stale as it was.
    """
    batch, slots = state.selected.shape

    def each(x: Array) -> Array:
        """What a request has, for each of its chunks."""
        return jnp.repeat(x, slots, axis=0)

    apart = dataclasses.replace(
        state,
        tokens=jnp.zeros((batch * slots, 0), jnp.int32),
        query=each(state.query),
        query_length=each(state.query_length),
        prefix_length=each(state.prefix_length),
        selected=state.selected.reshape(-1, 1),
        chunk_starts=each(state.prefix_length)[:, None],
        query_start=each(state.prefix_length) + cache.tokens.shape[2],
        live=None,
        pool=None,
    )
    if cache.documents > 1:
        cache = dataclasses.replace(
            cache.without_pool(),
            tokens=each(cache.tokens),
            lengths=each(cache.lengths),
            prefix_ids=each(cache.prefix_ids),
            prefix_length=each(cache.prefix_length),
        )
    pool = encode_jointly(model, cache, apart).pool
    own = jnp.where(state.selected >= 0, _own_ids(state), -1)
    return dataclasses.replace(state, pool=pool, chunk_ids=own)


def bridge(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    config: SelectionConfig,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Independent KV, of which a share of the tokens is recomputed with everything in view.

    One forward over the chosen tokens of every chunk, the query and the masked response; each row
    attends to prefix, all chosen chunks (whose KV this forward replaces layer by layer, where it
    recomputes it), query and response. Live KV is then fresh. The share of 1 is joint encoding but
    for the prefix, which has seen itself alone.

    Of config.bridge_tokens: "start", the first tokens of each chunk, or "attention", those that
    receive most from the query's last rows over all layers (`token_attention`), the anchor among
    them.
    """
    pool = cache.pool
    assert pool is not None
    batch, slots = state.selected.shape
    size = pool.k.shape[3]
    count = min(size, math.ceil(config.bridge_share * size))
    ids = jnp.maximum(state.chunk_ids, 0)
    lengths = jnp.where(state.chunk_ids >= 0, pool.lengths[ids], 0)  # [B, K]
    if config.bridge_tokens == "start":
        places = jnp.broadcast_to(jnp.arange(count), (batch, slots, count))
        places = jnp.where(places < lengths[..., None], places, size)
    else:
        received = token_attention(model, pool, state, implementation)
        places = best_tokens(received, count, cache.anchors)  # [B, K, count]
    chunk_rows = slots * count
    flat = places.reshape(batch, chunk_rows)
    own_rows = response_rows(state)
    own_positions = state.query_start[:, None] + jnp.arange(own_rows.shape[1])
    positions = (state.chunk_starts[..., None] + places).reshape(batch, chunk_rows)
    positions = jnp.concatenate([positions, own_positions], axis=1)
    view = row_rotations(model.config, state, positions)
    local = rotation(model.config, flat)
    slot = (jnp.arange(batch)[:, None] * slots + jnp.arange(slots))[..., None]  # [B, K, 1]

    own = ChunkPool(pool.k[:, ids.reshape(-1)], pool.v[:, ids.reshape(-1)], lengths.reshape(-1))
    state = dataclasses.replace(
        state, chunk_ids=jnp.where(state.chunk_ids >= 0, _own_ids(state), -1)
    )

    def replace(store: Array, layer: int, rows: Array) -> Array:
        """store [L, B K, G, C, D] with rows [B, K count, G, D] at their places; C is nowhere."""
        rows = rows.reshape(batch, slots, count, *rows.shape[2:])
        return store.at[layer, slot, :, places].set(rows.astype(store.dtype), mode="drop")

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        own, live = carry
        own = dataclasses.replace(
            own,
            k=replace(own.k, layer, rotate(k[:, :chunk_rows], local)),
            v=replace(own.v, layer, v[:, :chunk_rows]),
        )
        turned, live_v = rotate(k, view.own)[:, chunk_rows:], v[:, chunk_rows:]
        live_k = turned
        if live is not None:
            live = live.write(layer, turned, live_v, state.prefix_length, mesh=model.mesh)
            live_k, live_v = live.k[layer], live.v[layer]
        seen = attend_all(
            view, layer, q, live_k, live_v, own, state.chunk_ids, implementation, mesh=model.mesh
        )
        return seen.out, (own, live)

    tokens, _ = chosen_chunks(cache, state.selected)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(places, size - 1), axis=2)
    rows = jnp.concatenate([tokens.reshape(batch, chunk_rows), own_rows], axis=1)
    _, (own, live) = model.run(rows, attend, (own, state.live))
    return dataclasses.replace(state, pool=own, live=live, stale=jnp.zeros((batch,), bool))


def _own_ids(state: DenoiseState) -> Int[Array, "B K"]:
    return jnp.arange(state.selected.size, dtype=jnp.int32).reshape(state.selected.shape)


@functools.partial(jax.jit, static_argnames=("config", "encoding", "selecting", "implementation"))
def init_denoise(
    model: MaskPredictor,
    cache: ChunkCache | None,
    selection: Selection | None,
    query_ids: Int[Array, "B Q"],
    config: DecodeConfig,
    key: Array,
    *,
    query_length: Int[Array, "B"] | None = None,
    encoding: Encoding | None = None,
    selecting: SelectionConfig | None = None,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """The state before the first step: everything masked, the chosen chunks placed and encoded.

    Compiles once for each (shapes, config, encoding, selecting, implementation).

    Args:
      cache, selection: from `prefill` and `select_top_k`; selection.chunk_ids [B, K]. Both None for
        generation without a document's cache, where query_ids is the whole prompt. A cache has
        one document for all requests or one for each.
      query_ids: [B, Q], padded with -1, or with any ids behind query_length where that is given.
      config: lengths and sampling rule.
      key: PRNG key, of which request b uses fold_in(key, b); or a key for each request, [B].
      encoding: what the chunks' KV is computed from (see `SelectionConfig`). By default
        "independent" where the cache has their KV, else "joint".
      selecting: settings of encoding, positions and kept tokens, instead of `encoding`.
      implementation: of the attention over chunks, where the encoding has any.

    Raises:
      ValueError: an encoding that needs a pool asked of a cache without; cache without selection;
        guidance with a cache; both encoding and selecting.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    batch, q_rows = query_ids.shape
    if query_length is None:
        query_length = count_ids(query_ids)
    if (cache is None) != (selection is None):
        raise ValueError("cache and selection go together: give both or neither")
    if encoding is not None and selecting is not None:
        raise ValueError("selecting names an encoding already: give one of the two")
    if cache is not None and config.guidance > 0:
        raise ConfigError("guidance is implemented for generation without a document's cache")
    mask_id = model.config.mask_token_id
    zeros = jnp.zeros((batch,), jnp.int32)
    none = jnp.zeros((batch, 0), jnp.int32)
    state = DenoiseState(
        tokens=jnp.full((batch, config.gen_length), mask_id, jnp.int32),
        query=jnp.maximum(query_ids, 0),
        query_length=jnp.asarray(query_length, jnp.int32),
        prefix_length=zeros,
        selected=none,
        chunk_ids=none,
        chunk_starts=none,
        query_start=zeros,
        live=None,
        pool=None,
        block=zeros,
        step=zeros,
        stale=jnp.ones((batch,), bool),
        evaluations=zeros,
        rescored=zeros,
        keys=key if key.ndim else jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)),
    )
    prefix_rows = 0 if cache is None else cache.prefix_ids.shape[-1]
    if config.recompute != "response" or prefix_rows:
        rows = prefix_rows + q_rows + config.gen_length
        state = dataclasses.replace(
            state, live=init_live(model.config, batch, rows, model.dtype, model.mesh)
        )
    if cache is None or selection is None:
        return constrain(model.mesh, state)

    if selecting is None:
        default: Encoding = "joint" if cache.pool is None else "independent"
        selecting = SelectionConfig(encoding=encoding or default)
    starts_from_pool = selecting.encoding in ("independent", "bridge")
    if starts_from_pool and cache.pool is None:
        raise ValueError(
            f"the cache holds no chunk KV: prefill with encoding={selecting.encoding!r}"
        )
    if selecting.encoding == "query-conditioned" and prefix_rows and cache.prefix_k is None:
        raise ValueError("the cache holds no KV of the prefix: prefill with this encoding")
    if starts_from_pool and (selection.slots is not None) != cache.streamed:
        raise ValueError("cache and selection are not from the same call of prefill_top_k")

    if selection.chunk_ids.shape[0] != batch:
        raise ValueError(f"{batch} questions for {selection.chunk_ids.shape[0]} selections")
    prefix_length = cache.prefix_length[cache.document_of(batch)]
    state = dataclasses.replace(
        state,
        prefix_length=prefix_length,
        live_encoded=selecting.encoding in ("joint", "bridge"),
    )
    state = place_chunks(state, cache, selection.chunk_ids, selecting.positions)
    if starts_from_pool and selection.slots is not None:
        state = dataclasses.replace(state, chunk_ids=selection.slots)
    state = encode_chosen(model, cache, state, selecting, implementation)
    return constrain(model.mesh, state)
