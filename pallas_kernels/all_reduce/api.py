"""Public entry: sums of a few rows over the devices of a mesh axis, with what follows them."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.all_reduce.peer_memory import CAPACITY
from pallas_kernels.common import rms_norm

SumImplementation = Literal["mosaic_gpu", "xla"]


class Norm(NamedTuple):
    """An RMSNorm: weight [M], and what is added to the mean of squares."""

    weight: Float[Array, "M"]
    eps: float


def resolve_sum(
    implementation: SumImplementation | None,
    x: jax.ShapeDtypeStruct | Array,
    table: Int[Array, "*mesh A"] | None,
) -> SumImplementation:
    """What `device_sum` uses for a device's x.

    The named one; where none is named, "mosaic_gpu" where there is a table and the rows fit the
    exchange's memory, else "xla".

    Raises:
      ValueError: the name is not known, or the kernel does not take x.
    """
    problem = _problem(x, table)
    if implementation is None:
        return "xla" if problem else "mosaic_gpu"
    if implementation not in get_args(SumImplementation):
        known = ", ".join(get_args(SumImplementation))
        raise ValueError(f"implementation {implementation!r} is not known ({known})")
    if implementation == "mosaic_gpu" and problem is not None:
        raise ValueError(f"implementation 'mosaic_gpu': {problem}")
    return implementation


def _problem(x: jax.ShapeDtypeStruct | Array, table: Array | None) -> str | None:
    itemsize = jnp.dtype(x.dtype).itemsize
    if table is None:
        return "it needs the table of an exchange"
    if not jnp.issubdtype(x.dtype, jnp.floating) or itemsize not in (2, 4):
        return f"the kernel takes bfloat16, float16 and float32, got {jnp.dtype(x.dtype).name}"
    if x.shape[-1] * itemsize % 16:
        return f"rows of {x.shape[-1]} {jnp.dtype(x.dtype).name} are no multiple of 16 bytes"
    if x.size * itemsize > CAPACITY:
        return f"{x.size * itemsize} bytes are more than the exchange's {CAPACITY}"
    return None


def device_sum(
    x: Float[Array, "*rows M"],
    axis: str,
    *,
    table: Int[Array, "*mesh A"] | None = None,
    residual: Float[Array, "*rows M"] | None = None,
    norm: Norm | None = None,
    implementation: SumImplementation | None = None,
) -> tuple[Float[Array, "*rows M"], ...]:
    """Sum of x over the devices along `axis`, under `jax.shard_map`, the same on all of them.

    The sum is rounded to x's dtype before the residual is added. Where the kernel makes them, all
    devices make the same sums in the same order, and none begins before the last one has ended:
    XLA keeps to one stream (its default, in graphs too), and programs of several threads have a
    collective of XLA's over `axis` as well, which keeps them apart; others are run by one thread.

    Args:
      x: a device's part.
      axis: of the mesh.
      table: this device's row of `exchange_table` for that mesh and axis.
      residual: added behind the sum, the same on all devices.
      norm: asks for the RMSNorm of the result as well.
      implementation: which code runs; a named one is used or the call fails.
        "mosaic_gpu"  the kernel: devices write to each other's memory; not differentiable.
        "xla"         `lax.psum`, anywhere and of any size.
        None          see `resolve_sum`.

    Returns:
      (sum,), or with a norm (sum, its norm).

    Raises:
      ValueError: see `resolve_sum`.
    """
    if resolve_sum(implementation, x, table) == "mosaic_gpu":
        return _launch(x, table, residual, norm, devices=lax.axis_size(axis))
    total = lax.psum(x, axis)
    if residual is not None:
        total = residual + total
    return (total,) if norm is None else (total, rms_norm(total, *norm))


def _launch(
    x: Array, table: Any, residual: Array | None, norm: Norm | None, *, devices: int
) -> tuple[Array, ...]:
    eps = None if norm is None else float(norm.eps)
    fused = norm is not None and _row_fits(x)
    made: Any = _kernel(
        x, table, residual, norm.weight if norm is not None and fused else None,
        devices=devices, eps=eps if fused else None,
    )  # fmt: skip
    return made if norm is None or fused else (*made, rms_norm(made[0], *norm))


def _row_fits(x: Array) -> bool:
    """Whether a row is one for a block of threads, 16 bytes for each."""
    threads, rest = divmod(x.shape[-1] * jnp.dtype(x.dtype).itemsize, 16)
    return not rest and not threads % 128 and threads <= 1024


# A function of its own under jit: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("devices", "eps"))
def _kernel(
    x: Array,
    table: Array,
    residual: Array | None,
    weight: Array | None,
    *,
    devices: int,
    eps: float | None,
) -> tuple[Array, ...]:
    from pallas_kernels.all_reduce.hopper_kernel import build_sum

    columns = x.shape[-1]
    rows = [y.reshape(-1, columns) for y in (x, residual) if y is not None]
    run = build_sum(
        len(rows[0]), columns, x.dtype,
        devices=devices, capacity=CAPACITY, residual=residual is not None, eps=eps,
    )  # fmt: skip
    more = [] if weight is None else [weight]
    return tuple(y.reshape(x.shape) for y in run(*rows, *more, table.reshape(-1)))
