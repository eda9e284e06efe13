"""dKV-Cache (arXiv 2505.15781): KV of a token is cached one step after the token was decoded.

Taken from the paper and the behaviour of the authors' public code: which rows a step recomputes,
and the default intervals. "Cached" means that a row is not recomputed; its KV is what the network
last gave. Reproduced: the first two steps of a block recompute everything, and later blocks' masks
are recomputed too (LLaDA). For Dream, whose row j predicts token j + 1, a row is cached when the
*next* token was decoded (`shift_type` "un"), counted over the whole response: so a decoded token in
front of a mask is recomputed at every step, and the last row, which predicts nothing, keeps the KV
of a mask. Not reproduced: Dream's variants that cache the prompt from the start.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pdllm_jax.method.cache import DenoiseState
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.chosen_rows import rows_of_slots, run_rows
from pdllm_jax.method.sampling import LowConfidence, Random, rank
from pdllm_jax.method.unmasking import Schedule
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.randomness import Use, derive
from pdllm_jax.rules import COUNT, SIZE, require, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step
    from pdllm_jax.network.transformer import MaskPredictor

_LEAST_ROWS = 32  # of the narrowest pass


@dataclasses.dataclass(frozen=True)
class _DKVCache(CacheMethod):
    """Passes over all rows at some steps, and over few between them."""

    def full(self, step: Step) -> Bool[Array, "B"]:
        """Whether a step recomputes all rows."""
        raise NotImplementedError

    def few(self, step: Step) -> Bool[Array, "B R"]:
        """Returns the rows that another step recomputes."""
        raise NotImplementedError

    def sizes(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        """Returns the rows of the passes, ascending; the last has all."""
        raise NotImplementedError

    def chosen(self, step: Step) -> Bool[Array, "B R"]:
        """Returns the rows that a step recomputes."""
        valid = jnp.arange(step.rows.shape[1]) < step.state.placement.total[:, None]
        return valid & (self.full(step)[:, None] | self.few(step))

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        return tuple(range(len(self.sizes(state, config))))

    def width(self, step: Step) -> Int[Array, "B"]:
        count = jnp.count_nonzero(self.chosen(step), axis=1)[:, None]
        return (count > jnp.array(self.sizes(step.state, step.config)[:-1])).sum(axis=1)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        chosen = self.chosen(step)
        run = run_rows(step, chosen, self.sizes(step.state, step.config)[width])
        count = jnp.count_nonzero(chosen, axis=1)
        return Evaluation(*run.predicted, count, run.live, step.state.memory)


@dataclasses.dataclass(frozen=True)
class DKVCacheDecode(_DKVCache):
    """dKV-Cache-Decode: a step recomputes masks, and the tokens that the last one decoded.

    interval: steps between two that recompute everything (`cache_reloading_step`, for Dream
      `cache_steps`); 1 is plain generation. 8 is the README's for LLaDA, the scripts have 4.
    """

    name: ClassVar[str] = "dkv-cache-decode"
    interval: int = 8

    def __post_init__(self) -> None:
        validate(self, {"interval": SIZE})

    @classmethod
    def dream(cls) -> DKVCacheDecode:
        """Returns the method with the interval of the README for Dream."""
        return cls(interval=16)

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        return jnp.ones(state.tokens.shape, bool)

    def sizes(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        slots = state.tokens.shape[1]
        # Dream's last row predicts no slot.
        few = [n for n in (slots // 4, slots // 2) if n >= _LEAST_ROWS] + [slots + 1]
        everything = state.query.shape[1] + slots
        return (*(n for n in few if n < everything and self.interval > 1), everything)

    def full(self, step: Step) -> Bool[Array, "B"]:
        at_start = 0 if step.model.lookback else 1
        return (step.state.step % self.interval == 0) | (step.state.step <= at_start)

    def few(self, step: Step) -> Bool[Array, "B R"]:
        rows = rows_of_slots(step, step.state.memory)
        if step.model.lookback:
            last = jnp.arange(rows.shape[1]) == step.state.placement.total[:, None] - 1
            rows |= last & (step.state.evaluations == 1)[:, None]
        return rows

    def update(self, step: Step, after: DenoiseState) -> Any:
        """Returns the slots that were masked before the evaluation that is done."""
        return step.state.tokens == step.model.config.mask_token_id


@dataclasses.dataclass(frozen=True)
class DKVCacheGreedy(_DKVCache):
    """dKV-Cache-Greedy, for LLaDA: the order of decoding is random and known ahead.

    A step recomputes what the last one decoded, what it decodes itself, and masks near the latter.
    Needs remasking "random", which `decode_config` puts in the place of the default, and
    schedule "even".

    interval: steps between two that recompute everything (`cache_reloading_step`); 1 is plain
      generation in this order. 2 is the script's.
    window: masks for each slot that is decoded, the nearest, left before right (`window_size`).
    """

    name: ClassVar[str] = "dkv-cache-greedy"
    interval: int = 2
    window: int = 4

    def __post_init__(self) -> None:
        validate(self, {"interval": SIZE, "window": COUNT})

    def decode_config(self, config: DecodeConfig) -> DecodeConfig:
        """Returns config with this method; its random order takes the place of the default one."""
        if type(config.remasking) is LowConfidence:
            config = dataclasses.replace(config, remasking="random")
        return super().decode_config(config)

    def check(self, model: ModelConfig, config: DecodeConfig, rows: int) -> None:
        super().check(model, config, rows)
        named = f"method {self.name!r}"
        require(not model.logit_shift, f"{named} is published for LLaDA alone, got a logit shift")
        drawn, even = type(config.remasking) is Random, type(config.unmasking) is Schedule
        given = getattr(config.remasking, "name", config.remasking)
        require(drawn, f"{named} needs remasking='random', got {given!r}")
        require(even, f"{named} needs schedule='even', without threshold, factor or unmask")

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        """Returns the slots' priorities, and which are masked before the last evaluation."""
        keys = derive(state.keys[:, None], Use.ORDER, jnp.arange(state.tokens.shape[1]))
        priority = jax.vmap(jax.vmap(jax.random.uniform))(keys)
        return priority, jnp.ones(state.tokens.shape, bool)

    def sizes(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        everything, most = state.query.shape[1] + config.gen_length, _most_due(config)
        few = most * (2 + self.window)
        return (few, everything) if few < everything and self.interval > 1 else (everything,)

    def full(self, step: Step) -> Bool[Array, "B"]:
        return step.state.step % self.interval == 0

    def due(self, step: Step, ahead: int = 0) -> Int[Array, "B G"]:
        """Returns the place of each slot among those due in a step; negative for other slots."""
        priority, _ = step.state.memory
        config = step.config
        place = rank(jnp.where(step.in_block, priority, -jnp.inf))
        base, remainder = divmod(config.block_length, config.steps_per_block)
        number = step.state.step[:, None] + ahead
        first = number * base + jnp.minimum(number, remainder)
        count = base + (number < remainder)
        valid = step.in_block & (number >= 0) & (place >= first) & (place < first + count)
        return jnp.where(valid, place - first, -1)

    def few(self, step: Step) -> Bool[Array, "B R"]:
        _, masked = step.state.memory
        due, slot = self.due(step), jnp.arange(masked.shape[1])
        chosen = (due >= 0) | (self.due(step, -1) >= 0)
        for i in range(_most_due(step.config) if self.window else 0):
            centre = jnp.where(due == i, slot, 0).sum(axis=1, keepdims=True)
            distance = 2 * jnp.abs(slot - centre) + (slot > centre)
            free = masked & ~chosen & (due == i).any(axis=1, keepdims=True)
            near = rank(jnp.where(free, -distance.astype(jnp.float32), -jnp.inf)) < self.window
            chosen |= free & near
        return rows_of_slots(step, chosen)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        evaluation = super().evaluate(step, width)
        ready = (self.due(step) >= 0) & (evaluation.confidence > -jnp.inf)
        return evaluation._replace(confidence=jnp.where(ready, 0.0, -jnp.inf))

    def update(self, step: Step, after: DenoiseState) -> Any:
        priority, _ = step.state.memory
        return priority, step.state.tokens == step.model.config.mask_token_id


def _most_due(config: DecodeConfig) -> int:
    """Returns the most slots that a step of the even schedule unmasks."""
    return -(-config.block_length // config.steps_per_block)
