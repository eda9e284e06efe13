"""The kernel's schedule: which blocks of which chunks, cut into units of equal work.

Plain jnp on a few hundred integers. It depends on the selection alone, so that inside one jit the
compiler makes it once for all layers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Bits of BlockTable.facts.
VALID_BITS, SLOT_SHIFT = 0xFF, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """Blocks of every request, those without valid keys left out, and the units made of them.

    blocks [B * W] int32: chunk * blocks_per_chunk + block, W = K * blocks_per_chunk a request.
    facts [B * W] int32: valid keys (1..128) and slot << SLOT_SHIFT.
    units [U * 4] int32, U = B * splits: request, split, first block and end, places in `blocks`.
      Sorted by the chunk that they begin with, so that requests that share chunks read them at
      the same time.
    """

    blocks: Int[Array, "BW"]
    facts: Int[Array, "BW"]
    units: Int[Array, "U4"]


def block_table(
    chunk_ids: Int[Array, "B K"],
    lengths: Int[Array, "B K"],
    *,
    chunk_size: int,
    block_keys: int,
    splits: int,
) -> BlockTable:
    """Makes the table.

    Args:
      chunk_ids: inside the pool; lengths: valid keys, 0 for empty slots, at most chunk_size.
      splits: units a request, each an equal share of its blocks.
    """
    batch, slots = chunk_ids.shape
    per_chunk = chunk_size // block_keys
    width = slots * per_chunk
    counts = -(-lengths // block_keys)  # [B, K]
    # A sum rather than a cumsum: one small fusion.
    before = jnp.arange(slots)[:, None] > jnp.arange(slots)
    starts = jnp.where(before, counts[:, None], 0).sum(axis=-1)
    ends = starts + counts
    total = ends[:, -1]

    place = jnp.arange(width)
    slot = (ends[:, None] <= place[:, None]).sum(axis=-1)  # [B, W]
    slot = jnp.minimum(slot, slots - 1)

    def of_slot(values: Array) -> Array:
        return jnp.take_along_axis(values, slot, axis=1)

    block = jnp.clip(place - of_slot(starts), 0, per_chunk - 1)
    valid = jnp.clip(of_slot(lengths) - block * block_keys, 0, block_keys)
    blocks = of_slot(chunk_ids) * per_chunk + block
    facts = valid | (slot << SLOT_SHIFT)

    request = jnp.arange(batch)[:, None]
    split = jnp.arange(splits)
    first, end = split * total[:, None] // splits, (split + 1) * total[:, None] // splits
    units = jnp.stack(
        [
            jnp.broadcast_to(request, first.shape),
            jnp.broadcast_to(split, first.shape),
            request * width + first,
            request * width + end,
        ],
        axis=-1,
    ).reshape(-1, 4)
    if batch > 1:
        beginning = blocks.reshape(-1)[jnp.minimum(units[:, 2], batch * width - 1)]
        units = units[jnp.argsort(beginning, stable=True)]
    flat = (values.astype(jnp.int32).reshape(-1) for values in (blocks, facts, units))
    return BlockTable(*flat)
