"""The kernel's body for Hopper (sm_90): chosen chunks of a KV pool, read where they lie.

One block of threads a processor, each going through its share of the work items. An item is a unit
of the block table (a run of key blocks of one request), a KV head and a group of query tiles. One
warp asks the copy engine for K and V blocks, several ahead, and goes on into the next item; one or
two warpgroups multiply, each 64 packed query rows, with a running log-sum-exp. Two work on a query
tile each, over the same keys, or take turns with the blocks of keys and join at the item's end.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.block_table import SLOT_SHIFT, VALID_BITS
from pallas_kernels.geometry import ROWS, Geometry
from pallas_kernels.partial import EMPTY_LSE

_LOG2E = math.log2(math.e)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _mod(x: jax.Array, n: int) -> jax.Array:
    return lax.rem(x, jnp.int32(n))


def _div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x, jnp.int32(n))


def build(geo: Geometry, dtype: jnp.dtype, interpret):
    """The callable: q, k, v, blocks, facts, units, layer -> partial outputs and log-sum-exps.

    q [B, K or 1, T, H, D]; k, v [L, N, G, C, D]; the table's arrays; layer int32 [1].
    Returns out [splits, R, D] in `dtype` and lse [splits, R] float32 (natural log), rows (b, h, t).
    """
    tiles, turns, stages = geo.tiles_per_block, geo.key_groups, geo.stages
    wgs, keys, dim = tiles * turns, geo.block_keys, geo.dim
    units = geo.batch * geo.splits
    blocks_of_threads = min(geo.items, geo.processors)
    per_row_tiles = geo.rows // geo.rows_per_head

    def item(index, units_ref):
        """Work item -> unit's request, split, blocks lo..hi, and KV head and tile group."""
        unit, rest = _mod(index, units) * 4, _div(index, units)
        head, group = _div(rest, geo.groups), _mod(rest, geo.groups)
        return (*(units_ref[unit + i] for i in range(4)), head, group)

    def segments(head, tile):
        """(tile rows, first row of T, query head, whether it exists) of a tile's pieces."""
        rows = geo.rows_per_head
        first_head = _div(tile, per_row_tiles) * geo.heads_per_tile
        row = _mod(tile, per_row_tiles) * rows
        for i in range(geo.heads_per_tile):
            local = first_head + i
            exists = (local < geo.heads_per_kv) & (tile < geo.tiles)
            local = jnp.minimum(local, geo.heads_per_kv - 1)
            yield pl.ds(i * rows, rows), row, head * geo.heads_per_kv + local, exists

    def chunk_attention(
        q_gmem, k_gmem, v_gmem, blocks_gmem, facts_gmem, units_gmem, layer_gmem, out_gmem, lse_gmem,
        q_smem, p_smem, lse_smem, k_smem, v_smem,
        q_full, k_full, v_full, k_empty, v_empty, v_clean, joined, released,
    ):  # fmt: skip
        if interpret is None:  # which knows no launches that overlap
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        count = _div(geo.items - 1 - cta, blocks_of_threads) + 1

        def items(body, carry):
            """Folds body(request, split, lo, hi, head, group, carry) over this block's items."""

            def step(i, carry):
                return body(*item(cta + i * blocks_of_threads, units_gmem), carry)

            return lax.fori_loop(0, count, step, carry)

        @pl.when(wg == wgs)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _one_warp(warp):
                @pl.when(warp == 0)
                def _():
                    layer = layer_gmem[0]

                    def load(i, n, head):
                        stage = _mod(n, stages)
                        place = blocks_gmem[i]
                        chunk = _div(place, geo.per_chunk)
                        rows = pl.ds(_mod(place, geo.per_chunk) * keys, keys)
                        for gmem, smem, full, empty in (
                            (k_gmem, k_smem, k_full, k_empty),
                            (v_gmem, v_smem, v_full, v_empty),
                        ):

                            @pl.when(n >= stages)
                            def _(empty=empty):
                                plgpu.barrier_wait(empty.at[stage])

                            plgpu.copy_gmem_to_smem(
                                gmem.at[layer, chunk, head, rows], smem.at[stage], full.at[stage]
                            )
                        return n + 1

                    def run(request, split, lo, hi, head, group, n):
                        return lax.fori_loop(lo, hi, lambda i, n: load(i, n, head), n)

                    n = items(run, jnp.int32(0))

                    # No arrival is left over when the kernel ends.
                    @pl.loop(jnp.maximum(n - stages, 0), n)
                    def _drain(i):
                        stage = _mod(i, stages)
                        plgpu.barrier_wait(k_empty.at[stage])
                        plgpu.barrier_wait(v_empty.at[stage])

        @pl.when(wg < wgs)
        def _consumer():
            plgpu.set_max_registers(232, action="increase")
            q_tile, p_tile, lse_tile = q_smem.at[wg], p_smem.at[wg], lse_smem.at[wg]
            q_ready = q_full.at[wg]

            def load_queries(request, slot, head, tile):
                for rows, row, query_head, _ in segments(head, tile):
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[request, slot, pl.ds(row, geo.rows_per_head), query_head],
                        q_tile.at[rows],
                        q_ready,
                    )

            def clean(stage, valid):
                """Zeroes V behind the valid keys: 0 x NaN would be NaN."""

                @pl.when(wg % tiles == 0)
                def _():
                    for start in range(0, keys, ROWS):
                        part = v_smem.at[stage, pl.ds(start, ROWS)]
                        values = compat.load(part, plgpu.Layout.WGMMA)
                        row = plgpu.broadcasted_iota(
                            jnp.int32, (ROWS, dim), 0, layout=plgpu.Layout.WGMMA
                        )
                        zero = jnp.zeros((), dtype)
                        part[...] = jnp.where(row + start < valid, values, zero)
                    plgpu.commit_smem()
                    if tiles > 1:
                        plgpu.barrier_arrive(v_clean.at[stage])

                if tiles > 1:

                    @pl.when(wg > 0)
                    def _():
                        plgpu.barrier_wait(v_clean.at[stage])

            def run(request, split, lo, hi, head, group, n):
                tile = group * tiles + _mod(wg, tiles)
                # This warpgroup's blocks: every `turns`th from here. A stage is always of the same
                # warpgroup, since whoever waits at a barrier must do so in every phase.
                begin = lo + _mod(n + _div(wg, tiles), turns)

                def fact_of(i):
                    # What lies behind a unit's end may lie behind the table's.
                    return facts_gmem[jnp.minimum(i, facts_gmem.shape[0] - 1)]

                def slot_of(fact):
                    return fact >> SLOT_SHIFT if geo.query_slots else 0

                @pl.when(begin < hi)
                def _():
                    load_queries(request, slot_of(fact_of(begin)), head, tile)

                def block(step, carry):
                    peak, total, acc, present = carry
                    i = begin + step * turns
                    stage = _mod(n + i - lo, stages)
                    fact = fact_of(i)
                    valid, slot = fact & VALID_BITS, slot_of(fact)

                    @pl.when((step == 0) | (slot != present))
                    def _():
                        plgpu.barrier_wait(q_ready)

                    plgpu.barrier_wait(k_full.at[stage])

                    def scores_of(ref):
                        plgpu.wgmma(ref, q_tile, k_smem.at[stage].transpose((1, 0)))
                        return ref[...]

                    scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, keys), jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[stage])
                    if geo.query_slots:
                        # The next slot's rows are on their way while this block is finished.
                        following = slot_of(fact_of(i + turns))

                        @pl.when((i + turns < hi) & (following != slot))
                        def _():
                            load_queries(request, following, head, tile)

                    def masked(scores):
                        key = plgpu.broadcasted_iota(
                            jnp.int32, (ROWS, keys), 1, layout=plgpu.Layout.WGMMA
                        )
                        return jnp.where(key < valid, scores, EMPTY_LSE)

                    scores = lax.cond(valid < keys, masked, lambda x: x, scores)
                    factor = geo.scale * _LOG2E
                    new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
                    fade = jnp.exp2(peak - new_peak)
                    weights = jnp.exp2(
                        scores * factor - lax.broadcast_in_dim(new_peak, scores.shape, [0])
                    )
                    total = total * fade + weights.sum(axis=1)
                    acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
                    p_tile[...] = weights.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_wait(v_full.at[stage])

                    @pl.when(valid < keys)
                    def _():
                        clean(stage, valid)

                    def weighted_values(ref):
                        plgpu.wgmma(ref, p_tile, v_smem.at[stage])
                        return ref[...]

                    acc += pl.run_scoped(weighted_values, plgpu.ACC((ROWS, dim), jnp.float32))
                    plgpu.barrier_arrive(v_empty.at[stage])
                    return new_peak, total, acc, slot

                by_row = plgpu.Layout.WGMMA.reduce(1)
                start = (
                    plgpu.layout_cast(jnp.full((ROWS,), EMPTY_LSE, jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
                    jnp.int32(0),
                )
                steps = jnp.maximum(_div(hi - begin + turns - 1, turns), 0)
                peak, total, acc, _ = lax.fori_loop(0, steps, block, start)
                safe = jnp.maximum(total, 1e-30)
                acc = acc * lax.broadcast_in_dim(1 / safe, acc.shape, [0])
                lse = (peak + jnp.log(safe) * _LOG2E) * (1 / _LOG2E)
                lse = jnp.where(total > 0, lse, EMPTY_LSE)

                def leave(acc, lse):
                    """The query tile has been read for the last time: the result leaves from it."""
                    q_tile[...] = acc.astype(dtype)
                    lse_tile[...] = lse
                    plgpu.commit_smem()

                if turns == 1:
                    leave(acc, lse)
                    send(request, split, head, tile)
                    return n + hi - lo

                @pl.when(wg == 1)
                def _():
                    leave(acc, lse)
                    plgpu.barrier_arrive(joined)
                    plgpu.barrier_wait(released)

                @pl.when(wg == 0)
                def _():
                    plgpu.barrier_wait(joined)
                    other = compat.load(q_smem.at[1], plgpu.Layout.WGMMA).astype(jnp.float32)
                    other_lse = compat.load(lse_smem.at[1], by_row)
                    plgpu.commit_smem()  # read before the copy engine brings the next item's rows
                    plgpu.barrier_arrive(released)
                    top = jnp.maximum(lse, other_lse)
                    mine, others = jnp.exp(lse - top), jnp.exp(other_lse - top)
                    both = 1 / (mine + others)
                    leave(
                        acc * lax.broadcast_in_dim(mine * both, acc.shape, [0])
                        + other * lax.broadcast_in_dim(others * both, acc.shape, [0]),
                        top + jnp.log(mine + others),
                    )
                    send(request, split, head, tile)

                return n + hi - lo

            def send(request, split, head, tile):
                """The rows in the query tile to their places in the outputs."""
                for rows, row, query_head, exists in segments(head, tile):
                    start = (request * geo.heads + query_head) * geo.rows + row
                    target = pl.ds(start, geo.rows_per_head)

                    @pl.when(exists)
                    def _(rows=rows, target=target):
                        plgpu.copy_smem_to_gmem(q_tile.at[rows], out_gmem.at[split, target])
                        plgpu.copy_smem_to_gmem(lse_tile.at[rows], lse_gmem.at[split, target])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            items(run, jnp.int32(0))

    def tile(rows, columns=dim, count=1):
        return plgpu.SMEM((count, rows, columns), dtype, transforms=TILED)

    barriers = plgpu.Barrier
    return plgpu.kernel(
        chunk_attention,
        out_type=[
            jax.ShapeDtypeStruct((geo.splits, geo.flat_rows, dim), dtype),
            jax.ShapeDtypeStruct((geo.splits, geo.flat_rows), jnp.float32),
        ],
        scratch_types=[
            tile(ROWS, count=wgs),
            tile(ROWS, keys, count=wgs),
            plgpu.SMEM((wgs, ROWS), jnp.float32),
            tile(keys, count=stages),
            tile(keys, count=stages),
            barriers(num_barriers=wgs, num_arrivals=geo.heads_per_tile),
            barriers(num_barriers=stages),
            barriers(num_barriers=stages),
            barriers(num_barriers=stages, num_arrivals=tiles),
            barriers(num_barriers=stages, num_arrivals=tiles),
            barriers(num_barriers=stages),
            barriers(),
            barriers(),
        ],
        grid=(blocks_of_threads,),
        grid_names=("cta",),
        num_threads=wgs + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )
