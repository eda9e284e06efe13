"""Memory through which the GPUs of one host send each other a few rows (`all_reduce`).

The other devices write to a device's part behind JAX's back, and only the all-reduce kernel does.
JAX never moves an array, so its address is valid as long as the array lives: for the rest of the
process, like NCCL's buffers.
"""

from __future__ import annotations

import ctypes
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels import compat

CAPACITY = 1 << 20  # bytes that a device may send at once
HEADER = 1024  # bytes: the number of calls so far, a count of CTAs, and padding
EMPTY = 0x80008000  # -0.0 twice in bfloat16 and float16, about -4.6e-41 in float32
SETS = 2


def peer_problem(mesh: Mesh, axis: str) -> str | None:
    """Returns why devices along `axis` cannot write to each other's memory; None if they can.

    They must be Hopper GPUs of this process, and the driver must let each read and write the memory
    of all others.
    """
    if (problem := compat.mosaic_gpu_problem()) is not None:
        return problem
    if mesh.shape[axis] == 1:
        return f"{axis} has one device"
    devices = list(mesh.devices.flat)
    if len({device.process_index for device in devices}) > 1:
        return "the devices belong to several processes"
    kinds = {getattr(device, "compute_capability", device.platform) for device in devices}
    if kinds != {"9.0"}:
        return f"the devices' compute capability is not 9.0: {', '.join(sorted(kinds))}"
    groups = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
    for group in groups.reshape(-1, mesh.shape[axis]):
        for a in group:
            for b in group:
                if a != b and not _can_access(a.local_hardware_id, b.local_hardware_id):
                    return f"{a} cannot access the memory of {b}"
    return None


def _can_access(device: int, peer: int) -> bool:
    allowed = ctypes.c_int(0)
    cuda = ctypes.CDLL("libcuda.so.1")
    status = cuda.cuDeviceCanAccessPeer(ctypes.byref(allowed), device, peer)
    return status == 0 and allowed.value == 1


@functools.cache
def peer_memory(mesh: Mesh, axis: str) -> tuple[Array, Array]:
    """Returns each device's empty memory, int32 words, and the table of its addresses."""
    at = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    group = mesh.shape[axis]
    shape = (*mesh.devices.shape, (HEADER + SETS * group * CAPACITY) // 4)

    empty = np.full(shape, EMPTY, np.uint32).view(np.int32)
    empty[..., : HEADER // 4] = 0
    words = jax.device_put(empty, at)
    # On every device, before any of them can write to it.
    jax.block_until_ready(words)
    where = {shard.device: shard.data.unsafe_buffer_pointer() for shard in words.addressable_shards}
    table = np.zeros((*mesh.devices.shape, 1 + group), np.uint64)
    along = mesh.axis_names.index(axis)
    for place in np.ndindex(*mesh.devices.shape):
        peers = mesh.devices[(*place[:along], slice(None), *place[along + 1 :])]
        table[place] = [place[along], *(where[peer] for peer in peers)]
    return words, jax.device_put(table.view(np.int32), at)


def peer_table(mesh: Mesh, axis: str) -> Int[Array, "*mesh A"]:
    """Returns each device's row for `all_reduce`: its rank along `axis`, and all addresses.

    The first call for a mesh and axis allocates 2 MiB on each device for each device on the axis.
    Addresses differ between runs, so pass the table to compiled code as an argument.

    Raises:
      ValueError: `peer_problem` returns a reason.
    """
    if (problem := peer_problem(mesh, axis)) is not None:
        raise ValueError(f"no peer memory along {axis}: {problem}")
    return peer_memory(mesh, axis)[1]
