"""The attention kernel for Hopper (sm_90): chosen chunks of a KV pool, read where they lie.

One CTA for each SM. A CTA goes through its share of the work items: a unit of the block table (a
run of key blocks of one request), a KV head and a group of query tiles. A producer warp issues TMA
loads of K and V blocks, several stages ahead and across items. One or two consumer warpgroups
multiply, 64 packed query rows each, with a running log-sum-exp. Two consumers have a query tile
each and share the keys, or take turns with the key blocks of one tile and join at the item's end.
Of a pool in fp8 a converter warpgroup makes the tiles that they multiply; the consumers apply a
block's scale of K to its scores, and keep the weighted values in units of the scale of V.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_converter import Converter
from pallas_kernels.chunk_attention.hopper_producer import Cta, Producer, div, mod
from pallas_kernels.chunk_attention.hopper_schedule import SLOT_SHIFT, VALID_BITS
from pallas_kernels.chunk_attention.hopper_tiling import Geometry
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.compat import ROWS

_LOG2E = math.log2(math.e)


def build(geo: Geometry, dtype: jnp.dtype, *, interpret: Any) -> Any:
    """Makes the callable: q, k, v, own_k, own_v, blocks, facts, units, layer -> out, lse.

    Its arguments are those of `chunk_attention_hopper` with geo.rows rows; own_k, own_v [B, S, G,
    D] with S whole blocks, left out without own keys; the arrays of the `BlockTable`; layer int32
    [1]. Of a pool in fp8 the scales of k and v [L, N, G] come behind v. Its rows are (b, h, t), R
    of them with padding. It returns with one split out [B, T, H, D] in `dtype` and lse [R] float32
    (natural log), with more out [splits, R, D] and lse [splits, R].
    """
    scratch = _scratch(geo, dtype)
    live = ("own_k_gmem", "own_v_gmem") if geo.own_blocks else ()
    tables = ("blocks_gmem", "facts_gmem", "units_gmem", "layer_gmem")
    pool = ("k_gmem", "v_gmem", *(("k_scale_gmem", "v_scale_gmem") if geo.narrow else ()))
    names = ("q_gmem", *pool, *live, *tables, "out_gmem", "lse_gmem", *scratch)
    # At most 512 in all: 65,536 for a thread of each warpgroup.
    crowded = geo.narrow and geo.consumers > 1
    consumer, converter, producer = (216, 56, 24) if crowded else (232, 120, 40)

    def chunk_attention(*refs: Any) -> None:
        cta = Cta(geo, dtype, SimpleNamespace(**dict(zip(names, refs, strict=True))))

        @pl.when(cta.wg == cta.consumers)
        def _producer() -> None:
            plgpu.set_max_registers(producer, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(lambda: Producer(cta).run()))

        if geo.narrow:

            @pl.when(cta.wg == cta.consumers + 1)
            def _converter() -> None:
                plgpu.set_max_registers(converter, action="decrease")
                Converter(cta).run()

        @pl.when(cta.wg < cta.consumers)
        def _consumer() -> None:
            plgpu.set_max_registers(consumer, action="increase")
            _Consumer(cta).run()

    splits = geo.tuning.splits
    lead, tail = (splits, geo.flat_rows), (geo.batch, geo.rows, geo.heads, geo.dim)
    out, lse = (tail, lead[1:]) if splits == 1 else ((*lead, geo.dim), lead)
    return plgpu.kernel(
        chunk_attention,
        out_type=[jax.ShapeDtypeStruct(out, dtype), jax.ShapeDtypeStruct(lse, jnp.float32)],
        # In this order, as a dict would be sorted by name.
        scratch_types=list(scratch.values()),
        grid=(min(geo.items, geo.sms),),
        grid_names=("cta",),
        num_threads=geo.consumers + 1 + geo.narrow,
        thread_name="wg",
        interpret=interpret,
        compiler_params=compat.compiler_params(),
    )


def _scratch(geo: Geometry, dtype: jnp.dtype) -> dict[str, Any]:
    """Shared memory and barriers by name. p: weights; x_full and x_empty: TMA loads of x."""
    wgs, keys, stages = geo.consumers, geo.tuning.block_keys, geo.tile_stages
    in_flight, turns = geo.tuning.stages, geo.tile_turns

    def tile(count: int, rows: int, columns: int, dtype: Any = dtype) -> Any:
        transforms = compat.smem_transforms(columns, jnp.dtype(dtype).itemsize)
        return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)

    narrow: dict[str, Any] = {}
    for x in ("k8", "v8") if geo.narrow else ():
        narrow[f"{x}_smem"] = tile(in_flight, keys, geo.dim, jnp.float8_e4m3fn)
        narrow[f"{x}_full"] = plgpu.Barrier(num_barriers=in_flight)
        narrow[f"{x}_empty"] = plgpu.Barrier(num_barriers=in_flight)
    return narrow | {
        "q_smem": tile(wgs, ROWS, geo.dim),
        "p_smem": tile(wgs, ROWS, keys),
        # Results leave from where the weights were if the shapes are equal.
        "out_smem": tile(wgs, ROWS, geo.dim) if keys != geo.dim else tile(1, 8, 64),
        "lse_smem": plgpu.SMEM((wgs, ROWS), jnp.float32),
        "k_smem": tile(stages, keys, geo.dim),
        "v_smem": tile(stages, keys, geo.dim),
        "q_full": plgpu.Barrier(num_barriers=wgs, num_arrivals=geo.heads_per_tile),
        "k_full": plgpu.Barrier(num_barriers=turns),
        "v_full": plgpu.Barrier(num_barriers=turns),
        "k_empty": plgpu.Barrier(num_barriers=turns, num_arrivals=geo.tiles_per_cta),
        "v_empty": plgpu.Barrier(num_barriers=turns, num_arrivals=geo.tiles_per_cta),
        "v_clean": plgpu.Barrier(num_barriers=turns),
        "joined": plgpu.Barrier(),
        "released": plgpu.Barrier(),
    }


def _wait_sent() -> None:
    """Waits until results have left shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Block(NamedTuple):
    """What a consumer knows of a key block. fact: see `BlockTable.facts`. Scales: of fp8 alone."""

    fact: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class _Item(NamedTuple):
    """What a consumer knows of a work item."""

    request: jax.Array
    split: jax.Array
    length: jax.Array  # key blocks of the unit
    head: jax.Array  # KV head
    tile: jax.Array
    begin: jax.Array  # the consumer's first block
    base: jax.Array  # place of the unit's first block in the table
    block: _Block  # the consumer's first block


