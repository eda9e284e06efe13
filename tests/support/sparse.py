"""Random networks in PyTorch and JAX, and answers of cache methods beside their definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pdllm_jax import DecodeConfig
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from tests.oracles import checkpoints, dream, generation
from tests.support.models import model_from_tensors

LENGTHS = (19, 8, 15)  # of the prompts of a batch
CLEAR = 1e-5  # numbers that decide differ by more


@functools.cache
class Pair:
    """The same random network twice: `network` in PyTorch, `model` in JAX; and some prompts."""

    def __init__(self, family: str, layers: int = 2) -> None:
        self.family = family
        if family == "Dream":
            config = checkpoints.tiny_dream_config(num_hidden_layers=layers)
            head = "lm_head.weight"
        else:
            config = checkpoints.tiny_config(n_kv_heads=2, n_layers=layers)
            head = "model.transformer.ff_out.weight"
        tensors = checkpoints.random_tensors(config, 1)
        tensors[head][config["mask_token_id"]] *= 0.3  # No masks are predicted.
        self.mask_id = config["mask_token_id"]
        self.network = (dream if family == "Dream" else generation).Network(tensors, config)
        self.model = model_from_tensors(tensors, config)
        rng = np.random.default_rng(5)
        self.prompts = [rng.integers(0, checkpoints.N_BYTES, n) for n in LENGTHS]

    def state(self, config: DecodeConfig, prompts=None):
        """The last state of all prompts in one padded batch, or of these."""
        prompts = self.prompts if prompts is None else prompts
        padded = np.zeros((len(prompts), max(LENGTHS) + 2), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        inputs = jnp.asarray(padded), config, jax.random.key(0)
        lengths = jnp.asarray([len(prompt) for prompt in prompts])
        state = init_denoise(self.model, None, None, *inputs, query_length=lengths)
        return denoise(self.model, None, state, config=config)

    def defined(self, generate, **settings) -> list:
        """The run of each prompt by the method's definition."""
        prompts = [torch.from_numpy(prompt) for prompt in self.prompts]
        return [generate(self.network, x, mask_id=self.mask_id, **settings) for x in prompts]

    def published(self, generate, **settings) -> list[list[int]]:
        """Responses by a published algorithm of `generation` or `dream`."""
        settings |= {"mask_id": self.mask_id}
        responses = []
        for prompt in self.prompts:
            ids = torch.from_numpy(prompt)
            batch = ids if self.family == "Dream" else ids[None]
            tokens = generate(self.network, batch, **settings).tokens.flatten()
            responses.append(tokens[len(ids) :].tolist())
        return responses

    def check(self, generate, config: DecodeConfig, **settings):
        """Compares responses, evaluations and rows; returns the definition's runs and the state."""
        runs, state = self.defined(generate, **settings), self.state(config)
        layers, seen = self.model.config.n_layers, 0
        for b, run in enumerate(runs):
            if run.closest < CLEAR:
                continue
            seen += 1
            assert state.tokens[b].tolist() == run.response, b
            rows = sum(len(rows) for step in run.steps for rows in step.rows) / layers
            np.testing.assert_allclose(state.rows[b], rows, rtol=1e-5)
        assert seen >= 2
        return runs, state
