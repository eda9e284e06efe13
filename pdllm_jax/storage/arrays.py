"""Trees of arrays on disk, through Orbax."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jaxtyping import Array

from pdllm_jax.network.sharding import DATA, TENSOR, spec_of

_CHUNK_BYTES = 16 << 20
# A head with fewer bytes gets no file of its own.
HEAD_BYTES = 1 << 20
# Between disk and device at a time.
_RESTORE_GB = 4


def heads_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """Returns the axis of the KV heads, which a mesh divides; None for what is not KV."""
    mesh: Any = AbstractMesh((1, 1), (DATA, TENSOR))
    spec = tuple(spec_of(mesh, name, shape))
    return spec.index(TENSOR) if TENSOR in spec else None


def write_arrays(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays uncompressed. A file holds at most 16 MiB, of one KV head if a head has 1 MiB:
    a device of a mesh reads little that it does not keep.
    """
    import orbax.checkpoint as ocp  # takes as long to import as the rest of the package

    def cut(name: str, array: Array) -> ocp.SaveArgs:
        axis = heads_axis(name, array.shape)
        wide = axis is not None and array.nbytes // array.shape[axis] >= HEAD_BYTES
        return ocp.SaveArgs(shard_axes=(axis,) if wide else (), chunk_byte_size=_CHUNK_BYTES)

    stored = {name: x for name, x in arrays.items() if x.size}  # TensorStore has no empty arrays
    sizes = {name: cut(name, x) for name, x in stored.items()}
    # Without OCDBT the folder of an array has its name; KV does not compress.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(stored, save_args=sizes))


def read_arrays(folder: Path, targets: Any, *, partial: bool = False) -> Any:
    """Restores a tree of arrays, none of them empty, to the shardings of its ShapeDtypeStructs.

    partial: the folder holds others, too.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class MappedHandler(ocp.type_handlers.ArrayHandler):
        """Maps files: 8 GB/s onto an H200. Orbax reads them into fresh memory first: 4 GB/s."""

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            context = ts.Context({"file_io_mode": {"mode": "memmap"}})
            for info in infos:
                info.ts_context = context
            return await super().deserialize(infos, args)

    arguments = ocp.args.PyTreeRestore(
        item=targets,
        restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
        partial_restore=partial,
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, MappedHandler()))
    handler = ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=_RESTORE_GB, type_handler_registry=registry
    )
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(folder, args=arguments)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log: it warns about absent OCDBT files, and it raises what is wrong."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
