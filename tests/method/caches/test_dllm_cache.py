"""dLLM-Cache against its definition, token for token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.method.caches.dllm_cache import DLLMCache
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.rules import ConfigError
from tests.support.models import model_from_tensors

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream, generation  # noqa: E402
from tests.oracles.rivals import dllm_cache  # noqa: E402

SIZES = (13, 9)
CLEAR = 1e-5
LLADA = {"gen_length": 12, "block_length": 6, "steps": 12}
DREAM = {"gen_length": 12, "steps": 12, "alg": "entropy"}
FAMILIES = pytest.mark.parametrize("family", ["llada", "dream"])


@functools.cache
def pair(family: str):
    """The same network twice: in PyTorch, and in JAX."""
    if family == "dream":
        config = checkpoints.tiny_dream_config()
        tensors = checkpoints.random_tensors(config, 2)
        tensors["lm_head.weight"][config["mask_token_id"]] *= 0.3
        return dream.Network(tensors, config), model_from_tensors(tensors, config)
    config = checkpoints.tiny_config(n_kv_heads=2)
    tensors = checkpoints.random_tensors(config, 2)
    tensors["model.transformer.ff_out.weight"][config["mask_token_id"]] *= 0.3
    return generation.Network(tensors, config), model_from_tensors(tensors, config)


def prompts() -> list[np.ndarray]:
    return [np.random.default_rng(size).integers(0, checkpoints.N_BYTES, size) for size in SIZES]


def config_of(family: str, method) -> DecodeConfig:
    if family == "dream":
        rule = {name: value for name, value in DREAM.items() if name != "gen_length"}
        return DecodeConfig.dream(max_new_tokens=DREAM["gen_length"], **rule, recompute=method)
    return DecodeConfig(**LLADA, recompute=method)


def decode(family: str, method: Any):
    """The state after both prompts were answered in one padded batch."""
    model = pair(family)[1]
    query = np.full((len(SIZES), max(SIZES) + 2), -1)
    for row, ids in zip(query, prompts(), strict=True):
        row[: len(ids)] = ids
    config = config_of(family, method)
    start = init_denoise(model, None, None, jnp.asarray(query), config, jax.random.key(0))
    return denoise(model, None, start, config=config)


def compare(family: str, method: Any, forward) -> int:
    """Returns how many answers were compared, of requests whose decisions are clear."""
    state, clear, mask_id = decode(family, method), 0, pair(family)[1].config.mask_token_id
    for ids, tokens in zip(prompts(), state.tokens, strict=True):
        prompt, oracle = torch.from_numpy(ids), forward(len(ids))
        generate = dllm_cache.generate_dream if family == "dream" else dllm_cache.generate_llada
        settings = DREAM if family == "dream" else LLADA
        want = generate(oracle, prompt, mask_id=mask_id, **settings).tokens.flatten()
        if oracle.closest > CLEAR:
            assert tokens.tolist() == want[len(ids) :].tolist()
            clear += 1
    return clear


SETTINGS = [
    {"prompt_interval": 5, "response_interval": 3, "ratio": 0.25},
    {"prompt_interval": 6, "response_interval": 2, "ratio": 0.5},
    {"prompt_interval": 4, "response_interval": 6, "ratio": 0.0},
    {"prompt_interval": 4, "response_interval": 3, "ratio": 0.05},
    {"prompt_interval": 3, "response_interval": 100, "ratio": 0.4},
    {"prompt_interval": 100, "response_interval": 1, "ratio": 0.25},
]
QUICK = SETTINGS[:2]


@FAMILIES
@pytest.mark.parametrize(
    "settings", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SETTINGS]
)
def test_tokens_are_the_definitions(family, settings):
    def forward(size: int):
        return dllm_cache.DLLMCache(pair(family)[0], size, **settings)

    assert compare(family, DLLMCache(**settings), forward) > 0
