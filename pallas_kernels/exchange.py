"""Memory through which the devices of a group hand each other a few rows, and who may use it.

Each device holds `words`, which only the kernel of `mosaic_gpu_sum` writes to, and a table of where
the others' lie. JAX never moves an array, so that the addresses hold as long as `Exchange` is
alive, which is for whoever made it to see to.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

HEADER = 1024  # bytes: the number of calls so far, a count of blocks, and room
EMPTY = 0x80008000  # -0.0 twice in bfloat16 and float16, about -4.6e-41 in float32
SETS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """words, table: int32, a row for each device of the mesh, on that device.

    table [*mesh, 2 + 2 n]: rank in the group of n, padding, and n addresses as pairs of words.
    """

    words: Int[Array, "*mesh W"]
    table: Int[Array, "*mesh A"]
    capacity: int = dataclasses.field(metadata={"static": True})


def make_exchange(mesh: Mesh, axis: str, capacity: int) -> Exchange:
    """For sums of up to `capacity` bytes over `axis`, one group for each place on the other axes.

    Raises:
      ValueError: devices of several processes or none of NVIDIA's; capacity no multiple of 16.
    """
    if capacity <= 0 or capacity % 16:
        raise ValueError(f"capacity must be a positive multiple of 16 bytes, got {capacity}")
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        raise ValueError("an exchange is for the devices of one process")
    if mesh.devices.flat[0].platform != "gpu":
        raise ValueError("an exchange is for NVIDIA GPUs")
    at = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    group = mesh.shape[axis]
    shape = (*mesh.devices.shape, (HEADER + SETS * group * capacity) // 4)
    words = jax.jit(
        lambda: jnp.where(jnp.arange(shape[-1]) * 4 < HEADER, 0, jnp.int32(EMPTY - (1 << 32)))
        * jnp.ones(shape, jnp.int32),
        out_shardings=at,
    )()
    jax.block_until_ready(words)  # on every device, before any device can write there
    where = {
        shard.device: shard.data.unsafe_buffer_pointer() for shard in words.addressable_shards
    }
    table = np.zeros((*mesh.devices.shape, 1 + group), np.uint64)
    along = mesh.axis_names.index(axis)
    for place in np.ndindex(*mesh.devices.shape):
        row = [slice(None) if i == along else p for i, p in enumerate(place)]
        table[place] = [place[along], *(where[device] for device in mesh.devices[tuple(row)])]
    return Exchange(words, jax.device_put(table.view(np.int32), at), capacity)
