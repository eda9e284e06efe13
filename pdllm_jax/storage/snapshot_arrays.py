"""Arrays of a snapshot, through Orbax: uncompressed Zarr, every file checked as it is read.

What is written are global arrays, with no word of the mesh that they lay on; what is read goes
where the caller says. A large array's chunks hold one KV head of one layer, or one head of all
layers, so that a device of a tensor-parallel mesh reads little that it does not keep.

Of Orbax only public names are used: its ArrayHandler, with another TensorStore context and a
reading of its own. What decides the speed: no more files at a time than there are processors to
serve them (each has a buffer, and fresh memory costs more than copying), no fsync of every file by
TensorStore (all are flushed together before the snapshot gets its name), and reading into memory
that becomes the array's, where Orbax's becomes a CPU's only by a copy.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Sharding
from jaxtyping import Array

from pdllm_jax.storage.atomic import reason
from pdllm_jax.storage.checkpoint_arrays import quiet_orbax, read_array
from pdllm_jax.storage.snapshot_format import (
    ARRAYS,
    FileRecord,
    Manifest,
    SnapshotError,
    read_file,
    refusal,
)
from pdllm_jax.storage.zarr_layout import MAX_METADATA_BYTES, METADATA, check_layout

CHUNK_BYTES = 16 << 20
# Below these an array, or a head of a layer, is not worth a file of its own.
SMALL_ARRAY_BYTES, SMALL_CHUNK_BYTES = 4 << 20, 1 << 20
# Stays in a processor's cache.
_READ_BYTES = 256 << 10
_WORKERS = max(4, os.cpu_count() or 1)

_BUFFERS = threading.local()


class _Handler(ocp.type_handlers.ArrayHandler):
    """Reads and writes with our TensorStore context; `before` is called ahead of every reading."""

    def __init__(self, before: Callable[[str], None] | None = None):
        super().__init__(enable_write_sharding_file=False)
        self._context = ts.Context(
            {"file_io_concurrency": {"limit": _WORKERS}, "file_io_sync": False}
        )
        self._before = before

    def _ours(self, infos: Sequence[Any]) -> list[Any]:
        ours = [copy.copy(info) for info in infos]
        for info in ours:
            info.ts_context = self._context
        return ours

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        return await super().serialize(values, self._ours(infos), args)

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        restored = []
        checked = asyncio.create_task(self._check(infos[:1]))
        try:
            # One after the other, the next one's files being checked meanwhile: so these come from
            # the disk once, and are still in the page cache when they are read.
            for i, (info, arg) in enumerate(zip(infos, args, strict=True)):
                await checked
                checked = asyncio.create_task(self._check(infos[i + 1 : i + 2]))
                restored.append(await read_array(info.path, arg.sharding, self._context))
        finally:
            await asyncio.gather(checked, return_exceptions=True)
        return restored

    async def _check(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if self._before is not None:
                await asyncio.to_thread(self._before, info.name)


def _checkpointer(handler: _Handler) -> ocp.Checkpointer:
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry,
            use_ocdbt=False,
            use_compression=False,
        )
    )


def write_arrays(folder: Path, arrays: Mapping[str, Array]) -> dict[str, FileRecord]:
    """Writes folder/arrays and returns its files; arrays of size 0 have none."""
    stored = {name: array for name, array in arrays.items() if array.size}
    arguments = ocp.args.PyTreeSave(
        stored, save_args={name: _save_args(name, array) for name, array in stored.items()}
    )
    with quiet_orbax(), _checkpointer(_Handler()) as checkpointer:
        checkpointer.save(folder / ARRAYS, args=arguments)
    paths = sorted(path for path in (folder / ARRAYS).rglob("*") if path.is_file())
    with ThreadPoolExecutor(_WORKERS) as threads:
        records = threads.map(_file_record, paths)
        names = [path.relative_to(folder).as_posix() for path in paths]
        return dict(zip(names, records, strict=True))


def read_arrays(
    folder: Path, manifest: Manifest, sharding: Callable[[str], Sharding]
) -> dict[str, Array]:
    """Restores all arrays, each with the sharding that `sharding` gives for its name.

    `check_files` must have passed. Raises SnapshotError for contents that are not those written.
    """
    stored = {name: record for name, record in manifest.arrays.items() if record.size}
    files: dict[str, list[str]] = {name: [] for name in stored}
    for file in manifest.files:
        files.setdefault(file.split("/")[1], []).append(file)
    for name in files.keys() - stored.keys():
        verify(folder, manifest, files[name])
    for name, record in stored.items():
        _check_layout(folder, manifest, name, record.shape, record.dtype)
    target = {
        name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=sharding(name))
        for name, record in stored.items()
    }
    handler = _Handler(lambda name: verify(folder, manifest, files[name]))
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    try:
        with quiet_orbax(), _checkpointer(handler) as checkpointer:
            restored = checkpointer.restore(folder / ARRAYS, args=arguments)
    except SnapshotError:
        raise
    except Exception as error:
        # Orbax and TensorStore raise what comes: plain Exception, ValueError, KeyError, OSError.
        raise refusal(folder, ARRAYS, f"can not be restored: {reason(error)}") from error
    for name, record in manifest.arrays.items():
        if not record.size:
            empty = jnp.zeros(record.shape, record.dtype)
            restored[name] = jax.device_put(empty, sharding(name))
    return restored


def verify(folder: Path, manifest: Manifest, files: Sequence[str]) -> None:
    """Compares files with the checksums that the manifest has of them."""
    with ThreadPoolExecutor(_WORKERS) as threads:
        for name, found in zip(
            files, threads.map(lambda name: _file_record(folder / name), files), strict=True
        ):
            if found != manifest.files[name]:
                raise refusal(folder, name, "was altered: its checksum is another")


def _save_args(name: str, array: Array) -> ocp.SaveArgs:
    """How the array is cut into files."""
    if array.ndim < 4 or array.nbytes < SMALL_ARRAY_BYTES:
        return ocp.SaveArgs()
    # KV: [L, N, G, C, D] of a pool, [L, *B, S, G, D] elsewhere.
    heads = 2 if ".pool." in name else array.ndim - 2
    each = array.nbytes // (array.shape[0] * array.shape[heads])
    axes = (0, heads) if each >= SMALL_CHUNK_BYTES else (heads,)
    return ocp.SaveArgs(shard_axes=axes, chunk_byte_size=CHUNK_BYTES)


def _file_record(path: Path) -> FileRecord:
    checksum, nbytes = 0, 0
    buffer = memoryview(_BUFFERS.__dict__.setdefault("buffer", bytearray(_READ_BYTES)))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            nbytes += count
    return FileRecord(nbytes, checksum)


def _check_layout(
    folder: Path, manifest: Manifest, name: str, shape: tuple[int, ...], dtype: str
) -> None:
    """Zarr's own metadata says what the manifest says, and its chunks are the files there are."""
    prefix = f"{ARRAYS}/{name}/"
    where = f"{prefix}{METADATA}"
    if where not in manifest.files:
        raise refusal(folder, where, "is missing")
    found = {
        file.removeprefix(prefix): record.nbytes
        for file, record in manifest.files.items()
        if file.startswith(prefix) and file != where
    }
    metadata = read_file(folder, where, MAX_METADATA_BYTES)
    try:
        check_layout(metadata, found, shape, dtype)
    except ValueError as error:
        raise refusal(folder, where, f"does not describe {name}: {error}") from None
