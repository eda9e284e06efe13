"""The producer warp of the Hopper attention kernel, and what it shares with the consumers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_attention.hopper_tiling import Geometry


def mod(x: jax.Array, n: int) -> jax.Array:
    return lax.rem(x, jnp.int32(n))


def div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x, jnp.int32(n))


class Cta:
    """What producer and consumers of a CTA share: references by name, and its work items."""

    def __init__(self, geo: Geometry, dtype: jnp.dtype, refs: SimpleNamespace) -> None:
        self.geo, self.dtype, self.refs = geo, dtype, refs
        self.consumers = geo.consumers
        self.ctas = min(geo.items, geo.sms)
        self.index, self.wg = lax.axis_index("cta"), lax.axis_index("wg")
        self.count = div(geo.items - 1 - self.index, self.ctas) + 1

    def item(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns unit, KV head and tile group of the CTA's i-th item."""
        index, units = self.index + i * self.ctas, self.geo.batch * self.geo.tuning.splits
        rest = div(index, units)
        return mod(index, units), div(rest, self.geo.groups), mod(rest, self.geo.groups)


class Producer:
    """The warp that loads the key blocks of all items, up to `stages` ahead."""

    def __init__(self, cta: Cta) -> None:
        self.cta, self.geo, self.refs = cta, cta.geo, cta.refs
        self.keys, self.stages = cta.geo.tuning.block_keys, cta.geo.tuning.stages
        self.layer = self.refs.layer_gmem[0]
        self.narrow = "8" * cta.geo.narrow  # of the names of tiles and barriers

    def run(self) -> None:
        refs = vars(self.refs)
        n = lax.fori_loop(0, self.cta.count, self.load_item, jnp.int32(0))

        # Wait for the last arrivals: none may be pending when the kernel ends.
        @pl.loop(jnp.maximum(n - self.stages, 0), n)
        def _drain(i: jax.Array) -> None:
            stage = mod(i, self.stages)
            for x in ("k", "v"):
                plgpu.barrier_wait(refs[f"{x}{self.narrow}_empty"].at[stage])

    def load_item(self, i: jax.Array, n: jax.Array) -> jax.Array:
        """Loads the blocks of the i-th item, after n blocks of the items before."""
        refs, most = self.refs, self.geo.blocks_of_unit
        unit, head, _ = self.cta.item(i)
        request, length = refs.units_gmem[unit * 3], refs.units_gmem[unit * 3 + 2]
        base = unit * most

        def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            n, place = carry
            following = refs.blocks_gmem[base + jnp.minimum(j + 1, most - 1)]
            stage = mod(n, self.stages)

            def load() -> None:
                for x in ("k", "v"):
                    self.load_block(x, stage, place, n, head, request)

            if not (self.narrow and self.geo.own_blocks):
                load()
                return n + 1, following
            pl.when(place >= 0)(load)  # the converter loads own keys
            return n + (place >= 0).astype(jnp.int32), following

        return lax.fori_loop(0, length, step, (n, refs.blocks_gmem[base]))[0]

    def load_block(self, x: str, stage: Any, place: Any, n: Any, head: Any, request: Any) -> None:
        """Loads a block of "k" or "v" when its stage is empty. place: see `BlockTable.blocks`."""
        refs, keys, per_chunk = vars(self.refs), self.keys, self.geo.per_chunk
        name = x + self.narrow
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(refs[f"{name}_empty"].at[stage]))
        target, arrived = refs[f"{name}_smem"].at[stage], refs[f"{name}_full"].at[stage]

        def from_pool() -> None:
            chunk = div(place, per_chunk)
            rows = pl.ds(mod(place, per_chunk) * keys, keys)
            source = refs[f"{x}_gmem"].at[self.layer, chunk, head, rows]
            plgpu.copy_gmem_to_smem(source, target, arrived)

        def from_own() -> None:
            rows = pl.ds((-1 - place) * keys, keys)
            source = refs[f"own_{x}_gmem"].at[request, rows, head]
            plgpu.copy_gmem_to_smem(source, target, arrived)

        if self.geo.own_blocks and not self.narrow:
            pl.when(place >= 0)(from_pool)
            pl.when(place < 0)(from_own)
        else:
            from_pool()
