"""Public entry: products of a few rows with large weights, as fast as the weights can be read."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.geometry import Activation
from pallas_kernels.tuning import matmul_geometry

MatmulImplementation = Literal["mosaic_gpu", "xla", "interpret"]
DTYPES = (jnp.bfloat16, jnp.float16)
# Weights under this do not pay for a launch of their own kind.
LEAST_BYTES = 4 << 20


def resolve_matmul(
    implementation: MatmulImplementation | None,
    rows: int,
    weights: tuple[jax.ShapeDtypeStruct | Array, ...],
    activation: Activation = "none",
) -> MatmulImplementation:
    """What `matmul` uses for so many rows and such weights on JAX's default device.

    The named one; where none is named, "mosaic_gpu" where the kernel takes the shapes, the device
    has compute capability 9.0 and the weights are some megabytes, else "xla".

    Raises:
      ValueError: the name is not known, or that implementation does not take the shapes.
    """
    problem = _problem(rows, weights, activation)
    if implementation is None:
        size = sum(w.size for w in weights) * jnp.dtype(weights[0].dtype).itemsize
        fits = problem is None and compat.compute_capability() == "9.0" and size >= LEAST_BYTES
        return "mosaic_gpu" if fits else "xla"
    if implementation not in get_args(MatmulImplementation):
        known = ", ".join(get_args(MatmulImplementation))
        raise ValueError(f"implementation {implementation!r} is not known ({known})")
    if implementation != "xla" and problem is not None:
        raise ValueError(f"implementation {implementation!r}: {problem}")
    return implementation


def _problem(rows: int, weights: tuple[Any, ...], activation: Activation) -> str | None:
    if (problem := compat.mosaic_gpu_problem()) is not None:
        return problem
    dtype = weights[0].dtype
    if dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float16, got {jnp.dtype(dtype).name}"
    outs, inner = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    if matmul_geometry(rows, inner, outs, activation, compat.processors()) is None:
        return f"the kernel does not take {rows} rows of {inner} for results of {outs} columns"
    return None


def matmul(
    x: Float[Array, "*rows I"],
    *weights: Float[Array, "O I"],
    activation: Activation = "none",
    implementation: MatmulImplementation | None = None,
) -> tuple[Float[Array, "*rows O"], ...]:
    """x W^T for each of the weights, [out, in] as in the checkpoints; float32 accumulation.

    Pure and differentiable; derivatives are XLA's products in any case. For few rows the time is
    that of reading the weights, and the kernel does so in one launch for all of them.

    Args:
      x: rows, in the weights' dtype. float32 asks for true float32 products: the default on GPUs
        would be tf32.
      weights: with one inner dimension I; results of their O columns each.
      activation: "swiglu" makes one result of two weights: silu(x W1^T) * (x W2^T), both products
        rounded to x's dtype first.
      implementation: which code runs; a named one is used or the call fails.
        "mosaic_gpu"  the Hopper kernel: bfloat16 or float16, at most 128 rows, columns that divide
                      evenly among its blocks of threads; jax 0.11 or newer.
        "interpret"   the same kernel, interpreted on the CPU; very slow, for tests.
        "xla"         any backend, dtype and shape.
        None          see `resolve_matmul`.

    Returns:
      A tuple of results in x's dtype.

    Raises:
      ValueError: shapes, dtypes or counts that do not fit, named.
    """
    if not weights:
        raise ValueError("matmul needs at least one weight")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
            raise ValueError(
                f"weights must be [O, {x.shape[-1]}] {x.dtype} as x says, "
                f"got {weight.shape} {weight.dtype}"
            )
    if activation == "swiglu":
        if len(weights) != 2 or weights[0].shape != weights[1].shape:
            raise ValueError("swiglu needs two weights of one shape")
    elif activation != "none":
        raise ValueError(f"activation must be 'none' or 'swiglu', got {activation!r}")
    rows = x.size // x.shape[-1]
    implementation = resolve_matmul(implementation, rows, weights, activation)
    if implementation == "xla":
        return _matmul_xla(activation, x, *weights)
    interpret = compat.interpreter() if implementation == "interpret" else None
    return _matmul_kernel(activation, interpret, x, *weights)


def _matmul_xla(activation: Activation, x: Array, *weights: Array) -> tuple[Array, ...]:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    made = [
        lax.dot_general(
            x,
            weight,
            (((x.ndim - 1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=x.dtype,
        )
        for weight in weights
    ]
    return (jax.nn.silu(made[0]) * made[1],) if activation == "swiglu" else tuple(made)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul_kernel(
    activation: Activation, interpret: Any, x: Array, *weights: Array
) -> tuple[Array, ...]:
    return _launch(x, weights, activation=activation, interpret=interpret)


@_matmul_kernel.defjvp
def _matmul_jvp(activation, interpret, primals, tangents):
    """The value is the kernel's; the derivative XLA's."""
    _, derivative = jax.jvp(functools.partial(_matmul_xla, activation), primals, tangents)
    return _matmul_kernel(activation, interpret, *primals), derivative


# A function of its own under jit: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("activation", "interpret"))
def _launch(
    x: Array, weights: tuple[Array, ...], *, activation: Activation, interpret: Any
) -> tuple[Array, ...]:
    from pallas_kernels.matmul.hopper_kernel import build_matmul

    lead, inner = x.shape[:-1], x.shape[-1]
    flat = x.reshape(-1, inner)
    outs = tuple(w.shape[0] for w in weights)
    geo = matmul_geometry(flat.shape[0], inner, outs, activation, compat.processors())
    assert geo is not None
    padded = jnp.pad(flat, ((0, geo.rows - flat.shape[0]), (0, 0)))
    made = build_matmul(geo, x.dtype, interpret=interpret)(padded, *weights)
    if geo.splits > 1:
        made = [part.sum(axis=0).astype(x.dtype) for part in made]
    return tuple(part[: flat.shape[0]].reshape(*lead, -1) for part in made)
