"""The Hopper kernel that merges the splits of the attention kernel by their log-sum-exps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_producer import div, mod
from pallas_kernels.chunk_attention.hopper_tiling import Geometry
from pallas_kernels.compat import ROWS

# Splits whose outputs are in shared memory at once, and columns that a CTA merges: few, so that
# there are many CTAs.
_BUFFERS, _COLUMNS = 8, 32


def build_merge(geo: Geometry, dtype: jnp.dtype, *, interpret: Any) -> Any:
    """Makes the callable: out [splits, R, D], lse [splits, R] of the attention kernel -> out, lse.

    Rows are (b, h, t), R of them, in tiles of 64. Results are [B, T, H, D] in `dtype`, and [R].
    """
    splits, width = geo.tuning.splits, _COLUMNS
    buffers = min(splits, _BUFFERS)
    heads = geo.batch * geo.heads
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def merge_partials(out_gmem, lse_gmem, merged_gmem, merged_lse_gmem, *scratch):
        parts_smem, lse_smem, merged_lse_smem, part_full, lse_full = scratch
        first, share = lax.axis_index("tile") * ROWS, lax.axis_index("share")
        columns = pl.ds(share * width, width)

        def load(split):
            source, i = out_gmem.at[split, pl.ds(first, ROWS), columns], split % buffers
            plgpu.copy_gmem_to_smem(source, parts_smem.at[i], part_full.at[i])

        for split in range(splits):
            source = lse_gmem.at[split, pl.ds(first, ROWS)]
            plgpu.copy_gmem_to_smem(source, lse_smem.at[split], lse_full)
        for split in range(buffers):
            load(split)
        plgpu.barrier_wait(lse_full)
        scores = [compat.load(lse_smem.at[split], by_row) for split in range(splits)]
        top = functools.reduce(jnp.maximum, scores)
        total = compat.zeros((ROWS,), by_row)
        acc = compat.zeros((ROWS, width), plgpu.Layout.WGMMA)
        for split, score in enumerate(scores):
            weight = jnp.exp(score - top)
            total += weight
            plgpu.barrier_wait(part_full.at[split % buffers])
            part = compat.load(parts_smem.at[split % buffers], plgpu.Layout.WGMMA)
            acc += part.astype(jnp.float32) * lax.broadcast_in_dim(weight, acc.shape, [0])
            if split + buffers < splits:
                plgpu.commit_smem()  # all threads have read the buffer
                load(split + buffers)
        acc = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        merged = parts_smem.at[(splits - 1) % buffers]
        plgpu.commit_smem()
        merged[...] = acc.astype(dtype)
        merged_lse_smem[...] = top + jnp.log(total)
        plgpu.commit_smem()
        each = geo.rows_per_head
        for i in range(ROWS // each):
            start = first + i * each
            place = div(start, geo.rows)
            head = jnp.minimum(place, heads - 1)
            request, rows = div(head, geo.heads), pl.ds(mod(start, geo.rows), each)
            target = merged_gmem.at[request, rows, mod(head, geo.heads), columns]
            source = merged.at[pl.ds(i * each, each)]
            pl.when(place < heads)(functools.partial(plgpu.copy_smem_to_gmem, source, target))

        @pl.when(share == 0)
        def _():
            plgpu.copy_smem_to_gmem(merged_lse_smem, merged_lse_gmem.at[pl.ds(first, ROWS)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        merge_partials,
        out_type=[
            jax.ShapeDtypeStruct((geo.batch, geo.rows, geo.heads, geo.dim), dtype),
            jax.ShapeDtypeStruct((geo.flat_rows,), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((buffers, ROWS, width), dtype, transforms=compat.smem_transforms(width)),
            plgpu.SMEM((splits, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=buffers),
            plgpu.Barrier(num_arrivals=splits),
        ],
        grid=(geo.flat_rows // ROWS, geo.dim // width),
        grid_names=("tile", "share"),
        interpret=interpret,
        compiler_params=compat.compiler_params(),
    )
