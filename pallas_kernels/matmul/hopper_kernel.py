"""The kernel's body for products of few rows (sm_90): weights go through once, at memory's speed.

A block of threads makes some columns of every result, over the whole inner dimension or, with
splits, over a part of it. One warp asks the copy engine for blocks of weights and of rows, several
ahead; a warpgroup for each 64 rows multiplies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import ROWS, MatmulGeometry


def _tiled(columns: int, itemsize: int) -> tuple:
    """How shared memory holds a tile of so many columns: rows of at most 128 bytes."""
    width = 128 // itemsize
    while columns % width:
        width //= 2
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * itemsize)


def build_matmul(geo: MatmulGeometry, dtype: jnp.dtype, *, interpret):
    """The callable: x [R, I], weights [O_i, I] -> results [R, O_i] in `dtype`, or, with splits,
    float32 [splits, R, O_i] to be summed.
    """
    count, results, tiles, steps = len(geo.outs), geo.results, geo.tiles, geo.steps
    loaded = min(geo.rows, ROWS)  # rows of a tile that exist

    def stream_matmul(x_gmem, *refs):
        weights, refs = refs[:count], refs[count:]
        outs, refs = refs[:results], refs[results:]
        x_smem, w_smem, out_smem = (
            refs[0],
            refs[1 : 1 + count],
            refs[1 + count : 1 + count + results],
        )
        full, empty = refs[1 + count + results :]
        unit, split, wg = lax.axis_index("unit"), lax.axis_index("split"), lax.axis_index("wg")

        def inner(step):
            return pl.ds((split * steps + step) * geo.block, geo.block)

        def source(i, step):
            return weights[i].at[pl.ds(unit * geo.columns[i], geo.columns[i]), inner(step)]

        @pl.when(wg == tiles)
        def _producer():
            @plgpu.warp_map
            def _one_warp(warp):
                @pl.when(warp == 0)
                def _():
                    @pl.loop(0, steps)
                    def _load(step):
                        stage = lax.rem(step, jnp.int32(geo.stages))
                        arrived = full.at[stage]

                        @pl.when(step >= geo.stages)
                        def _():
                            plgpu.barrier_wait(empty.at[stage])

                        for i in range(count):
                            plgpu.copy_gmem_to_smem(source(i, step), w_smem[i].at[stage], arrived)
                        for tile in range(tiles):
                            plgpu.copy_gmem_to_smem(
                                x_gmem.at[pl.ds(tile * ROWS, loaded), inner(step)],
                                x_smem.at[stage, tile, pl.ds(0, loaded)],
                                arrived,
                            )

                    # No arrival is left over when the kernel ends.
                    @pl.loop(max(steps - geo.stages, 0), steps)
                    def _drain(step):
                        plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(geo.stages))])

        @pl.when(wg < tiles)
        def _consumer():
            def block(step, sums):
                stage = lax.rem(step, jnp.int32(geo.stages))
                plgpu.barrier_wait(full.at[stage])
                made = []
                for i in range(count):

                    def product(ref, i=i):
                        columns = w_smem[i].at[stage].transpose((1, 0))
                        plgpu.wgmma(ref, x_smem.at[stage, wg], columns)
                        return ref[...]

                    shape = plgpu.ACC((ROWS, geo.columns[i]), jnp.float32)
                    made.append(sums[i] + pl.run_scoped(product, shape))
                plgpu.barrier_arrive(empty.at[stage])
                return tuple(made)

            def zeros(columns):
                nothing = jnp.zeros((ROWS, columns), jnp.float32)
                return plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)

            sums = lax.fori_loop(0, steps, block, tuple(zeros(n) for n in geo.columns))
            if geo.activation == "swiglu":
                # Rounded where the products' results would have been.
                gate, up = (s.astype(dtype).astype(jnp.float32) for s in sums)
                act = (gate / (1 + jnp.exp(-gate))).astype(dtype).astype(jnp.float32)
                sums = (act * up,)
            for i, made in enumerate(sums):
                out_smem[i].at[wg][...] = made.astype(out_smem[i].dtype)
            plgpu.commit_smem()
            rows = pl.ds(wg * ROWS, loaded)
            for i, out in enumerate(outs):
                columns = pl.ds(unit * geo.columns[i], geo.columns[i])
                target = out.at[split, rows, columns] if geo.splits > 1 else out.at[rows, columns]
                plgpu.copy_smem_to_gmem(out_smem[i].at[wg, pl.ds(0, loaded)], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    result = jnp.float32 if geo.splits > 1 else dtype
    lead = (geo.splits,) if geo.splits > 1 else ()
    itemsize = jnp.dtype(result).itemsize
    return plgpu.kernel(
        stream_matmul,
        out_type=[jax.ShapeDtypeStruct((*lead, geo.rows, n), result) for n in geo.outs[:results]],
        scratch_types=[
            plgpu.SMEM(
                (geo.stages, tiles, ROWS, geo.block), dtype, transforms=_tiled(geo.block, 2)
            ),
            *(
                plgpu.SMEM((geo.stages, n, geo.block), dtype, transforms=_tiled(geo.block, 2))
                for n in geo.columns
            ),
            *(
                plgpu.SMEM((tiles, ROWS, n), result, transforms=_tiled(n, itemsize))
                for n in geo.columns[:results]
            ),
            plgpu.Barrier(num_barriers=geo.stages, num_arrivals=count + tiles),
            plgpu.Barrier(num_barriers=geo.stages, num_arrivals=tiles),
        ],
        grid=(geo.units, geo.splits),
        grid_names=("unit", "split"),
        num_threads=tiles + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )
