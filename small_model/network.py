"""Computes the network for training: one lax.scan over stacked layers, with the adapter merged in.

The function equals pdllm_jax.MaskPredictor's (a test compares them). The scan compiles one layer
instead of thirty, and jax.checkpoint chooses what the backward pass recomputes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LINEAR = ("q_proj", "k_proj", "v_proj", "attn_out", "gate_proj", "up_proj", "down_proj")
NORMS = ("attn_norm", "ff_norm")
_CHECKPOINT_NAMES = {"gate_proj": "ff_proj", "down_proj": "ff_out"}

Params = dict[str, Any]


class Shape(NamedTuple):
    """Static sizes of the network and the implementation of attention ("cudnn" or "xla")."""

    n_heads: int
    n_kv_heads: int
    rope_theta: float
    eps: float
    attention: str = "xla"


def shape_of(config: Mapping[str, Any], attention: str = "xla") -> Shape:
    """Returns the Shape of a config.json's contents."""
    names = ("n_heads", "n_kv_heads", "rope_theta", "rms_norm_eps")
    return Shape(*(config[name] for name in names), attention)


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


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("bti,oi->bto", x, weight)


def encode(
    params: Params, shape: Shape, tokens: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """Returns the hidden states after the final norm, [B, T, M]; attention is bidirectional.

    lengths: int [B], valid tokens of each row; None: all.
    The backward pass recomputes everything except attention and the matrix products.
    """
    x = params["embedding"][tokens]
    batch, length, width = x.shape
    dim = width // shape.n_heads
    frequencies = shape.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None] for f in (np.cos, np.sin))

    def before(x: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = _norm(x, layer["attn_norm"], shape.eps)
        q, k, v = (
            _linear(h, layer[name]).reshape(batch, length, -1, dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def after(x: jax.Array, out: jax.Array, layer: Params) -> jax.Array:
        x = x + _linear(out.reshape(batch, length, width), layer["attn_out"])
        h = _norm(x, layer["ff_norm"], shape.eps)
        gated = jax.nn.silu(_linear(h, layer["gate_proj"])) * _linear(h, layer["up_proj"])
        return x + _linear(gated, layer["down_proj"])

    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    before, after = jax.checkpoint(before, policy=keep), jax.checkpoint(after, policy=keep)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        q, k, v = before(x, layer)
        out = jax.nn.dot_product_attention(
            q, k, v, implementation=shape.attention, key_value_seq_lengths=lengths
        )
        return after(x, out, layer), None

    layers = {name: params[name] for name in LINEAR + NORMS}
    x, _ = jax.lax.scan(block, x, layers)
    return _norm(x, params["final_norm"], shape.eps)


def head(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., M]; the embedding is the LM head."""
    return jnp.einsum(
        "...m,vm->...v", hidden, params["embedding"], preferred_element_type=jnp.float32
    )
