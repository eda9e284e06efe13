"""Rotations: the identity that lets chunk-local keys serve any placement, under every scaling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.network.rope import inverse_frequencies, rotate, rotation

SCALINGS = {
    "plain": None,
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 4.0),
    "yarn": RopeScaling("yarn", 4.0, original_max_position=64),
}


def configured(kind: str) -> ModelConfig:
    return dataclasses.replace(ModelConfig.tiny(), rope_scaling=SCALINGS[kind])


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("offset", [0, 5, 1000])
def test_rotating_queries_back_equals_rotating_keys_on(kind, offset):
    """Identity 4: R(p) q . R(o + i) k = R(p - o) q . R(i) k."""
    config = configured(kind)
    q, k = (jax.random.normal(jax.random.key(i), (7, 3, config.head_dim)) for i in (0, 1))
    at, local = jnp.arange(7) + 1100, jnp.arange(7)

    def scores(*positions):
        by = (rotation(config, x) for x in positions)
        return jnp.einsum("qhd,khd->hqk", *map(rotate, (q, k), by))

    want = scores(at, local + offset)
    np.testing.assert_allclose(scores(at - offset, local), want, atol=2e-3)
    assert not np.allclose(scores(at - offset - 1, local), want, atol=2e-2)


def test_positions_may_be_negative():
    config = configured("plain")
    x = jax.random.normal(jax.random.key(0), (1, 1, config.head_dim))
    turned = rotate(x, rotation(config, jnp.array([-9])))
    back = rotate(turned, rotation(config, jnp.array([9])))
    np.testing.assert_allclose(back, x, atol=1e-6)
    assert not np.allclose(turned, x, atol=1e-2)


def test_frequencies_of_the_scalings():
    frequencies = {kind: inverse_frequencies(configured(kind)) for kind in SCALINGS}
    plain = frequencies["plain"][0]
    np.testing.assert_allclose(frequencies["linear"][0], plain / 4)
    for kind in ("ntk", "yarn"):  # leave the fastest plane alone, slow the slowest by the factor
        np.testing.assert_allclose((frequencies[kind][0] / plain)[[0, -1]], [1, 1 / 4])
    assert frequencies["yarn"][1] == pytest.approx(0.1 * np.log(4) + 1)


def test_half_split_layout():
    config = configured("plain")
    x = jnp.zeros((1, 1, config.head_dim)).at[0, 0, 1].set(1.0)
    turned = rotate(x, rotation(config, jnp.array([3])))[0, 0]
    angle = 3 * config.rope_theta ** (-2 / config.head_dim)
    want = np.zeros(config.head_dim)
    want[1], want[1 + config.head_dim // 2] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(turned, want, atol=1e-6)
