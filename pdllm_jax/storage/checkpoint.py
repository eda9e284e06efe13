"""A converted checkpoint: the layout of its folder, and restoring it as a model.

    FOLDER/manifest.json  what the folder holds, with checksums
    FOLDER/config.json    the architecture, as the PyTorch checkpoint states it
    FOLDER/tokenizer.*    the tokenizer's files
    FOLDER/params/        Orbax checkpoint of nnx.to_pure_dict(nnx.state(model))

`convert` writes the folder.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import AllReduceImplementation
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import mesh_sizes, shardings
from pdllm_jax.network.transformer import MaskPredictor, put_on
from pdllm_jax.storage.arrays import read_arrays
from pdllm_jax.storage.manifest import (
    CheckpointError,
    FolderKind,
    Manifest,
    errors_as,
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


def open_checkpoint(path: str | Path, *, verify: bool = False) -> Manifest:
    """Reads the manifest of a converted checkpoint and compares the folder with it.

    Compares the sizes of all files, and the checksums of all but the weights (of all: `verify`).

    Raises:
      CheckpointError: names what is missing, truncated or changed.
    """
    manifest = read_manifest(Path(path), CHECKPOINT)
    manifest.check(math.inf if verify else _SMALL_BYTES)
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
    manifest = open_checkpoint(folder, verify=verify)
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
    shapes = nnx.to_pure_dict(state)
    # The device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding
    places = jax.tree.map(lambda _: default, shapes) if mesh is None else shardings(mesh, shapes)
    targets = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    with errors_as(CheckpointError, f"{folder / PARAMS} cannot be restored"):
        nnx.replace_by_pure_dict(state, read_arrays(folder / PARAMS, targets))
    model = nnx.merge(graph, state)
    return model if mesh is None else put_on(model, mesh, sums)
