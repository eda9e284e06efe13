"""Joint encoding: one forward over prefix, chosen chunks, query and response."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import Implementation
from pdllm_jax.method.cache import (
    ChunkCache,
    DenoiseState,
    chosen_chunks,
    dynamic_updates,
    init_pool,
    write_chunks,
)
from pdllm_jax.method.encodings.base import Encoding, slot_ids
from pdllm_jax.method.live_forward import response_rows
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class Joint(Encoding):
    """Full attention among prefix, all kept chunks, query and masked response."""

    name: ClassVar[str] = "joint"
    keeps_prefix: ClassVar[bool] = False
    live_encoded: ClassVar[bool] = True

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        state: DenoiseState,
        implementation: Implementation | None,
    ) -> DenoiseState:
        """Returns the state with its pool and fresh live KV."""
        return encode_jointly(model, cache, state)


def encode_jointly(model: MaskPredictor, cache: ChunkCache, state: DenoiseState) -> DenoiseState:
    """One forward over prefix, chosen chunks, query and response, laid without gaps.

    Full attention among all of them. Gives the state its pool and fresh live KV.
    """
    batch, slots = state.selected.shape
    size, prefix_rows = cache.tokens.shape[2], cache.prefix_ids.shape[1]
    context_rows = slots * size
    own_rows = state.query.shape[1] + state.tokens.shape[1]
    tokens, lengths = chosen_chunks(cache, state.selected)
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
        chunk_ids=jnp.where(state.selected >= 0, slot_ids(state), -1),
        stale=jnp.zeros((batch,), bool),
    )
