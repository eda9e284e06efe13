"""A converted checkpoint: the layout of its folder, and restoring it as a model.

    FOLDER/manifest.json  what the folder holds, with checksums
    FOLDER/config.json    the architecture, as the PyTorch checkpoint states it
    FOLDER/tokenizer.*    the tokenizer's files
    FOLDER/params/        Orbax checkpoint of nnx.to_pure_dict(nnx.state(model))

`convert` writes the folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import AllReduceImplementation
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import mesh_sizes, shardings
from pdllm_jax.network.transformer import MaskPredictor, put_on
from pdllm_jax.storage.atomic import reason
from pdllm_jax.storage.manifest import (
    CheckpointError,
    FolderKind,
    Manifest,
    read_json,
    read_manifest,
)

CONFIG = "config.json"
PARAMS = "params"
CHECKPOINT = FolderKind(
    "checkpoint", 2, CheckpointError, "convert it (again): pdllm-convert SOURCE DESTINATION"
)
DTYPES = ("bfloat16", "float16", "float32")
# Files up to this size (JSON, Zarr metadata, most tokenizers) are compared with their checksums
# whenever a checkpoint is opened.
_SMALL_BYTES = 8 << 20
# Between disk and device at a time.
_RESTORE_GB = 4


def open_checkpoint(path: str | Path) -> Manifest:
    """Reads the manifest of a converted checkpoint and compares the folder with it.

    Compares the sizes of all files, and the checksums of all but the weights.

    Raises:
      CheckpointError: names what is missing, truncated or changed.
    """
    manifest = read_manifest(Path(path), CHECKPOINT)
    manifest.check_sizes()
    manifest.verify(name for name, file in manifest.files.items() if file.nbytes <= _SMALL_BYTES)
    return manifest


def load_config(path: str | Path) -> ModelConfig:
    """Reads the architecture of a checkpoint from its config.json.

    Raises:
      CheckpointError: the folder has no readable config.json.
      ConfigError: the architecture is not implemented.
    """
    return ModelConfig.from_dict(read_json(Path(path) / CONFIG))


def load_model(
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    sums: AllReduceImplementation | None = None,
    verify: bool = False,
) -> MaskPredictor:
    """Restores a converted checkpoint, a few arrays at a time.

    Args:
      path: folder that `pdllm-convert` wrote.
      dtype: of weights and activations, bfloat16, float16 or float32; None keeps the checkpoint's.
      mesh: of `make_mesh`; every device then reads only its part of the weights. None loads to
        JAX's default device.
      sums: on a mesh, as for `shard_model`.
      verify: also compares the checksums of the weights, which reads them twice.

    Raises:
      CheckpointError: the folder is not a complete converted checkpoint, or was changed.
      ConfigError: config.json is not implemented, or the mesh does not divide it.
      ValueError: `sums` without a mesh.
    """
    folder = Path(path).resolve()
    manifest = open_checkpoint(folder)
    if verify:
        manifest.verify()
    config = load_config(folder)
    if mesh is not None:
        mesh_sizes(config, mesh)
    elif sums is not None:
        raise ValueError(f"sums {sums!r} needs a mesh")
    name = manifest.settings["dtype"] if dtype is None else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name} is not supported ({', '.join(DTYPES)} are)")
    # Shapes alone: no weight is drawn.
    abstract = nnx.eval_shape(
        lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(name))
    )
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, _restore(folder / PARAMS, nnx.to_pure_dict(state), mesh))
    model = nnx.merge(graph, state)
    return model if mesh is None else put_on(model, mesh, sums)


def _restore(params: Path, wanted: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Returns the arrays of `wanted`, a pure dict of shapes and dtypes, on their devices."""
    import orbax.checkpoint as ocp  # takes as long to import as the rest of the package

    # The device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding
    places = jax.tree.map(lambda _: default, wanted) if mesh is None else shardings(mesh, wanted)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        wanted,
        places,
    )
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_RESTORE_GB)
    try:
        with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(params, args=arguments)
    except Exception as error:  # Orbax and TensorStore raise various classes
        raise CheckpointError(f"{params} cannot be restored: {reason(error)}") from error


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
