"""Encodings by one forward over rows without gaps: prefix, chunks, query, and perhaps response."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pdllm_jax.method.cache import ChunkCache, Placement, init_pool, write_chunks
from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding
from pdllm_jax.method.live_forward import JointRows, joint_rows
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
        return encode_rows(model, cache, request, request.rows.ids)[0]


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
        return Encoded(encode_rows(model, cache, each, query)[0].pool, request.live)


def encode_rows(
    model: MaskPredictor, cache: ChunkCache, request: EncodeRequest, own_ids: Int[Array, "B R"]
) -> tuple[Encoded, Float[Array, "B T M"], JointRows]:
    """Runs one forward over prefix, chosen chunks and `own_ids`; see `joint_rows`.

    Returns:
      The KV; the residual stream, and its rows.
    """
    rows = joint_rows(cache, request.selected, request.placement, own_ids)
    batch, slots, size = rows.chunk_row.shape
    by = rotation(model.config, rows.positions)
    chunk_local = rotation(model.config, jnp.arange(size))
    prefix_length = request.placement.prefix_length

    live_row = jnp.arange(cache.prefix_ids.shape[1] + own_ids.shape[1])
    context = rows.own_start - prefix_length
    behind = jnp.where(live_row < prefix_length[:, None], 0, context[:, None])
    live_from = jnp.minimum(live_row + behind, rows.ids.shape[1] - 1)
    chunk_from = rows.chunk_row.reshape(batch, -1)
    zeros = jnp.zeros((batch,), jnp.int32)

    def pick(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[..., None, None], axis=1)

    kind = request.kv_format
    pool = init_pool(model.config, batch * slots, size, model.dtype, model.mesh, kind)
    lengths = cache.chosen(request.selected)[1].reshape(-1)
    pool = dataclasses.replace(pool, lengths=lengths)

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        pool, live = carry
        turned = rotate(k, by)
        out = attention(model.mesh, rotate(q, by), turned, v, rows.total).out
        shape = (batch * slots, size, *k.shape[2:])
        chunk_k = rotate(pick(k, chunk_from).reshape(shape), chunk_local)
        chunk_v = pick(v, chunk_from).reshape(shape)
        pool = write_chunks(pool, layer, chunk_k, chunk_v, lengths, 0)
        live_kv = None if live is None else (pick(turned, live_from), pick(v, live_from))
        # Stored before the next layer: otherwise XLA keeps the KV of all layers until the end.
        out, pool, live_kv = lax.optimization_barrier((out, pool, live_kv))
        if live is not None:
            live = live.write(layer, *live_kv, zeros, mesh=model.mesh)
        return out, (pool, live)

    x, (pool, live) = model.run(rows.ids, attend, (pool, request.live))
    return Encoded(pool, live), x, rows
