"""Models whose layers multiply by weights in 8 bits, made from those in 16 or 32."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import EightBits, Scaled
from pallas_kernels.scaled import divided, factors, magnitude
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import place
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import require

_magnitude, _divided = jax.jit(magnitude), jax.jit(divided, static_argnames="bits")


def abstract_state(config: ModelConfig, dtype: DTypeLike) -> tuple[Any, Any]:
    """Returns the graph of a model and its state with shapes in place of arrays."""
    made = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))
    return nnx.split(made)


def quantise_weight(weight: Float[Array, "O I"], bits: EightBits) -> Scaled:
    """Returns `pallas_kernels.quantise` of a weight, with the same bits on devices of all kinds.

    The host divides: see `pallas_kernels.scaled.factors`.
    """
    largest, everywhere = _magnitude(weight), weight.sharding
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
    scales = factors(np.asarray(jax.device_put(largest, everywhere)), bits)
    scale, inverse = jax.device_put(scales, everywhere)
    return Scaled(_divided(weight, inverse, bits=bits), scale)


def full_shapes(layer: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Returns the shapes that `quantise_layer` makes this layer of: matrices in `dtype`."""
    result = {}
    for name, module in layer.items():
        kept = {key: x for key, x in module.items() if key != "scale"}
        if "scale" in module:
            kept["weight"] = jax.ShapeDtypeStruct(module["weight"].shape, dtype)
        result[name] = kept
    return result


def quantise_layer(layer: dict[str, Any], bits: EightBits, mesh: Mesh | None) -> dict[str, Any]:
    """Returns a layer's parameters with its matrices in 8 bits, where `shardings` places them.

    Waits for them, so that no more than one layer is in flight.

    Args:
      layer: {"q_proj": {"weight": .., "bias": ..}, "attn_norm": {"weight": ..}, ..}.
    """
    result = {}
    for name, module in layer.items():
        if module["weight"].ndim == 2:
            scaled = quantise_weight(module["weight"], bits)
            module = {**module, "weight": scaled.values, "scale": scaled.scale}
        result[name] = module
    return jax.block_until_ready(place(mesh, result))


def quantise_model(model: MaskPredictor, bits: EightBits) -> MaskPredictor:
    """Returns a model with the matrices of the layers in 8 bits, and all else shared with `model`.

    `load_model(..., weights=bits)` never holds both forms of all layers.

    Args:
      model: with full weights, on one device or a mesh.
      bits: "fp8" or "int8".

    Raises:
      ConfigError: the model's weights have 8 bits already, or another name of `bits`.
    """
    stored = model.config.weight_format
    require(stored == "full", f"the model's weights are in {stored} already")
    config = dataclasses.replace(model.config, weight_format=bits)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layers = params["blocks"].items()
    params["blocks"] = {i: quantise_layer(layer, bits, model.mesh) for i, layer in layers}
    graph, state = abstract_state(config, model.dtype)
    nnx.replace_by_pure_dict(state, params)
    result = nnx.merge(graph, state)
    if model.mesh is not None:
        result.mesh = model.mesh
    if model.links is not None:
        result.links = model.links
    return result
