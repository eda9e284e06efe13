"""Plain generation, Fast-dLLM's caches (arXiv 2505.22618), and the decoding of Prefilling-dLLM.

An evaluation has one of two widths:

  wide    query and response. When a block starts with stale live KV, or at every step of `Plain`.
  narrow  the current block (`DualCache`), or it and all behind it (`PrefixCache`), against the live
          KV of the other rows as the block's start left it. With a logit shift one more row in
          front: the row in front of the block predicts the block's first slot. Its KV stays.

Over a whole prompt as query, `Plain` is the published generation of LLaDA and of Dream. With chunks
(`Prefilling`), all of them serve: `DecodeConfig.recompute` names one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.method.cache import DenoiseState, dynamic_slices
from pdllm_jax.method.caches.base import CacheMethod, Evaluation, Prediction
from pdllm_jax.method.live_forward import live_forward, predicting_rows
from pdllm_jax.rules import require

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

_NARROW, _WIDE = 0, 1
# (first response slot [B], slots) -> logits [B, slots, V].
_Logits = Callable[[Array, int], Float[Array, "B T V"]]


@dataclasses.dataclass(frozen=True)
class PrefixCache(CacheMethod):
    """Fast-dLLM's prefix cache: a step recomputes the block and all behind it."""

    name: ClassVar[str] = "prefix-cache"
    verifies: ClassVar[bool] = True
    only_block: ClassVar[bool] = False

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        fresh = state.live_encoded and config.n_blocks == 1
        return (_NARROW,) if fresh else (_NARROW, _WIDE)

    def width(self, step: Step) -> Int[Array, "B"]:
        return (step.state.stale & step.active).astype(jnp.int32)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        return self._narrow(step) if width == _NARROW else self._wide(step)

    def _wide(self, step: Step) -> Evaluation:
        """Recomputes query and response of stale requests."""
        state = step.state
        wide = self.width(step) == _WIDE
        response_row = jnp.arange(step.rows.shape[1]) - state.query_length[:, None]
        rewritten = response_row >= step.first[:, None]
        if self.only_block:
            rewritten &= response_row < step.first[:, None] + step.config.block_length
        # Requests with fresh live KV go through this pass beside stale ones, and keep theirs.
        evaluation = _everything(step, wide, keep=~(rewritten | wide[:, None]))
        beside = row_count(step) - self._narrow_rows(step)  # not a request's own
        return evaluation._replace(rows=evaluation.rows - jnp.where(wide, 0, beside))

    def _narrow_rows(self, step: Step) -> int:
        slots = step.config.block_length if self.only_block else step.state.tokens.shape[1]
        return min(slots + step.model.lookback, step.rows.shape[1])

    def _narrow(self, step: Step) -> Evaluation:
        """Recomputes the block, or it and all behind it; see `MaskPredictor.lookback`."""
        model, state, length = step.model, step.state, step.config.block_length
        rows, only_block = step.rows, self.only_block
        first = state.query_length + step.first
        start = model.predicting_row(first if only_block else state.query_length)
        count = self._narrow_rows(step)
        row = start[:, None] + jnp.arange(count)
        keep = None
        if not only_block or model.lookback:
            keep = row < first[:, None]
            if only_block:
                keep |= row >= first[:, None] + length
        rows = dynamic_slices(rows, start, count)
        start_row = state.prefix_length + start
        x, live, _ = live_forward(model, step.context, rows, start_row, keep, shadow=step.shadow)
        block = predicting_rows(model, x, first, length, start)
        predicted = step.predict(model.logits(model.final_norm(block)), step.first)
        predicted, shadows = _verified(step, predicted, x)
        return Evaluation(*predicted, count + shadows, live, refreshed=False)


