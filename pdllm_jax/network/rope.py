"""Rotary position embedding: half-split layout, full precision, plain or scaled frequencies.

Scores depend on differences of positions: R(p) q . R(o + i) k = R(p - o) q . R(i) k. So keys stay
rotated at chunk-local positions i and serve any offset o; the few query rows are rotated by p - o
instead. The identity holds for scaled frequencies and for YaRN's factor too. See docs/algorithm.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pdllm_jax.network.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """The cos and sin of the angles of rows, each [..., T, D/2] float32."""

    cos: Array
    sin: Array


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns each plane's angle per position, float64 [D/2], and the factor on cos and sin."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    plane = np.arange(0, dim, 2, dtype=np.float64) / dim
    if scaling is None:
        return theta**-plane, 1.0
    if scaling.kind == "linear":
        return theta**-plane / scaling.factor, 1.0
    if scaling.kind == "ntk":
        return (theta * scaling.factor ** (dim / (dim - 2))) ** -plane, 1.0
    return _yarn(dim, theta, scaling)


def _yarn(dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3.2): slow planes interpolated, fast ones kept, by a ramp."""

    def plane_of(rotations: float) -> float:
        turns = scaling.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(plane_of(scaling.beta_fast)), 0)
    high = min(math.ceil(plane_of(scaling.beta_slow)), dim - 1)
    width = max(high - low, 1e-3)
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    frequencies = base / scaling.factor * ramp + base * (1.0 - ramp)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
    return frequencies, attention_factor


def rotation(config: ModelConfig, positions: Int[Array, "*rows T"]) -> Rotation:
    """Returns the rotations of rows at `positions`, which may be negative."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rows_of(by: Rotation, rows: slice) -> Rotation:
    """Returns the rotations of some of the rows."""
    return Rotation(by.cos[..., rows, :], by.sin[..., rows, :])


def rotate(x: Float[Array, "*rows T H D"], by: Rotation) -> Float[Array, "*rows T H D"]:
    """Rotates every head of every row; float32 inside, x's dtype outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
