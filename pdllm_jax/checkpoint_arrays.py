"""Arrays of a converted checkpoint, through Orbax, onto the devices where they are wanted."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Mesh

from pdllm_jax.checkpoint import MANIFEST, CheckpointError, Manifest, leaves, reason
from pdllm_jax.parallel import shardings


def read_params(
    params: Path, manifest: Manifest, wanted: dict[str, Any], mesh: Mesh | None
) -> dict[str, Any]:
    """The pure dict of `wanted`, shapes and dtypes. CheckpointError, also where params/ itself
    says something else than the manifest.
    """
    # Without a mesh the device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding
    places = jax.tree.map(lambda _: default, wanted) if mesh is None else shardings(mesh, wanted)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        wanted,
        places,
    )
    # Bounds what is on its way between disk and device; must exceed the largest array.
    largest = max(record.nbytes for record in manifest.tensors)
    handler = ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=2 + 2 * largest // 10**9,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, _MappedReader())
        ),
    )
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    try:
        with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            _check_stored(params, manifest, checkpointer.metadata(params))
            return checkpointer.restore(params, args=arguments)
    except CheckpointError:
        raise
    except Exception as error:
        # Orbax and TensorStore raise what comes: plain Exception, ValueError, KeyError, OSError.
        raise CheckpointError(f"{params} can not be restored: {reason(error)}") from error


class _MappedReader(ocp.type_handlers.ArrayHandler):
    """Orbax's handler, told to map the files instead of reading them.

    By default TensorStore reads a file into memory of its own and copies the array out of that.
    Fresh memory costs the kernel as much as the reading, and half of it was needed for nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._context = ts.Context({"file_io_mode": {"mode": "memmap"}})

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[jax.Array]:
        mapped = [copy.copy(info) for info in infos]
        for info in mapped:
            info.ts_context = self._context
        return await super().deserialize(mapped, args)


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


def _check_stored(params: Path, manifest: Manifest, metadata: Any) -> None:
    """The manifest against the shapes and dtypes that params/ itself declares."""
    stored = {
        path: (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in leaves(metadata.item_metadata.tree)
    }
    expected = {record.path: (record.shape, record.dtype) for record in manifest.tensors}
    for path in sorted(stored.keys() | expected.keys()):
        if stored.get(path) != expected.get(path):
            raise CheckpointError(
                f"{params} and {MANIFEST} disagree about {path}: "
                f"{_describe(stored.get(path))} and {_describe(expected.get(path))}"
            )


def _describe(tensor: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if tensor is None else f"{tensor[1]}{list(tensor[0])}"
