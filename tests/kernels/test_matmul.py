"""Products of few rows: the kernel, interpreted and lowered for a GPU, against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Scaled, compat, matmul, quantise, resolve_matmul
from pallas_kernels.compat import SHARED_MEMORY
from pallas_kernels.matmul.api import launch
from pallas_kernels.matmul.hopper_tiling import Geometry, Tuning, choose
from tests.support.kernels import OLD_JAX, implementations, launches, lowered, spec
from tests.support.models import relative_error

IMPLEMENTATIONS = implementations("xla")


def operands(rows, inner, outs, dtype=jnp.bfloat16, bits=None):
    keys = jax.random.split(jax.random.key(0), len(outs) + 1)
    x = jax.random.normal(keys[0], (*rows, inner)).astype(dtype)
    weights = [jax.random.normal(k, (n, inner)) / 16 for k, n in zip(keys[1:], outs, strict=True)]
    return x, [w.astype(dtype) if bits is None else quantise(w, bits) for w in weights]


def by_hand(x, weights, biases=(), activation="none"):
    """In float64; 8-bit weights as what they stand for."""
    plain = [np.asarray(w.restore(np.float32) if isinstance(w, Scaled) else w) for w in weights]
    biases = [np.asarray(bias, np.float64) for bias in biases] or [0] * len(weights)
    x = np.asarray(x, np.float64)
    products = [x @ w.astype(np.float64).T + b for w, b in zip(plain, biases, strict=True)]
    if activation == "none":
        return products
    gate, up = products
    return [gate / (1 + np.exp(-gate)) * up]


def some_biases(outs, dtype):
    keys = jax.random.split(jax.random.key(1), len(outs))
    return tuple(jax.random.normal(k, (n,)).astype(dtype) for k, n in zip(keys, outs, strict=True))


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rows", "inner", "outs", "dtype", "bits"),
    [
        ((2, 5), 128, (64, 192), jnp.bfloat16, None),
        ((64,), 192, (128,), jnp.float16, None),
        ((3, 33), 256, (128,), jnp.bfloat16, None),
        ((1,), 256, (128, 64, 64), jnp.float16, None),
        ((33,), 256, (64,), jnp.bfloat16, "fp8"),
        ((2, 5), 256, (128, 64), jnp.bfloat16, "int8"),
        pytest.param((8,), 256, (64,), jnp.float16, "fp8", marks=pytest.mark.slow),
        pytest.param((8,), 256, (64,), jnp.float16, "int8", marks=pytest.mark.slow),
    ],
)
def test_products(implementation, rows, inner, outs, dtype, bits):
    """With biases where there are several weights."""
    x, weights = operands(rows, inner, outs, dtype, bits)
    biases = some_biases(outs, dtype) if len(outs) > 1 else ()
    got = matmul(x, *weights, biases=biases, implementation=implementation)
    for one, want in zip(got, by_hand(x, weights, biases), strict=True):
        assert one.shape == want.shape
        assert one.dtype == dtype
        assert relative_error(one, want) < (4e-3 if dtype == jnp.bfloat16 else 5e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("rows", "bits"), [(32, None), (70, None), (32, "fp8")])
def test_swiglu(implementation, rows, bits):
    x, weights = operands((rows,), 256, (64, 64), bits=bits)
    (got,) = matmul(x, *weights, activation="swiglu", implementation=implementation)
    (want,) = by_hand(x, weights, activation="swiglu")
    assert relative_error(got, want) < 8e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fp8_products_are_those_of_quantised_rows(dtype):
    """Many rows, a row of zeros and a row 10,000 times as large as the others among them."""
    x, weights = operands((2, 70), 256, (96, 40), dtype, "fp8")
    x = x.at[0, :2].multiply(jnp.array([[0.0], [1e4]], dtype))
    biases = some_biases((96, 40), dtype)
    got = matmul(x, *weights, biases=biases, implementation="xla_fp8")
    rows = quantise(x, "fp8").restore(jnp.float32)
    exact = zip(by_hand(rows, weights, biases), by_hand(x, weights, biases), strict=True)
    for one, (want, unquantised) in zip(got, exact, strict=True):
        assert one.dtype == dtype
        # bfloat16 is rounded twice, once before the scales.
        assert relative_error(one, want) < (6e-3 if dtype == jnp.bfloat16 else 5e-4)
        assert relative_error(one, unquantised) < 4e-2
        assert relative_error(one[0, 2:], want[0, 2:]) < 6e-3
    text = str(jax.make_jaxpr(lambda x: matmul(x, *weights, implementation="xla_fp8"))(x))
    assert text.count("reduce_max") == 1  # one quantisation serves all weights


@pytest.mark.parametrize(
    ("implementation", "bits"),
    [
        pytest.param("interpret", None, marks=OLD_JAX),
        pytest.param("interpret", "int8", marks=OLD_JAX),
        ("xla_fp8", "fp8"),
    ],
)
def test_gradients_are_those_of_the_portable_path(implementation, bits):
    """Of rows and, in 16 bits, of weights."""
    x, weights = operands((8,), 128, (64, 64), bits=bits)

    def loss(x, weights, implementation):
        (out,) = matmul(x, *weights, activation="swiglu", implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    by = (0,) if bits else (0, 1)
    got, want = (jax.grad(loss, by)(x, weights, name) for name in (implementation, "xla"))
    # What is differentiated is still the implementation.
    text = str(jax.make_jaxpr(lambda x: jax.value_and_grad(loss)(x, weights, implementation))(x))
    assert ("stream_matmul" if implementation == "interpret" else "f8_e4m3fn[8,128]") in text
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(one, other) < (6e-2 if bits == "fp8" else 2e-2)


@OLD_JAX
@pytest.mark.parametrize(
    ("rows", "activation", "bits", "cut"),
    [
        (32, "none", None, Tuning(64, 2, 64, 2)),
        (72, "swiglu", None, Tuning(128, 1, 64, 2)),
        (40, "none", "fp8", Tuning(64, 1, 256, 2, 2)),
        (8, "none", "int8", Tuning(64, 2, 128, 2)),
    ],
    ids=["splits", "two tiles, swiglu", "biases, two parts", "8 bits, splits"],
)
def test_the_interpreter_finds_no_race(rows, activation, bits, cut):
    outs, inner = (128, 128) if activation == "swiglu" else (128, 64), 768 if bits else 512
    x, weights = operands((rows,), inner, outs, bits=bits)
    biases = some_biases(outs, x.dtype) if activation == "none" else ()
    itemsize = weights[0].dtype.itemsize
    geo = Geometry(rows, inner, outs, cut, activation, bool(biases), itemsize)
    assert geo.steps > cut.stages  # stages are used again
    assert geo.problem is None
    got = launch(geo, x, weights, biases, interpret=compat.interpreter(detect_races=True))
    for one, other in zip(got, by_hand(x, weights, biases, activation), strict=True):
        assert relative_error(one, other) < 8e-3
    assert not compat.races_found()


@OLD_JAX
def test_rows_in_float16():
    """One is out of its range, and saturates."""
    x, weights = operands((8,), 256, (64,), bits="fp8")
    x = x.at[0, 0].set(1e5)
    (got,) = matmul(x, *weights, implementation="interpret", recast=True)
    (want,) = by_hand(jnp.clip(x.astype(jnp.float32), -65504, 65504), weights)
    assert got.dtype == x.dtype
    assert relative_error(got, want) < 4e-3


@OLD_JAX
def test_columns_that_do_not_divide_the_results():
    """The last CTA of a result begins earlier; two make some columns."""
    outs = (192, 128)
    x, weights = operands((33,), 256, outs, bits="fp8")
    biases = some_biases(outs, x.dtype)
    geo = Geometry(40, 256, outs, Tuning(128, 1, 128, 2), biases=True, itemsize=1)
    assert geo.problem is None
    assert geo.firsts == (0, 2, 3)
    got = launch(geo, x, weights, biases, interpret=compat.interpreter())
    for one, other in zip(got, by_hand(x, weights, biases), strict=True):
        assert relative_error(one, other) < 4e-3


@OLD_JAX
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (33, jnp.bfloat16),
        (33, jnp.float8_e4m3fn),
        *[
            pytest.param(rows, dtype, marks=pytest.mark.slow)
            for rows in (1, 128)
            for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)
        ],
    ],
)
@pytest.mark.parametrize(
    ("inner", "outs", "activation"),
    [
        (4096, (4096, 4096, 4096), "none"),
        (4096, (12288, 12288), "swiglu"),
        (12288, (4096,), "none"),
        (4096, (4096,), "none"),
        (3584, (3584, 512, 512), "none"),
        (3584, (18944, 18944), "swiglu"),
        (18944, (3584,), "none"),
    ],
    ids=["query, key, value", "gate and up", "down", "output", "28/4 heads", "wide", "wide down"],
)
def test_lowers_for_hopper(rows, dtype, inner, outs, activation):
    geo = choose(rows, inner, outs, activation, sms=132, itemsize=jnp.dtype(dtype).itemsize)
    assert geo.shared_memory <= SHARED_MEMORY
    assert geo.ctas >= 0.42 * 132
    settings = {"activation": activation, "implementation": "mosaic_gpu"}
    if outs[0] != outs[-1]:
        settings["biases"] = tuple(jnp.ones(n, jnp.bfloat16) for n in outs)

    def layers(x, *weights):
        return [matmul(x * i, *weights, **settings) for i in range(3)]

    weights = [spec(n, inner, dtype=dtype) for n in outs]
    if dtype != jnp.bfloat16:
        weights = [Scaled(w, spec(w.shape[0], dtype=jnp.float32)) for w in weights]
    text = lowered(layers, spec(rows, inner), *weights)
    assert text.count("func.func private @_launch") == 1
    assert launches(text)


@pytest.mark.parametrize("inner", [64, 640, 4096])
@pytest.mark.parametrize("outs", [(64,), (192, 64, 64), (4096, 4096, 4096), (72, 72), (84, 84)])
@pytest.mark.parametrize("rows", [1, 32, 64, 65, 128, 129])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_geometry_covers_every_column_once(inner, outs, rows, itemsize):
    geo = choose(rows, inner, outs, "none", sms=132, itemsize=itemsize)
    if rows > 128 or any(n % 64 for n in outs) or inner * itemsize % 128:
        assert geo is None
        return
    assert rows <= geo.rows < rows + 8
    cut = geo.tuning
    counts = np.diff(geo.firsts)
    assert all((count - 1) * cut.columns < n for count, n in zip(counts, outs, strict=True))
    assert all(count * cut.columns >= n for count, n in zip(counts, outs, strict=True))
    assert cut.splits * geo.steps * cut.block == inner
    assert geo.ctas <= 132
    assert geo.shared_memory <= SHARED_MEMORY
    assert geo.registers_used <= geo.registers


@OLD_JAX
def test_which_path_is_taken(monkeypatch):
    big, small, wide = spec(4096, 4096), spec(64, 4096), spec(4096, 4096, dtype=jnp.float32)
    for capability, path in (("9.0", "mosaic_gpu"), ("8.0", "xla"), (None, "xla")):
        monkeypatch.setattr(compat, "compute_capability", lambda c=capability: c)
        assert resolve_matmul(None, 32, (big,)) == path
    monkeypatch.setattr(compat, "compute_capability", lambda: "9.0")
    assert resolve_matmul(None, 129, (big,)) == "xla"
    assert resolve_matmul(None, 32, (small,)) == "xla"
    assert resolve_matmul(None, 32, (wide,)) == "xla"
    with pytest.raises(ValueError, match="must be scaled float8_e4m3fn, got bfloat16"):
        resolve_matmul("xla_fp8", 129, (big,))
    with pytest.raises(ValueError, match="129 rows"):
        resolve_matmul("mosaic_gpu", 129, (big,))
    with pytest.raises(ValueError, match=r"results of \(72,\) columns: .*a multiple of 64"):
        resolve_matmul("mosaic_gpu", 32, (spec(72, 4096),))
    with pytest.raises(ValueError, match="got float32"):
        resolve_matmul("mosaic_gpu", 32, (wide,))
    with pytest.raises(ValueError, match="'triton' is not known"):
        resolve_matmul("triton", 32, (big,))


@OLD_JAX
@pytest.mark.parametrize(
    ("capability", "rows", "dtype", "values", "path"),
    [
        ("9.0", 32, jnp.bfloat16, jnp.float8_e4m3fn, "mosaic_gpu"),
        ("9.0", 32, jnp.bfloat16, jnp.int8, "mosaic_gpu"),
        ("9.0", 129, jnp.bfloat16, jnp.float8_e4m3fn, "xla_fp8"),
        ("9.0", 129, jnp.bfloat16, jnp.int8, "xla"),
        ("9.0", 129, jnp.float32, jnp.float8_e4m3fn, "xla"),
        ("8.9", 129, jnp.float16, jnp.float8_e4m3fn, "xla_fp8"),
        ("8.9", 32, jnp.bfloat16, jnp.float8_e4m3fn, "xla"),
        ("10.0", 129, jnp.bfloat16, jnp.float8_e4m3fn, "xla_fp8"),
        ("8.0", 129, jnp.bfloat16, jnp.float8_e4m3fn, "xla"),
        (None, 129, jnp.bfloat16, jnp.float8_e4m3fn, "xla"),
    ],
)
def test_which_path_is_taken_with_8_bits(monkeypatch, capability, rows, dtype, values, path):
    monkeypatch.setattr(compat, "compute_capability", lambda: capability)
    weight = Scaled(spec(4096, 4096, dtype=values), spec(4096, dtype=jnp.float32))
    assert resolve_matmul(None, rows, (weight,), dtype=dtype) == path


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ([], {}, "at least one weight"),
        ([(8, 31)], {}, r"weights must be \[O, 32\]"),
        ([(8, 32, 1)], {}, r"weights must be \[O, 32\]"),
        ([(8, 32)], {"activation": "swiglu"}, "swiglu needs two weights"),
        ([(8, 32), (9, 32)], {"activation": "swiglu"}, "swiglu needs two weights"),
        ([(8, 32)], {"activation": "gelu"}, "activation must be"),
        ([(8, 32)], {"biases": (jnp.zeros(9),)}, "biases must be one"),
        ([(8, 32)], {"biases": (jnp.zeros(8, jnp.bfloat16),)}, "biases must be float32"),
        ([(8, 32)] * 2, {"biases": (jnp.zeros(8),) * 2, "activation": "swiglu"}, "without swiglu"),
    ],
)
def test_what_does_not_fit_is_named(weights, more, message):
    run = functools.partial(matmul, jnp.zeros((2, 32)), *map(jnp.zeros, weights), **more)
    with pytest.raises(ValueError, match=message):
        run()
