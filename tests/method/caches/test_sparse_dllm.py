"""Sparse-dLLM against its definition, token for token."""

from __future__ import annotations

import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.method.caches.sparse_dllm import SparseDLLM
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles import dream, generation
from tests.oracles.rivals import sparse_dllm
from tests.support.sparse import Pair

SLOW = pytest.mark.slow
DEFAULT = {("LLaDA", 0), ("Dream", 1)}
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
        pytest.param(family, name, marks=() if (family, i) in DEFAULT else SLOW)
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
    pair, settings = Pair(family), {"gen_length": 16, "block_length": 8, "steps": 10}
    if family == "Dream":
        want = pair.published(dream.dual_cache, alg="entropy", **settings)
    else:
        want = pair.published(generation.dual_cache, **settings)
    every = config_of(family, 10, SparseDLLM(keep_ratio=1.0, delay=0))
    assert pair.state(every).tokens.tolist() == want


@pytest.mark.parametrize("family", ["LLaDA", pytest.param("Dream", marks=SLOW)])
def test_requests_at_different_steps_are_answered_as_if_each_were_alone(family):
    """By a threshold: some request recomputes its block beside another that chooses its rows."""
    pair = Pair(family)
    config = DecodeConfig(16, 4, threshold=0.4, recompute=SparseDLLM(keep_ratio=0.3))
    together = pair.state(config)
    assert len(set(together.evaluations.tolist())) > 1
    for b, prompt in enumerate(pair.prompts):
        alone = pair.state(config, [prompt] * len(pair.prompts))
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
        assert alone.rows[0] == together.rows[b]


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"keep_ratio": 1.5}, {"delay": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SparseDLLM(**wrong)
