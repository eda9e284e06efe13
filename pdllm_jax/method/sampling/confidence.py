"""Confidence rules: how sure the network is of its prediction for each masked slot.

A rule is a function (logits [T, V] float32, predicted tokens [T], PRNG key) -> log confidence [T],
finite; it is static under jit, so it must be hashable. Sources: LLaDA (arXiv 2502.09992,
low-confidence and random remasking), Dream (arXiv 2508.15487, margin and entropy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import row_sum

_LEAST = -1e30  # finite: -inf means that a slot is not a candidate


def log_probability(
    logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """log softmax(logits)[token], to full relative precision also where the probability is near 1.

    -log(1 + sum of the other words' odds): log_softmax would round -1e-9 and -1e-12 to the same
    zero, and so lose the order of confident slots.
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    odds = logits - chosen
    others = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], -jnp.inf, odds)
    top = jnp.maximum(others.max(axis=-1), 0.0)
    # With top = 0 this is log1p of a sum of small terms; else the usual shifted form.
    rest = row_sum(jnp.exp(others - top[..., None]))
    return -jnp.where(top > 0, top + jnp.log(rest + jnp.exp(-top)), jnp.log1p(rest))


def log_margin(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """log(p1 - p2) of the two likeliest tokens; a large negative number where they tie."""
    (first, second), (best, _) = (jnp.moveaxis(x, -1, 0) for x in jax.lax.top_k(logits, 2))
    lead = jnp.log(-jnp.expm1(second - first))
    return jnp.maximum(log_probability(logits, best) + lead, _LEAST)


def negative_entropy(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """sum of p log p, to full relative precision also near 0.

    Written as log p1 - sum of p_i (l_1 - l_i), whose terms have one sign.
    """
    best = jnp.argmax(logits, axis=-1)
    top = log_probability(logits, best)
    behind = logits.max(axis=-1, keepdims=True) - logits
    terms = jnp.exp(top[..., None] - behind) * behind
    return top - row_sum(jnp.where(behind < jnp.inf, terms, 0.0))


# (logits [T, V] float32, predicted tokens [T] int32, PRNG key) -> log confidence [T], finite.
Confidence = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class LowConfidence:
    """The probability of the predicted token."""

    name: ClassVar[str] = "low_confidence"

    def __call__(self, logits: Array, tokens: Array, key: Array) -> Array:
        return log_probability(logits, tokens)


@dataclasses.dataclass(frozen=True)
class Margin:
    """The lead of the likeliest token over the second, p1 - p2."""

    name: ClassVar[str] = "margin"

    def __call__(self, logits: Array, tokens: Array, key: Array) -> Array:
        return log_margin(logits)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """exp(-entropy) of the prediction."""

    name: ClassVar[str] = "entropy"

    def __call__(self, logits: Array, tokens: Array, key: Array) -> Array:
        return negative_entropy(logits)


@dataclasses.dataclass(frozen=True)
class Random:
    """A uniform random number."""

    name: ClassVar[str] = "random"

    def __call__(self, logits: Array, tokens: Array, key: Array) -> Array:
        return jnp.log(jax.random.uniform(key, tokens.shape, minval=1e-9))
