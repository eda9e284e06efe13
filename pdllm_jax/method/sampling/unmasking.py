"""Unmasking rules: how many of the candidates a step takes.

A rule is a function (log confidence [G], -inf where a slot is not a candidate; evaluations made in
the block, int32) -> bool [G]; it is static under jit, so it must be hashable. Sources: LLaDA (arXiv
2502.09992, schedule), Fast-dLLM (arXiv 2505.22618, threshold and factor).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

Unmask = Callable[[Array, Array], Array]


def _rank(confidence: Array) -> Int[Array, "G"]:
    """Place of each slot by confidence, 0 the best; ties to the lower slot."""
    return jnp.argsort(jnp.argsort(-confidence, stable=True), stable=True)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Spreads a block's slots evenly over its steps, the remainder first."""

    block_length: int
    steps: int

    def __call__(self, confidence: Array, step: Array) -> Array:
        base, remainder = divmod(self.block_length, self.steps)
        return _rank(confidence) < base + (step < remainder)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Takes every slot with at least this confidence, and always the best one."""

    threshold: float

    def __call__(self, confidence: Array, step: Array) -> Array:
        sure = confidence >= jnp.log(jnp.float32(self.threshold))
        return (_rank(confidence) == 0) | sure


@dataclasses.dataclass(frozen=True)
class Factor:
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
        return _rank(confidence) < first + ((first == 0) | (first == n - 1))
