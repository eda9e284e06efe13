"""A denoising step: one evaluation of the network, then the sampling rule.

Live rows are prefix, query and response. The context, if any, is a pool of chunks with the chosen
ids. Which rows an evaluation recomputes is said by the cache method (`caches/`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig
from pdllm_jax.method.cache import ChunkPool, DenoiseState, dynamic_slices, dynamic_updates
from pdllm_jax.method.caches import Evaluation, Prediction
from pdllm_jax.method.live_forward import Context, Shadow, query_rows
from pdllm_jax.method.sampling import log_probability, predict
from pdllm_jax.method.unmasking import Rows, Seen, due_of
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive


class Step:
    """A step on a state: what a cache method is given, and the sampling rule.

    state: before the step.
    active [B]: requests that are not finished.
    first [B], in_block [B, G]: the current block's first slot, and its slots.
    rule: the unmasking rule.
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
        self.method, self.rule = config.cache_method, config.unmasking
        self.active = state.block < config.n_blocks
        self.first = jnp.minimum(state.block, config.n_blocks - 1) * config.block_length
        slot, first = jnp.arange(state.tokens.shape[1]), self.first[:, None]
        self.in_block = (slot >= first) & (slot < first + config.block_length)
        self.masked = self._masked(state.tokens, state.step, state.rule_memory)
        self.masked &= self.active[:, None]
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

    def _masked(self, tokens: Array, step: Array, memory: Any) -> Bool[Array, "B G"]:
        return jax.vmap(self.rule.masked)(tokens == self.model.config.mask_token_id, step, memory)

    def predict(self, logits: Float[Array, "B T V"], first: Int[Array, "B"]) -> Prediction:
        """Returns tokens, confidences and log probabilities [B, G] of the slots from `first` on.

        Other slots keep their tokens and have the confidence -inf.
        """
        slots = first[:, None] + jnp.arange(logits.shape[1])
        return self._fill(logits, slots, lambda old, new: dynamic_updates(old, first, new))

    def predict_at(self, logits: Float[Array, "B T V"], slots: Int[Array, "B T"]) -> Prediction:
        """As `predict`, for the slots with these numbers; a number of G and more is no slot."""
        at = jnp.arange(len(slots))[:, None], slots
        return self._fill(logits, slots, lambda old, new: old.at[at].set(new, mode="drop"))

    def _fill(
        self, logits: Array, slots: Array, put: Callable[[Array, Array], Array]
    ) -> Prediction:
        config, state, rule = self.config, self.state, self.rule
        eos, eot = self.model.config.eos_token_id, config.eot_token_id
        settings = config.prediction | {
            "never": (eos,) if config.logits_eos_inf else (),
            "last": (eos, eot) if config.confidence_eos_eot_inf and eot is not None else (),
        }
        keys = derive(state.keys, Use.EVALUATION, state.evaluations)
        place = slots - self.first[:, None]
        place = jnp.where(place < 0, config.block_length, jnp.minimum(place, config.block_length))

        def of_request(key: Array, memory: Any, *known: Array) -> tuple[Any, ...]:
            rows = Rows(*known)
            adjusted, memory = rule.adjust(rows, memory)
            tokens, confidence, seen = predict(adjusted, key=key, slots=rows.slots, **settings)
            reading, memory = rule.read(seen, rows, memory)
            return tokens, confidence, log_probability(rows.logits, tokens), reading, memory

        at = jnp.arange(len(slots))[:, None], slots
        masked = self.masked.at[at].get(mode="fill", fill_value=False)
        known = logits, slots, place, masked, state.step
        *made, reading, memory = jax.vmap(of_request)(keys, state.rule_memory, *known)

        def put_in(fill: float, x: Array) -> Array:
            return put(jnp.full((*state.tokens.shape, *x.shape[2:]), fill, x.dtype), x)

        reading = jax.tree.map(functools.partial(put_in, 0), reading), memory
        tokens, confidence, log_p = made
        confidence, log_p = put_in(-jnp.inf, confidence), put_in(-jnp.inf, log_p)
        return Prediction(put(state.tokens, tokens), confidence, log_p, reading)

    @property
    def shadow(self) -> Shadow | None:
        """The rows by which the rule verifies the block, if it does."""
        if not self.rule.verifies:
            return None
        shape = len(self.first), self.config.block_length
        ids = jnp.full(shape, self.model.config.mask_token_id, jnp.int32)
        slots = self.state.tokens.shape[1]
        return Shadow(ids, self.state.placement.total - slots + self.first, slots)

    def verify(self, predicted: Prediction, logits: Float[Array, "B block V"]) -> Prediction:
        """Returns the prediction with the rule's reading of its shadow rows' logits."""
        tokens = dynamic_slices(self.state.tokens, self.first, self.config.block_length)
        log_p = jax.vmap(log_probability)(logits, tokens)
        reading = dynamic_updates(jnp.zeros(self.state.tokens.shape), self.first, log_p)
        return predicted._replace(reading=(reading, predicted.reading[1]))

    def advance(self, evaluation: Evaluation) -> DenoiseState:
        """Unmasks slots, and goes on to the next block where this one is finished."""
        state, config, mask_id = self.state, self.config, self.model.config.mask_token_id
        slot = jnp.arange(state.tokens.shape[1])
        later = slot >= self.first[:, None] + config.block_length
        candidates = self.masked & ~later & (evaluation.confidence > -jnp.inf)
        if not self.rule.fills_behind:
            candidates &= self.in_block
        confidence = jnp.where(candidates, evaluation.confidence, -jnp.inf)
        reading, memory = evaluation.reading
        filled = self.in_block & ~self.masked & self.active[:, None]
        due = due_of(config.block_length, config.steps_per_block, state.step)
        seen = Seen(confidence, state.step, due, filled, evaluation.tokens == mask_id, reading)
        choice = jax.vmap(self.rule.take)(seen, memory)
        take = choice.take & candidates
        if config.first_slot_alone:
            alone = candidates & (slot == self.first[:, None])
            take = jnp.where(state.step[:, None] == 0, alone, take)
        tokens, step = jnp.where(take, evaluation.tokens, state.tokens), state.step + 1
        unmasked = take & (tokens != mask_id)
        probability = jnp.where(unmasked, jnp.exp(evaluation.log_p), state.probability)
        if choice.remask is not None:
            remask = choice.remask & filled
            tokens = jnp.where(remask, mask_id, tokens)
            probability = jnp.where(remask, -1.0, probability)
        # As published, a block that is verified ends when nothing is masked behind it either.
        scope = self.in_block | candidates if self.rule.verifies else self.in_block
        open_slots = (self._masked(tokens, step, choice.memory) & scope).any(axis=1)
        finished = self.active & (~open_slots | (step >= config.step_limit))
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
            probability=probability,
            live=evaluation.live,
            block=block,
            text_blocks=text_blocks,
            step=jnp.where(finished | ~self.active, 0, step),
            stale=jnp.where(evaluation.refreshed, finished, state.stale | finished),
            evaluations=state.evaluations + self.active,
            rows=state.rows + jnp.where(self.active, evaluation.rows, 0),
            memory=evaluation.memory,
            rule_memory=choice.memory,
        )
        return dataclasses.replace(after, memory=self.method.update(self, after))
