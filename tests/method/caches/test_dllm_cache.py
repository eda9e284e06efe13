"""dLLM-Cache against its definition, token for token."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pdllm_jax.method.caches.dllm_cache import DLLMCache
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles.rivals import dllm_cache
from tests.support.rivals import SIZES, compare, decode

FAMILIES = pytest.mark.parametrize("family", ["llada", "dream"])
SETTINGS = [
    {"prompt_interval": 5, "response_interval": 3, "ratio": 0.25},
    {"prompt_interval": 6, "response_interval": 2, "ratio": 0.5},
    {"prompt_interval": 4, "response_interval": 6, "ratio": 0.0},
    {"prompt_interval": 4, "response_interval": 3, "ratio": 0.05},
    {"prompt_interval": 3, "response_interval": 100, "ratio": 0.4},
    {"prompt_interval": 100, "response_interval": 1, "ratio": 0.25},
]
# By default each family has one of the settings.
CASES = [
    pytest.param(family, settings, marks=() if i == j else pytest.mark.slow)
    for j, family in enumerate(("llada", "dream"))
    for i, settings in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_tokens_are_the_definitions(family, settings):
    state, compared = compare(
        family, DLLMCache(**settings), partial(dllm_cache.DLLMCache, **settings)
    )
    assert compared
    oracle = compared[0]
    # Layer 0 of the prompt is computed here where the other layers are, for a row at most else.
    rows = [
        sum(row >= oracle.prompt_length or row in step[1] for layer in step for row in layer)
        for step in oracle.rows
    ]
    at = SIZES.index(oracle.prompt_length)
    np.testing.assert_allclose(state.rows[at], sum(rows) / 2)


@FAMILIES
def test_refreshed_at_every_step_it_is_plain_generation(family):
    off = DLLMCache(prompt_interval=1, response_interval=1)
    np.testing.assert_array_equal(decode(family, off).tokens, decode(family, "response").tokens)


def test_settings_of_the_scripts():
    assert DLLMCache.published("llada-instruct", "gsm8k") == DLLMCache(50, 7, 0.25)
    assert DLLMCache.published("dream-base", "mmlu-pro") == DLLMCache(25, 2)
    with pytest.raises(ConfigError, match=r"model 'gpt' is not known .*dream-base"):
        DLLMCache.published("gpt", "gsm8k")
    with pytest.raises(ConfigError, match="task 'hotpotqa' is not known"):
        DLLMCache.published("dream-base", "hotpotqa")
    with pytest.raises(ConfigError, match="ratio must lie in"):
        DLLMCache(ratio=1.5)
