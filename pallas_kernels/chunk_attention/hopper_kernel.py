"""The kernel's body for Hopper (sm_90): chosen chunks of a KV pool, read where they lie.

One block of threads a processor, each going through its share of the work items. An item is a unit
of the block table (a run of key blocks of one request), a KV head and a group of query tiles. One
warp asks the copy engine for K and V blocks, several ahead, and goes on into the next item; one or
two warpgroups multiply, each 64 packed query rows, with a running log-sum-exp. Two work on a query
tile each, over the same keys, or take turns with the blocks of keys and join at the item's end.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_schedule import SLOT_SHIFT, VALID_BITS
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.geometry import ROWS, Geometry

_LOG2E = math.log2(math.e)


def tiled(columns: int) -> tuple:
    """How shared memory holds a tile of so many half-precision columns."""
    width = min(columns, 64)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _mod(x: jax.Array, n: int) -> jax.Array:
    return lax.rem(x, jnp.int32(n))


def _div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x, jnp.int32(n))


def build(geo: Geometry, dtype: jnp.dtype, *, whole: bool, interpret):
    """The callable: q, k, v, near_k, near_v, blocks, facts, units, layer -> out, lse.

    q [B, 1, K or, with near keys, K + 1, T, H, D]; k, v [L, N, G, C, D]; near_k, near_v
    [B, S, G, D], S whole blocks, left out where geo.near_blocks is 0; the table's arrays; layer
    int32 [1].
    Returns out [splits, R, D] in `dtype` and lse [splits, R] float32 (natural log), rows (b, h, t);
    `whole`, which wants a single split: out [B, T, H, D] and lse [R].
    """
    tiles, turns, stages = geo.tiles_per_block, geo.key_groups, geo.stages
    wgs, keys, dim = tiles * turns, geo.block_keys, geo.dim
    units = geo.batch * geo.splits
    most = geo.blocks_of_unit
    blocks_of_threads = min(geo.items, geo.processors)
    per_row_tiles = geo.rows // geo.rows_per_head
    by_row = plgpu.Layout.WGMMA.reduce(1)
    apart = keys != dim
    has_near = geo.near_blocks > 0

    def work(index):
        """Item -> unit, KV head and tile group."""
        rest = _div(index, units)
        return _mod(index, units), _div(rest, geo.groups), _mod(rest, geo.groups)

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

    def chunk_attention(q_gmem, k_gmem, v_gmem, *refs: Any):
        near_gmem, refs = refs[: 2 * has_near], refs[2 * has_near :]
        blocks_gmem, facts_gmem, units_gmem, layer_gmem, out_gmem, lse_gmem, *scratch = refs
        q_smem, p_smem, out_smem, lse_smem, k_smem, v_smem, *barriers = scratch
        q_full, k_full, v_full, k_empty, v_empty, v_clean, joined, released = barriers
        near_k_gmem, near_v_gmem = near_gmem or (None, None)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        count = _div(geo.items - 1 - cta, blocks_of_threads) + 1

        def work_of(i):
            return work(cta + i * blocks_of_threads)

        @pl.when(wg == wgs)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _one_warp(warp):
                @pl.when(warp == 0)
                def _():
                    layer = layer_gmem[0]

                    def load(place, n, head, request):
                        stage = _mod(n, stages)
                        for pool, near, smem, full, empty in (
                            (k_gmem, near_k_gmem, k_smem, k_full, k_empty),
                            (v_gmem, near_v_gmem, v_smem, v_full, v_empty),
                        ):

                            @pl.when(n >= stages)
                            def _(empty=empty):
                                plgpu.barrier_wait(empty.at[stage])

                            target, arrived = smem.at[stage], full.at[stage]

                            def from_pool(pool=pool, target=target, arrived=arrived):
                                chunk = _div(place, geo.per_chunk)
                                rows = pl.ds(_mod(place, geo.per_chunk) * keys, keys)
                                source = pool.at[layer, chunk, head, rows]
                                plgpu.copy_gmem_to_smem(source, target, arrived)

                            def from_near(near=near, target=target, arrived=arrived):
                                rows = pl.ds((-1 - place) * keys, keys)
                                source = near.at[request, rows, head]
                                plgpu.copy_gmem_to_smem(source, target, arrived)

                            if has_near:
                                pl.when(place >= 0)(from_pool)
                                pl.when(place < 0)(from_near)
                            else:
                                from_pool()

                    def run(i, n):
                        unit, head, _ = work_of(i)
                        request, length = units_gmem[unit * 3], units_gmem[unit * 3 + 2]
                        base = unit * most

                        def step(j, carry):
                            n, place = carry
                            following = blocks_gmem[base + jnp.minimum(j + 1, most - 1)]
                            load(place, n, head, request)
                            return n + 1, following

                        return lax.fori_loop(0, length, step, (n, blocks_gmem[base]))[0]

                    n = lax.fori_loop(0, count, run, jnp.int32(0))

                    # No arrival is left over when the kernel ends.
                    @pl.loop(jnp.maximum(n - stages, 0), n)
                    def _drain(i):
                        stage = _mod(i, stages)
                        plgpu.barrier_wait(k_empty.at[stage])
                        plgpu.barrier_wait(v_empty.at[stage])

        @pl.when(wg < wgs)
        def _consumer():
            plgpu.set_max_registers(232, action="increase")
            q_tile, p_tile, q_ready = q_smem.at[wg], p_smem.at[wg], q_full.at[wg]
            here, turn = _mod(wg, tiles), _div(wg, tiles)
            # The result leaves from where the weights were, if that has its shape.
            results = out_smem if apart else p_smem
            out_tile, lse_tile = results.at[wg], lse_smem.at[wg]

            def look(i, n):
                """What this warpgroup must know of the i-th item, which n blocks come before."""
                unit, head, group = work_of(i)
                # Its blocks: every `turns`th from `begin`. A stage is always of the same
                # warpgroup, since whoever waits at a barrier must do so in every phase.
                begin = _mod(n + turn, turns)
                fact = facts_gmem[unit * most + jnp.minimum(begin, most - 1)]
                request, split, length = (units_gmem[unit * 3 + field] for field in range(3))
                return request, split, length, head, group * tiles + here, begin, unit * most, fact

            def slot_of(fact):
                return fact >> SLOT_SHIFT if geo.query_slots else 0

            def load_queries(request, slot, head, tile):
                for rows, row, query_head, _ in segments(head, tile):
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[request, slot, pl.ds(row, geo.rows_per_head), query_head],
                        q_tile.at[rows],
                        q_ready,
                    )

            def ask(item, wanted):
                """For the rows that an item begins with."""
                request, _split, length, head, tile, begin, _base, fact = item

                @pl.when(wanted & (begin < length))
                def _():
                    load_queries(request, slot_of(fact), head, tile)

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

            def run(i, carry):
                n, item = carry
                request, split, length, head, tile, begin, base, fact = item
                more = i + 1 < count
                following_item = look(jnp.minimum(i + 1, count - 1), n + length)

                def block(step, carry):
                    peak, total, acc, present, fact = carry
                    j = begin + step * turns
                    stage = _mod(n + j, stages)
                    valid, slot = fact & VALID_BITS, slot_of(fact)
                    last = j + turns >= length
                    # What lies behind a unit's end may lie behind the table's.
                    fact = facts_gmem[base + jnp.minimum(j + turns, most - 1)]

                    @pl.when((step == 0) | (slot != present))
                    def _():
                        plgpu.barrier_wait(q_ready)

                    plgpu.barrier_wait(k_full.at[stage])

                    def scores_of(ref):
                        plgpu.wgmma(ref, q_tile, k_smem.at[stage].transpose((1, 0)))
                        return ref[...]

                    scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, keys), jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[stage])
                    # The next rows are on their way while this block is finished.
                    if geo.query_slots:
                        following = slot_of(fact)

                        @pl.when(jnp.logical_not(last) & (following != slot))
                        def _():
                            load_queries(request, following, head, tile)

                    ask(following_item, more & last)

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
                    if not apart:

                        @pl.when((step == 0) & (i > 0))
                        def _():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

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
                    return new_peak, total, acc, slot, fact

                start = (
                    plgpu.layout_cast(jnp.full((ROWS,), EMPTY_LSE, jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
                    jnp.int32(0),
                    fact,
                )
                steps = jnp.maximum(_div(length - begin + turns - 1, turns), 0)

                @pl.when(steps == 0)
                def _():
                    ask(following_item, more)

                peak, total, acc, _, _ = lax.fori_loop(0, steps, block, start)
                safe = jnp.maximum(total, 1e-30)
                acc = acc * lax.broadcast_in_dim(1 / safe, acc.shape, [0])
                lse = (peak + jnp.log(safe) * _LOG2E) * (1 / _LOG2E)
                lse = jnp.where(total > 0, lse, EMPTY_LSE)

                def leave(acc, lse):
                    @pl.when(i > 0)
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    out_tile[...] = acc.astype(dtype)
                    lse_tile[...] = lse
                    plgpu.commit_smem()

                if turns == 1:
                    leave(acc, lse)
                    send(request, split, head, tile)
                    return n + length, following_item

                @pl.when(wg == 1)
                def _():
                    leave(acc, lse)
                    plgpu.barrier_arrive(joined)
                    plgpu.barrier_wait(released)

                @pl.when(wg == 0)
                def _():
                    plgpu.barrier_wait(joined)
                    other = compat.load(results.at[1], plgpu.Layout.WGMMA).astype(jnp.float32)
                    other_lse = compat.load(lse_smem.at[1], by_row)
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

                return n + length, following_item

            def send(request, split, head, tile):
                """The rows in the result's tile to their places in the outputs."""
                for rows, row, query_head, exists in segments(head, tile):
                    start = (request * geo.heads + query_head) * geo.rows + row
                    flat = pl.ds(start, geo.rows_per_head)
                    if whole:
                        place = pl.ds(row, geo.rows_per_head)
                        targets = out_gmem.at[request, place, query_head], lse_gmem.at[flat]
                    else:
                        targets = out_gmem.at[split, flat], lse_gmem.at[split, flat]

                    @pl.when(exists)
                    def _(rows=rows, targets=targets):
                        plgpu.copy_smem_to_gmem(out_tile.at[rows], targets[0])
                        plgpu.copy_smem_to_gmem(lse_tile.at[rows], targets[1])

            first = look(0, 0)
            ask(first, True)
            lax.fori_loop(0, count, run, (jnp.int32(0), first))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def tile(rows, columns=dim, count=1):
        return plgpu.SMEM((count, rows, columns), dtype, transforms=tiled(columns))

    barriers = plgpu.Barrier
    out_shape: tuple[int, ...] = (geo.batch, geo.rows, geo.heads, dim)
    lse_shape: tuple[int, ...] = (geo.flat_rows,)
    if not whole:
        out_shape, lse_shape = (geo.splits, geo.flat_rows, dim), (geo.splits, geo.flat_rows)
    return plgpu.kernel(
        chunk_attention,
        out_type=[
            jax.ShapeDtypeStruct(out_shape, dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        scratch_types=[
            tile(ROWS, count=wgs),
            tile(ROWS, keys, count=wgs),
            tile(ROWS, count=wgs) if apart else tile(8, 64),
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