class _Consumer:
    """A warpgroup that multiplies: one query tile of each of the CTA's items."""

    def __init__(self, cta: Cta) -> None:
        self.cta, self.geo, self.refs, wg = cta, cta.geo, cta.refs, cta.wg
        refs, self.tiles = cta.refs, cta.geo.tiles_per_cta
        self.keys, self.turns = cta.geo.tuning.block_keys, cta.geo.tuning.key_groups
        self.q_tile, self.p_tile = refs.q_smem.at[wg], refs.p_smem.at[wg]
        self.q_ready = refs.q_full.at[wg]
        self.local_tile, self.turn = mod(wg, self.tiles), div(wg, self.tiles)
        self.shares_smem = self.keys == self.geo.dim  # weights and results
        self.results = refs.p_smem if self.shares_smem else refs.out_smem
        self.out_tile, self.lse_tile = self.results.at[wg], refs.lse_smem.at[wg]
        self.by_row = plgpu.Layout.WGMMA.reduce(1)

    def run(self) -> None:
        first = self.read_item(0, 0)
        self.prefetch_queries(first, True)
        lax.fori_loop(0, self.cta.count, self.attend_item, (jnp.int32(0), first))
        _wait_sent()

    def read_item(self, i: Any, n: Any) -> _Item:
        """Reads the CTA's i-th item, which n blocks of other items come before."""
        refs, most = self.refs, self.geo.blocks_of_unit
        unit, head, group = self.cta.item(i)
        # Every `turns`th block from `begin` on. A stage always belongs to the same warpgroup, since
        # a warpgroup that waits at a barrier must do so in every phase.
        begin = mod(n + self.turn, self.turns)
        block = self.read_block(unit * most + jnp.minimum(begin, most - 1), head)
        request, split, length = (refs.units_gmem[unit * 3 + field] for field in range(3))
        tile = group * self.tiles + self.local_tile
        return _Item(request, split, length, head, tile, begin, unit * most, block)

    def read_block(self, i: Any, head: Any) -> _Block:
        """Reads what the table says of its i-th block, and the block's scales."""
        refs = self.refs
        if not self.geo.narrow:
            return _Block(refs.facts_gmem[i])
        place = refs.blocks_gmem[i]
        at = refs.layer_gmem[0], div(jnp.maximum(place, 0), self.geo.per_chunk), head
        scales = refs.k_scale_gmem[at], refs.v_scale_gmem[at]
        return _Block(refs.facts_gmem[i], *(jnp.where(place >= 0, x, 1.0) for x in scales))

    def slot_of(self, fact: jax.Array) -> Any:
        return fact >> SLOT_SHIFT if self.geo.query_slots else 0

    def segments(self, head: Any, tile: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yields (rows of the tile, first row of T, query head, whether it exists) for each head.

        The last tile of a KV head may have room for more heads than are left.
        """
        geo, rows = self.geo, self.geo.rows_per_head
        tiles_of_head = geo.rows // rows
        first_head = div(tile, tiles_of_head) * geo.heads_per_tile
        row = mod(tile, tiles_of_head) * rows
        for i in range(geo.heads_per_tile):
            local = first_head + i
            exists = (local < geo.heads_per_kv) & (tile < geo.tiles)
            local = jnp.minimum(local, geo.heads_per_kv - 1)
            yield pl.ds(i * rows, rows), row, head * geo.heads_per_kv + local, exists

    def load_queries(self, item: _Item, slot: Any) -> None:
        for rows, row, query_head, _ in self.segments(item.head, item.tile):
            place = item.request, slot, pl.ds(row, self.geo.rows_per_head), query_head
            source = self.refs.q_gmem.at[place]
            plgpu.copy_gmem_to_smem(source, self.q_tile.at[rows], self.q_ready)

    def prefetch_queries(self, item: _Item, wanted: Any) -> None:
        """Starts to load the query rows that the item begins with."""
        wanted &= item.begin < item.length
        pl.when(wanted)(lambda: self.load_queries(item, self.slot_of(item.block.fact)))

    def attend_item(self, i: jax.Array, carry: tuple[jax.Array, _Item]) -> Any:
        """Attends to the blocks of the i-th item. carry: blocks of the items before, the item."""
        n, item = carry
        has_next = i + 1 < self.cta.count
        next_item = self.read_item(jnp.minimum(i + 1, self.cta.count - 1), n + item.length)
        start = (
            plgpu.layout_cast(jnp.full((ROWS,), EMPTY_LSE, jnp.float32), self.by_row),
            compat.zeros((ROWS,), self.by_row),
            compat.zeros((ROWS, self.geo.dim), plgpu.Layout.WGMMA),
            jnp.int32(0),
            item.block.v_scale,
            item.block,
        )
        steps = jnp.maximum(div(item.length - item.begin + self.turns - 1, self.turns), 0)
        pl.when(steps == 0)(lambda: self.prefetch_queries(next_item, has_next))
        step = functools.partial(self.attend_block, i, n, item, next_item, has_next)
        peak, total, acc, _, unit, _ = lax.fori_loop(0, steps, step, start)
        safe = jnp.maximum(total, 1e-30)
        share = (unit if self.geo.narrow else 1) / safe
        acc = acc * lax.broadcast_in_dim(share, acc.shape, [0])
        lse = (peak + jnp.log(safe) * _LOG2E) * (1 / _LOG2E)
        lse = jnp.where(total > 0, lse, EMPTY_LSE)
        if self.turns > 1:
            self.join_and_send(i, item, acc, lse)
        else:
            self.store(i, acc, lse)
            self.send(item)
        return n + item.length, next_item

    def attend_block(
        self, i: Any, n: Any, item: _Item, next_item: _Item, has_next: Any, step: Any, carry: Any
    ) -> Any:
        """One key block: scores, running maximum and sum, weighted values.

        carry: maximum and sum of a row's scores (base 2), weighted values, the slot whose query
        rows are loaded, the unit of the values, the block.
        """
        refs, keys, geo = self.refs, self.keys, self.geo
        peak, total, acc, loaded_slot, unit, block = carry
        j = item.begin + step * self.turns
        stage = turn = mod(n + j, geo.tile_stages)
        if geo.tile_turns != geo.tile_stages:
            turn = mod(n + j, geo.tile_turns)
        valid, slot = block.fact & VALID_BITS, self.slot_of(block.fact)
        last = j + self.turns >= item.length
        # Clipped: the block behind a unit's end may lie behind the table's end.
        following = item.base + jnp.minimum(j + self.turns, geo.blocks_of_unit - 1)
        next_block = self.read_block(following, item.head)
        pl.when((step == 0) | (slot != loaded_slot))(lambda: plgpu.barrier_wait(self.q_ready))
        plgpu.barrier_wait(refs.k_full.at[turn])
        scores = compat.product(self.q_tile, refs.k_smem.at[stage].transpose((1, 0)), keys)
        plgpu.barrier_arrive(refs.k_empty.at[turn])
        # Load the next query rows while this block is finished.
        if self.geo.query_slots:
            next_slot = self.slot_of(next_block.fact)
            wanted = jnp.logical_not(last) & (next_slot != slot)
            pl.when(wanted)(lambda: self.load_queries(item, next_slot))

        self.prefetch_queries(next_item, has_next & last)

        def masked(scores: jax.Array) -> jax.Array:
            key = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(key < valid, scores, EMPTY_LSE)

        scores = lax.cond(valid < keys, masked, lambda x: x, scores)
        factor = geo.scale * _LOG2E * (block.k_scale if geo.narrow else 1)
        new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
        fade = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
        total = total * fade + weights.sum(axis=1)
        if geo.narrow:
            fade = fade * (unit / block.v_scale)
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
        if self.shares_smem:
            pl.when((step == 0) & (i > 0))(_wait_sent)
        self.p_tile[...] = weights.astype(self.cta.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(refs.v_full.at[turn])
        pl.when(valid < keys)(lambda: self.zero_padding(stage, turn, valid))
        acc += compat.product(self.p_tile, refs.v_smem.at[stage], self.geo.dim)
        plgpu.barrier_arrive(refs.v_empty.at[turn])
        return new_peak, total, acc, slot, block.v_scale, next_block

    def zero_padding(self, stage: Any, turn: Any, valid: Any) -> None:
        """Zeroes V behind the valid keys: their weight is 0, and 0 * NaN is NaN."""
        wg, dim, layout = self.cta.wg, self.geo.dim, plgpu.Layout.WGMMA

        @pl.when(wg % self.tiles == 0)
        def _() -> None:
            for start in range(0, self.keys, ROWS):
                part = self.refs.v_smem.at[stage, pl.ds(start, ROWS)]
                values = compat.load(part, layout)
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS, dim), 0, layout=layout)
                zero = jnp.zeros((), self.cta.dtype)
                part[...] = jnp.where(row + start < valid, values, zero)
            plgpu.commit_smem()
            if self.tiles > 1:
                plgpu.barrier_arrive(self.refs.v_clean.at[turn])

        if self.tiles > 1:
            pl.when(wg > 0)(lambda: plgpu.barrier_wait(self.refs.v_clean.at[turn]))

    def store(self, i: Any, acc: jax.Array, lse: jax.Array) -> None:
        """Puts a result into shared memory when the previous one has left it."""
        pl.when(i > 0)(_wait_sent)
        self.out_tile[...] = acc.astype(self.cta.dtype)
        self.lse_tile[...] = lse
        plgpu.commit_smem()

    def join_and_send(self, i: Any, item: _Item, acc: jax.Array, lse: jax.Array) -> None:
        """Merges the results of two warpgroups that took turns; the first sends the sum."""
        refs = self.refs

        @pl.when(self.cta.wg == 1)
        def _() -> None:
            self.store(i, acc, lse)
            plgpu.barrier_arrive(refs.joined)
            plgpu.barrier_wait(refs.released)

        @pl.when(self.cta.wg == 0)
        def _() -> None:
            plgpu.barrier_wait(refs.joined)
            other = compat.load(self.results.at[1], plgpu.Layout.WGMMA).astype(jnp.float32)
            other_lse = compat.load(refs.lse_smem.at[1], self.by_row)
            plgpu.barrier_arrive(refs.released)
            top = jnp.maximum(lse, other_lse)
            weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
            share = 1 / (weight + other_weight)
            self.store(
                i,
                acc * lax.broadcast_in_dim(weight * share, acc.shape, [0])
                + other * lax.broadcast_in_dim(other_weight * share, acc.shape, [0]),
                top + jnp.log(weight + other_weight),
            )
            self.send(item)

    def send(self, item: _Item) -> None:
        """Starts the copies of the result's rows to their places in the outputs."""
        geo, out, lse = self.geo, self.refs.out_gmem, self.refs.lse_gmem
        for rows, row, query_head, exists in self.segments(item.head, item.tile):
            start = (item.request * geo.heads + query_head) * geo.rows + row
            flat = pl.ds(start, geo.rows_per_head)
            if geo.tuning.splits > 1:
                targets = out.at[item.split, flat], lse.at[item.split, flat]
            else:
                place = pl.ds(row, geo.rows_per_head)
                targets = out.at[item.request, place, query_head], lse.at[flat]
            pairs = (self.out_tile.at[rows], targets[0]), (self.lse_tile.at[rows], targets[1])

            @pl.when(exists)
            def _(pairs: Any = pairs) -> None:
                for source, target in pairs:
                    plgpu.copy_smem_to_gmem(source, target)
