"""Public entry: products of a few rows with large weights, as fast as the weights can be read."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.all_reduce.api import Norm
from pallas_kernels.common import resolve, rms_norm
from pallas_kernels.matmul.hopper_tiling import FEW_ROWS, Activation, Geometry, choose
from pallas_kernels.scaled import Scaled, quantise

MatmulImplementation = Literal["mosaic_gpu", "xla_fp8", "xla", "interpret"]
Weight = Float[Array, "O I"] | Scaled
# Smaller weights do not pay for the kernel's launch.
LEAST_BYTES = 4 << 20


def resolve_matmul(
    implementation: MatmulImplementation | None,
    rows: int,
    weights: tuple[jax.ShapeDtypeStruct | Array | Scaled, ...],
    activation: Activation = "none",
    dtype: DTypeLike | None = None,
) -> MatmulImplementation:
    """Returns what `matmul` uses for this number of rows and weights on JAX's default device.

    A name is returned as it is. None gives "mosaic_gpu" if the kernel takes the shapes, the device
    has compute capability 9.0 and the weights have at least 4 MiB; "xla_fp8" for more than 128 rows
    of 16 bits with weights in fp8 if the compute capability is at least 8.9; else "xla".

    Args:
      implementation, rows, weights, activation: as of `matmul`.
      dtype: of the rows; by default the weights', bfloat16 if they are scaled.

    Raises:
      ValueError: the name is not known, or that implementation does not take the inputs.
    """
    scaled = isinstance(weights[0], Scaled)
    values = jnp.dtype(weights[0].dtype)
    x_dtype = jnp.dtype(dtype or (jnp.bfloat16 if scaled else values))
    capability = compat.compute_capability()
    problem = _problem(rows, weights, activation, x_dtype)
    fp8 = scaled and values == jnp.float8_e4m3fn
    if implementation == "xla_fp8" and fp8:
        return implementation
    if implementation is None:
        # Of fewer rows, reading the weights takes the time, not the products.
        wide = rows > FEW_ROWS and x_dtype in compat.DTYPES
        if fp8 and wide and capability is not None and float(capability) >= 8.9:
            return "xla_fp8"
        size = sum(w.size for w in weights) * values.itemsize
        if capability != "9.0" or size < LEAST_BYTES:
            problem = "the kernel does not pay"
    elif implementation == "xla_fp8":
        problem = f"the weights must be scaled float8_e4m3fn, got {values}"
    return resolve(implementation, get_args(MatmulImplementation), problem)


def _problem(
    rows: int, weights: tuple[Any, ...], activation: Activation, dtype: jnp.dtype
) -> str | None:
    outs, inner = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    itemsize = jnp.dtype(weights[0].dtype).itemsize
    if (problem := compat.dtype_problem(dtype)) is not None:
        return problem
    if choose(rows, inner, outs, activation, sms=compat.sm_count(), itemsize=itemsize) is None:
        given = f"{rows} rows of {inner} for results of {outs} columns"
        allowed = f"at most {FEW_ROWS} rows of a multiple of {128 // itemsize}"
        allowed += "; results of a multiple of 64 columns"
        return f"the kernel does not take {given}: {allowed}"
    return None


def matmul(
    x: Float[Array, "*rows I"] | Scaled,
    *weights: Weight,
    biases: tuple[Float[Array, "O"], ...] = (),
    activation: Activation = "none",
    implementation: MatmulImplementation | None = None,
    dtype: DTypeLike | None = None,
    narrow: bool = False,
    recast: bool = False,
) -> tuple[Any, ...]:
    """Returns x W^T + b for each weight, [out, in] as in checkpoints, with float32 accumulation.

    Pure and differentiable; derivatives are XLA's products for every implementation. With few rows
    the time is the reading of the weights, and the kernel does it in one launch for all of them.

    Args:
      x: rows, in the weights' dtype. float32 asks for true float32 products, where the default on
        GPUs would be tf32. Or what an earlier call with `narrow` returned.
      weights: [O, I] each, with the same inner dimension I; or all of them in 8 bits, with a scale
        for each row (`Scaled`).
      biases: one for each weight, in x's dtype; () for none, and with an activation. The kernel
        adds them before it rounds the products; XLA's path adds them to the rounded products.
      activation: "swiglu" makes one result of two weights: silu(x W1^T) * (x W2^T), both products
        rounded to x's dtype first.
      implementation: the code to run. A named one runs or the call fails.
        "mosaic_gpu"  the Hopper kernel: x in bfloat16 or float16, at most 128 rows, sizes that are
                      multiples of 64 (in, 128 if scaled; and out); jax 0.11 or newer. Scaled
                      weights are read in 8 bits and multiplied in x's dtype (but see `recast`).
        "interpret"   the same kernel, interpreted on the CPU; very slow, for tests.
        "xla_fp8"     weights scaled in fp8: x is quantised to fp8, a scale for each row, and XLA
                      multiplies in fp8. For many rows: the reading of weights is a small part then.
        "xla"         any backend, dtype and shape; scaled weights are multiplied in x's dtype.
        None          see `resolve_matmul`.
      dtype: of results from scaled rows, bfloat16 by default.
      narrow: results that go into one more product alone. With "xla_fp8" they are returned as that
        product takes them: `Scaled`, fp8, a scale for each row. These have no derivative.
      recast: for x from elementwise operations. The kernel with weights in fp8 then multiplies in
        float16, in half the instructions for a weight; rows in bfloat16 are cast as they are made.
        Exact between 2^-14 and 65504; beyond, values saturate.

    Returns:
      A tuple of results in x's dtype; see `dtype` and `narrow`.

    Raises:
      ValueError: shapes, dtypes or counts that do not fit.
    """
    if not weights:
        raise ValueError("matmul needs at least one weight")
    if isinstance(x, Scaled):
        if not all(isinstance(w, Scaled) and w.shape[1:] == x.shape[-1:] for w in weights):
            raise ValueError(f"scaled rows need scaled weights [O, {x.shape[-1]}]")
        settings: Any = {"activation": activation, "narrow": narrow}
        return matmul_fp8(x, *weights, biases=biases, dtype=dtype or jnp.bfloat16, **settings)
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
    implementation = resolve_matmul(implementation, rows, weights, activation, x.dtype)
    if implementation == "xla":
        return matmul_xla(x, *weights, biases=biases, activation=activation)
    if narrow and implementation == "xla_fp8":
        return matmul_fp8(x, *weights, biases=biases, activation=activation, narrow=True)
    return _matmul((implementation, recast), activation, x, weights, biases)


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

    def product(weight: Weight) -> Array:
        if not isinstance(weight, Scaled):
            return _multiply(x, weight, result)
        rows, values = _tied(x, weight.values)
        exact = _multiply(rows, values.astype(x.dtype), jnp.float32)  # the cast is exact
        return (exact * weight.scale).astype(result)

    return _finish(map(product, weights), biases, activation)


def matmul_fp8(
    x: Float[Array, "*rows I"] | Scaled,
    *weights: Any,
    biases: tuple[Float[Array, "O"], ...] = (),
    activation: Activation = "none",
    dtype: DTypeLike | None = None,
    narrow: bool = False,
) -> tuple[Any, ...]:
    """Returns the products of `matmul` by XLA, from rows that are quantised to fp8 on the way.

    One quantisation serves all weights. The arguments are those of `matmul`.
    """
    result = jnp.dtype(x.dtype if dtype is None else dtype)
    rows = x if isinstance(x, Scaled) else _quantised(x)
    # bfloat16 is half the bytes for the scaling to read; float16 would overflow.
    kept = jnp.bfloat16 if result == jnp.bfloat16 else jnp.float32
    raws = [_raw_product(rows.values, weight.values, kept) for weight in weights]
    scales = [weight.scale for weight in weights]
    if narrow and activation == "swiglu" and kept == jnp.bfloat16 and _in_one_kernel(raws[0]):
        return (Scaled(*_to_rows("swiglu", 0.0, *raws, rows.scale, *scales)),)

    def product(raw: Array, scale: Array) -> Array:
        return (raw.astype(jnp.float32) * (rows.scale[..., None] * scale)).astype(result)

    results = _finish(map(product, raws, scales), biases, activation)
    if activation == "swiglu":
        # Otherwise XLA computes a row's activations twice: for its scale, and to quantise it.
        results = lax.optimization_barrier(results)
    return tuple(map(_quantised, results)) if narrow else results


def _raw_product(rows: Array, weight: Array, dtype: DTypeLike) -> Array:
    # With the algorithm named, XLA takes cuBLAS at once; else it compiles and times Triton's too.
    algorithm = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
    precision = None if compat.compute_capability() is None else algorithm
    return _multiply(rows, weight, dtype, precision)


def add_product(
    stream: Float[Array, "*rows O"],
    x: Float[Array, "*rows I"] | Scaled,
    weight: Weight,
    norm: Norm | None = None,
) -> tuple[Any, ...]:
    """Returns (stream + x W^T,), or with a norm also its RMSNorm, for products alone.

    Args:
      x, weight: as of `matmul`; the product is rounded to the stream's dtype first.
      norm: where `matmul` would quantise rows for such a weight, the norm is returned as `Scaled`
        rows, as with `narrow`.
    """
    if isinstance(weight, Scaled) and not isinstance(x, Scaled):
        rows = x.size // x.shape[-1]
        if resolve_matmul(None, rows, (weight,), dtype=x.dtype) == "xla_fp8":
            x = _quantised(x)
    if norm is None or not isinstance(x, Scaled):
        total = stream + matmul(x, weight, dtype=stream.dtype)[0]
        return (total,) if norm is None else (total, rms_norm(total, *norm))
    assert isinstance(weight, Scaled)
    if stream.dtype == jnp.bfloat16 and _in_one_kernel(stream):
        raw = _raw_product(x.values, weight.values, jnp.bfloat16)
        scales = x.scale, weight.scale, norm.weight
        total, *normed = _to_rows("add_norm", norm.eps, raw, stream, *scales)
        return total, Scaled(*normed)
    total = stream + matmul(x, weight, dtype=stream.dtype)[0]
    return total, _quantised(rms_norm(total, *norm))


def _quantised(x: Array) -> Scaled:
    """Quantises rows to fp8. XLA computes the scales once, not again in all that they multiply."""
    return Scaled(*lax.optimization_barrier(tuple(quantise(x, "fp8"))))


def _in_one_kernel(x: Array) -> bool:
    """Whether the kernel that quantises rows takes rows of this size, on this device."""
    from pallas_kernels.matmul.hopper_rows import threads

    problem = compat.hopper_problem() or compat.mosaic_gpu_problem()
    return problem is None and threads(x.shape[-1]) is not None


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _to_rows(kind: Any, eps: float, x: Array, *inputs: Array) -> tuple[Array, ...]:
    """Runs `build_rows` on rows [.., N]."""
    from pallas_kernels.matmul.hopper_rows import build_rows

    (*lead, columns), rows = x.shape, x.size // x.shape[-1]
    other, scale, *of_columns = inputs
    run = build_rows(kind, rows, columns, eps)
    results = run(*(y.reshape(rows, -1) for y in (x, other)), scale.reshape(rows), *of_columns)
    return tuple(y.reshape(*lead, *y.shape[1:]) for y in results)


@jax.custom_jvp
def _tied(x: Array, values: Array) -> tuple[Array, Array]:
    """Returns both, the values not before the rows.

    Otherwise XLA moves the cast of a weight in front of a loop, and keeps the casts of all layers.
    """
    return lax.optimization_barrier((x, values))


@_tied.defjvp
def _tied_jvp(primals, tangents):
    """JAX 0.12 cannot transpose a barrier that holds a constant."""
    return _tied(*primals), tangents


def _multiply(x: Array, weight: Array, dtype: DTypeLike, precision: Any = None) -> Array:
    if x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST
    inner = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, inner, precision, preferred_element_type=dtype)


def _finish(
    products: Iterable[Array], biases: tuple[Array, ...], activation: Activation
) -> tuple[Array, ...]:
    products = tuple(map(jnp.add, products, biases) if biases else products)
    return (jax.nn.silu(products[0]) * products[1],) if activation == "swiglu" else products


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul(
    how: tuple[MatmulImplementation, bool], activation: Activation, x, weights, biases
) -> tuple[Array, ...]:
    implementation, recast = how
    if implementation == "xla_fp8":
        return matmul_fp8(x, *weights, biases=biases, activation=activation)
    interpret = compat.interpreter() if implementation == "interpret" else None
    return _launch(activation, interpret, recast, x, weights, biases)


@_matmul.defjvp
def _matmul_jvp(how, activation, primals, tangents):
    """The value is the implementation's; the derivative that of `matmul_xla`."""

    def plain(x, weights, biases):
        return matmul_xla(x, *weights, biases=biases, activation=activation)

    _, derivative = jax.jvp(plain, primals, tangents)
    return _matmul(how, activation, *primals), derivative


