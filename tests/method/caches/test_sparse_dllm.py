"""Sparse-dLLM against its definition, token for token."""

from __future__ import annotations

import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.method.caches.sparse_dllm import SparseDLLM
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles.rivals import sparse_dllm
from tests.support.sparse import Pair

SLOW = pytest.mark.slow
SETTINGS = {
    "published": ({}, 12),
    "few keys, each by itself, later": ({"keep_ratio": 0.15, "kernel": None, "delay": 2}, 8),
    "wide maximum at once": ({"keep_ratio": 0.3, "kernel": 5, "delay": 0}, 16),
}


def config_of(family: str, steps: int, method, **settings) -> DecodeConfig:
    if family == "Dream":
        rule = DecodeConfig.fast_dllm_dream(
            max_new_tokens=16, block_length=8, steps=steps, alg="entropy", **settings
        )
        return DecodeConfig(**vars(rule) | {"recompute": method})
    return DecodeConfig(gen_length=16, block_length=8, steps=steps, recompute=method, **settings)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family == "Dream") == (i == 1) else SLOW)
        for family in ("LLaDA", "Dream")
        for i, name in enumerate(SETTINGS)
    ],
)
def test_tokens_are_those_of_the_definition(family, name):
    changes, steps = SETTINGS[name]
    shape = {"gen_length": 16, "block_length": 8, "steps": steps}
    config = config_of(family, steps, SparseDLLM(**changes))
    Pair(family).check(sparse_dllm.generate, config, **shape, **changes)


@pytest.mark.parametrize("family", ["LLaDA", pytest.param("Dream", marks=SLOW)])
def test_with_all_keys_at_once_it_is_the_dual_cache(family):
    pair = Pair(family)
    every = config_of(family, 10, SparseDLLM(keep_ratio=1.0, delay=0))
    want = pair.state(config_of(family, 10, "block"))
    assert pair.state(every).tokens.tolist() == want.tokens.tolist()


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"keep_ratio": 1.5}, {"delay": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SparseDLLM(**wrong)
