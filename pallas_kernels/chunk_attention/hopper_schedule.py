"""The Hopper kernel's schedule: the key blocks of the chosen chunks, cut into equal units of work.

Plain jnp on a few hundred integers. It depends on the selection alone, so that the compiler makes
it once for all layers of a jitted step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.chunk_attention.hopper_tiling import Geometry

# Bits of BlockTable.facts.
VALID_BITS, SLOT_SHIFT = 0xFF, 8


class BlockTable(NamedTuple):
    """The units of every request: runs of its key blocks, without those that have no valid keys.

    U = B * splits units of M places each, M the most blocks that a unit can have, so that a unit's
    first block is found without a look-up.

    Attributes:
      blocks: [U * M] int32, chunk * blocks_per_chunk + block; -1 - block for a request's own keys.
      facts: [U * M] int32, valid keys (1..128) and slot << SLOT_SHIFT; 0 valid behind a unit's
        end. Own keys are slot K.
      units: [U * 3] int32: request, split, and number of blocks. With several requests sorted by
        the units' first chunk, so that requests that share chunks read them at the same time.
    """

    blocks: Int[Array, "UM"]
    facts: Int[Array, "UM"]
    units: Int[Array, "U3"]


def block_table(
    geo: Geometry,
    chunk_ids: Int[Array, "B K"],
    lengths: Int[Array, "B K"],
    own_lengths: Int[Array, "B"] | None,
) -> BlockTable:
    """Makes the table of ids inside the pool and their valid keys, 0 for an empty slot."""
    batch, chosen = chunk_ids.shape
    block_keys, splits, most = geo.tuning.block_keys, geo.tuning.splits, geo.blocks_of_unit
    if own_lengths is not None:
        lengths = jnp.concatenate([lengths, own_lengths[:, None]], axis=1)
        chunk_ids = jnp.pad(chunk_ids, ((0, 0), (0, 1)))
    slots = lengths.shape[1]
    counts = -(-lengths // block_keys)  # [B, slots]
    # A sum rather than a cumsum: one small fusion.
    before = jnp.arange(slots)[:, None] > jnp.arange(slots)
    starts = jnp.where(before, counts[:, None], 0).sum(axis=-1)
    ends = starts + counts
    total = ends[:, -1:]

    split = jnp.arange(splits)
    first, end = split * total // splits, (split + 1) * total // splits  # [B, splits]
    place = (first[..., None] + jnp.arange(most)).reshape(batch, -1)  # [B, splits * M]
    slot = jnp.minimum((ends[:, None] <= place[..., None]).sum(axis=-1), slots - 1)

    def of_slot(values: Array) -> Array:
        return jnp.take_along_axis(values, slot, axis=1)

    is_own = slot == chosen
    most_of_slot = jnp.where(is_own, geo.own_blocks, geo.per_chunk)
    block = jnp.clip(place - of_slot(starts), 0, most_of_slot - 1)
    valid = jnp.clip(of_slot(lengths) - block * block_keys, 0, block_keys)
    valid = jnp.where(place < jnp.repeat(end, most, axis=1), valid, 0)
    blocks = jnp.where(is_own, -1 - block, of_slot(chunk_ids) * geo.per_chunk + block)
    facts = valid | (slot << SLOT_SHIFT)

    request = jnp.broadcast_to(jnp.arange(batch)[:, None], first.shape)
    units = jnp.stack([request, jnp.broadcast_to(split, first.shape), end - first], axis=-1)
    tables = [blocks.reshape(-1, most), facts.reshape(-1, most), units.reshape(-1, 3)]
    if batch > 1:
        order = jnp.argsort(tables[0][:, 0], stable=True)
        tables = [values[order] for values in tables]
    return BlockTable(*(values.astype(jnp.int32).reshape(-1) for values in tables))
