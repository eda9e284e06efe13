"""Step 6: one denoising step, and the loop on the device.

Live rows are prefix, query and response. The context, if any, is a pool of chunks with the chosen
ids. A step is one evaluation of the network on the recomputed rows, then the sampling rule:

  wide    query and response. When a block starts with stale live KV, or at every step for
          recompute "response".
  narrow  the current block ("block"), or it and all behind it ("suffix"), against the live KV of
          the other rows as the block's start left it.

Without context, with the whole prompt as query: recompute "response" is LLaDA's published
generation, "suffix" Fast-dLLM's prefix cache, "block" its dual cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import (
    ChunkCache,
    ChunkPool,
    DenoiseState,
    LiveCache,
    dynamic_slices,
    dynamic_updates,
)
from pdllm_jax.method.live_forward import live_forward, response_rows
from pdllm_jax.method.reselect import reselect_due
from pdllm_jax.method.sampling import predict, transfer
from pdllm_jax.method.scoring import check_scorable
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor

Width = Literal["wide", "narrow"]


def _guided_hidden(
    model: MaskPredictor, state: DenoiseState, rows: Int[Array, "B T"]
) -> Float[Array, "two_B T M"]:
    """Returns hidden rows twice in one batch: as they are, and with the prompt masked."""
    in_prompt = jnp.arange(rows.shape[1]) < state.query_length[:, None]
    blind = jnp.where(in_prompt, model.config.mask_token_id, rows)
    lengths = jnp.tile(state.query_length + state.tokens.shape[1], 2)
    return model.encode(jnp.concatenate([rows, blind]), lengths)


def _guided_logits(
    model: MaskPredictor, hidden: Float[Array, "two_B T M"], guidance: float
) -> Float[Array, "B T V"]:
    """Returns LLaDA's guided logits u + (1 + guidance) (c - u), u of the masked prompt."""
    conditional, unconditional = jnp.split(model.logits(hidden), 2)
    return unconditional + (guidance + 1) * (conditional - unconditional)


def _step(
    model: MaskPredictor,
    pool: ChunkPool | None,
    state: DenoiseState,
    config: DecodeConfig,
    implementation: Implementation | None,
    width: Width | None = None,
) -> DenoiseState:
    """Runs one step. width: of the pass, where it is static, so that only that pass is compiled."""
    batch, length = state.tokens.shape
    block_length = config.block_length
    active = state.block < config.n_blocks
    block_start = jnp.minimum(state.block, config.n_blocks - 1) * block_length
    slot = jnp.arange(length)
    in_block = (slot >= block_start[:, None]) & (slot < block_start[:, None] + block_length)
    masked = (state.tokens == model.config.mask_token_id) & active[:, None]
    always_wide = config.recompute == "response"
    wide = jnp.ones((batch,), bool) if always_wide else state.stale & active
    # A predicted mask token leaves its slot masked. As published, an evaluation of all rows may
    # unmask such slots of earlier blocks.
    behind = (slot < block_start[:, None]) & wide[:, None]
    candidates = masked & (in_block | behind)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.evaluations)
    forward = functools.partial(
        live_forward,
        model,
        pool,
        state.placement.only(active),
        state.live,
        implementation=implementation,
    )

    def decide(logits: Array, first: Array) -> tuple[Array, Array]:
        """Returns tokens and confidences [B, G] of rows from `first` on, -inf elsewhere."""
        tokens, confidence = jax.vmap(
            lambda x, k: predict(x, config.remasking, config.temperature, k)
        )(logits, keys)
        return (
            dynamic_updates(state.tokens, first, tokens),
            dynamic_updates(jnp.full((batch, length), -jnp.inf), first, confidence),
        )

    def read(logits_of: Callable[[Array, int], Array]) -> tuple[Array, Array]:
        """Predicts the block's rows alone, unless an earlier slot is still masked."""

        def block() -> tuple[Array, Array]:
            return decide(logits_of(block_start, block_length), block_start)

        def everything() -> tuple[Array, Array]:
            first = jnp.zeros_like(block_start)
            return decide(logits_of(first, length), first)

        if config.n_blocks == 1:
            return block()
        return lax.cond((masked & behind).any(), everything, block)

    def wide_step() -> tuple[Array, Array, LiveCache | None]:
        rows = response_rows(state)
        if config.guidance > 0:
            both = _guided_hidden(model, state, rows)

            def guided(first: Array, size: int) -> Array:
                hidden = dynamic_slices(both, jnp.tile(state.query_length + first, 2), size)
                return _guided_logits(model, hidden, config.guidance)

            return *read(guided), state.live
        response_row = jnp.arange(rows.shape[1]) - state.query_length[:, None]
        rewritten = response_row >= block_start[:, None]
        if config.recompute == "block":
            rewritten &= response_row < block_start[:, None] + block_length
        # Requests with fresh live KV go through this pass beside stale ones, and keep theirs.
        keep = None if always_wide else ~(rewritten | wide[:, None])
        x, live, _ = forward(rows, state.prefix_length, keep)

        def plain(first: Array, size: int) -> Array:
            return model.logits(
                model.final_norm(dynamic_slices(x, state.query_length + first, size))
            )

        return *read(plain), live

    def narrow_step() -> tuple[Array, Array, LiveCache | None]:
        response_start = state.prefix_length + state.query_length
        if config.recompute == "block":
            rows = dynamic_slices(state.tokens, block_start, block_length)
            start = response_start + block_start
            x, live, _ = forward(rows, start)
            return *decide(model.logits(model.final_norm(x)), block_start), live
        keep = slot < block_start[:, None]
        x, live, _ = forward(state.tokens, response_start, keep)
        hidden = model.final_norm(dynamic_slices(x, block_start, block_length))
        return *decide(model.logits(hidden), block_start), live

    if always_wide or width == "wide":
        predicted, confidence, live = wide_step()
    elif width == "narrow":
        predicted, confidence, live = narrow_step()
    else:
        predicted, confidence, live = lax.cond(wide.any(), wide_step, narrow_step)

    confidence = jnp.where(candidates, confidence, -jnp.inf)
    take = jax.vmap(lambda c, s: transfer(c, s, config.unmasking))(confidence, state.step)
    tokens = jnp.where(take, predicted, state.tokens)
    step = state.step + 1
    limit = config.steps_per_block if config.scheduled else block_length
    open_slots = ((tokens == model.config.mask_token_id) & in_block).any(axis=1)
    finished = active & (~open_slots | (step >= limit))
    block = state.block + finished
    if config.stop_ids:
        stops = jnp.isin(tokens, jnp.array(config.stop_ids)) & in_block
        ended = finished & stops.any(axis=1)
        block = jnp.where(ended, config.n_blocks, block)
        unread = ended[:, None] & (slot >= block_start[:, None] + block_length)
        tokens = jnp.where(unread, model.config.eos_token_id, tokens)
    state = dataclasses.replace(
        state,
        tokens=tokens,
        live=live,
        block=block,
        step=jnp.where(finished | ~active, 0, step),
        stale=jnp.where(wide, finished, state.stale | finished),
        evaluations=state.evaluations + active,
    )
    return constrain(model.mesh, state)


