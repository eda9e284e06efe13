"""Computes the network for training: one lax.scan over stacked layers, with the adapter merged in.

The function equals pdllm_jax.MaskPredictor's (a test compares them). The scan compiles one layer
instead of thirty, and jax.checkpoint chooses what the backward pass recomputes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.common import rms_norm
from pdllm_jax import MaskPredictor, ModelConfig
from pdllm_jax.network.rope import rotate, rotation

LINEAR = ("q_proj", "k_proj", "v_proj", "attn_out", "gate_proj", "up_proj", "down_proj")
NORMS = ("attn_norm", "ff_norm")
_CHECKPOINT_NAMES = {"gate_proj": "ff_proj", "down_proj": "ff_out"}

Params = dict[str, Any]


def stack(tensors: Mapping[str, np.ndarray], n_layers: int) -> Params:
    """Stacks checkpoint tensors: embedding, final_norm, and [L, ...] for LINEAR and NORMS."""
    params: Params = {
        "embedding": tensors["model.transformer.wte.weight"],
        "final_norm": tensors["model.transformer.ln_f.weight"],
    }
    for name in LINEAR + NORMS:
        params[name] = np.stack([tensors[tensor_name(i, name)] for i in range(n_layers)])
    return params


def tensor_name(layer: int, name: str) -> str:
    """Returns the name of a layer's tensor in a checkpoint."""
    return f"model.transformer.blocks.{layer}.{_CHECKPOINT_NAMES.get(name, name)}.weight"


def merge(base: Params, trainable: Params, dtype: Any = jnp.bfloat16) -> Params:
    """Returns the network's parameters in `dtype`.

    base: from `stack`, with "gain" {name: float32 [L]} from `gains`.
    trainable: "lora" {name: {"a": [L, r, in], "b": [L, out, r]}}, "norms" and "special" [6, M].
    """
    params = dict(base)
    for name, pair in trainable["lora"].items():
        delta = jnp.einsum("lor,lri->loi", pair["b"], pair["a"])
        delta = delta * base["gain"][name][:, None, None]
        params[name] = (base[name].astype(jnp.float32) + delta).astype(dtype)
    for name, values in trainable["norms"].items():
        params[name] = values.astype(dtype)
    special = trainable["special"].astype(dtype)
    params["embedding"] = jnp.asarray(base["embedding"], dtype).at[: len(special)].set(special)
    params.pop("gain")
    return params


def gains(params: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Returns the factor of each linear map's adapter, float32 [L].

    The factor is `scale` for a weight of the usual size 1/sqrt(in). SmolLM2's linear maps are up to
    eight times larger; with a common factor their adapters would learn more slowly.
    """
    factors = {}
    for name in LINEAR:
        weight = np.asarray(params[name], np.float32)
        size = np.sqrt(np.mean(weight * weight, axis=(1, 2)) * weight.shape[2])
        factors[name] = (scale * size).astype(np.float32)
    return factors


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("bti,oi->bto", x, weight)


def encode(params: Params, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Returns the hidden states after the final norm, [B, T, M]; attention is bidirectional.

    The backward pass recomputes everything except attention and the matrix products.
    """
    x = params["embedding"][tokens]
    (batch, length, width), eps = x.shape, config.rms_norm_eps
    places = rotation(config, jnp.arange(length))
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def before(x: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = rms_norm(x, layer["attn_norm"], eps)
        shape = (batch, length, -1, config.head_dim)
        q, k, v = (_linear(h, layer[f"{name}_proj"]).reshape(shape) for name in "qkv")
        return rotate(q, places), rotate(k, places), v

    def after(x: jax.Array, out: jax.Array, layer: Params) -> jax.Array:
        x = x + _linear(out.reshape(batch, length, width), layer["attn_out"])
        h = rms_norm(x, layer["ff_norm"], eps)
        gated = jax.nn.silu(_linear(h, layer["gate_proj"])) * _linear(h, layer["up_proj"])
        return x + _linear(gated, layer["down_proj"])

    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    before, after = jax.checkpoint(before, policy=keep), jax.checkpoint(after, policy=keep)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        out = jax.nn.dot_product_attention(*before(x, layer), implementation=attention)
        return after(x, out, layer), None

    layers = {name: params[name] for name in LINEAR + NORMS}
    x, _ = jax.lax.scan(block, x, layers)
    return rms_norm(x, params["final_norm"], eps)


def head(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., M]; the embedding is the LM head."""
    return jnp.matmul(hidden, params["embedding"].T, preferred_element_type=jnp.float32)


def to_model(params: Params, config: ModelConfig) -> MaskPredictor:
    """Returns the library's model with the weights of `stack` or `merge`, and their dtype."""
    dtype = params["embedding"].dtype
    model = MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype)
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)
    for name in ("embedding", "final_norm"):
        weights[name]["weight"] = params[name]
    for layer, name in itertools.product(range(config.n_layers), LINEAR + NORMS):
        weights["blocks"][layer][name]["weight"] = params[name][layer]
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, weights))
    return nnx.merge(graph, state)
