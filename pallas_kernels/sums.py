"""Sums whose last bits do not depend on what lies beside a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _sum_by_halves(x: Float[Array, "*rows M"]) -> Float[Array, "*rows"]:
    size = 1 << (x.shape[-1] - 1).bit_length()
    # Behind a barrier, so that no product is fused with the first additions.
    x = jax.lax.optimization_barrier(x)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def row_sum(x: Float[Array, "*rows M"]) -> Float[Array, "*rows"]:
    """Sum over the last axis, on the CPU in an order of its own.

    XLA's reductions on the CPU choose their order by the size of the whole array, so that a row's
    last bit would depend on its neighbours. By halves of a power of two it depends on the row
    alone, and zeros behind it change nothing.
    """
    return jax.lax.platform_dependent(x, cpu=_sum_by_halves, default=lambda x: x.sum(axis=-1))


def rms_norm(
    x: Float[Array, "*rows M"], weight: Float[Array, "M"], eps: float
) -> Float[Array, "*rows M"]:
    """Root-mean-square norm: float32 inside, cast back, then scaled by the weight."""
    wide = x.astype(jnp.float32)
    mean = row_sum(wide * wide) / x.shape[-1]
    return (wide * jax.lax.rsqrt(mean[..., None] + eps)).astype(x.dtype) * weight
