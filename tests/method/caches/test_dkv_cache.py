"""dKV-Cache against its definition, token for token and row for row."""

from __future__ import annotations

import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.method.caches.dkv_cache import DKVCacheDecode, DKVCacheGreedy
from pdllm_jax.rules import ConfigError

torch = pytest.importorskip("torch")

from tests.method.caches.pairs import compare, pair  # noqa: E402
from tests.oracles.rivals import dkv_cache  # noqa: E402

SLOW = pytest.mark.slow
LLADA = {"gen_length": 24, "block_length": 8, "steps": 24}
DREAM = {"max_new_tokens": 16, "steps": 16, "alg": "entropy"}

DECODE_LLADA = [
    (4, {}),
    (3, {"block_length": 12, "steps": 10}),
    (1, {}),
    (99, {"steps": None, "threshold": 0.5}),
    # Passes of a quarter and a half of the response.
    (4, {"gen_length": 128, "block_length": 64, "steps": 32}),
]


@pytest.mark.parametrize(
    ("interval", "change"),
    [pytest.param(*case, marks=SLOW if i else ()) for i, case in enumerate(DECODE_LLADA)],
)
def test_decode_for_llada(interval, change):
    config = DecodeConfig(**LLADA | change, recompute=DKVCacheDecode(interval))
    settings = {name: getattr(config, name) for name in ("block_length", "threshold")}
    settings |= {"steps": config.steps_per_block * config.n_blocks, "interval": interval}
    assert compare("llada", config, dkv_cache.decode_llada, **settings) == 3


DECODE_DREAM = [(5, {}), (16, {"steps": 20, "alg": "maskgit_plus", "top_p": 0.9}), (1, {})]


@pytest.mark.parametrize(
    ("interval", "change"),
    [pytest.param(*case, marks=SLOW if i else ()) for i, case in enumerate(DECODE_DREAM)],
)
def test_decode_for_dream(interval, change):
    settings = DREAM | change
    config = DecodeConfig.dream(**settings, recompute=DKVCacheDecode(interval))
    del settings["max_new_tokens"]
    assert compare("dream", config, dkv_cache.decode_dream, interval=interval, **settings) == 3


GREEDY = [
    (2, 4, {}),
    (3, 1, {"block_length": 12, "steps": 10}),
    (4, 0, {"steps": 12}),
    (1, 4, {}),
]


@pytest.mark.parametrize(
    ("interval", "window", "change"),
    [pytest.param(*case, marks=SLOW if i else ()) for i, case in enumerate(GREEDY)],
)
def test_greedy(interval, window, change):
    method = DKVCacheGreedy(interval, window)
    config = DecodeConfig(**LLADA | change, recompute=method, remasking="random")
    both = pair("llada")
    drawn = np.asarray(both.start(config).memory[0])
    assert len(set(drawn.flatten().tolist())) == drawn.size

    def define(network, prompt, **settings):
        index = [len(ids) for ids in both.prompts].index(len(prompt))
        ahead = np.zeros(len(prompt))
        row = torch.from_numpy(np.concatenate([ahead, drawn[index]]))
        priorities = row.expand(config.n_blocks, -1)
        return dkv_cache.greedy_llada(network, prompt, priorities=priorities, **settings)

    settings = {"block_length": config.block_length, "steps": config.steps or config.gen_length}
    settings |= {"interval": interval, "window": window}
    assert compare("llada", config, define, **settings) == 3


def test_greedy_takes_the_place_of_the_default_order():
    assert DKVCacheGreedy().decode_config(DecodeConfig()).remasking.name == "random"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("dream", {}, "LLaDA alone"),
        ("llada", {"remasking": "low_confidence"}, "needs remasking='random', got 'low_conf"),
        ("llada", {"steps": None, "threshold": 0.9}, "needs schedule='even', without threshold"),
    ],
)
def test_greedy_is_refused_by_name(family, change, message):
    settings = LLADA | {"remasking": "random", "recompute": DKVCacheGreedy()} | change
    with pytest.raises(ConfigError, match=f"dkv-cache-greedy.*{message}"):
        pair(family).start(DecodeConfig(**settings))
