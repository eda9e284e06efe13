"""MaskKV against its definition, token for token."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pdllm_jax.method.caches.dllm_cache import DLLMCache
from pdllm_jax.method.caches.mask_kv import MaskKV, mask_kv_budgets
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles.rivals import mask_kv
from tests.support.rivals import SIZES, compare, decode

OFTEN = {"prompt_interval": 5, "response_interval": 3}
SETTINGS = [
    {"budget": 4, **OFTEN},
    {"budget": ((3, 6), (11, 1)), "ratio": 0.5, **OFTEN},
    {"budget": 11, "prompt_interval": 6, "response_interval": 2},
    {"budget": 2, "prompt_interval": 50, "response_interval": 4, "ratio": 0.1},
]
CASES = [
    pytest.param(family, settings, marks=() if i == j else pytest.mark.slow)
    for j, family in enumerate(("llada", "dream"))
    for i, settings in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_tokens_are_the_definitions(family, settings):
    state, compared = compare(family, MaskKV(**settings), partial(mask_kv.MaskKV, **settings))
    assert compared
    for b, size in enumerate(SIZES):
        oracle = next((one for one in compared if one.prompt_length == size), None)
        for layer, heads in enumerate(oracle.kept if oracle else []):
            for head, kept in enumerate(heads):
                assert state.memory["kept"][layer][b, head, : len(kept)].tolist() == kept


@pytest.mark.parametrize("family", ["llada", pytest.param("dream", marks=pytest.mark.slow)])
def test_with_all_of_the_prompt_it_is_dllm_cache(family):
    same = {"prompt_interval": 4, "response_interval": 4, "first_layer": family == "llada"}
    state = decode(family, MaskKV(budget=max(SIZES), **same))
    np.testing.assert_array_equal(state.tokens, decode(family, DLLMCache(**same)).tokens)


def test_budgets_of_layers_and_heads():
    got = mask_kv_budgets(
        100, [4, 1, 1, 2], [(0.5, 0.5), (0.2, 0.6), (1, 1), (0, 1)], groups=[(0, 3), (1, 2)]
    )
    # 40 each; of the rest, 240, the first and last layer have 6/8 and the middle 2/8.
    layers = [40 + 90, 40 + 30, 40 + 30, 40 + 90]
    shares = [(0.5, 0.5), (0.25, 0.75), (0.5, 0.5), (0, 1)]
    want = [
        tuple(int(0.1 * k + 0.9 * 2 * k * p + 1e-9) for p in share)
        for k, share in zip(layers, shares, strict=True)
    ]
    assert got == tuple(want)
    with pytest.raises(ConfigError, match="groups must name 2 layers once"):
        mask_kv_budgets(10, [1, 1], [(1,), (1,)], groups=[(0,)])


def test_budgets_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ConfigError, match="budget must be a positive integer"):
        MaskKV(budget=0)
    with pytest.raises(ConfigError, match="or such numbers"):
        MaskKV(budget=((1, 0),))
    with pytest.raises(ConfigError, match="budget has 1 layers"):
        decode("llada", MaskKV(budget=((1, 2),)))
