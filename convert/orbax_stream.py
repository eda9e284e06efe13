"""Orbax one array at a time, through its public API.

The format is Zarr without OCDBT and without compression: trained weights do not compress, and every
array is a folder, so that a damaged file names its tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from convert.mapping import tree
from pdllm_jax.rules import listed
from pdllm_jax.storage.arrays import quiet_orbax
from pdllm_jax.storage.manifest import CheckpointError, errors_as

# Larger arrays are cut, so that several threads write and read them; only an embedding is larger.
CHUNK_BYTES = 128 << 20
# Arrays that are being written while the next one is read.
AHEAD_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf that stands for an array of `nbytes`, which `load` makes.

    order: leaves are loaded in ascending order.
    """

    order: Any
    nbytes: int
    load: Callable[[], NDArray[Any]]


# Orbax before 0.12.5 always copies an array before it writes it.
_NO_COPY: dict[str, Any] = {"deepcopy_host_arrays": False}
if "deepcopy_host_arrays" not in inspect.signature(ocp.type_handlers.NumpyHandler).parameters:
    _NO_COPY = {}


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves as the arrays that they load.

    Orbax's own handlers take all arrays at once; a checkpoint may be larger than the memory.
    """

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        pending: deque[tuple[int, Any]] = deque()
        try:
            rows = sorted(zip(values, infos, args, strict=True), key=lambda row: row[0].order)
            for leaf, info, arg in rows:
                while pending and sum(n for n, _ in pending) > max(AHEAD_BYTES - leaf.nbytes, 0):
                    pending[0][1].result()
                    pending.popleft()
                (future,) = await super().serialize([leaf.load()], [info], [arg])
                pending.append((leaf.nbytes, future))
            for _, future in pending:
                future.result()
        finally:
            for _, future in pending:  # after an error: no thread may write on
                with contextlib.suppress(Exception):
                    future.result()
        return []


def save(path: Path, leaves: Mapping[str, Leaf]) -> None:
    """Writes an Orbax checkpoint to an absolute path; `leaves` by dotted parameter path."""
    params = tree(leaves)
    arguments = ocp.args.PyTreeSave(
        params, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    )
    with quiet_orbax():
        registry = ocp.type_handlers.create_type_handler_registry((Leaf, _LeafHandler(**_NO_COPY)))
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, use_ocdbt=False, use_compression=False
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=arguments)


def sizes(params: Path, paths: Iterable[str]) -> dict[str, int]:
    """Returns the bytes of arrays by their paths; CheckpointError if one is missing."""
    with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
        arrays = _flat(checkpointer.metadata(params).item_metadata.tree)
    if absent := [path for path in paths if path not in arrays]:
        raise CheckpointError(f"{params} lacks {listed(absent)}")
    return {path: math.prod(arrays[path].shape) * arrays[path].dtype.itemsize for path in paths}


def restore(params: Path, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Reads some arrays into host memory; `paths` are dotted parameter paths.

    Raises:
      CheckpointError: an array is missing or cannot be read.
    """
    paths = list(paths)
    arguments = ocp.args.PyTreeRestore(
        item=tree(dict.fromkeys(paths, 0)),
        restore_args=tree(dict.fromkeys(paths, ocp.RestoreArgs(restore_type=np.ndarray))),
        partial_restore=True,
    )
    with (
        errors_as(CheckpointError, f"{params} cannot be read"),
        quiet_orbax(),
        ocp.PyTreeCheckpointer() as checkpointer,
    ):
        return _flat(checkpointer.restore(params, args=arguments))


def _flat(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