@dataclasses.dataclass(frozen=True)
class DualCache(PrefixCache):
    """Fast-dLLM's dual cache: a step recomputes the block alone."""

    name: ClassVar[str] = "dual-cache"
    only_block: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Plain(CacheMethod):
    """Every step recomputes query and response: the published generation of LLaDA and of Dream."""

    name: ClassVar[str] = "plain"
    guides: ClassVar[bool] = True
    verifies: ClassVar[bool] = True
    keeps_live: ClassVar[bool] = False

    def evaluate(self, step: Step, width: int) -> Evaluation:
        everyone = jnp.ones(step.active.shape, bool)
        if step.config.guidance > 0:
            return self._guided(step, everyone)
        return _everything(step, everyone)

    def _guided(self, step: Step, everyone: Array) -> Evaluation:
        """Evaluates LLaDA's guided logits u + (1 + guidance) (c - u), u of the masked prompt."""
        model, state, guidance = step.model, step.state, step.config.guidance
        in_prompt = jnp.arange(step.rows.shape[1]) < state.query_length[:, None]
        blind = jnp.where(in_prompt, model.config.mask_token_id, step.rows)
        lengths = jnp.tile(state.query_length + state.tokens.shape[1], 2)
        both = model.encode(jnp.concatenate([step.rows, blind]), lengths)

        def logits(first: Array, size: int) -> Array:
            first_row = jnp.tile(state.query_length + first, 2)
            hidden = predicting_rows(model, both, first_row, size)
            conditional, unconditional = jnp.split(model.logits(hidden), 2)
            return unconditional + (guidance + 1) * (conditional - unconditional)

        predicted = predict_block(step, logits, everyone)
        return Evaluation(*predicted, 2 * row_count(step), state.live)


@dataclasses.dataclass(frozen=True)
class Prefilling(CacheMethod):
    """Prefilling-dLLM (arXiv 2606.10537): chosen chunks; `DecodeConfig.recompute` decodes."""

    name: ClassVar[str] = "prefilling"
    uses_chunks: ClassVar[bool] = True
    verifies: ClassVar[bool] = True

    def decode_config(self, config: DecodeConfig) -> DecodeConfig:
        named = isinstance(config.recompute, str)
        message = f"method {self.name!r} takes recompute by name, got {config.cache_method.name!r}"
        require(named, f"{message}, which is for whole prompts")
        return super().decode_config(config)


def _everything(
    step: Step, wide: Bool[Array, "B"], keep: Bool[Array, "B R"] | None = None
) -> Evaluation:
    """Recomputes query and response, for requests that are `wide`; others keep rows' KV."""
    model, state = step.model, step.state
    x, live, _ = live_forward(model, step.context, step.rows, keep=keep, shadow=step.shadow)

    def logits(first: Array, size: int) -> Array:
        hidden = predicting_rows(model, x, state.query_length + first, size)
        return model.logits(model.final_norm(hidden))

    predicted, shadows = _verified(step, predict_block(step, logits, wide), x)
    return Evaluation(*predicted, row_count(step) + shadows, live, refreshed=wide)


def _verified(step: Step, predicted: Prediction, x: Array) -> tuple[Prediction, int]:
    """Adds what the shadow rows behind the others in x say, and returns their number."""
    if step.shadow is None:
        return predicted, 0
    count, model = step.config.block_length, step.model
    return step.verify(predicted, model.logits(model.final_norm(x[:, -count:]))), count


def row_count(step: Step) -> Int[Array, "B"]:
    """Returns the rows of query and response of each request."""
    return step.state.query_length + step.state.tokens.shape[1]


def predict_block(step: Step, logits: _Logits, wide: Bool[Array, "B"]) -> Prediction:
    """Predicts the block's slots alone, unless an earlier slot is still masked.

    A predicted mask token leaves its slot masked. As published, an evaluation of all rows may
    unmask such slots of earlier blocks. Some rules read, or fill, other slots than that.
    """
    slot = jnp.arange(step.state.tokens.shape[1])
    behind = (slot < step.first[:, None]) & wide[:, None]

    def block() -> Prediction:
        return step.predict(logits(step.first, step.config.block_length), step.first)

    def everything() -> Prediction:
        evaluated = jnp.where(step.in_block | wide[:, None], slot, slot.size)
        return step.predict_at(logits(jnp.zeros_like(step.first), slot.size), evaluated)

    if step.config.n_blocks == 1:
        return block()
    if step.rule.reads_response:
        return everything()
    if not step.rule.fills_behind:
        return block()
    return lax.cond((step.masked & behind).any(), everything, block)
