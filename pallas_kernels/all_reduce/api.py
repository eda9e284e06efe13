"""Public entry: sums of a few rows over the devices of a mesh axis, with residual and RMSNorm."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.all_reduce.peer_memory import CAPACITY
from pallas_kernels.common import resolve, rms_norm

AllReduceImplementation = Literal["mosaic_gpu", "xla"]


class Norm(NamedTuple):
    """An RMSNorm: weight [M], and eps, which is added to the mean of squares."""

    weight: Float[Array, "M"]
    eps: float


def resolve_all_reduce(
    implementation: AllReduceImplementation | None,
    x: jax.ShapeDtypeStruct | Array,
    table: Int[Array, "*mesh A"] | None,
) -> AllReduceImplementation:
    """Returns what `all_reduce` uses for a device's x.

    A name is returned as it is. None gives "mosaic_gpu" if there is a table and the rows fit into
    the peer memory, else "xla".

    Raises:
      ValueError: the name is not known, or the kernel does not take x.
    """
    return resolve(implementation, get_args(AllReduceImplementation), _problem(x, table))


def _problem(x: jax.ShapeDtypeStruct | Array, table: Array | None) -> str | None:
    dtype = jnp.dtype(x.dtype)
    if table is None:
        return "it needs a peer table"
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        return f"the kernel takes bfloat16, float16 and float32, got {dtype.name}"
    if x.shape[-1] * dtype.itemsize % 16:
        return f"rows must be a multiple of 16 bytes, got {x.shape[-1]} {dtype.name}"
    if x.size * dtype.itemsize > CAPACITY:
        return f"the peer memory holds {CAPACITY} bytes, got {x.size * dtype.itemsize}"
    return None


def all_reduce(
    x: Float[Array, "*rows M"],
    axis: str,
    *,
    table: Int[Array, "*mesh A"] | None = None,
    residual: Float[Array, "*rows M"] | None = None,
    norm: Norm | None = None,
    implementation: AllReduceImplementation | None = None,
) -> tuple[Float[Array, "*rows M"], ...]:
    """Sums x over the devices along `axis`, under `jax.shard_map`; every device gets the sum.

    The sum is rounded to x's dtype before the residual is added.

    The kernel needs all devices to make the same sums in the same order, each after the last one
    has ended. XLA does so within a program: it runs them on one stream (its default, in graphs
    too). Between programs of several threads, a collective of XLA's over `axis` in each program
    keeps the order; run programs without one from a single thread.

    Args:
      x: this device's part.
      axis: the mesh axis.
      table: this device's row of `peer_table` for that mesh and axis.
      residual: added to the sum; the same on all devices.
      norm: makes the RMSNorm of the result as well.
      implementation: the code to run. A named one runs or the call fails.
        "mosaic_gpu"  the kernel: devices write to each other's memory; not differentiable.
        "xla"         `lax.psum`, on any device and of any size.
        None          see `resolve_all_reduce`.

    Returns:
      (sum,), or with a norm (sum, its norm).

    Raises:
      ValueError: see `resolve_all_reduce`.
    """
    if resolve_all_reduce(implementation, x, table) == "mosaic_gpu":
        weight, eps = (None, None) if norm is None else (norm.weight, float(norm.eps))
        devices = lax.axis_size(axis)
        return _launch(x, table, residual, weight, devices=devices, eps=eps)
    total = lax.psum(x, axis)
    if residual is not None:
        total = residual + total
    return (total,) if norm is None else (total, rms_norm(total, *norm))


def _row_fits(x: Array) -> bool:
    """Returns whether one CTA can hold a row, 16 bytes for each thread."""
    threads, rest = divmod(x.shape[-1] * jnp.dtype(x.dtype).itemsize, 16)
    return not rest and not threads % 128 and threads <= 1024


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("devices", "eps"))
def _launch(x, table, residual, weight, *, devices: int, eps: float | None) -> tuple[Array, ...]:
    from pallas_kernels.all_reduce.hopper_kernel import build_all_reduce

    rows = [y.reshape(-1, x.shape[-1]) for y in (x, residual) if y is not None]
    fused = eps is not None and _row_fits(x)
    run = build_all_reduce(
        rows[0].shape, x.dtype, devices=devices, residual=len(rows) > 1, eps=eps if fused else None
    )
    results = run(*rows, *([weight] if fused else []), table.reshape(-1))
    results = tuple(y.reshape(x.shape) for y in results)
    return results if fused or eps is None else (*results, rms_norm(results[0], weight, eps))
