"""Rows in fp8 between wide products: the same values as products of rows in 16 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Norm, Scaled, add_product, compat, matmul, quantise
from pallas_kernels.common import rms_norm
from tests.support.kernels import OLD_JAX, launches, lowered, spec
from tests.support.models import relative_error


def operands(rows, model, hidden):
    """Rows, a stream, weights of gate, up and down in fp8, a norm."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, stream = (jax.random.normal(k, (2, rows, model), jnp.bfloat16) for k in keys[:2])
    x = x.at[0, 1].set(0)
    shapes = (hidden, model), (hidden, model), (model, hidden)
    weights = (jax.random.normal(k, s) / 16 for k, s in zip(keys[2:5], shapes, strict=True))
    norm = Norm(jax.random.uniform(keys[5], (model,), jnp.bfloat16), 1e-5)
    return x, stream, *(quantise(w, "fp8") for w in weights), norm


@pytest.mark.parametrize(
    ("device", "model", "hidden"),
    [
        ("CPU", 128, 384),
        pytest.param("GPU", 1024, 3072, marks=pytest.mark.gpu),
        pytest.param("GPU", 4096, 12288, marks=pytest.mark.gpu),
        pytest.param("GPU", 3584, 18944, marks=pytest.mark.gpu),  # sizes that XLA keeps
    ],
)
def test_a_layer_of_rows_in_fp8(device, model, hidden):
    """Also a row of zeros. The kernel does not round in between, so it may be nearer."""
    x, stream, gate, up, down, norm = operands(133, model, hidden)
    settings = {"activation": "swiglu", "implementation": "xla_fp8"}
    (plain,) = matmul(x, gate, up, **settings)
    (hidden_rows,) = matmul(x, gate, up, **settings, narrow=True)
    assert isinstance(hidden_rows, Scaled)
    assert hidden_rows.scale.shape == (2, 133)
    assert relative_error(hidden_rows.restore(jnp.float32), plain) < 3e-2
    assert not np.asarray(hidden_rows.values[0, 1], np.float32).any()
    assert hidden_rows.scale[0, 1] == 1
    total, normed = add_product(stream, hidden_rows, down, norm)
    want = stream + matmul(plain, down, implementation="xla_fp8")[0]
    assert total.dtype == stream.dtype
    product = hidden_rows.restore(jnp.float32) @ down.restore(jnp.float32).T
    assert relative_error(total, stream.astype(jnp.float32) + product) < 8e-3
    assert isinstance(normed, Scaled)
    exact = rms_norm(total.astype(jnp.float32), norm.weight.astype(jnp.float32), norm.eps)
    assert relative_error(normed.restore(jnp.float32), exact) < 3e-2
    (alone,) = add_product(stream, hidden_rows, down)
    assert relative_error(alone, total) < 1e-3
    if device == "CPU":
        same = quantise(plain, "fp8")
        assert all(map(np.array_equal, hidden_rows, same))
        assert np.array_equal(total, want)
        (product,) = matmul(normed, gate, dtype=jnp.float32)
        (other,) = matmul(normed.restore(jnp.float32), gate, implementation="xla")
        assert product.dtype == jnp.float32
        assert relative_error(product, other) < 1e-4
        return
    # Rows in 16 bits, which the output projection has.
    total, _ = add_product(stream, plain, down, norm)
    assert relative_error(total, want) < 2e-3


@OLD_JAX
def test_one_launch_between_two_products(monkeypatch):
    """Kinds of them; the kernel does not take every size."""
    monkeypatch.setattr(compat, "compute_capability", lambda: "9.0")

    def layer(stream, x, out, gate, up, down, weight):
        norm = Norm(weight, 1e-5)
        stream, normed = add_product(stream, x, out, norm)
        (hidden,) = matmul(normed, gate, up, activation="swiglu", narrow=True)
        return add_product(stream, hidden, down, norm)

    def count(model, hidden):
        sizes = (model, model), (hidden, model), (hidden, model), (model, hidden)
        scale = lambda n: spec(n, dtype=jnp.float32)  # noqa: E731
        weights = [Scaled(spec(*s, dtype=jnp.float8_e4m3fn), scale(s[0])) for s in sizes]
        rows = spec(1, 300, model), spec(1, 300, model)
        return len(launches(lowered(layer, *rows, *weights, spec(model))))

    # With the norm, with the activation; the second norm is lowered with the first.
    assert count(4096, 12288) == 2
    assert count(3584, 18944) == 0


def test_rows_that_do_not_fit_are_named():
    _, _, gate, *_ = operands(3, 128, 384)
    rows = quantise(jnp.ones((3, 64)), "fp8")
    with pytest.raises(ValueError, match=r"scaled rows need scaled weights \[O, 64\]"):
        matmul(rows, gate)
