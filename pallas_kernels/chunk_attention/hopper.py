"""The Hopper kernel's launch: the inputs that it takes, its geometry, the merge of its splits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_schedule import block_table
from pallas_kernels.chunk_attention.hopper_tiling import Geometry, Shape, choose
from pallas_kernels.common import Partial, valid_chunks
from pallas_kernels.scaled import Scaled

HEAD_SIZES = (64, 128)
CHUNK_MULTIPLE = 64


def input_problem(
    dtype: jnp.dtype, head_size: int, chunk_size: int, pool_dtype: Any = None
) -> str | None:
    """Returns why the kernel does not take such inputs on any device; None if it does."""
    if (problem := compat.dtype_problem(dtype)) is not None:
        return problem
    if head_size not in HEAD_SIZES:
        return f"the kernel takes head sizes 64 and 128, got {head_size}"
    if chunk_size % CHUNK_MULTIPLE:
        return f"the kernel takes chunk sizes that are multiples of 64, got {chunk_size}"
    if pool_dtype not in (None, jnp.float8_e4m3fn):
        return f"the kernel takes a pool in 16 bits or float8_e4m3fn, got {jnp.dtype(pool_dtype)}"
    return None


def chunk_attention_hopper(
    q, k, v, layer, chunk_ids, chunk_lengths, scale, own_kv=None, *, tuning=None, interpret=None
) -> Partial:
    """Attends to the chosen chunks, and to own keys in the same launch; see `chunk_attention`.

    Args:
      q: [B, Q, T, H, D], rows for each of the K slots, or one set for all of them (Q = 1). With own
        keys Q = K + 1, the last place for those.
      own_kv: padded by a copy if S is not a multiple of the key blocks.
      tuning: a `Tuning`; by default what `hopper_tiling.choose` returns.
      interpret: `compat.interpreter()` to run on the CPU.
    """
    # NumPy for a static layer: a constant, and no kernel that makes it.
    static = isinstance(layer, int)
    index: Any = np.array([layer], np.int32) if static else jnp.asarray(layer, jnp.int32)[None]
    batch, places, rows, heads, dim = q.shape
    kv_heads, chunk_size = k.shape[2:4]
    slots, sms, narrow = chunk_ids.shape[1], compat.sm_count(), isinstance(k, Scaled)

    def of_rows(rows: int, heads: int) -> Shape:
        # At least 32: a head's log-sum-exps leave shared memory in one copy of whole 128 bytes.
        padded = compat.padded_rows(rows)
        return Shape(batch, slots, padded, heads, kv_heads, dim, chunk_size, sms, narrow)

    shape, packed = of_rows(rows, heads), of_rows(rows * (heads // kv_heads), kv_heads)
    # Rows that fill tiles badly: the query heads of a KV head as more rows of one head.
    pack = packed.tiles < shape.tiles
    shape = packed if pack else shape
    geo = Geometry(
        **vars(shape),
        tuning=choose(shape) if tuning is None else tuning,
        query_slots=places > 1,
        own_keys=0 if own_kv is None else own_kv.k.shape[1],
        scale=scale,
    )
    q = _pack(q, kv_heads) if pack else q
    part = _launch(geo, interpret, q, k, v, index, chunk_ids, chunk_lengths, own_kv)
    return _unpack(part, heads // kv_heads) if pack else part


def _pack(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, Q, T, G R, D] -> [B, Q, T R, G, D]: the R query heads of a KV head become rows."""
    batch, places, rows, _, dim = q.shape
    q = q.reshape(batch, places, rows, kv_heads, -1, dim).swapaxes(3, 4)
    return q.reshape(batch, places, -1, kv_heads, dim)


def _unpack(part: Partial, each: int) -> Partial:
    """[B, T R, G, D] -> [B, T, G R, D], and the log-sum-exps; R = each."""
    batch, _, kv_heads, dim = part.out.shape
    out = part.out.reshape(batch, -1, each, kv_heads, dim).swapaxes(2, 3)
    lse = part.lse.reshape(batch, kv_heads, -1, each).swapaxes(2, 3)
    rows = out.shape[1]
    return Partial(out.reshape(batch, rows, -1, dim), lse.reshape(batch, -1, rows))


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _launch(geo: Geometry, interpret: Any, q, k, v, layer, chunk_ids, chunk_lengths, own_kv):
    from pallas_kernels.chunk_attention.hopper_kernel import build
    from pallas_kernels.chunk_attention.hopper_merge import build_merge

    rows = q.shape[2]
    if padding := geo.rows - rows:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    ids, lengths = valid_chunks(chunk_ids, chunk_lengths, geo.chunk_size)
    own_lengths = None if own_kv is None else jnp.clip(own_kv.lengths, 0, geo.own_keys)
    table = block_table(geo, ids, lengths, own_lengths)
    live = [] if own_kv is None else own_kv[:2]
    if padding := geo.own_blocks * geo.tuning.block_keys - geo.own_keys:
        live = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in live]
    pool = [k.values, v.values, k.scale, v.scale] if geo.narrow else [k, v]
    out, lse = build(geo, q.dtype, interpret=interpret)(q, *pool, *live, *table, layer)
    if geo.tuning.splits > 1:
        out, lse = build_merge(geo, q.dtype, interpret=interpret)(out, lse)
    used = geo.batch * geo.heads * geo.rows
    lse = lse[:used].reshape(geo.batch, geo.heads, geo.rows)
    return Partial(out[:, :rows], lse[..., :rows])
