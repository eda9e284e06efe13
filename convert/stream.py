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
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

CHUNK_BYTES = 128 << 20
# Arrays being written and the one being read, together. At LLaDA-8B's size this lets the two
# largest, of 1.04 GB in bfloat16, overlap.
IN_FLIGHT_BYTES = 5 << 29


class Handle(Protocol):
    """A leaf that stands for an array."""

    order: Any
    nbytes: int

    def load(self) -> NDArray[Any]: ...


class _Saver(ocp.type_handlers.NumpyHandler):
    """Writes handles as if they were the arrays that they load."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Handle], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        pending: list[tuple[int, Any]] = []

        def wait_until(limit: int) -> None:
            while pending and sum(nbytes for nbytes, _ in pending) > limit:
                pending[0][1].result()
                del pending[0]  # not before: an interrupt must find it

        try:
            # Front to back through the source files, whatever the tree's order.
            rows = sorted(zip(values, infos, args, strict=True), key=lambda row: row[0].order)
            for handle, info, arg in rows:
                wait_until(max(IN_FLIGHT_BYTES - handle.nbytes, 0))
                futures = await super().serialize([handle.load()], [info], [arg])
                pending += [(handle.nbytes, future) for future in futures]
            wait_until(-1)
        finally:
            # Nothing may write on behind the back of whoever clears up after an error.
            for _, future in pending:
                with contextlib.suppress(Exception):
                    future.result()
        return []


class _Reader(ocp.type_handlers.NumpyHandler):
    """Gives every array to `sink` and restores an empty one in its place."""

    def __init__(self, sink: Callable[[str, NDArray[Any]], None]):
        super().__init__()
        self._sink = sink

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[NDArray[Any]]:
        args = args or [ocp.RestoreArgs()] * len(infos)
        for info, arg in zip(infos, args, strict=True):
            (array,) = await super().deserialize([info], [arg])
            self._sink(info.name, array)
        return [np.empty(0)] * len(infos)


def save(path: Path, tree: Any, leaf: type) -> None:
    """Writes a pytree whose leaves are Handles of class `leaf`; `path` must be absolute."""
    arguments = ocp.args.PyTreeSave(
        tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    )
    with _quiet(), ocp.Checkpointer(_handler(leaf, _Saver())) as checkpointer:
        checkpointer.save(path, args=arguments)


def restore(path: Path, sink: Callable[[str, NDArray[Any]], None]) -> None:
    """Calls sink(path in the pure dict, joined by dots; array) for every array in turn."""
    with _quiet(), ocp.Checkpointer(_handler(np.ndarray, _Reader(sink))) as checkpointer:
        checkpointer.restore(path, args=ocp.args.PyTreeRestore())


def _handler(leaf: type, handler: Any) -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry((leaf, handler))
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_ocdbt=False, use_compression=False
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without OCDBT, Orbax warns that there is no OCDBT to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
