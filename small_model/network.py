"""The network as training wants it: parameters stacked over layers, one lax.scan, adapters.

The same function as pdllm_jax.LLaDA's (a test compares them); scanning compiles one layer instead
of thirty, and what is recomputed in the backward pass is chosen here.
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
    """Static sizes of the network, and how attention is computed ("cudnn" or "xla")."""

    n_heads: int
    n_kv_heads: int
    rope_theta: float
    eps: float
    attention: str = "xla"
    causal: bool = False  # only to check the base as the language model it was


def shape_of(config: Mapping[str, Any], attention: str = "xla", causal: bool = False) -> Shape:
    """Shape from the contents of config.json."""
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    return Shape(heads, kv_heads, config["rope_theta"], config["rms_norm_eps"], attention, causal)


def stack(tensors: Mapping[str, np.ndarray], n_layers: int) -> Params:
    """Checkpoint tensors -> {"embedding", "final_norm", <linear and norm names>: [L, ...]}."""
    params: Params = {
        "embedding": tensors["model.transformer.wte.weight"],
        "final_norm": tensors["model.transformer.ln_f.weight"],
    }
    for name in LINEAR + NORMS:
        params[name] = np.stack(
            [tensors[tensor_name(layer, name)] for layer in range(n_layers)], axis=0
        )
    return params


def tensor_name(layer: int, name: str) -> str:
    """Name of a block's tensor in a checkpoint."""
    return f"model.transformer.blocks.{layer}.{_CHECKPOINT_NAMES.get(name, name)}.weight"


def merge(base: Params, trainable: Params, dtype: Any = jnp.bfloat16) -> Params:
    """Network parameters from the base and what is trained.

    trainable holds "lora" {name: {"a": [L, r, in], "b": [L, out, r]}}, "gain" {name: float32
    scalar per layer [L]}, "norms" and "special" [6, M]; or "full", which replaces the base.
    """
    if "full" in trainable:
        return jax.tree.map(lambda x: x.astype(dtype), trainable["full"])
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
    """Factor of each adapter, float32 [L]: `scale` for a weight of the usual size 1/sqrt(in).

    SmolLM2's norms have small weights and its linear maps large ones, up to eight times the usual;
    without the factor an adapter would learn that much more slowly.
    """
    found = {}
    for name in LINEAR:
        weight = np.asarray(params[name], np.float32)
        size = np.sqrt(np.mean(weight * weight, axis=(1, 2)) * weight.shape[2])
        found[name] = (scale * size).astype(np.float32)
    return found


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
    """Hidden states after the final norm, [B, T, M]; every token attends to every other.

    lengths: int [B], tokens of each row that are attended to; all of them by default.

    Everything but attention and the products themselves is recomputed in the backward pass.
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
            q, k, v, is_causal=shape.causal, implementation=shape.attention,
            key_value_seq_lengths=lengths,
        )  # fmt: skip
        return after(x, out, layer), None

    layers = {name: params[name] for name in LINEAR + NORMS}
    x, _ = jax.lax.scan(block, x, layers)
    return _norm(x, params["final_norm"], shape.eps)


def head(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits of rows [..., M], float32; the embedding is the LM head."""
    return jnp.einsum(
        "...m,vm->...v", hidden, params["embedding"], preferred_element_type=jnp.float32
    )
