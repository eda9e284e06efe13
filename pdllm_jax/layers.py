"""The network's small parts: linear maps in PyTorch layout, RMSNorm, SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def project(
    x: Float[Array, "*rows I"], weight: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """x W^T with float32 accumulation; `dtype` of the result, x's by default.

    float32 weights ask for true float32 products: the default on GPUs would be tf32.
    """
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=x.dtype if dtype is None else dtype,
    )


class Linear(nnx.Module):
    """y = x W^T without bias; W is [out, in] as in the checkpoints, so nothing is transposed."""

    def __init__(self, size_in: int, size_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        scale = size_in**-0.5
        values = jax.random.normal(rngs.params(), (size_out, size_in), jnp.float32) * scale
        self.weight = nnx.Param(values.astype(dtype))

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        return project(x, self.weight[...])


class Embedding(nnx.Module):
    """Token embedding [E, M]."""

    def __init__(self, rows: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        values = jax.random.normal(rngs.params(), (rows, size), jnp.float32) * size**-0.5
        self.weight = nnx.Param(values.astype(dtype))

    def __call__(self, token_ids: Array) -> Float[Array, "*rows M"]:
        return self.weight[...][token_ids]


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


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 inside, cast back, then scaled by the weight."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        wide = x.astype(jnp.float32)
        mean = row_sum(wide * wide) / x.shape[-1]
        scale = jax.lax.rsqrt(mean[..., None] + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
