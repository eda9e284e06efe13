"""Step 6: the loop of denoising steps on the device. `step.py` says what a step is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.reselect import reselect_due
from pdllm_jax.method.step import Step
from pdllm_jax.network.dispatch import ModelFunction
from pdllm_jax.network.transformer import MaskPredictor


@functools.partial(
    ModelFunction, static_argnames=("config", "implementation"), donate_argnames=("state",)
)
def denoise_step(
    model: MaskPredictor,
    cache: ChunkCache | None,
    state: DenoiseState,
    *,
    config: DecodeConfig,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Runs one network evaluation and the sampling rule. Pure; donates `state`.

    Compiles once for each (shapes, config, implementation). A finished request does not change,
    and its chunks are not read. `config` must be the one that the state was made with; `cache` the
    cache, or None where the state has a pool (all encodings but "independent") or no chunks.
    """
    return Step(model, state.pool_in(cache), state, config, implementation).run()


@functools.partial(
    jax.jit, static_argnames=("config", "implementation", "settings"), donate_argnames=("state",)
)
def denoise(
    model: MaskPredictor,
    cache: ChunkCache | None,
    state: DenoiseState,
    *,
    config: DecodeConfig,
    implementation: Implementation | None = None,
    settings: SelectionConfig | None = None,
    until: Int[Array, ""] | None = None,
) -> DenoiseState:
    """Runs steps until every request is done, in one loop on the device. See `denoise_step`.

    settings: that the state was made with, where they ask for re-selection; `cache` is then needed,
      with the KV of every chunk.
    until: stops when every request has done this many blocks. A run-time value; call again to
      continue.
    """
    last_block = config.n_blocks if until is None else jnp.minimum(until, config.n_blocks)

    def unfinished(state: DenoiseState) -> Array:
        return (state.block < last_block).any()

    if settings is not None and settings.reselects:
        if cache is None or not state.chunk_ids.shape[1]:
            raise ValueError("re-selection needs the document's cache")

        def reselect_and_step(state: DenoiseState) -> DenoiseState:
            due = state.block < config.n_blocks
            if settings.reselect == "block":
                due &= state.step == 0
            state = reselect_due(model, cache, state, settings, config, implementation, due)
            return Step(model, state.pool_in(cache), state, config, implementation).run()

        return lax.while_loop(unfinished, reselect_and_step, state)

    # A pool that does not change is kept out of the loop's carry.
    fixed, pool = state.pool_in(cache), state.pool

    def step_of(state: DenoiseState) -> Step:
        return Step(model, fixed, state, config, implementation)

    def run(width: int) -> Callable[[DenoiseState], DenoiseState]:
        return lambda state: step_of(state).run(width)

    def needs(width: int) -> Callable[[DenoiseState], Array]:
        return lambda state: unfinished(state) & (step_of(state).width == width)

    def each_width(state: DenoiseState) -> DenoiseState:
        """Runs a loop for each width: a branch at every step would copy the live KV."""
        for width in widths:
            state = lax.while_loop(needs(width), run(width), state)
        return state

    body, widths = each_width, config.cache_method.widths(state, config)
    if len(widths) == 1:
        one = run(*widths)
        # With a fixed number of steps, test for the end between blocks alone: the test waits for
        # the host. In a loop that begins inside a block, the extra steps change nothing.
        steps = config.steps_per_block if config.scheduled and until is None else 1
        body = lambda state: lax.fori_loop(0, steps, lambda _, s: one(s), state)  # noqa: E731
    last = lax.while_loop(unfinished, body, dataclasses.replace(state, pool=None))
    return dataclasses.replace(last, pool=pool)
