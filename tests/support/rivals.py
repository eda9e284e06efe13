"""The same tiny network in PyTorch and in JAX, for cache methods and their definitions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pdllm_jax import DecodeConfig
from pdllm_jax.method.cache import DenoiseState
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.network.transformer import MaskPredictor
from tests.oracles import checkpoints, dream, generation
from tests.oracles.rivals.dllm_cache import DLLMCache, generate_dream, generate_llada
from tests.support.models import model_from_tensors

SIZES = (13, 9)  # of the prompts of a batch
CLEAR = 1e-5  # what decides differs by more
SETTINGS: dict[str, dict[str, Any]] = {
    "llada": {"gen_length": 12, "block_length": 6, "steps": 12},
    "dream": {"gen_length": 12, "steps": 12, "alg": "entropy"},
}


@functools.cache
def pair(family: str, seed: int = 2) -> tuple[generation.Network, MaskPredictor]:
    """A random network that predicts no masks, with two query heads for each KV head."""
    dreams = family == "dream"
    config = checkpoints.tiny_dream_config() if dreams else checkpoints.tiny_config(n_kv_heads=2)
    tensors = checkpoints.random_tensors(config, seed)
    head = "lm_head.weight" if dreams else "model.transformer.ff_out.weight"
    tensors[head][config["mask_token_id"]] *= 0.3
    network = (dream if dreams else generation).Network(tensors, config)
    return network, model_from_tensors(tensors, config)


def prompts(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, checkpoints.N_BYTES, size) for size in SIZES]


def decode(family: str, method: Any, seed: int = 2) -> DenoiseState:
    """The state after all prompts were answered in one padded batch."""
    model, settings = pair(family, seed)[1], dict(SETTINGS[family])
    if family == "dream":
        settings["max_new_tokens"] = settings.pop("gen_length")
    config = (DecodeConfig.dream if family == "dream" else DecodeConfig)(
        **settings, recompute=method
    )
    query = np.full((len(SIZES), max(SIZES) + 2), -1)
    for row, ids in zip(query, prompts(), strict=True):
        row[: len(ids)] = ids
    start = init_denoise(model, None, None, jnp.asarray(query), config, jax.random.key(0))
    return denoise(model, None, start, config=config)


def compare(
    family: str, method: Any, forward: Callable[..., DLLMCache], seed: int = 2
) -> tuple[DenoiseState, list[DLLMCache]]:
    """Asserts that the answers are those of a definition, `forward(network, prompt length)`.

    Returns the state, and the definitions whose decisions were clear: those that were compared.
    """
    state, compared = decode(family, method, seed), []
    network, model = pair(family, seed)
    generate = generate_dream if family == "dream" else generate_llada
    for ids, tokens in zip(prompts(), state.tokens, strict=True):
        oracle, rule = forward(network, len(ids)), SETTINGS[family]
        run = generate(oracle, torch.from_numpy(ids), mask_id=model.config.mask_token_id, **rule)
        if oracle.closest > CLEAR:
            assert tokens.tolist() == run.tokens.flatten()[len(ids) :].tolist()
            compared.append(oracle)
    return state, compared
