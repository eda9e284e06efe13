"""A model of the wanted size without a checkpoint, made in no more memory than it takes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pdllm_jax import MaskPredictor, ModelConfig


def cheap_model(config: ModelConfig, dtype: DTypeLike = jnp.bfloat16) -> MaskPredictor:
    """Weights from a hash of their places, with the spread that random ones would have.

    `LLaDA(config, rngs=...)` draws in float32, and a device's peak memory would be that of the
    drawing. Here every array comes from one fused program without temporaries.
    """
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: _fill(leaf.shape, jnp.dtype(leaf.dtype)), state)
    return nnx.merge(graph, jax.block_until_ready(state))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 1:  # a norm
        return jnp.ones(shape, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    bits = (row * jnp.uint32(2654435761)) ^ (column * jnp.uint32(2246822519))
    bits = (bits ^ (bits >> 15)) * jnp.uint32(3266489917)
    uniform = (bits >> 8).astype(jnp.float32) / (1 << 24) - 0.5
    return (uniform * (12 / shape[1]) ** 0.5).astype(dtype)
