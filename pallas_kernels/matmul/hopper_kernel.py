"""The Hopper kernel for products of few rows: every weight is read once, at memory bandwidth.

A CTA makes some columns of one result, over the whole inner dimension or, with splits, over a part
of it. One producer warp issues TMA loads of weights and rows, several stages ahead. Each of the
other warpgroups multiplies a tile of 64 rows of a weight with all rows of x, over its part of a
stage: the result is transposed, so that few rows fill few of the tensor cores' columns, and the
tile may come from registers. Weights of 8 bits are turned into x's dtype there.
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


def build_matmul(
    geo: Geometry, dtype: jnp.dtype, values: jnp.dtype, rows: jnp.dtype, *, interpret: Any
) -> Any:
    """Makes the callable: x [R, I], weights [O_i, I], scales [O_i], biases [O_i] -> [R, O_i].

    With splits the results are float32 [splits, O_i, R], to be summed; there are no biases then.

    Args:
      geo: how the work is cut.
      dtype: of biases and results.
      values: of the weights. There are scales, in float32, if it is not `rows`.
      rows: the dtype of x, in which it is multiplied.
      interpret: see `compat.interpreter`.
    """
    cut, tiles, steps, results = geo.tuning, geo.tiles, geo.steps, geo.results
    count, at_once, parts, depth = len(results), geo.at_once, cut.parts, cut.block // cut.parts
    scaled, split_up, consumers = values != rows, cut.splits > 1, geo.consumers
    biased, result = geo.biases and not split_up, jnp.float32 if split_up else dtype
    staging = scaled and interpret is not None  # the interpreter takes no operand in registers

    def stream_matmul(x_gmem, *refs):
        rest = iter(refs)

        def take(n):
            return list(itertools.islice(rest, n))

        w_gmem, scale_gmem = take(len(geo.outs)), take(len(geo.outs) * scaled)
        bias_gmem, out_gmem, w_smem = take(count * biased), take(count), take(at_once)
        x_smem, out_smem, full, empty = take(4)
        scale_smem, bias_smem = take(at_once * scaled), take(biased)
        extra = take(scaled or biased)
        sum_smem, summed = take(at_once * (parts > 1)), take(parts > 1)
        staged = take(staging)
        cta, split, wg = (lax.axis_index(name) for name in ("cta", "split", "wg"))
        part, tile = lax.div(wg, jnp.int32(tiles)), lax.rem(wg, jnp.int32(tiles))

        def of_result(run: Callable[[int, Any], None]) -> None:
            """Runs with the CTA's result and its first column of it."""
            for i, (first, end) in enumerate(zip(geo.firsts, geo.firsts[1:], strict=False)):
                start = jnp.minimum((cta - first) * cut.columns, results[i] - cut.columns)
                pl.when((first <= cta) & (cta < end))(functools.partial(run, i, start))

        def stage_of(step):
            return lax.rem(step, jnp.int32(cut.stages))

        def load(i, start, step):
            stage = stage_of(step)
            arrived = full.at[stage]
            pl.when(step >= cut.stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
            for p in range(parts):
                inner = pl.ds((split * steps + step) * cut.block + p * depth, depth)
                for weight, target in zip(w_gmem[i:], w_smem, strict=False):
                    for t in range(tiles):
                        source = weight.at[pl.ds(start + t * ROWS, ROWS), inner]
                        plgpu.copy_gmem_to_smem(source, target.at[stage, p, t], arrived)
                plgpu.copy_gmem_to_smem(x_gmem.at[:, inner], x_smem.at[stage, p], arrived)

        def load_all(i, start):
            once = [*zip(scale_gmem[i:], scale_smem, strict=False)]
            once += zip(bias_gmem[i:], bias_smem, strict=False)
            for source, target in once:
                for t in range(tiles):
                    columns = pl.ds(start + t * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(source.at[columns], target.at[t], *extra)
            pl.loop(0, steps)(lambda step: load(i, start, step))

        def produce():
            of_result(load_all)

            # Wait for the last arrivals: none may be pending when the kernel ends.
            @pl.loop(max(steps - cut.stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[stage_of(step)])

        @pl.when(wg == consumers)
        def _producer():
            if consumers > 1:
                plgpu.set_max_registers(40, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(produce))

        def operand(weight):
            if not scaled:
                return weight
            converted = convert(weight, rows)
            if not staged:
                return converted
            staged[0].at[wg][...] = converted
            plgpu.commit_smem()
            return staged[0].at[wg]

        def multiply(*accs):
            @pl.loop(0, steps)
            def _(step):
                stage = stage_of(step)
                plgpu.barrier_wait(full.at[stage])
                x = x_smem.at[stage, part].transpose((1, 0))
                for weight, acc in zip(w_smem, accs, strict=True):
                    plgpu.wgmma(acc, operand(weight.at[stage, part, tile]), x)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[stage])

            return tuple(acc[...] for acc in accs)

        def by_column(ref):
            column = compat.load(ref.at[tile], plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
            return lax.broadcast_in_dim(column, (ROWS, geo.rows), [0])

        def finish(sums):
            if scaled or biased:
                plgpu.barrier_wait(*extra)
            if scaled:
                sums = [s * by_column(scale) for s, scale in zip(sums, scale_smem, strict=True)]
            if geo.activation == "swiglu":
                # Rounded as the two products would be if they were results.
                gate, up = (s.astype(dtype).astype(jnp.float32) for s in sums)
                act = (gate / (1 + jnp.exp(-gate))).astype(dtype).astype(jnp.float32)
                sums = [act * up]
            (total,) = sums
            if biased:
                total += by_column(*bias_smem)
            out_tile = out_smem.at[tile]
            (out_tile if split_up else out_tile.transpose((1, 0)))[...] = total.astype(result)
            plgpu.commit_smem()

            def send(i, start):
                columns = pl.ds(start + tile * ROWS, ROWS)
                target = out_gmem[i].at[(split, columns) if split_up else (slice(None), columns)]
                plgpu.copy_smem_to_gmem(out_tile, target)

            of_result(send)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg < consumers)
        def _consumer():
            if consumers > 1:
                plgpu.set_max_registers(geo.registers, action="increase")
            acc = plgpu.ACC((ROWS, geo.rows), jnp.float32)
            sums = pl.run_scoped(multiply, *[acc] * at_once)
            if parts == 1:
                finish(sums)
                return

            @pl.when(part > 0)
            def _():
                for s, target in zip(sums, sum_smem, strict=True):
                    target.at[part - 1, tile][...] = s
                plgpu.barrier_arrive(*summed)

            @pl.when(part == 0)
            def _():
                plgpu.barrier_wait(*summed)
                totals = list(sums)
                for i, p in itertools.product(range(at_once), range(parts - 1)):
                    totals[i] += compat.load(sum_smem[i].at[p, tile], plgpu.Layout.WGMMA)
                finish(totals)

    def smem(*shape, dtype=dtype):
        transforms = compat.smem_transforms(shape[-1], jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    once: list[Any] = [plgpu.SMEM((tiles, ROWS), jnp.float32)] * (at_once * scaled)
    once += [plgpu.SMEM((tiles, ROWS), dtype)] * biased
    once += [plgpu.Barrier(num_arrivals=tiles * len(once))] if once else []
    if parts > 1:
        once += [smem(parts - 1, tiles, ROWS, geo.rows, dtype=jnp.float32)] * at_once
        once += [plgpu.Barrier(num_arrivals=tiles * (parts - 1))]
    once += [smem(consumers, ROWS, depth, dtype=rows)] * staging
    return plgpu.kernel(
        stream_matmul,
        out_type=[
            jax.ShapeDtypeStruct((cut.splits, n, geo.rows) if split_up else (geo.rows, n), result)
            for n in results
        ],
        scratch_types=[
            *[smem(cut.stages, parts, tiles, ROWS, depth, dtype=values)] * at_once,
            smem(cut.stages, parts, geo.rows, depth, dtype=rows),
            smem(tiles, *((ROWS, geo.rows) if split_up else (geo.rows, ROWS)), dtype=result),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=parts * (at_once * tiles + 1)),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=consumers),
            *once,
        ],
        grid=(geo.firsts[-1], cut.splits),
        grid_names=("cta", "split"),
        num_threads=consumers + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=compat.compiler_params(),
    )


def convert(tile: Any, dtype: jnp.dtype) -> jax.Array:
    """Returns a tile of weights of 8 bits in the registers from which it is multiplied."""
    values = plgpu.layout_cast(compat.load(tile, plgpu.Layout.WGMMA_UPCAST_2X), plgpu.Layout.WGMMA)
    if values.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        # The hardware converts to float16 alone; both steps are exact.
        values = values.astype(jnp.float16).astype(jnp.float32)
    return values.astype(dtype)
