"""d2Cache against its definition, token for token and row for row."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.method.caches import d2_cache as implementation
from pdllm_jax.method.caches.d2_cache import D2Cache

torch = pytest.importorskip("torch")

from tests.method.caches.pairs import compare, pair  # noqa: E402
from tests.oracles.rivals import d2_cache  # noqa: E402

SLOW = pytest.mark.slow
CONFIG = {"gen_length": 16, "block_length": 16, "steps": 16}
SPARSE = {"current_k": 4, "rollout_p": 0.2, "sigma": 3.0, "prior_sigma": 4.0}
CASES = [
    ("llada", SPARSE, {}),
    ("dream", SPARSE | {"inflate_w": 3}, {"top_p": 0.9}),
    ("llada", SPARSE | {"refresh_confidence": True, "inflate_w": 2}, {"block_length": 8}),
    ("dream", SPARSE | {"refresh_confidence": True}, {"block_length": 8, "steps": 8}),
    ("llada", SPARSE | {"prior_sigma": None}, {"steps": None, "threshold": 0.4}),
    ("llada", {"current_k": 2, "prior_sigma": 0.6, "zero_logits": True}, {}),
    ("dream", {"current_k": 2, "prior_sigma": 0.6, "zero_logits": True}, {"top_p": 0.9}),
    ("llada", {}, {"steps": 8}),
    ("llada", SPARSE, {"steps": 2}),
    ("dream", SPARSE, {"block_length": 8, "steps": 2, "top_p": 0.9}),
]


@pytest.mark.parametrize(
    ("family", "method", "change"),
    [pytest.param(*case, marks=SLOW if i > 1 else ()) for i, case in enumerate(CASES)],
)
def test_equals_its_definition(family, method, change):
    shift = family == "dream"
    config = DecodeConfig(**CONFIG | change, recompute=D2Cache(**method), scaled_confidence=shift)
    settings = dataclasses.asdict(config.recompute)
    names = {"refresh": "refresh_confidence", "stale": "zero_logits"}
    settings |= {name: settings.pop(theirs) for name, theirs in names.items()}
    settings |= {name: getattr(config, name) for name in ("block_length", "threshold", "top_p")}
    settings |= {"steps": config.steps or config.gen_length, "shift": shift}
    assert compare(family, config, d2_cache.generate, **settings) >= 2


@SLOW
def test_recomputing_everything_is_plain_generation():
    method = D2Cache(rollout_p=1.0, prior_sigma=None)
    config = DecodeConfig(**CONFIG | {"block_length": 8, "steps": 8}, recompute=method)
    want, _ = pair("llada").published("plain", config)
    np.testing.assert_array_equal(pair("llada").denoise(config).tokens, want)


@pytest.mark.parametrize("sigma", [0.7, 10.0])
@pytest.mark.parametrize("size", [1, 5, 40])
def test_density(size, sigma):
    known = np.random.default_rng(size).random((3, size)) < 0.5
    got = implementation.density(jnp.asarray(known), sigma)
    want = [d2_cache.density(torch.from_numpy(row), sigma) for row in known]
    np.testing.assert_allclose(got, torch.stack(want), rtol=1e-5, atol=1e-7)
