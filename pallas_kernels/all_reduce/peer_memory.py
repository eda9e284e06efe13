"""Memory through which the GPUs of one host hand each other a few rows (`device_sum`).

A device's part of it is written to by the others, behind JAX's back, and only by the kernel of
`mosaic_gpu_sum`. JAX never moves an array, so that its address holds as long as the array lives:
for the rest of the process, as NCCL's buffers do.
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
HEADER = 1024  # bytes: the number of calls so far, a count of blocks, and room
EMPTY = 0x80008000  # -0.0 twice in bfloat16 and float16, about -4.6e-41 in float32
SETS = 2


def exchange_problem(mesh: Mesh, axis: str) -> str | None:
    """Why the devices along `axis` of a mesh can't write to each other's memory; None if they can.

    They are Hopper GPUs of this process, and the driver lets each read and write all others'.
    """
    if (problem := compat.mosaic_gpu_problem()) is not None:
        return problem
    if mesh.shape[axis] == 1:
        return f"{axis} has one device"
    devices = list(mesh.devices.flat)
    if len({device.process_index for device in devices}) > 1:
        return "the devices are those of several processes"
    kinds = {getattr(device, "compute_capability", device.platform) for device in devices}
    if kinds != {"9.0"}:
        return f"the devices' compute capability is not 9.0: {', '.join(sorted(kinds))}"
    groups = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(
        -1, mesh.shape[axis]
    )
    for group in groups:
        for a in group:
            for b in group:
                if a != b and not _can_access(a.local_hardware_id, b.local_hardware_id):
                    return f"{a} cannot access the memory of {b}"
    return None


def _can_access(device: int, peer: int) -> bool:
    found = ctypes.c_int(0)
    cuda = ctypes.CDLL("libcuda.so.1")
    return cuda.cuDeviceCanAccessPeer(ctypes.byref(found), device, peer) == 0 and found.value == 1


@functools.cache
def _memory(mesh: Mesh, axis: str) -> tuple[Array, Array]:
    """What each device holds, empty, and the table that tells where."""
    at = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    group = mesh.shape[axis]
    shape = (*mesh.devices.shape, (HEADER + SETS * group * CAPACITY) // 4)

    empty = np.full(shape, EMPTY, np.uint32).view(np.int32)
    empty[..., : HEADER // 4] = 0
    words = jax.device_put(empty, at)
    # On every device, before one of them can write there.
    jax.block_until_ready(words)
    where = {shard.device: shard.data.unsafe_buffer_pointer() for shard in words.addressable_shards}
    table = np.zeros((*mesh.devices.shape, 1 + group), np.uint64)
    along = mesh.axis_names.index(axis)
    for place in np.ndindex(*mesh.devices.shape):
        peers = mesh.devices[(*place[:along], slice(None), *place[along + 1 :])]
        table[place] = [place[along], *(where[peer] for peer in peers)]
    return words, jax.device_put(table.view(np.int32), at)


def exchange_table(mesh: Mesh, axis: str) -> Int[Array, "*mesh A"]:
    """What `device_sum` takes, of each device its own row: rank along `axis`, and addresses.

    The memory is taken on the first call for a mesh and axis, 1 MiB for each device on the axis,
    twice, on each of them. Addresses differ from run to run: a table is an argument of what is
    compiled, never a constant in it.

    Raises:
      ValueError: `exchange_problem` has one.
    """
    if (problem := exchange_problem(mesh, axis)) is not None:
        raise ValueError(f"no exchange along {axis}: {problem}")
    return _memory(mesh, axis)[1]
