"""A denoising step: one evaluation of the network, then the sampling rule.

Live rows are prefix, query and response. The context, if any, is a pool of chunks with the chosen
ids. Which rows an evaluation recomputes is said by the cache method (`caches/`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig
from pdllm_jax.method.cache import ChunkPool, DenoiseState, dynamic_updates
from pdllm_jax.method.caches import Evaluation
from pdllm_jax.method.live_forward import Context, query_rows
from pdllm_jax.method.sampling import log_probability, predict, transfer
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive


class Step:
    """A step on a state: what a cache method is given, and the sampling rule.

    state: before the step.
    active [B]: requests that are not finished.
    first [B], in_block [B, G]: the current block's first slot, and its slots.
    masked [B, G]: masked slots of active requests.
    context: what live rows attend to; finished requests read no chunks.
    """

    def __init__(
        self,
        model: MaskPredictor,
        pool: ChunkPool | None,
        state: DenoiseState,
        config: DecodeConfig,
        implementation: Implementation | None,
    ):
        self.model, self.state, self.config = model, state, config
        self.method = config.cache_method
        self.active = state.block < config.n_blocks
        self.first = jnp.minimum(state.block, config.n_blocks - 1) * config.block_length
        slot, first = jnp.arange(state.tokens.shape[1]), self.first[:, None]
        self.in_block = (slot >= first) & (slot < first + config.block_length)
        self.masked = (state.tokens == model.config.mask_token_id) & self.active[:, None]
        placement = state.placement.only(self.active)
        self.context = Context(pool, placement, state.live, implementation)

    @property
    def rows(self) -> Int[Array, "B R"]:
        """Tokens of query and response without a gap, then padding."""
        return query_rows(self.state).ids

    @property
    def width(self) -> Int[Array, ""]:
        """The largest width that an active request needs."""
        least = self.method.widths(self.state, self.config)[0]
        return jnp.where(self.active, self.method.width(self), least).max()

    def run(self, width: int | None = None) -> DenoiseState:
        """Returns the next state. width: where it is static, so that only that one is compiled."""
        widths = self.method.widths(self.state, self.config)
        if width is None and len(widths) > 1:
            branches = [functools.partial(self._evaluate, width) for width in widths]
            evaluation = lax.switch(self.width - widths[0], branches)
        else:
            evaluation = self._evaluate(widths[0] if width is None else width)
        return constrain(self.model.mesh, self.advance(evaluation))

    def _evaluate(self, width: int) -> Evaluation:
        evaluation, shape = self.method.evaluate(self, width), self.active.shape
        rows = jnp.broadcast_to(jnp.asarray(evaluation.rows, jnp.float32), shape)
        refreshed = jnp.broadcast_to(evaluation.refreshed, shape)
        return evaluation._replace(rows=rows, refreshed=refreshed)

    def predict(
        self, logits: Float[Array, "B T V"], first: Int[Array, "B"]
    ) -> tuple[Array, Array, Array]:
        """Returns tokens, confidences and log probabilities [B, G] of the slots from `first` on.

        Other slots keep their tokens and have the confidence -inf.
        """
        slots = first[:, None] + jnp.arange(logits.shape[1])
        return self._fill(logits, slots, lambda old, new: dynamic_updates(old, first, new))

    def predict_at(
        self, logits: Float[Array, "B T V"], slots: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """As `predict`, for the slots with these numbers; a number of G and more is no slot."""
        at = jnp.arange(len(slots))[:, None], slots
        return self._fill(logits, slots, lambda old, new: old.at[at].set(new, mode="drop"))

    def _fill(
        self, logits: Array, slots: Array, put: Callable[[Array, Array], Array]
    ) -> tuple[Array, Array, Array]:
        config = self.config
        eos, eot = self.model.config.eos_token_id, config.eot_token_id
        rule = config.prediction | {
            "never": (eos,) if config.logits_eos_inf else (),
            "last": (eos, eot) if config.confidence_eos_eot_inf and eot is not None else (),
        }
        keys = derive(self.state.keys, Use.EVALUATION, self.state.evaluations)
        predicted, confidence = jax.vmap(
            lambda x, key, slots: predict(x, key=key, slots=slots, **rule)
        )(logits, keys, slots)
        log_p = jax.vmap(log_probability)(logits, predicted)
        none = jnp.full(self.state.tokens.shape, -jnp.inf)
        return put(self.state.tokens, predicted), put(none, confidence), put(none, log_p)

    def advance(self, evaluation: Evaluation) -> DenoiseState:
        """Unmasks slots, and goes on to the next block where this one is finished."""
        state, config, mask_id = self.state, self.config, self.model.config.mask_token_id
        slot = jnp.arange(state.tokens.shape[1])
        later = slot >= self.first[:, None] + config.block_length
        candidates = self.masked & ~later & (evaluation.confidence > -jnp.inf)
        confidence = jnp.where(candidates, evaluation.confidence, -jnp.inf)
        take = jax.vmap(lambda c, s: transfer(c, s, config.unmasking))(confidence, state.step)
        if config.first_slot_alone:
            alone = candidates & (slot == self.first[:, None])
            take = jnp.where(state.step[:, None] == 0, alone, take)
        tokens, step = jnp.where(take, evaluation.tokens, state.tokens), state.step + 1
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
            tokens = jnp.where(ended[:, None] & later, self.model.config.eos_token_id, tokens)
        after = dataclasses.replace(
            state,
            tokens=tokens,
            probability=jnp.where(unmasked, jnp.exp(evaluation.log_p), state.probability),
            live=evaluation.live,
            block=block,
            text_blocks=text_blocks,
            step=jnp.where(finished | ~self.active, 0, step),
            stale=jnp.where(evaluation.refreshed, finished, state.stale | finished),
            evaluations=state.evaluations + self.active,
            rows=state.rows + jnp.where(self.active, evaluation.rows, 0),
            memory=evaluation.memory,
        )
        return dataclasses.replace(after, memory=self.method.update(self, after))
