"""The Hopper kernel for products of few rows: every weight is read once, at memory bandwidth.

A CTA makes some columns of one result, over the whole inner dimension or, with splits, over a part
of it. One producer warp issues TMA loads of weights and rows, several stages ahead. One warpgroup
for each 64 rows multiplies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
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
    """Makes the callable: x [R, I], weights [O_i, I], biases [O_i] -> results [R, O_i] in `dtype`.

    With splits the results are float32 [splits, R, O_i], to be summed; there are no biases then.
    """
    cut, tiles, steps, results = geo.tuning, geo.tiles, geo.steps, geo.results
    count, columns, at_once = len(results), cut.columns, geo.at_once
    biased = geo.biases and cut.splits == 1

    def stream_matmul(x_gmem, *refs):
        rest = iter(refs)
        w_gmem, bias_gmem, out_gmem, w_smem = (
            list(itertools.islice(rest, n)) for n in (len(geo.outs), count * biased, count, at_once)
        )
        x_smem, out_smem, full, empty, *bias = rest
        cta, split, wg = (lax.axis_index(name) for name in ("cta", "split", "wg"))

        def of_result(run: Callable[[int, Any], None]) -> None:
            """Runs with the CTA's result and its first column of it."""
            for i, (first, end) in enumerate(zip(geo.firsts, geo.firsts[1:], strict=False)):
                start = jnp.minimum((cta - first) * columns, results[i] - columns)
                pl.when((first <= cta) & (cta < end))(functools.partial(run, i, start))

        def stage_of(step):
            return lax.rem(step, jnp.int32(cut.stages))

        def load(i, start, step):
            stage = stage_of(step)
            inner = pl.ds((split * steps + step) * cut.block, cut.block)
            arrived = full.at[stage]
            pl.when(step >= cut.stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
            for weight, target in zip(w_gmem[i:], w_smem, strict=False):
                source = weight.at[pl.ds(start, columns), inner]
                plgpu.copy_gmem_to_smem(source, target.at[stage], arrived)
            for tile, rows in enumerate(geo.loaded):
                source = x_gmem.at[pl.ds(tile * ROWS, rows), inner]
                plgpu.copy_gmem_to_smem(source, x_smem.at[stage, tile, pl.ds(0, rows)], arrived)

        def load_all(i, start):
            if biased:
                plgpu.copy_gmem_to_smem(bias_gmem[i].at[pl.ds(start, columns)], *bias)
            pl.loop(0, steps)(lambda step: load(i, start, step))

        def produce():
            of_result(load_all)

            # Wait for the last arrivals: none may be pending when the kernel ends.
            @pl.loop(max(steps - cut.stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[stage_of(step)])

        @pl.when(wg == tiles)
        def _producer():
            if tiles > 1:
                plgpu.set_max_registers(40, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

        def multiply(*accs):
            @pl.loop(0, steps)
            def _(step):
                stage = stage_of(step)
                plgpu.barrier_wait(full.at[stage])
                for weights, acc in zip(w_smem, accs, strict=True):
                    plgpu.wgmma(acc, x_smem.at[stage, wg], weights.at[stage].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[stage])

            return tuple(acc[...] for acc in accs)

        @pl.when(wg < tiles)
        def _consumer():
            if tiles > 1:
                plgpu.set_max_registers(232, action="increase")
            sums = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, columns), jnp.float32)] * at_once)
            if geo.activation == "swiglu":
                # Rounded as the two products would be if they were results.
                gate, up = (s.astype(dtype).astype(jnp.float32) for s in sums)
                act = (gate / (1 + jnp.exp(-gate))).astype(dtype).astype(jnp.float32)
                sums = (act * up,)
            (total,) = sums
            if biased:
                plgpu.barrier_wait(bias[1])
                added = compat.load(bias[0], plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                total += lax.broadcast_in_dim(added, total.shape, [1])
            out_smem.at[wg][...] = total.astype(out_smem.dtype)
            plgpu.commit_smem()

            def send(tile, rows, i, start):
                place = pl.ds(tile * ROWS, rows), pl.ds(start, columns)
                target = out_gmem[i].at[(split, *place) if cut.splits > 1 else place]
                plgpu.copy_smem_to_gmem(out_smem.at[tile, pl.ds(0, rows)], target)

            for tile, rows in enumerate(geo.loaded):
                store = functools.partial(send, tile, rows)
                pl.when(wg == tile)(functools.partial(of_result, store))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    result = jnp.float32 if cut.splits > 1 else dtype
    lead = (cut.splits,) if cut.splits > 1 else ()

    def smem(*shape, dtype=dtype):
        transforms = compat.smem_transforms(shape[-1], jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    bias: list[Any] = [plgpu.SMEM((columns,), dtype), plgpu.Barrier()] if biased else []
    return plgpu.kernel(
        stream_matmul,
        out_type=[jax.ShapeDtypeStruct((*lead, geo.rows, n), result) for n in results],
        scratch_types=[
            *[smem(cut.stages, columns, cut.block)] * at_once,
            smem(cut.stages, tiles, ROWS, cut.block),
            smem(tiles, ROWS, columns, dtype=result),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=at_once + tiles),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=tiles),
            *bias,
        ],
        grid=(geo.firsts[-1], cut.splits),
        grid_names=("cta", "split"),
        num_threads=tiles + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=compat.compiler_params(),
    )