def _stays_fresh(state: DenoiseState, config: DecodeConfig) -> bool:
    """Returns whether the live KV is never stale: fresh from the encoding, and one block."""
    return state.live_encoded and config.n_blocks == 1


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames=("state",)
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
    width: Width | None = "narrow" if _stays_fresh(state, config) else None
    return _step(model, state.pool_in(cache), state, config, implementation, width)


@functools.partial(
    jax.jit,
    static_argnames=("config", "implementation", "settings"),
    donate_argnames=("state",),
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

    settings: the settings that the state was made with, where they ask for re-selection; `cache`
      is then needed, with the KV of every chunk.
    until: stops when every request has done this many blocks. A run-time value; call again to
      continue.
    """
    reselecting = settings if settings is not None and settings.reselects else None
    if reselecting is not None:
        if cache is None or not state.chunk_ids.shape[1]:
            raise ValueError("re-selection needs the document's cache")
        check_scorable(cache)
    last_block = config.n_blocks if until is None else jnp.minimum(until, config.n_blocks)
    # A pool that does not change is kept out of the loop's carry.
    fixed = state.pool_in(cache) if reselecting is None else None
    pool = state.pool

    def unfinished(state: DenoiseState) -> Array:
        return (state.block < last_block).any()

    def stale(state: DenoiseState) -> Array:
        return (state.stale & (state.block < config.n_blocks)).any()

    def step_of(width: Width) -> Callable[[DenoiseState], DenoiseState]:
        return lambda state: _step(model, fixed, state, config, implementation, width)

    def each_width(state: DenoiseState) -> DenoiseState:
        """Runs a loop for each width: a branch at every step would copy the live KV."""
        state = lax.while_loop(lambda s: unfinished(s) & ~stale(s), step_of("narrow"), state)
        return lax.while_loop(lambda s: unfinished(s) & stale(s), step_of("wide"), state)

    def reselect_and_step(state: DenoiseState) -> DenoiseState:
        assert cache is not None
        assert reselecting is not None
        due = state.block < config.n_blocks
        if reselecting.reselect == "block":
            due &= state.step == 0
        state = reselect_due(model, cache, state, reselecting, config, implementation, due)
        return _step(model, state.pool_in(cache), state, config, implementation)

    if reselecting is not None:
        return lax.while_loop(unfinished, reselect_and_step, state)
    body = each_width
    if config.recompute == "response" or _stays_fresh(state, config):
        one = step_of("wide" if config.recompute == "response" else "narrow")
        # With a fixed number of steps, test for the end between blocks alone: the test waits for
        # the host. In a loop that begins inside a block, the extra steps change nothing.
        fixed_steps = config.scheduled and until is None
        steps = config.steps_per_block if fixed_steps else 1
        body = lambda state: lax.fori_loop(0, steps, lambda _, s: one(s), state)  # noqa: E731
    last = lax.while_loop(unfinished, body, dataclasses.replace(state, pool=None))
    return dataclasses.replace(last, pool=pool)
