"""Elastic-Cache against its definition, token for token. Both are from the paper alone."""

from __future__ import annotations

import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.method.caches.elastic_cache import ElasticCache
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles import generation
from tests.oracles.rivals import elastic_cache
from tests.support.sparse import Pair

SLOW = pytest.mark.slow
SETTINGS = {
    "published": {},
    "a small window that often refreshes": {"window": 3, "gamma": 0.97},
    "no refresh": {"window": 4, "gamma": 0.0, "threshold": 0.6},
}


def config_of(method, threshold: float = 0.9) -> DecodeConfig:
    return DecodeConfig(gen_length=16, block_length=16, threshold=threshold, recompute=method)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if i == 1 else SLOW)
        for family in ("LLaDA", "Dream")
        for i, name in enumerate(SETTINGS)
    ],
)
def test_tokens_and_rows_are_those_of_the_definition(family, name):
    settings = SETTINGS[name]
    method = ElasticCache(**{x: settings[x] for x in ("window", "gamma") if x in settings})
    config = config_of(method, settings.get("threshold", 0.9))
    runs, state = Pair(family, 3).check(elastic_cache.generate, config, gen_length=16, **settings)
    assert state.evaluations.tolist() == [len(run.steps) for run in runs]
    called = {step.chosen[0] for run in runs for step in run.steps[1:]}
    if name == "a small window that often refreshes":
        assert len(called) > 2


def test_with_a_cosine_above_1_it_is_plain():
    pair, shape = Pair("LLaDA"), {"gen_length": 16, "block_length": 16, "steps": 16}
    want = pair.published(generation.plain, threshold=0.9, **shape)
    got = pair.state(config_of(ElasticCache(gamma=1.5)))
    assert got.tokens.tolist() == want


@pytest.mark.parametrize("wrong", [{"window": 0}, {"gamma": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ElasticCache(**wrong)
