"""The network's small parts: linear maps in PyTorch layout, RMSNorm, SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import Norm, matmul
from pallas_kernels.sums import rms_norm
from pdllm_jax.sharded import add_projected, look_up, project_columns


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
        return matmul(x, self.weight[...])[0]


def project_all(
    x: Float[Array, "*rows I"], *linears: Linear, mesh: Mesh | None = None
) -> tuple[Float[Array, "*rows O"], ...]:
    """x through each of them; where rows are few, in one launch."""
    return project_columns(mesh, x, *(linear.weight[...] for linear in linears))


def swiglu(
    x: Float[Array, "*rows I"], gate: Linear, up: Linear, mesh: Mesh | None = None
) -> Float[Array, "*rows O"]:
    """silu(gate(x)) * up(x)."""
    weights = gate.weight[...], up.weight[...]
    return project_columns(mesh, x, *weights, activation="swiglu")[0]


def add_to_stream(
    stream: Float[Array, "*rows M"],
    x: Float[Array, "*rows I"],
    linear: Linear,
    norm: RMSNorm | None,
    mesh: Mesh | None = None,
    links: Array | None = None,
) -> tuple[Float[Array, "*rows M"], Float[Array, "*rows M"]]:
    """stream + linear(x), and its norm, by default itself."""
    by = None if norm is None else Norm(norm.weight[...], norm.eps)
    found = add_projected(mesh, stream, x, linear.weight[...], by, links)
    return found[0], found[-1]


class Embedding(nnx.Module):
    """Token embedding [E, M]."""

    def __init__(self, rows: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        values = jax.random.normal(rngs.params(), (rows, size), jnp.float32) * size**-0.5
        self.weight = nnx.Param(values.astype(dtype))

    def __call__(self, token_ids: Array, mesh: Mesh | None = None) -> Float[Array, "*rows M"]:
        return look_up(mesh, self.weight[...], token_ids)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 inside, cast back, then scaled by the weight."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        return rms_norm(x, self.weight[...], self.eps)
