"""Public entry: products of a few rows with large weights, as fast as the weights can be read."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.common import resolve
from pallas_kernels.matmul.hopper_tiling import Activation, Geometry, choose
from pallas_kernels.scaled import Scaled

MatmulImplementation = Literal["mosaic_gpu", "xla", "interpret"]
Weight = Float[Array, "O I"] | Scaled
# Smaller weights do not pay for the kernel's launch.
LEAST_BYTES = 4 << 20


def resolve_matmul(
    implementation: MatmulImplementation | None,
    rows: int,
    weights: tuple[jax.ShapeDtypeStruct | Array | Scaled, ...],
    activation: Activation = "none",
) -> MatmulImplementation:
    """Returns what `matmul` uses for this number of rows and weights on JAX's default device.

    A name is returned as it is. None gives "mosaic_gpu" if the kernel takes the shapes, the device
    has compute capability 9.0 and the weights have at least 4 MiB, else "xla".

    Raises:
      ValueError: the name is not known, or that implementation does not take the inputs.
    """
    problem = _problem(rows, weights, activation)
    if implementation is None:
        size = sum(w.size for w in weights) * jnp.dtype(weights[0].dtype).itemsize
        if compat.compute_capability() != "9.0" or size < LEAST_BYTES:
            problem = "the kernel does not pay"
    return resolve(implementation, get_args(MatmulImplementation), problem)


def _problem(rows: int, weights: tuple[Any, ...], activation: Activation) -> str | None:
    if isinstance(weights[0], Scaled):
        return "the kernel does not take weights of 8 bits"
    outs, inner = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    problem = compat.dtype_problem(weights[0].dtype)
    if problem is None and choose(rows, inner, outs, activation, sms=compat.sm_count()) is None:
        return f"the kernel does not take {rows} rows of {inner} for results of {outs} columns"
    return problem


def matmul(
    x: Float[Array, "*rows I"],
    *weights: Weight,
    biases: tuple[Float[Array, "O"], ...] = (),
    activation: Activation = "none",
    implementation: MatmulImplementation | None = None,
) -> tuple[Float[Array, "*rows O"], ...]:
    """Returns x W^T + b for each weight, [out, in] as in checkpoints, with float32 accumulation.

    Pure and differentiable; derivatives are XLA's products for every implementation. With few rows
    the time is the reading of the weights, and the kernel does it in one launch for all of them.

    Args:
      x: rows, in the weights' dtype. float32 asks for true float32 products, where the default on
        GPUs would be tf32.
      weights: [O, I] each, with the same inner dimension I; or all of them in 8 bits, with a scale
        for each row (`Scaled`).
      biases: one for each weight, in x's dtype; () for none, and with an activation. The kernel
        adds them before it rounds the products; XLA's path adds them to the rounded products.
      activation: "swiglu" makes one result of two weights: silu(x W1^T) * (x W2^T), both products
        rounded to x's dtype first.
      implementation: the code to run. A named one runs or the call fails.
        "mosaic_gpu"  the Hopper kernel: bfloat16 or float16, at most 128 rows, sizes that are
                      multiples of 64 (in) and 8 (out); jax 0.11 or newer.
        "interpret"   the same kernel, interpreted on the CPU; very slow, for tests.
        "xla"         any backend, dtype and shape.
        None          see `resolve_matmul`.

    Returns:
      A tuple of results in x's dtype.

    Raises:
      ValueError: shapes, dtypes or counts that do not fit.
    """
    if not weights:
        raise ValueError("matmul needs at least one weight")
    wanted = f"[O, {x.shape[-1]}] {x.dtype} as x, or all of them scaled"
    scaled = isinstance(weights[0], Scaled)
    for w in weights:
        fits = isinstance(w, Scaled) == scaled and (scaled or w.dtype == x.dtype)
        if not fits or w.ndim != 2 or w.shape[1] != x.shape[-1]:
            raise ValueError(f"weights must be {wanted}, got {w.shape} {w.dtype}")
    shapes = [w.shape for w in weights]
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be 'none' or 'swiglu', got {activation!r}")
    if activation == "swiglu" and (len(shapes) != 2 or shapes[0] != shapes[1]):
        raise ValueError(f"swiglu needs two weights of one shape, got {shapes}")
    if biases and (activation != "none" or [b.shape for b in biases] != [w[:1] for w in shapes]):
        given = [b.shape for b in biases]
        raise ValueError(f"biases must be one [O] for each of {shapes} without swiglu, got {given}")
    if any(b.dtype != x.dtype for b in biases):
        raise ValueError(f"biases must be {x.dtype} as x, got {[str(b.dtype) for b in biases]}")
    rows = x.size // x.shape[-1]
    implementation = resolve_matmul(implementation, rows, weights, activation)
    if implementation == "xla":
        return matmul_xla(x, *weights, biases=biases, activation=activation)
    interpret = compat.interpreter() if implementation == "interpret" else None
    return _matmul_kernel(activation, interpret, x, weights, biases)


def matmul_xla(
    x: Float[Array, "*rows I"],
    *weights: Weight,
    biases: tuple[Float[Array, "O"], ...] = (),
    activation: Activation = "none",
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "*rows O"], ...]:
    """Returns the products of `matmul` by XLA, for any number of rows.

    Args:
      x, weights, biases, activation: as of `matmul`.
      dtype: of the results, x's by default.
    """
    result = x.dtype if dtype is None else dtype
    multiply = functools.partial(
        lax.dot_general,
        dimension_numbers=(((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )

    def product(x: Array, weight: Weight) -> Array:
        if not isinstance(weight, Scaled):
            return multiply(x, weight, preferred_element_type=result)
        # The barrier ties the cast to the rows: XLA would move it in front of a loop, and keep the
        # casts of all layers.
        x, values = lax.optimization_barrier((x, weight.values))
        exact = multiply(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (exact * weight.scale).astype(result)

    products = tuple(product(x, weight) for weight in weights)
    if biases:
        products = tuple(map(jnp.add, products, biases))
    return (jax.nn.silu(products[0]) * products[1],) if activation == "swiglu" else products


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul_kernel(activation: Activation, interpret: Any, x, weights, biases) -> tuple[Array, ...]:
    return _launch(activation, interpret, x, weights, biases)


@_matmul_kernel.defjvp
def _matmul_jvp(activation, interpret, primals, tangents):
    """The value is the kernel's; the derivative XLA's."""

    def plain(x, weights, biases):
        return matmul_xla(x, *weights, biases=biases, activation=activation)

    _, derivative = jax.jvp(plain, primals, tangents)
    return _matmul_kernel(activation, interpret, *primals), derivative


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _launch(activation: Activation, interpret: Any, x, weights, biases) -> tuple[Array, ...]:
    flat, outs = x.reshape(-1, x.shape[-1]), tuple(w.shape[0] for w in weights)
    rows, inner = flat.shape
    geo = choose(rows, inner, outs, activation, bool(biases), compat.sm_count())
    assert geo is not None
    products = launch(geo, flat, weights, biases, interpret=interpret)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in products)


def launch(geo: Geometry, x, weights, biases=(), *, interpret: Any = None) -> tuple[Array, ...]:
    """Runs the kernel as `geo` says on rows [R, I], and sums its splits."""
    from pallas_kernels.matmul.hopper_kernel import build_matmul

    rows = x.shape[0]
    run = build_matmul(geo, x.dtype, interpret=interpret)
    x = jnp.pad(x, ((0, geo.rows - rows), (0, 0)))
    if geo.tuning.splits == 1:
        products = run(x, *weights, *biases)
    else:
        products = [part.sum(axis=0) for part in run(x, *weights)]
        if biases:
            products = map(jnp.add, products, biases)
    return tuple(part[:rows].astype(x.dtype) for part in products)
