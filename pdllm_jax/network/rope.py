"""Rotary position embedding: half-split layout, full precision, plain or scaled frequencies.

A rotation depends on the position alone, so R(p) q . R(o + i) k = R(p - o) q . R(i) k: keys can be
kept rotated at chunk-local positions i and serve any offset o by rotating the few query rows by
p - o instead (shared terms: algorithm step "Positions"). Scaling changes the frequencies, and
YaRN a common factor on both sides, neither of which touches that identity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pdllm_jax.network.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """cos and sin of the angles of some rows, each [..., T, D/2] float32."""

    cos: Array
    sin: Array


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each of the D/2 planes, float64, and the factor on cos and sin."""
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
    """YaRN (arXiv 2309.00071, section 3.2): slow planes interpolated, fast ones kept, a ramp."""

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
    """Angles of rows at `positions` (any integers, negative ones too)."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "*rows T H D"], by: Rotation) -> Float[Array, "*rows T H D"]:
    """Rotates every head of every row; float32 inside, x's dtype outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
