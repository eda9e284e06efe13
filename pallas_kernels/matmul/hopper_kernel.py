"""The Hopper kernel for products of few rows: every weight is read once, at memory bandwidth.

A CTA makes some columns of every result, over the whole inner dimension or, with splits, over a
part of it. One producer warp issues TMA loads of weights and rows, several stages ahead. One
warpgroup for each 64 rows multiplies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.compat import ROWS
from pallas_kernels.matmul.hopper_tiling import Geometry


def build_matmul(geo: Geometry, dtype: jnp.dtype, *, interpret: Any) -> Any:
    """Makes the callable: x [R, I], weights [O_i, I] -> results [R, O_i] in `dtype`.

    With splits the results are float32 [splits, R, O_i], to be summed.
    """
    count, results, tiles, steps = len(geo.outs), geo.results, geo.tiles, geo.steps
    loaded = min(geo.rows, ROWS)  # rows of a tile that exist

    def stream_matmul(x_gmem, *refs):
        w_gmem, out_gmem, refs = refs[:count], refs[count:][:results], refs[count + results :]
        x_smem, w_smem, out_smem = refs[0], refs[1:][:count], refs[1 + count :][:results]
        full, empty = refs[1 + count + results :]
        unit, split, wg = lax.axis_index("unit"), lax.axis_index("split"), lax.axis_index("wg")

        def stage_of(step):
            return lax.rem(step, jnp.int32(geo.stages))

        def columns_of(i):
            return pl.ds(unit * geo.columns[i], geo.columns[i])

        def inner(step):
            return pl.ds((split * steps + step) * geo.block, geo.block)

        def load(step):
            stage = stage_of(step)
            arrived = full.at[stage]
            pl.when(step >= geo.stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
            for i in range(count):
                source = w_gmem[i].at[columns_of(i), inner(step)]
                plgpu.copy_gmem_to_smem(source, w_smem[i].at[stage], arrived)
            for tile in range(tiles):
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(tile * ROWS, loaded), inner(step)],
                    x_smem.at[stage, tile, pl.ds(0, loaded)],
                    arrived,
                )

        def load_all():
            pl.loop(0, steps)(load)

            # Wait for the last arrivals: none may be pending when the kernel ends.
            @pl.loop(max(steps - geo.stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[stage_of(step)])

        @pl.when(wg == tiles)
        def _producer():
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(load_all))

        def multiply(step, sums):
            stage = stage_of(step)
            plgpu.barrier_wait(full.at[stage])
            new_sums = []
            for w, n, total in zip(w_smem, geo.columns, sums, strict=True):
                weights = w.at[stage].transpose((1, 0))
                new_sums.append(total + compat.product(x_smem.at[stage, wg], weights, n))
            plgpu.barrier_arrive(empty.at[stage])
            return tuple(new_sums)

        @pl.when(wg < tiles)
        def _consumer():
            start = tuple(compat.zeros((ROWS, n), plgpu.Layout.WGMMA) for n in geo.columns)
            sums = lax.fori_loop(0, steps, multiply, start)
            if geo.activation == "swiglu":
                # Rounded as the two products would be if they were results.
                gate, up = (s.astype(dtype).astype(jnp.float32) for s in sums)
                act = (gate / (1 + jnp.exp(-gate))).astype(dtype).astype(jnp.float32)
                sums = (act * up,)
            for i, total in enumerate(sums):
                out_smem[i].at[wg][...] = total.astype(out_smem[i].dtype)
            plgpu.commit_smem()
            rows = pl.ds(wg * ROWS, loaded)
            for i, out in enumerate(out_gmem):
                columns = columns_of(i)
                target = out.at[split, rows, columns] if geo.splits > 1 else out.at[rows, columns]
                plgpu.copy_smem_to_gmem(out_smem[i].at[wg, pl.ds(0, loaded)], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    result = jnp.float32 if geo.splits > 1 else dtype
    lead = (geo.splits,) if geo.splits > 1 else ()

    def smem(*shape, dtype=dtype):
        transforms = compat.smem_transforms(shape[-1], jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        stream_matmul,
        out_type=[jax.ShapeDtypeStruct((*lead, geo.rows, n), result) for n in geo.outs[:results]],
        scratch_types=[
            smem(geo.stages, tiles, ROWS, geo.block),
            *(smem(geo.stages, n, geo.block) for n in geo.columns),
            *(smem(tiles, ROWS, n, dtype=result) for n in geo.columns[:results]),
            plgpu.Barrier(num_barriers=geo.stages, num_arrivals=count + tiles),
            plgpu.Barrier(num_barriers=geo.stages, num_arrivals=tiles),
        ],
        grid=(geo.units, geo.splits),
        grid_names=("unit", "split"),
        num_threads=tiles + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=compat.compiler_params(),
    )
