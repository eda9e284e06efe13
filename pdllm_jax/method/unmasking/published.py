"""The published rules of the confidences alone.

Sources: LLaDA (arXiv 2502.09992: even schedule), Dream (arXiv 2508.15487: schedule by time,
"origin"), Fast-dLLM (arXiv 2505.22618: threshold, factor).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pdllm_jax.method.sampling import rank
from pdllm_jax.method.unmasking.base import Unmasking


def due_of(block_length: int, steps: int, step: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns how many slots of a block the even schedule unmasks in a step."""
    base, remainder = divmod(block_length, steps)
    return base + (step < remainder)


@dataclasses.dataclass(frozen=True)
class Schedule(Unmasking):
    """Spreads a block's slots evenly over its steps, the remainder first."""

    block_length: int
    steps: int

    def __call__(self, confidence: Array, step: Array) -> Array:
        return rank(confidence) < due_of(self.block_length, self.steps, step)


@dataclasses.dataclass(frozen=True)
class TimeSchedule(Unmasking):
    """Dream's schedule: of the masks that are left, a step from time t to s takes 1 - s / t.

    Times fall evenly from 1 to eps. The number is rounded down and may be 0; the last step takes
    all. Everything is float32, as published.
    """

    steps: int
    eps: float

    def remaining(self) -> Float[np.ndarray, "n"]:
        """Returns the share of the masks that each step leaves, s / t, and 0 for the last."""
        times = float32_linspace(1.0, self.eps, self.steps + 1)
        return np.append(times[1:-1] / times[:-2], np.float32(0))

    def __call__(self, confidence: Array, step: Array) -> Array:
        masks = (confidence > -jnp.inf).sum().astype(jnp.float32)
        share = jnp.asarray(np.float32(1) - self.remaining())[step]
        return rank(confidence) < (masks * share).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Chance(TimeSchedule):
    """Dream's "origin": takes each slot with the probability 1 - s / t, independently of others.

    The confidence is the logarithm of a uniform random number.
    """

    def __call__(self, confidence: Array, step: Array) -> Array:
        return confidence >= jnp.log(jnp.asarray(self.remaining()))[step]


def float32_linspace(start: float, stop: float, n: int) -> Float[np.ndarray, "n"]:
    """Returns the values of PyTorch's float32 `linspace`, bit for bit; n is at least 2.

    Each half counts from its own end, with one rounding for product and sum.
    """
    ends = np.array([start, stop], np.float32)
    step = np.float64((ends[1] - ends[0]) / np.float32(n - 1))
    index = np.arange(n)
    low, high = ends[0] + step * index, ends[1] - step * (n - 1 - index)
    return np.where(index < n // 2, low, high).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Threshold(Unmasking):
    """Takes every slot with at least this confidence, and always the best one."""

    threshold: float

    def __call__(self, confidence: Array, step: Array) -> Array:
        sure = confidence >= jnp.log(jnp.float32(self.threshold))
        return (rank(confidence) == 0) | sure


@dataclasses.dataclass(frozen=True)
class Factor(Unmasking):
    """Fast-dLLM's factor rule.

    With confidences sorted downwards and bounds 1 - factor / (i + 2), i from 0, where the first
    bound always holds: the count is the index of the first slot under its bound, or the last index
    if every bound holds; one more where that is the first or the last index, as published.
    """

    factor: float

    def __call__(self, confidence: Array, step: Array) -> Array:
        n = (confidence > -jnp.inf).sum()
        best = jnp.exp(jnp.sort(confidence)[::-1])
        index = jnp.arange(confidence.shape[0])
        below = (index > 0) & (index < n) & (best < 1 - self.factor / (index + 2))
        first = jnp.where(below.any(), jnp.argmax(below), n - 1)
        return rank(confidence) < first + ((first == 0) | (first == n - 1))
