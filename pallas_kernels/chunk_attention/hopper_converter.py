"""The converter warpgroup of the Hopper attention kernel: tiles of fp8 become tiles of 16 bits.

wgmma reads K and V from shared memory, in half precision. The producer loads fp8, half the bytes,
and this warpgroup turns each block of K and of V into the tile that the consumers read. Values are
exact in either half precision; the consumers apply the scales.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.chunk_attention.hopper_producer import Cta, mod
from pallas_kernels.compat import ROWS

_COLUMNS = 64  # that are converted at once, so that few registers are needed


class Converter:
    """A warpgroup that fills the consumers' tiles: from fp8, or from a request's own keys."""

    def __init__(self, cta: Cta) -> None:
        self.cta, self.geo, self.refs = cta, cta.geo, cta.refs
        self.keys, self.stages = cta.geo.tuning.block_keys, cta.geo.tuning.stages

    def run(self) -> None:
        start = jnp.int32(0), jnp.int32(0)
        n, _ = lax.fori_loop(0, self.cta.count, self.convert_item, start)

        # Wait for the last arrivals: none may be pending when the kernel ends.
        @pl.loop(jnp.maximum(n - self.geo.tile_stages, 0), n)
        def _drain(i: jax.Array) -> None:
            for x in ("k", "v"):
                plgpu.barrier_wait(vars(self.refs)[f"{x}_empty"].at[mod(i, self.geo.tile_turns)])

    def convert_item(self, i: jax.Array, counts: tuple[jax.Array, jax.Array]) -> Any:
        """Converts the blocks of the i-th item; counts: blocks before it, and those of the pool."""
        refs, most = self.refs, self.geo.blocks_of_unit
        unit, head, _ = self.cta.item(i)
        request, length = refs.units_gmem[unit * 3], refs.units_gmem[unit * 3 + 2]
        base = unit * most

        def step(j: jax.Array, carry: Any) -> Any:
            n, of_pool, place = carry
            following = refs.blocks_gmem[base + jnp.minimum(j + 1, most - 1)]
            for x in ("k", "v"):
                self.fill(x, n, of_pool, place, head, request)
            return n + 1, of_pool + (place >= 0).astype(jnp.int32), following

        return lax.fori_loop(0, length, step, (*counts, refs.blocks_gmem[base]))[:2]

    def fill(self, x: str, n: Any, of_pool: Any, place: Any, head: Any, request: Any) -> None:
        """Fills the tile of block n, of "k" or "v". place: see `BlockTable.blocks`."""
        refs, geo = vars(self.refs), self.geo
        before = mod(n + geo.tile_turns - geo.tile_stages, geo.tile_turns)
        pl.when(n >= geo.tile_stages)(lambda: plgpu.barrier_wait(refs[f"{x}_empty"].at[before]))
        tile = refs[f"{x}_smem"].at[mod(n, geo.tile_stages)]
        ready = refs[f"{x}_full"].at[mod(n, geo.tile_turns)]

        def from_pool() -> None:
            stage = mod(of_pool, self.stages)
            plgpu.barrier_wait(refs[f"{x}8_full"].at[stage])
            for start in range(0, self.keys, ROWS):
                rows = pl.ds(start, ROWS)
                values = compat.load(refs[f"{x}8_smem"].at[stage, rows], compat.copy_layout())
                for column in range(0, geo.dim, _COLUMNS):
                    # The conversion that sm_90 has; both are exact.
                    wide = values[:, column : column + _COLUMNS].astype(jnp.float16)
                    if self.cta.dtype != jnp.float16:
                        wide = wide.astype(jnp.float32).astype(self.cta.dtype)
                    tile.at[rows, pl.ds(column, _COLUMNS)][...] = wide
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs[f"{x}8_empty"].at[stage])
            plgpu.barrier_arrive(ready)

        def from_own() -> None:
            rows = pl.ds((-1 - place) * self.keys, self.keys)
            source = refs[f"own_{x}_gmem"].at[request, rows, head]
            plgpu.copy_gmem_to_smem(source, tile, ready)

        if geo.own_blocks:
            pl.when(place >= 0)(from_pool)
            pl.when(place < 0)(from_own)
        else:
            from_pool()
