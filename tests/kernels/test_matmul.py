"""Products of few rows: the kernel, interpreted and lowered for a GPU, against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, matmul, resolve_matmul
from pallas_kernels.compat import SHARED_MEMORY
from pallas_kernels.matmul.api import launch
from pallas_kernels.matmul.hopper_tiling import Geometry, Tuning, choose
from tests.support.kernels import OLD_JAX, implementations, launches, lowered, spec
from tests.support.models import relative_error

IMPLEMENTATIONS = implementations("xla")


def operands(rows, inner, outs, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), len(outs) + 1)
    x = jax.random.normal(keys[0], (*rows, inner)).astype(dtype)
    weights = [jax.random.normal(k, (n, inner)) / 16 for k, n in zip(keys[1:], outs, strict=True)]
    return x, [w.astype(dtype) for w in weights]


def by_hand(x, weights, biases=()):
    x, *weights = (np.asarray(each, np.float64) for each in (x, *weights))
    biases = [np.asarray(bias, np.float64) for bias in biases] or [0] * len(weights)
    return [x @ w.T + bias for w, bias in zip(weights, biases, strict=True)]


def some_biases(outs, dtype):
    keys = jax.random.split(jax.random.key(1), len(outs))
    return tuple(jax.random.normal(k, (n,)).astype(dtype) for k, n in zip(keys, outs, strict=True))


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rows", "inner", "outs"),
    [
        ((2, 5), 128, (64, 32)),
        ((64,), 192, (96,)),
        ((3, 33), 512, (64,)),
        ((1,), 256, (48, 16, 16)),
    ],
    ids=["few rows", "a full tile", "two tiles, the last in part", "one row, as GQA has columns"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_products(implementation, rows, inner, outs, dtype):
    """With biases where there are several weights."""
    if implementation == "interpret" and (dtype == jnp.float16) != (inner in (192, 256)):
        pytest.skip("interpreted in the other half precision")
    x, weights = operands(rows, inner, outs, dtype)
    biases = some_biases(outs, dtype) if len(outs) > 1 else ()
    got = matmul(x, *weights, biases=biases, implementation=implementation)
    for one, want in zip(got, by_hand(x, weights, biases), strict=True):
        assert one.shape == want.shape
        assert one.dtype == dtype
        assert relative_error(one, want) < (4e-3 if dtype == jnp.bfloat16 else 5e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("rows", [32, 70])
def test_swiglu(implementation, rows):
    x, weights = operands((rows,), 256, (64, 64))
    (got,) = matmul(x, *weights, activation="swiglu", implementation=implementation)
    gate, up = by_hand(x, weights)
    assert relative_error(got, gate / (1 + np.exp(-gate)) * up) < 8e-3


@OLD_JAX
def test_gradients_are_those_of_the_portable_path():
    x, weights = operands((8,), 128, (32, 32))

    def loss(x, weights, implementation):
        (out,) = matmul(x, *weights, activation="swiglu", implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    got, want = (jax.grad(loss, (0, 1))(x, weights, name) for name in ("interpret", "xla"))
    # What is differentiated is still the kernel.
    text = str(jax.make_jaxpr(lambda x: jax.value_and_grad(loss)(x, weights, "interpret"))(x))
    assert "stream_matmul" in text
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(one, other) < 2e-2


@OLD_JAX
@pytest.mark.parametrize(
    ("rows", "activation", "cut"),
    [
        (32, "none", Tuning(32, 2, 64, 2)),
        (96, "swiglu", Tuning(32, 1, 64, 2)),
        (40, "none", Tuning(32, 1, 128, 2)),
    ],
    ids=["splits", "two tiles, swiglu", "biases"],
)
def test_the_interpreter_finds_no_race(rows, activation, cut):
    outs = (64, 64) if activation == "swiglu" else (64, 32)
    x, weights = operands((rows,), 512, outs)
    biases = some_biases(outs, x.dtype) if activation == "none" else ()
    geo = Geometry(rows, 512, outs, cut, activation, bool(biases))
    assert geo.steps > cut.stages  # stages are used again
    assert geo.problem is None
    got = launch(geo, x, weights, biases, interpret=compat.interpreter(detect_races=True))
    want = by_hand(x, weights, biases)
    if activation == "swiglu":
        want = [want[0] / (1 + np.exp(-want[0])) * want[1]]
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) < 8e-3
    assert not compat.races_found()


@OLD_JAX
def test_columns_that_do_not_divide_the_results():
    """The last CTA of a result begins earlier; two make some columns."""
    outs = (112, 48)
    x, weights = operands((33,), 256, outs)
    biases = some_biases(outs, x.dtype)
    geo = Geometry(40, 256, outs, Tuning(32, 1, 64, 2), biases=True)
    assert geo.firsts == (0, 4, 6)
    got = launch(geo, x, weights, biases, interpret=compat.interpreter())
    for one, other in zip(got, by_hand(x, weights, biases), strict=True):
        assert relative_error(one, other) < 4e-3


@OLD_JAX
@pytest.mark.parametrize("rows", [1, 33, 128])
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
def test_lowers_for_hopper(rows, inner, outs, activation):
    geo = choose(rows, inner, outs, activation, sms=132)
    assert geo.shared_memory <= SHARED_MEMORY
    assert geo.ctas >= 0.65 * 132
    settings = {"activation": activation, "implementation": "mosaic_gpu"}
    if outs[0] != outs[-1]:
        settings["biases"] = tuple(jnp.ones(n, jnp.bfloat16) for n in outs)

    def layers(x, *weights):
        return [matmul(x * i, *weights, **settings) for i in range(3)]

    text = lowered(layers, spec(rows, inner), *(spec(n, inner) for n in outs))
    assert text.count("func.func private @_launch") == 1
    assert launches(text)


@pytest.mark.parametrize("inner", [64, 576, 4096])
@pytest.mark.parametrize("outs", [(64,), (192, 64, 64), (4096, 4096, 4096), (24, 24), (20, 20)])
@pytest.mark.parametrize("rows", [1, 32, 64, 65, 128, 129])
def test_geometry_covers_every_column_once(inner, outs, rows):
    geo = choose(rows, inner, outs, "none", sms=132)
    if rows > 128 or any(n % 8 for n in outs):
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
    with pytest.raises(ValueError, match="129 rows"):
        resolve_matmul("mosaic_gpu", 129, (big,))
    with pytest.raises(ValueError, match="got float32"):
        resolve_matmul("mosaic_gpu", 32, (wide,))
    with pytest.raises(ValueError, match="'triton' is not known"):
        resolve_matmul("triton", 32, (big,))


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
