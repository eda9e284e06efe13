"""Step 6: one denoising step, and the loop on the device.

Live rows are prefix, query and response. The context, if any, is a pool of chunks with the chosen
ids. A step is one evaluation of the network on the recomputed rows, then the sampling rule:

  wide    query and response. When a block starts with stale live KV, or at every step for
          recompute "response".
  narrow  the current block ("block"), or it and all behind it ("suffix"), against the live KV of
          the other rows as the block's start left it. With a logit shift one more row in front:
          the row in front of the block predicts the block's first slot. Its KV stays.

Without context, with the whole prompt as query: recompute "response" is the published generation
of LLaDA and of Dream, "suffix" Fast-dLLM's prefix cache, "block" its dual cache.
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
from pdllm_jax.method.live_forward import Context, live_forward, predicting_rows, query_rows
from pdllm_jax.method.reselect import reselect_due
from pdllm_jax.method.sampling import log_probability, predict, transfer
from pdllm_jax.network.dispatch import ModelFunction
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive

Width = Literal["wide", "narrow"]
# (first response slot [B], slots) -> logits [B, slots, V].
Logits = Callable[[Array, int], Float[Array, "B T V"]]
# Predicted token, confidence, log probability [B, G], -inf where there is none; then live KV.
Evaluation = tuple[Array, Array, Array, LiveCache | None]


class _Step:
    """A step on a state: the slots that it may fill, and ways to evaluate the network."""

    def __init__(
        self,
        model: MaskPredictor,
        pool: ChunkPool | None,
        state: DenoiseState,
        config: DecodeConfig,
        implementation: Implementation | None,
    ):
        self.model, self.state, self.config = model, state, config
        self.active = state.block < config.n_blocks
        self.first = jnp.minimum(state.block, config.n_blocks - 1) * config.block_length
        slot, first = jnp.arange(state.tokens.shape[1]), self.first[:, None]
        self.in_block = (slot >= first) & (slot < first + config.block_length)
        self.masked = (state.tokens == model.config.mask_token_id) & self.active[:, None]
        self.always_wide = config.recompute == "response"
        stale = state.stale & self.active
        self.wide = jnp.ones(stale.shape, bool) if self.always_wide else stale
        # A predicted mask token leaves its slot masked. As published, an evaluation of all rows may
        # unmask such slots of earlier blocks.
        self.behind = (slot < first) & self.wide[:, None]
        self.keys = derive(state.keys, Use.EVALUATION, state.evaluations)
        placement = state.placement.only(self.active)
        self.context = Context(pool, placement, state.live, implementation)

    def run(self, width: Width | None = None) -> DenoiseState:
        """Returns the next state. width: where it is static, so that only that pass is compiled."""
        if self.always_wide or width == "wide":
            evaluation = self.evaluate_wide()
        elif width == "narrow":
            evaluation = self.evaluate_narrow()
        else:
            evaluation = lax.cond(self.wide.any(), self.evaluate_wide, self.evaluate_narrow)
        return constrain(self.model.mesh, self.advance(*evaluation))

    def predict(self, logits: Array, first: Array) -> tuple[Array, Array, Array]:
        """Returns tokens, confidences and log probabilities of the slots from `first` on."""
        config, tokens = self.config, self.state.tokens
        eos, eot = self.model.config.eos_token_id, config.eot_token_id
        rule = config.prediction | {
            "never": (eos,) if config.logits_eos_inf else (),
            "last": (eos, eot) if config.confidence_eos_eot_inf and eot is not None else (),
        }
        predicted, confidence = jax.vmap(
            lambda x, key, slot: predict(x, key=key, first=slot, **rule)
        )(logits, self.keys, first)
        log_p = jax.vmap(log_probability)(logits, predicted)
        none = jnp.full(tokens.shape, -jnp.inf)
        confidences, log_p = (dynamic_updates(none, first, x) for x in (confidence, log_p))
        return dynamic_updates(tokens, first, predicted), confidences, log_p

    def predict_block(self, logits: Logits) -> tuple[Array, Array, Array]:
        """Predicts the block's slots alone, unless an earlier slot is still masked."""

        def from_slot(first: Array, slots: int) -> tuple[Array, Array, Array]:
            return self.predict(logits(first, slots), first)

        block = functools.partial(from_slot, self.first, self.config.block_length)
        if self.config.n_blocks == 1:
            return block()
        length = self.state.tokens.shape[1]
        everything = lambda: from_slot(jnp.zeros_like(self.first), length)  # noqa: E731
        return lax.cond((self.masked & self.behind).any(), everything, block)

    def evaluate_guided(self) -> Evaluation:
        """Evaluates LLaDA's guided logits u + (1 + guidance) (c - u), u of the masked prompt."""
        model, state, guidance = self.model, self.state, self.config.guidance
        rows = query_rows(state).ids
        in_prompt = jnp.arange(rows.shape[1]) < state.query_length[:, None]
        blind = jnp.where(in_prompt, model.config.mask_token_id, rows)
        lengths = jnp.tile(state.query_length + state.tokens.shape[1], 2)
        both = model.encode(jnp.concatenate([rows, blind]), lengths)

        def logits(first: Array, size: int) -> Array:
            first_row = jnp.tile(state.query_length + first, 2)
            hidden = predicting_rows(model, both, first_row, size)
            conditional, unconditional = jnp.split(model.logits(hidden), 2)
            return unconditional + (guidance + 1) * (conditional - unconditional)

        return *self.predict_block(logits), state.live

    def evaluate_wide(self) -> Evaluation:
        """Recomputes query and response."""
        model, state, config = self.model, self.state, self.config
        if config.guidance > 0:
            return self.evaluate_guided()
        rows = query_rows(state).ids
        response_row = jnp.arange(rows.shape[1]) - state.query_length[:, None]
        rewritten = response_row >= self.first[:, None]
        if config.recompute == "block":
            rewritten &= response_row < self.first[:, None] + config.block_length
        # Requests with fresh live KV go through this pass beside stale ones, and keep theirs.
        keep = None if self.always_wide else ~(rewritten | self.wide[:, None])
        x, live, _ = live_forward(model, self.context, rows, keep=keep)

        def logits(first: Array, size: int) -> Array:
            hidden = predicting_rows(model, x, state.query_length + first, size)
            return model.logits(model.final_norm(hidden))

        return *self.predict_block(logits), live

    def evaluate_narrow(self) -> Evaluation:
        """Recomputes the block, or it and all behind it; see `MaskPredictor.lookback`."""
        model, state, length = self.model, self.state, self.config.block_length
        rows, only_block = query_rows(state).ids, self.config.recompute == "block"
        first = state.query_length + self.first
        start = model.predicting_row(first if only_block else state.query_length)
        count = (length if only_block else state.tokens.shape[1]) + model.lookback
        count = min(count, rows.shape[1])
        row = start[:, None] + jnp.arange(count)
        keep = None
        if not only_block or model.lookback:
            keep = row < first[:, None]
            if only_block:
                keep |= row >= first[:, None] + length
        rows = dynamic_slices(rows, start, count)
        x, live, _ = live_forward(model, self.context, rows, state.prefix_length + start, keep)
        x = predicting_rows(model, x, first, length, start)
        return *self.predict(model.logits(model.final_norm(x)), self.first), live

    def advance(
        self, predicted: Array, confidence: Array, log_p: Array, live: LiveCache | None
    ) -> DenoiseState:
        """Unmasks slots, and goes on to the next block where this one is finished."""
        state, config, mask_id = self.state, self.config, self.model.config.mask_token_id
        candidates = self.masked & (self.in_block | self.behind)
        confidence = jnp.where(candidates, confidence, -jnp.inf)
        take = jax.vmap(lambda c, s: transfer(c, s, config.unmasking))(confidence, state.step)
        if config.first_slot_alone:
            alone = candidates & (jnp.arange(take.shape[1]) == self.first[:, None])
            take = jnp.where(state.step[:, None] == 0, alone, take)
        tokens, step = jnp.where(take, predicted, state.tokens), state.step + 1
        unmasked = take & (tokens != mask_id)
        limit = config.block_length + config.first_slot_alone
        limit = config.steps_per_block if config.scheduled else limit
        open_slots = ((tokens == mask_id) & self.in_block).any(axis=1)
        finished = self.active & (~open_slots | (step >= limit))
        block, text_blocks = state.block + finished, state.text_blocks
        if config.stop_ids:
            stops = jnp.isin(tokens, jnp.array(config.stop_ids)) & self.in_block
            ended = finished & stops.any(axis=1)
            text_blocks = jnp.where(ended, block, text_blocks)
            block = jnp.where(ended, config.n_blocks, block)
            slot = jnp.arange(tokens.shape[1])
            unread = ended[:, None] & (slot >= self.first[:, None] + config.block_length)
            tokens = jnp.where(unread, self.model.config.eos_token_id, tokens)
        return dataclasses.replace(
            state,
            tokens=tokens,
            probability=jnp.where(unmasked, jnp.exp(log_p), state.probability),
            live=live,
            block=block,
            text_blocks=text_blocks,
            step=jnp.where(finished | ~self.active, 0, step),
            stale=jnp.where(self.wide, finished, state.stale | finished),
            evaluations=state.evaluations + self.active,
        )


