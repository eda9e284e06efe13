"""Cache methods beside their definitions: the same random network in JAX and in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pdllm_jax.config import DecodeConfig
from tests.method import test_generation_dream, test_generation_published
from tests.oracles.rivals.dkv_cache import Trace

CLEAR = 1e-6  # scores that decide differ by more


@functools.cache
def pair(family: str) -> Any:
    """The two networks of a family, and prompts of different lengths."""
    module = test_generation_dream if family == "dream" else test_generation_published
    return module.Pair()


def compare(family: str, config: DecodeConfig, define: Callable[..., Trace], **settings) -> int:
    """Compares tokens, evaluations and rows; returns how many requests of the batch were clear."""
    both, clear = pair(family), 0
    state = both.denoise(config)
    settings |= {"mask_id": both.config["mask_token_id"], "gen_length": config.gen_length}
    for i, prompt in enumerate(both.prompts):
        trace = define(both.network, torch.from_numpy(np.asarray(prompt, np.int64)), **settings)
        if trace.closest < CLEAR:
            continue
        assert state.tokens[i].tolist() == trace.tokens[len(prompt) :].tolist()
        assert int(state.evaluations[i]) == len(trace.rows)
        assert int(state.rows[i]) == sum(map(len, trace.rows))
        clear += 1
    return clear
