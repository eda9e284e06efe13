"""A converted checkpoint: the layout of its folder, and restoring it as a model.

    FOLDER/manifest.json  what the folder holds, with checksums
    FOLDER/config.json    the architecture, as the PyTorch checkpoint states it
    FOLDER/tokenizer.*    the tokenizer's files
    FOLDER/params/        Orbax checkpoint of nnx.to_pure_dict(nnx.state(model))

`convert` writes the folder.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import AllReduceImplementation
from pdllm_jax.network.config import ModelConfig, WeightFormat
from pdllm_jax.network.eight_bits import abstract_state, full_shapes, quantise_layer
from pdllm_jax.network.sharding import mesh_sizes, shardings
from pdllm_jax.network.transformer import MaskPredictor, put_on
from pdllm_jax.rules import require
from pdllm_jax.storage.arrays import read_arrays
from pdllm_jax.storage.manifest import (
    MANIFEST,
    CheckpointError,
    FolderKind,
    Manifest,
    errors_as,
    read_json,
    read_manifest,
)

CONFIG = "config.json"
PARAMS = "params"
# Of the manifest's settings, beside "dtype": the weight format, where it is not "full".
WEIGHTS = "weights"
CHECKPOINT = FolderKind(
    "checkpoint", 2, CheckpointError, "convert it (again): pdllm-convert SOURCE DESTINATION"
)
DTYPES = ("bfloat16", "float16", "float32")
# Full weights that wait to be quantised, at most: one layer at least, two of LLaDA-8B.
_FULL_BYTES = 1 << 30
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

    `weight_format` is what manifest.json says, "full" without one.

    Raises:
      CheckpointError: the folder has no readable config.json, or its manifest was changed.
      ConfigError: the architecture is not implemented.
    """
    folder = Path(path)
    config = ModelConfig.from_dict(read_json(folder / CONFIG))
    if not (folder / MANIFEST).exists():
        return config
    stored = read_manifest(folder, CHECKPOINT).settings.get(WEIGHTS, "full")
    return dataclasses.replace(config, weight_format=stored)


def load_model(
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    sums: AllReduceImplementation | None = None,
    weights: WeightFormat | None = None,
    verify: bool = False,
) -> MaskPredictor:
    """Restores a converted checkpoint, a few arrays at a time.

    Args:
      path: folder that `pdllm-convert` wrote.
      dtype: of weights and activations, bfloat16, float16 or float32; None keeps the checkpoint's.
      mesh: of `make_mesh`; every device then reads only its part of the weights. None loads to
        JAX's default device.
      sums: on a mesh, as for `shard_model`.
      weights: "fp8" or "int8" makes 8 bits of a checkpoint's full weights, as `pdllm-convert
        --weights` does, a few layers at a time; None keeps the checkpoint's. Weights in 8 bits load
        as such alone.
      verify: also compares the checksums of the weights, which reads them twice.

    Raises:
      CheckpointError: the folder is not a complete converted checkpoint, was changed, or holds
        8 bits where other weights are wanted.
      ConfigError: config.json is not implemented, or the mesh does not divide it; or `weights` is
        not known.
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
    stored = config.weight_format
    bits: Any = stored if weights is None else weights
    allowed = get_args(WeightFormat)
    require(bits in allowed, f"weights {bits!r} is not known ({', '.join(allowed)})")
    if stored not in ("full", bits):
        way = "pdllm-convert --reverse makes full weights; without weights= they load as they are"
        raise CheckpointError(f"weights {weights!r}: {folder} holds {stored} weights; {way}")
    config = dataclasses.replace(config, weight_format=bits)
    graph, state = abstract_state(config, jnp.dtype(name))
    params = nnx.to_pure_dict(state)
    # The device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding

    def restore(targets: Any, *, partial: bool = False) -> Any:
        places = jax.tree.map(lambda _: default, targets)
        places = places if mesh is None else shardings(mesh, targets)
        placed = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), targets, places
        )
        return read_arrays(folder / PARAMS, placed, partial=partial)

    def quantised(layers: dict[int, Any]) -> dict[int, Any]:
        shapes = {i: full_shapes(x, manifest.settings["dtype"]) for i, x in layers.items()}
        largest = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[0]))
        count, result = max(1, _FULL_BYTES // largest), dict[int, Any]()
        for first in range(0, len(shapes), count):
            group = {i: shapes[i] for i in range(first, min(first + count, len(shapes)))}
            full = restore({"blocks": group}, partial=True)["blocks"]
            result |= {i: quantise_layer(full.pop(i), bits, mesh) for i in group}
        return result

    with errors_as(CheckpointError, f"{folder / PARAMS} cannot be restored"):
        if bits == stored:
            params = restore(params)
        else:  # a few layers at a time: full weights are never whole in memory
            layers = params.pop("blocks")
            params = restore(params, partial=True)
            params["blocks"] = quantised(layers)
        nnx.replace_by_pure_dict(state, params)
    model = nnx.merge(graph, state)
    return model if mesh is None else put_on(model, mesh, sums)
