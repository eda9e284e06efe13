"""Around the kernel: what it supports, its launch, and the merge of its splits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, tuning
from pallas_kernels.chunk_attention.hopper_schedule import block_table
from pallas_kernels.common import OwnKV, Partial, selected_chunks
from pallas_kernels.geometry import Geometry

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_SIZES = (64, 128)
CHUNK_MULTIPLE = 64


def input_problem(dtype: jnp.dtype, head_size: int, chunk_size: int) -> str | None:
    """Why the kernel does not take such inputs, whatever the device; None where it does."""
    if (problem := compat.mosaic_gpu_problem()) is not None:
        return problem
    if dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float16, got {jnp.dtype(dtype).name}"
    if head_size not in HEAD_SIZES:
        return f"the kernel takes head sizes 64 and 128, got {head_size}"
    if chunk_size % CHUNK_MULTIPLE:
        return f"the kernel takes chunk sizes that are multiples of 64, got {chunk_size}"
    return None


def device_problem() -> str | None:
    """Why this process' default device cannot run the kernel; None where it can."""
    capability = compat.compute_capability()
    if capability is None:
        return f"the kernel runs on NVIDIA GPUs, the default device is {compat.default_device()}"
    if capability != "9.0":
        return f"the kernel needs compute capability 9.0, this device has {capability}"
    return None


def chunk_attention_mosaic_gpu(
    q: Float[Array, "B Q T H D"],
    k: Float[Array, "L N G C D"],
    v: Float[Array, "L N G C D"],
    layer: int | Int[Array, ""],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    scale: float,
    near: OwnKV | None = None,
    *,
    settings: tuning.Tuning | None = None,
    interpret: Any = None,
) -> Partial:
    """Attention over the chosen chunks, and over near keys in the same launch.

    q: rows for each of the K slots, or one for all of them; with near keys K + 1, the last theirs.
    near: copied where S is no multiple of the blocks of keys.
    settings: by default what tuning.py says. interpret: `compat.interpreter()` to run on the CPU.
    """
    # A constant where it is known, rather than a kernel that makes it.
    known = isinstance(layer, int)
    index: Any = np.array([layer], np.int32) if known else jnp.asarray(layer, jnp.int32)[None]
    shape = _geometry(q.shape, k.shape)
    if settings is None:
        settings = tuning.choose(
            batch=shape.batch,
            slots=chunk_ids.shape[1],
            columns=shape.kv_heads * shape.groups,
            chunk_size=k.shape[3],
            dim=shape.dim,
            tiles=shape.tiles_per_block,
            processors=shape.processors,
        )
    shape = dataclasses.replace(
        shape,
        scale=scale,
        per_chunk=k.shape[3] // settings.block_keys,
        block_keys=settings.block_keys,
        stages=settings.stages,
        splits=settings.splits,
        key_groups=settings.key_groups,
        slots=chunk_ids.shape[1],
        near_blocks=0 if near is None else -(-near.k.shape[1] // settings.block_keys),
    )
    return _launch(q, k, v, index, chunk_ids, chunk_lengths, near, shape=shape, interpret=interpret)


def _geometry(q: tuple[int, ...], pool: tuple[int, ...]) -> Geometry:
    """What follows from the shapes of queries and pool alone."""
    batch, query_slots, rows, heads, dim = q
    return Geometry(
        batch=batch,
        rows=_padded_rows(rows),
        heads=heads,
        kv_heads=pool[2],
        dim=dim,
        query_slots=query_slots > 1,
        processors=compat.processors(),
    )


def _padded_rows(rows: int) -> int:
    """T as tiles of 64 rows can hold it: 32, or a multiple of 64.

    No less than 32: the log-sum-exps of a head leave shared memory on their own, from an address
    that must be a multiple of 128 bytes.
    """
    return 32 if rows <= 32 else -(-rows // 64) * 64


# A function of its own under jit: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _launch(
    q: Array,
    k: Array,
    v: Array,
    layer: Array,
    chunk_ids: Array,
    chunk_lengths: Array,
    near: OwnKV | None,
    *,
    shape: Geometry,
    interpret: Any,
) -> Partial:
    from pallas_kernels.chunk_attention.hopper_kernel import build
    from pallas_kernels.chunk_attention.hopper_merge import build_merge

    chunk_size, rows = k.shape[3], q.shape[2]
    padding = shape.rows - rows
    if padding:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    table = block_table(
        *selected_chunks(chunk_ids, chunk_lengths, chunk_size),
        chunk_size=chunk_size,
        block_keys=shape.block_keys,
        splits=shape.splits,
        by_chunk=shape.batch > 1,
        near_lengths=None if near is None else jnp.clip(near.lengths, 0, near.k.shape[1]),
        near_blocks=shape.near_blocks,
    )
    more: tuple[Array, ...] = ()
    if near is not None:
        fill = shape.near_blocks * shape.block_keys - near.k.shape[1]
        fill_rows = ((0, 0), (0, fill), (0, 0), (0, 0))
        more = (jnp.pad(near.k, fill_rows), jnp.pad(near.v, fill_rows)) if fill else near[:2]
    kernel = build(shape, q.dtype, whole=shape.splits == 1, interpret=interpret)
    out, lse = kernel(q, k, v, *more, table.blocks, table.facts, table.units, layer)
    if shape.splits > 1:
        out, lse = build_merge(shape, q.dtype, interpret=interpret)(out, lse)
    used = shape.batch * shape.heads * shape.rows
    lse = lse[:used].reshape(shape.batch, shape.heads, shape.rows)
    return Partial(out[:, :rows], lse[..., :rows])
