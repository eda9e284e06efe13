"""Arrays of a converted checkpoint, through Orbax, onto the devices where they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from pdllm_jax.network.sharding import shardings
from pdllm_jax.storage.atomic import reason
from pdllm_jax.storage.manifest import CheckpointError

_ALIGNMENT = 64  # of XLA's buffers on a CPU
_AT_A_TIME = 4  # arrays on their way between disk and device


def read_params(params: Path, wanted: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The pure dict of `wanted`, shapes and dtypes, from a folder that `read_manifest` has checked:
    what its arrays' metadata says is believed. CheckpointError.
    """
    # Without a mesh the device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding
    places = jax.tree.map(lambda _: default, wanted) if mesh is None else shardings(mesh, wanted)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        wanted,
        places,
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, _MappedReader())
        ),
    )
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    try:
        with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(params, args=arguments)
    except Exception as error:
        # Orbax and TensorStore raise what comes: plain Exception, ValueError, KeyError, OSError.
        raise CheckpointError(f"{params} can not be restored: {reason(error)}") from error


class _MappedReader(ocp.type_handlers.ArrayHandler):
    """Orbax's handler, but files are mapped, and copied into memory that becomes the arrays'.

    By default TensorStore reads a file into memory of its own, Orbax copies the array out of that,
    and JAX once more on a CPU. Fresh memory costs the kernel as much as the reading.
    """

    def __init__(self) -> None:
        super().__init__()
        self._context = ts.Context({"file_io_mode": {"mode": "memmap"}})

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[jax.Array]:
        assert args is not None
        some = asyncio.Semaphore(_AT_A_TIME)

        async def read(info: Any, arg: Any) -> jax.Array:
            async with some:
                return await read_array(
                    info.path, arg.sharding, self._context, shape=arg.global_shape, dtype=arg.dtype
                )

        return await asyncio.gather(*map(read, infos, args))


async def read_array(
    path: Path,
    sharding: Sharding,
    context: ts.Context,
    *,
    shape: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """An array as Orbax writes it (Zarr, without OCDBT), laid as `sharding` says.

    Each part that devices of this process hold is read once. dtype: None keeps the stored one.
    ValueError for another shape than this; what TensorStore raises for files that are missing.
    """
    store = await open_array(path, context)
    if shape is not None and tuple(store.shape) != tuple(shape):
        raise ValueError(f"{path.name} has the shape {store.shape}, not {tuple(shape)}")
    if dtype is not None and store.dtype.numpy_dtype != dtype:
        store = ts.cast(store, ts.dtype(np.dtype(dtype)))
    holders: dict[str, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(store.shape)
    for device, index in indices.items():
        holders.setdefault(str(index), []).append(device)
    place_chunks = []
    for devices in holders.values():
        part = store[indices[devices[0]]]
        out = _aligned(part.shape, part.dtype.numpy_dtype)
        await ts.array(out).write(part[ts.d[:].translate_to[0]])
        for device in devices:
            one = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            place_chunks.append(jax.device_put(out, one))
    return jax.make_array_from_single_device_arrays(store.shape, sharding, place_chunks)


async def open_array(path: Path, context: ts.Context) -> ts.TensorStore:
    """An array's folder as it was checked: Zarr's version 2, whatever else may lie beside it."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "fill_missing_data_reads": False,
    }
    return await ts.open(spec, open=True, context=context)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """New memory that a CPU's buffer takes as it is, instead of a copy of it."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + nbytes].view(dtype).reshape(shape)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Without Orbax's own log lines: it warns where nothing is wrong (no OCDBT to merge), and what
    is wrong is raised as well.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