# Under jit by itself: lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _launch(
    activation: Activation, interpret: Any, recast: bool, x, weights, biases
) -> tuple[Array, ...]:
    flat, outs = x.reshape(-1, x.shape[-1]), tuple(w.shape[0] for w in weights)
    (rows, inner), itemsize = flat.shape, weights[0].dtype.itemsize
    geo = choose(rows, inner, outs, activation, bool(biases), compat.sm_count(), itemsize)
    assert geo is not None
    products = launch(geo, flat, weights, biases, interpret=interpret, recast=recast)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in products)


def launch(
    geo: Geometry, x, weights, biases=(), *, interpret: Any = None, recast: bool = False
) -> tuple[Array, ...]:
    """Runs the kernel as `geo` says on rows [R, I], and sums its splits."""
    from pallas_kernels.matmul.hopper_kernel import build_matmul

    scales = [w.scale for w in weights if isinstance(w, Scaled)]
    values = [w.values if isinstance(w, Scaled) else w for w in weights]
    rows, dtype = x.shape[0], x.dtype
    if recast and values[0].dtype == jnp.float8_e4m3fn:
        most = float(jnp.finfo(jnp.float16).max)
        x = jnp.clip(x.astype(jnp.float32), -most, most).astype(jnp.float16)
    run = build_matmul(geo, dtype, values[0].dtype, x.dtype, interpret=interpret)
    x = jnp.pad(x, ((0, geo.rows - rows), (0, 0)))
    if geo.tuning.splits == 1:
        products = run(x, *values, *scales, *biases)
    else:
        products = [part.sum(axis=0).T for part in run(x, *values, *scales)]
        if biases:
            products = map(jnp.add, products, biases)
    return tuple(part[:rows].astype(dtype) for part in products)
