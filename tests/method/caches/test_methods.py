"""What holds for every cache method on whole prompts. Each method's own tests are beside this."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    Engine,
    chunk_prompt,
    encode_document,
    select_top_k,
)
from pdllm_jax.method.caches import CACHE_METHODS, CacheMethod, cache_method
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.randomness import random_key
from pdllm_jax.rules import ConfigError
from tests.support.method import answer_both, sharp_model

# Settings under which rows are left out, for the few tokens of these requests.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix-cache": {},
    "dual-cache": {},
    "d2-cache": {"current_k": 2, "rollout_p": 0.2, "sigma": 2.0},
    "dkv-cache-decode": {"interval": 4},
    "dkv-cache-greedy": {"window": 1},
    "dllm-cache": {"prompt_interval": 4, "response_interval": 4, "ratio": 0.3},
    "elastic-cache": {"window": 2, "gamma": 0.97},
    "mask-kv": {"prompt_interval": 4, "response_interval": 4, "ratio": 0.3, "budget": 5},
    "sparse-d": {"tile": 4, "select": 0.2, "skip": 0.1},
    "sparse-dllm": {"keep_ratio": 0.4},
}
# Rules of decoding that a method needs.
RULES: dict[str, dict[str, Any]] = {"dkv-cache-greedy": {"remasking": "random", "threshold": None}}
DECODE = DecodeConfig(gen_length=8, block_length=4)
SIZES = (13, 9, 15)  # of one bucket
each_method = pytest.mark.parametrize("name", METHODS)


def method_of(name: str) -> CacheMethod:
    return dataclasses.replace(cache_method(name), **METHODS[name])


def decoding(name: str, **changes: Any) -> DecodeConfig:
    return dataclasses.replace(DECODE, **changes | RULES.get(name, {}))


def prompt(size: int) -> list[int]:
    return np.random.default_rng(size).integers(0, 250, size).tolist()


def test_every_method_is_tested():
    assert list(METHODS) == [name for name in CACHE_METHODS if name != "prefilling"]


@each_method
def test_ragged_requests_are_answered_as_if_each_were_alone(name):
    """Also: a second request of the bucket compiles nothing."""
    engine = Engine(sharp_model(), decoding=decoding(name), method=method_of(name))
    pairs = answer_both(engine, [([], prompt(size)) for size in SIZES])
    assert len({tuple(alone.tokens) for alone, _ in pairs}) == len(SIZES)
    assert pairs[1][0].timings["compile"] == 0
    for alone, together in pairs:
        assert (together.tokens, together.evaluations) == (alone.tokens, alone.evaluations)


@pytest.mark.slow
@each_method
def test_steps_by_hand_equal_the_loop_on_the_device(name):
    """With a rule under which requests finish their blocks at different steps."""
    config = decoding(name, threshold=0.3, recompute=method_of(name))
    query = np.full((len(SIZES), max(SIZES)), -1)
    for row, size in zip(query, SIZES, strict=True):
        row[:size] = prompt(size)
    model = sharp_model()
    start = lambda: init_denoise(model, None, None, query, config, random_key(0))  # noqa: E731
    want, state = denoise(model, None, start(), config=config), start()
    for _ in range(config.gen_length):
        state = denoise_step(model, None, state, config=config)
    np.testing.assert_array_equal(state.tokens, want.tokens)
    np.testing.assert_array_equal(state.evaluations, want.evaluations)
    np.testing.assert_array_equal(state.rows, want.rows)


@each_method
def test_settings_are_json(name):
    config = decoding(name, recompute=method_of(name))
    assert not config.has_code
    assert DecodeConfig.from_flat(**json.loads(json.dumps(config.to_flat()))) == config


@pytest.mark.parametrize("name", [name for name in METHODS if not CACHE_METHODS[name].guides])
def test_guidance_is_refused_by_name(name):
    guided = DecodeConfig(guidance=1.0, recompute="response")
    with pytest.raises(ConfigError, match=f"guidance .*{name}"):
        method_of(name).decode_config(guided)


def test_methods_in_the_wrong_place_are_refused_by_name():
    """A method for whole prompts would count the rows of a prefix wrong."""
    model, whole = sharp_model(), dataclasses.replace(DECODE, recompute=method_of("d2-cache"))
    with pytest.raises(ConfigError, match="'prefilling' takes recompute by name, got 'd2-cache'"):
        Engine(model, decoding=whole)
    cache = encode_document(model, chunk_prompt([3], [*range(9)], [5], ChunkConfig(chunk_size=8)))
    selection = select_top_k(np.zeros((1, 2), np.float32), 1)
    with pytest.raises(ConfigError, match="'d2-cache' takes no document's cache"):
        init_denoise(model, cache, selection, np.array([[5]]), whole, random_key(0))
    with pytest.raises(ConfigError, match=r"recompute Prefilling.* is not known"):
        dataclasses.replace(DECODE, recompute=cache_method("prefilling"))
    with pytest.raises(ConfigError, match="must be a name or a CacheMethod, got 3"):
        Engine(model, method=3)
    with pytest.raises(ConfigError, match="method 'none' is not known"):
        DecodeConfig.from_flat(recompute={"method": "none"})
