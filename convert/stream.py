"""Orbax, one array at a time, through its public API.

Saving hands Orbax a tree of handles instead of arrays, and registers for them a TypeHandler that
turns a handle into an array only when its turn comes; the bytes on their way to disk are bounded.
Restoring gives every array to a callback and keeps none. On disk the arrays are ordinary NumPy
arrays to Orbax, which any of its checkpointers restores with or without a target.

The format is Zarr without OCDBT and without compression: trained weights do not compress (zstd
costs ten times the copy), the bytes on disk are those of the tensors, and every array is a folder
of its own, so that a file that was lost or cut short names its tensor. Chunks are at most 128 MiB,
which only an embedding exceeds, so that large arrays are written and read by several threads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from numpy.typing import NDArray

from pdllm_jax.storage.checkpoint import CheckpointError
from pdllm_jax.storage.checkpoint_arrays import open_array, quiet_orbax

CHUNK_BYTES = 128 << 20
# All buffers together. At LLaDA-8B's size the two largest arrays, of 1.04 GB in bfloat16, fit.
BUFFER_BYTES = 5 << 29
# Arrays being written while the next one is read; more would only take memory.
AHEAD_BYTES = 1 << 29


class Handle(Protocol):
    """A leaf that stands for an array, which `load` puts into a buffer of `nbytes`."""

    @property
    def order(self) -> Any: ...

    @property
    def nbytes(self) -> int: ...

    def load(self, buffer: NDArray[np.uint8]) -> NDArray[Any]: ...


class _Buffers:
    """Lends buffers that are written from in the background.

    They are used again: memory that is fresh from the system costs as much as the reading. A model
    has few sizes, so that sizes need only match exactly.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[NDArray[np.uint8], Any]] = []
        self._idle: list[NDArray[np.uint8]] = []

    def borrow(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer; waits until there is room for it."""
        while self._lent and self._pending() > max(AHEAD_BYTES, 2 * nbytes):
            self._collect()
        for position, buffer in enumerate(self._idle):
            if buffer.nbytes == nbytes:
                return self._idle.pop(position)
        while (self._idle or self._lent) and self._held() + nbytes > BUFFER_BYTES:
            if not self._idle:
                self._collect()
            self._idle.clear()
        return np.empty(nbytes, np.uint8)

    def lend(self, buffer: NDArray[np.uint8], future: Any) -> None:
        """The buffer is free again when the future is done."""
        self._lent.append((buffer, future))

    def finish(self) -> None:
        while self._lent:
            self._collect()

    def settle(self) -> None:
        """Waits for all that is being written, whatever becomes of it."""
        for _, future in self._lent:
            with contextlib.suppress(Exception):
                future.result()

    def _pending(self) -> int:
        return sum(buffer.nbytes for buffer, _ in self._lent)

    def _held(self) -> int:
        return self._pending() + sum(buffer.nbytes for buffer in self._idle)

    def _collect(self) -> None:
        buffer, future = self._lent[0]
        future.result()
        del self._lent[0]  # not before: after an interrupt `settle` must find it
        self._idle.append(buffer)


# Orbax before 0.12.5 always copies an array before it writes it, and has no word for not doing so.
_NO_COPY: dict[str, Any] = {"deepcopy_host_arrays": False}
if "deepcopy_host_arrays" not in inspect.signature(ocp.type_handlers.NumpyHandler).parameters:
    _NO_COPY = {}


class _Saver(ocp.type_handlers.NumpyHandler):
    """Writes handles as if they were the arrays that they load."""

    def __init__(self) -> None:
        super().__init__(**_NO_COPY)

    async def serialize(
        self, values: Sequence[Handle], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        buffers = _Buffers()
        try:
            # Front to back through the source files, whatever the tree's order.
            rows = sorted(zip(values, infos, args, strict=True), key=lambda row: row[0].order)
            for handle, info, arg in rows:
                buffer = buffers.borrow(handle.nbytes)
                (future,) = await super().serialize([handle.load(buffer)], [info], [arg])
                buffers.lend(buffer, future)
            buffers.finish()
        finally:
            # Nothing may write on behind the back of whoever clears up after an error.
            buffers.settle()
        return []


class _Reader(ocp.type_handlers.NumpyHandler):
    """Gives every array to `sink` and restores an empty one in its place.

    missing: the names of those that have not come. Another's name ends it before it is read.
    """

    def __init__(self, names: Collection[str], sink: Callable[[str, NDArray[Any]], None]):
        super().__init__()
        self.missing = set(names)
        self._sink = sink

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[NDArray[Any]]:
        context = ts.Context({})
        for info in infos:
            if info.name not in self.missing:
                raise CheckpointError(f"{info.parent_dir} also holds {info.name!r:.99}")
            store = await open_array(info.path, context)
            self._sink(info.name, await store.read())
            self.missing.remove(info.name)
        return [np.empty(0)] * len(infos)


def save(path: Path, tree: Any, leaf: type) -> None:
    """Writes a pytree whose leaves are Handles of class `leaf`; `path` must be absolute."""
    arguments = ocp.args.PyTreeSave(
        tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    )
    with quiet_orbax(), ocp.Checkpointer(_handler(leaf, _Saver())) as checkpointer:
        checkpointer.save(path, args=arguments)


def restore(path: Path, names: Collection[str], sink: Callable[[str, NDArray[Any]], None]) -> None:
    """Calls sink(path in the pure dict, joined by dots; array) for every array in turn.

    CheckpointError where there are other arrays than these `names`.
    """
    reader = _Reader(names, sink)
    with quiet_orbax(), ocp.Checkpointer(_handler(np.ndarray, reader)) as checkpointer:
        checkpointer.restore(path, args=ocp.args.PyTreeRestore())
    if reader.missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(reader.missing))}")


def _handler(leaf: type, handler: Any) -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry((leaf, handler))
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_ocdbt=False, use_compression=False
    )