def _only_width(state: DenoiseState, config: DecodeConfig) -> Width | None:
    """Returns the width of all steps, if it is one; narrow where the live KV is never stale."""
    if config.recompute == "response":
        return "wide"
    return "narrow" if state.live_encoded and config.n_blocks == 1 else None


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
    step = _Step(model, state.pool_in(cache), state, config, implementation)
    return step.run(_only_width(state, config))


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
            return _Step(model, state.pool_in(cache), state, config, implementation).run()

        return lax.while_loop(unfinished, reselect_and_step, state)

    # A pool that does not change is kept out of the loop's carry.
    fixed, pool = state.pool_in(cache), state.pool

    def step_of(width: Width) -> Callable[[DenoiseState], DenoiseState]:
        return lambda state: _Step(model, fixed, state, config, implementation).run(width)

    def stale(state: DenoiseState) -> Array:
        return (state.stale & (state.block < config.n_blocks)).any()

    def each_width(state: DenoiseState) -> DenoiseState:
        """Runs a loop for each width: a branch at every step would copy the live KV."""
        state = lax.while_loop(lambda s: unfinished(s) & ~stale(s), step_of("narrow"), state)
        return lax.while_loop(lambda s: unfinished(s) & stale(s), step_of("wide"), state)

    body, width = each_width, _only_width(state, config)
    if width is not None:
        one = step_of(width)
        # With a fixed number of steps, test for the end between blocks alone: the test waits for
        # the host. In a loop that begins inside a block, the extra steps change nothing.
        steps = config.steps_per_block if config.scheduled and until is None else 1
        body = lambda state: lax.fori_loop(0, steps, lambda _, s: one(s), state)  # noqa: E731
    last = lax.while_loop(unfinished, body, dataclasses.replace(state, pool=None))
    return dataclasses.replace(last, pool=pool)
