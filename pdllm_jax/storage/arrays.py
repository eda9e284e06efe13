"""Arrays of a snapshot on disk, through Orbax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array

from pdllm_jax.network.sharding import DATA, TENSOR, spec_of
from pdllm_jax.storage.checkpoint import quiet_orbax

_CHUNK_BYTES = 16 << 20
# A head with fewer bytes gets no file of its own.
HEAD_BYTES = 1 << 20


def heads_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """Returns the axis of the KV heads, which a mesh divides; None for what is not KV."""
    mesh: Any = AbstractMesh((1, 1), (DATA, TENSOR))
    spec = tuple(spec_of(mesh, name, shape))
    return spec.index(TENSOR) if TENSOR in spec else None


def write_arrays(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays through Orbax, uncompressed. A file holds at most 16 MiB, of one KV head if a
    head has 1 MiB: a device of a mesh reads little that it does not keep.
    """
    import orbax.checkpoint as ocp  # slow to import

    def cut(name: str, array: Array) -> ocp.SaveArgs:
        axis = heads_axis(name, array.shape)
        wide = axis is not None and array.nbytes // array.shape[axis] >= HEAD_BYTES
        return ocp.SaveArgs(shard_axes=(axis,) if wide else (), chunk_byte_size=_CHUNK_BYTES)

    # TensorStore has no empty arrays.
    stored = {name: x for name, x in arrays.items() if x.size}
    sizes = {name: cut(name, x) for name, x in stored.items()}
    with quiet_orbax(), _checkpointer() as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(stored, save_args=sizes))


def read_arrays(folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Restores arrays through Orbax, with the shape, dtype and sharding of their targets."""
    import orbax.checkpoint as ocp

    stored = {name: x for name, x in targets.items() if math.prod(x.shape)}
    arguments = ocp.args.PyTreeRestore(
        item=stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored)
    )
    with _checkpointer() as checkpointer:
        arrays = checkpointer.restore(folder, args=arguments)
    empty = {name: x for name, x in targets.items() if name not in stored}
    return arrays | {
        name: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding) for name, x in empty.items()
    }


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Without OCDBT the folder of an array has its name; KV does not compress.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))
