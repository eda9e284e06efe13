"""Encodings by one forward over rows without gaps: prefix, chunks, query, and perhaps response."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pdllm_jax.method.cache import ChunkCache, Placement, dynamic_updates, init_pool, write_chunks
from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class Joint(Encoding):
    """Full attention among prefix, all kept chunks, query and masked response."""

    name: ClassVar[str] = "joint"
    keeps_prefix: ClassVar[bool] = False
    live_encoded: ClassVar[bool] = True

    def encode(self, model: MaskPredictor, cache: ChunkCache, request: EncodeRequest) -> Encoded:
        """Runs one forward over prefix, chosen chunks, query and masked response."""
        return _encode_rows(model, cache, request, request.rows.ids)


@dataclasses.dataclass(frozen=True)
class QueryConditioned(Encoding):
    """Full attention among prefix, one chunk and the query."""

    name: ClassVar[str] = "query-conditioned"

    def encode(self, model: MaskPredictor, cache: ChunkCache, request: EncodeRequest) -> Encoded:
        """Runs one forward for each chosen chunk, the query behind the chunk's full slot.

        Keeps the KV of the chunk's rows alone.
        """
        slots = request.selected.shape[1]

        def per_chunk(x: Array) -> Array:
            """Repeats the value of a request for each of its chunks."""
            return jnp.repeat(x, slots, axis=0)

        selected, query = request.selected.reshape(-1, 1), per_chunk(request.rows.query)
        prefix = per_chunk(request.placement.prefix_length)
        placement = Placement(
            chunk_ids=selected,
            chunk_starts=prefix[:, None],
            query_start=prefix + cache.tokens.shape[2],
            prefix_length=prefix,
            total=prefix + per_chunk(request.rows.query_length),
        )
        if cache.documents > 1:
            tokens_alone = dataclasses.replace(cache, pool=None, prefix_k=None, prefix_v=None)
            cache = jax.tree.map(per_chunk, tokens_alone)
        each = request._replace(selected=selected, placement=placement, live=None)
        return Encoded(_encode_rows(model, cache, each, query).pool, request.live)


def _encode_rows(
    model: MaskPredictor, cache: ChunkCache, request: EncodeRequest, own_ids: Int[Array, "B R"]
) -> Encoded:
    """Runs one forward over prefix, chosen chunks and `own_ids`, laid without gaps.

    own_ids: rows from placement.query_start on, padded; placement.total counts the valid ones with
    the prefix.
    """
    selected, placement = request.selected, request.placement
    batch, slots = selected.shape
    size, prefix_rows = cache.tokens.shape[2], cache.prefix_ids.shape[1]
    own_rows, prefix_length = own_ids.shape[1], placement.prefix_length
    tokens, lengths = cache.chosen(selected)
    ends = jnp.cumsum(lengths, axis=1)
    context = ends[:, -1]

    # Rows and positions: each part overwrites the padding of the one before it.
    rows = jnp.zeros((batch, prefix_rows + slots * size + own_rows), jnp.int32)
    rows = rows.at[:, :prefix_rows].set(cache.prefix_ids)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    inside = jnp.arange(size)
    starts = prefix_length[:, None] + ends - lengths  # first row of each chunk, [B, K]
    for j in range(slots):
        rows = dynamic_updates(rows, starts[:, j], tokens[:, j])
        chunk_positions = placement.chunk_starts[:, j, None] + inside
        positions = dynamic_updates(positions, starts[:, j], chunk_positions)
    own_start = prefix_length + context
    rows = dynamic_updates(rows, own_start, own_ids)
    own_positions = placement.query_start[:, None] + jnp.arange(own_rows)
    positions = dynamic_updates(positions, own_start, own_positions)
    by = rotation(model.config, positions)
    chunk_local = rotation(model.config, inside)
    total = placement.total + context

    live_row = jnp.arange(prefix_rows + own_rows)
    behind = jnp.where(live_row < prefix_length[:, None], 0, context[:, None])
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
        chunk_k = rotate(pick(k, chunk_from).reshape(shape), chunk_local)
        chunk_v = pick(v, chunk_from).reshape(shape)
        pool = write_chunks(pool, layer, chunk_k, chunk_v, 0)
        live_kv = None if live is None else (pick(turned, live_from), pick(v, live_from))
        # Stored before the next layer: otherwise XLA keeps the KV of all layers until the end.
        out, pool, live_kv = lax.optimization_barrier((out, pool, live_kv))
        if live is not None:
            live = live.write(layer, *live_kv, zeros, mesh=model.mesh)
        return out, (pool, live)

    _, (pool, live) = model.run(rows, attend, (pool, request.live))
    return Encoded(pool, live)
