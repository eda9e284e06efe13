"""The Hopper kernel's launch: the inputs that it takes, its geometry, the merge of its splits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_schedule import block_table
from pallas_kernels.chunk_attention.hopper_tiling import (
    Geometry,
    QueryTiles,
    Tuning,
    choose,
    padded_rows,
)
from pallas_kernels.common import OwnKV, Partial, valid_chunks

HEAD_SIZES = (64, 128)
CHUNK_MULTIPLE = 64


def input_problem(dtype: jnp.dtype, head_size: int, chunk_size: int) -> str | None:
    """Returns why the kernel does not take such inputs on any device; None if it does."""
    if (problem := compat.dtype_problem(dtype)) is not None:
        return problem
    if head_size not in HEAD_SIZES:
        return f"the kernel takes head sizes 64 and 128, got {head_size}"
    if chunk_size % CHUNK_MULTIPLE:
        return f"the kernel takes chunk sizes that are multiples of 64, got {chunk_size}"
    return None


def chunk_attention_hopper(
    q: Float[Array, "B Q T H D"],
    k: Float[Array, "L N G C D"],
    v: Float[Array, "L N G C D"],
    layer: int | Int[Array, ""],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    scale: float,
    own_kv: OwnKV | None = None,
    *,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Partial:
    """Attends to the chosen chunks, and to own keys in the same launch.

    Args:
      q: rows for each of the K slots, or one set for all of them (Q = 1). With own keys Q = K + 1,
        the last place for those.
      k, v, layer, chunk_ids, chunk_lengths, scale: as in `ChunkAttention`.
      own_kv: padded by a copy if S is not a multiple of the key blocks.
      tuning: `hopper_tiling.choose` by default.
      interpret: `compat.interpreter()` to run on the CPU.
    """
    # NumPy for a static layer: a constant, and no kernel that makes it.
    static = isinstance(layer, int)
    index: Any = np.array([layer], np.int32) if static else jnp.asarray(layer, jnp.int32)[None]
    batch, places, rows, heads, dim = q.shape
    kv_heads, chunk_size = k.shape[2:4]
    slots, sms = chunk_ids.shape[1], compat.sm_count()
    tiles = QueryTiles(padded_rows(rows), heads, kv_heads)
    if tuning is None:
        tuning = choose(
            batch=batch,
            slots=slots,
            columns=kv_heads * tiles.groups,
            chunk_size=chunk_size,
            dim=dim,
            tiles=tiles.tiles_per_cta,
            sms=sms,
        )
    geo = Geometry(
        tiles.rows,
        heads,
        kv_heads,
        batch=batch,
        dim=dim,
        query_slots=places > 1,
        sms=sms,
        scale=scale,
        tuning=tuning,
        slots=slots,
        per_chunk=chunk_size // tuning.block_keys,
        own_blocks=0 if own_kv is None else -(-own_kv.k.shape[1] // tuning.block_keys),
    )
    return _launch(q, k, v, index, chunk_ids, chunk_lengths, own_kv, geo=geo, interpret=interpret)


def chunk_attention_interpreted(*arguments: Any) -> Partial:
    """Runs `chunk_attention_hopper` in Pallas' interpreter on the CPU."""
    return chunk_attention_hopper(*arguments, interpret=compat.interpreter())


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("geo", "interpret"))
def _launch(
    q: Array,
    k: Array,
    v: Array,
    layer: Array,
    chunk_ids: Array,
    chunk_lengths: Array,
    own_kv: OwnKV | None,
    *,
    geo: Geometry,
    interpret: Any,
) -> Partial:
    from pallas_kernels.chunk_attention.hopper_kernel import build
    from pallas_kernels.chunk_attention.hopper_merge import build_merge

    chunk_size, rows, tuning = k.shape[3], q.shape[2], geo.tuning
    if padding := geo.rows - rows:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    table = block_table(
        *valid_chunks(chunk_ids, chunk_lengths, chunk_size),
        chunk_size=chunk_size,
        block_keys=tuning.block_keys,
        splits=tuning.splits,
        by_chunk=geo.batch > 1,
        own_lengths=None if own_kv is None else jnp.clip(own_kv.lengths, 0, own_kv.k.shape[1]),
        own_blocks=geo.own_blocks,
    )
    own: tuple[Array, ...] = () if own_kv is None else own_kv[:2]
    if own and (padding := geo.own_blocks * tuning.block_keys - own[0].shape[1]):
        own = tuple(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in own)
    kernel = build(geo, q.dtype, interpret=interpret)
    out, lse = kernel(q, k, v, *own, table.blocks, table.facts, table.units, layer)
    if tuning.splits > 1:
        out, lse = build_merge(geo, q.dtype, interpret=interpret)(out, lse)
    used = geo.batch * geo.heads * geo.rows
    lse = lse[:used].reshape(geo.batch, geo.heads, geo.rows)
    return Partial(out[:, :rows], lse[..., :rows])
