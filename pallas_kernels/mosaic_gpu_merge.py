"""The merge of the kernel's splits in one launch: attention over the union of their keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.mosaic_gpu_sm90 import ROWS, TILED, Geometry

# Splits whose outputs lie in shared memory at once.
_BUFFERS = 8


def build_merge(geo: Geometry, dtype: jnp.dtype, interpret):
    """The callable: out [splits, R, D], lse [splits, R], both as the kernel leaves them.

    Rows are (b, h, t), R of them, in tiles of 64 with one block of threads each. Returns
    out [B, T, H, D] in `dtype` and lse [R] float32.
    """
    splits, dim = geo.splits, geo.dim
    buffers = min(splits, _BUFFERS)
    pieces = ROWS // geo.rows_per_head
    heads = geo.batch * geo.heads
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def body(out_gmem, lse_gmem, merged_gmem, merged_lse_gmem, parts, lses, top_lse, ready, known):
        first = lax.axis_index("tile") * ROWS

        def load(split):
            plgpu.copy_gmem_to_smem(
                out_gmem.at[split, pl.ds(first, ROWS)],
                parts.at[split % buffers],
                ready.at[split % buffers],
            )

        if interpret is None:
            plgpu.griddepcontrol_wait()
        for split in range(splits):
            plgpu.copy_gmem_to_smem(lse_gmem.at[split, pl.ds(first, ROWS)], lses.at[split], known)
        for split in range(buffers):
            load(split)
        plgpu.barrier_wait(known)
        scores = [compat.load(lses.at[split], by_row) for split in range(splits)]
        top = scores[0]
        for score in scores[1:]:
            top = jnp.maximum(top, score)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
        for split, score in enumerate(scores):
            weight = jnp.exp(score - top)
            total += weight
            plgpu.barrier_wait(ready.at[split % buffers])
            part = compat.load(parts.at[split % buffers], plgpu.Layout.WGMMA)
            acc += part.astype(jnp.float32) * lax.broadcast_in_dim(weight, acc.shape, [0])
            if split + buffers < splits:
                plgpu.commit_smem()  # all have read the buffer
                load(split + buffers)
        acc = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        last = parts.at[(splits - 1) % buffers]
        plgpu.commit_smem()
        last[...] = acc.astype(dtype)
        top_lse[...] = top + jnp.log(total)
        plgpu.commit_smem()
        for i in range(pieces):
            start = first + i * geo.rows_per_head
            head = lax.div(start, jnp.int32(geo.rows))
            row = lax.rem(start, jnp.int32(geo.rows))
            request = lax.div(head, jnp.int32(geo.heads))

            @pl.when(head < heads)
            def _(i=i, head=head, row=row, request=request):
                plgpu.copy_smem_to_gmem(
                    last.at[pl.ds(i * geo.rows_per_head, geo.rows_per_head)],
                    merged_gmem.at[
                        request,
                        pl.ds(row, geo.rows_per_head),
                        lax.rem(head, jnp.int32(geo.heads)),
                    ],
                )

        plgpu.copy_smem_to_gmem(top_lse, merged_lse_gmem.at[pl.ds(first, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((geo.batch, geo.rows, geo.heads, dim), dtype),
            jax.ShapeDtypeStruct((geo.flat_rows,), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((buffers, ROWS, dim), dtype, transforms=TILED),
            plgpu.SMEM((splits, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=buffers),
            plgpu.Barrier(num_arrivals=splits),
        ],
        grid=(geo.flat_rows // ROWS,),
        grid_names=("tile",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )
