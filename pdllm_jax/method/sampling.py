"""The first half of a step's sampling rule: what masked slots predict, and how surely.

A confidence rule ranks the predictions: a function (logits [T, V] float32, predicted tokens [T],
PRNG keys [T], one for each slot) -> log confidence [T], finite. It is static under jit, so it must
be hashable. `unmasking/` has the second half: the slots that are unmasked. Sources: LLaDA (arXiv
2502.09992: low-confidence and random remasking), Dream (arXiv 2508.15487: margin, entropy, origin,
filters).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import row_sum
from pdllm_jax.randomness import Use, derive

Confidence = Callable[[Array, Array, Array], Array]
Ids = tuple[int, ...]

_LEAST = -1e30  # finite: -inf means that a slot is not a candidate


def predict(
    logits: Float[Array, "T V"],
    confidence: Confidence,
    temperature: float,
    key: Array,
    slots: Int[Array, "T"] | None = None,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    scaled_confidence: bool = False,
    order_temperature: float = 0.0,
    never: Ids = (),
    last: Ids = (),
) -> tuple[Int[Array, "T"], Float[Array, "T"], Float[Array, "T V"]]:
    """Returns each row's predicted token, its log confidence, finite, and the logits of that.

    Args:
      temperature: samples from softmax(logits / temperature) by the Gumbel trick; 0 is greedy.
      key: of the request's evaluation. What a slot draws depends on it and on the slot alone.
      slots: of the rows, 0 to T - 1 by default.
      top_p, top_k: only tokens that `filtered` keeps are predicted.
      scaled_confidence: computes the confidence from the scaled, filtered logits, as Dream;
        otherwise from the logits as they are, as LLaDA.
      order_temperature: of Gumbel noise on the confidences. The n best are then n slots drawn
        without replacement from softmax(confidence / order_temperature), where the confidence is
        Dream's: a probability, a difference of two, or the negative entropy.
      never: tokens that are not predicted: their logit is -inf.
      last: tokens whose slots have the least confidence. The confidence of other tokens is computed
        without them, as published.
    """
    slots = jnp.arange(logits.shape[0]) if slots is None else slots
    logits = scores = _without(logits.astype(jnp.float32), never)
    scale = temperature if temperature > 0 else 1.0
    if top_p is not None or top_k is not None:
        scores = jnp.where(filtered(logits / scale, top_p, top_k), logits, -jnp.inf)
    if scaled_confidence:
        logits = scores / scale
    if temperature > 0:
        scores += temperature * _gumbel(derive(key, Use.NOISE, slots), logits.shape[1:])
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    logits = _without(logits, last)
    values = confidence(logits, tokens, derive(key, Use.ORDER, slots))
    if order_temperature > 0:
        values = values if isinstance(confidence, Entropy) else jnp.exp(values)
        noise = _gumbel(derive(key, Use.ORDER_NOISE, slots), ())
        values = jnp.maximum(values / order_temperature + noise, _LEAST)
    if last:
        values = jnp.where(jnp.isin(tokens, jnp.array(last)), _LEAST, values)
    return tokens, values, logits


def _gumbel(keys: Array, shape: tuple[int, ...]) -> Array:
    """Returns Gumbel noise of this shape for each key."""
    # Mode "low" ends at 16: tokens less probable than about 1e-7 would not be drawn.
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32, mode="high"))(keys)


def filtered(
    logits: Float[Array, "T V"], top_p: float | None, top_k: int | None
) -> Bool[Array, "T V"]:
    """Returns the tokens that Dream's filters keep, at least one in a row.

    top_p: the likeliest tokens, each if those before it have at most this probability together; of
      equals, the lower ids come first. top_k: of these, the k likeliest and those that equal the
      k-th.
    """
    kept = jnp.ones(logits.shape, bool)
    if top_p is not None and top_p < 1:
        best = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(best, axis=-1), axis=-1)[:, :-1]
        n = 1 + (before <= jnp.float32(top_p)).sum(axis=-1, keepdims=True)
        bound = jnp.take_along_axis(best, n - 1, axis=-1)
        above, equal = logits > bound, logits == bound
        n_equal = n - above.sum(axis=-1, keepdims=True)
        kept = above | (equal & (jnp.cumsum(equal, axis=-1) <= n_equal))
    if top_k is not None:
        likeliest = jnp.where(kept, logits, -jnp.inf)
        best = jax.lax.top_k(likeliest, min(top_k, logits.shape[-1]))[0]
        kept &= logits >= best[:, -1:]
    return kept


def _without(logits: Float[Array, "T V"], ids: Ids) -> Float[Array, "T V"]:
    return logits.at[:, jnp.array(ids)].set(-jnp.inf) if ids else logits


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


@dataclasses.dataclass(frozen=True)
class LowConfidence:
    """The probability of the predicted token."""

    name: ClassVar[str] = "low_confidence"

    def __call__(self, logits: Array, tokens: Array, keys: Array) -> Array:
        return log_probability(logits, tokens)


@dataclasses.dataclass(frozen=True)
class Margin:
    """The lead of the likeliest token over the second, p1 - p2; about 0 where they tie."""

    name: ClassVar[str] = "margin"

    def __call__(self, logits: Array, tokens: Array, keys: Array) -> Array:
        (first, second), (best, _) = (jnp.moveaxis(x, -1, 0) for x in jax.lax.top_k(logits, 2))
        lead = jnp.log(-jnp.expm1(second - first))
        return jnp.maximum(log_probability(logits, best) + lead, _LEAST)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """exp(-entropy) of the prediction, to full relative precision also near 1.

    Its logarithm is log p1 - sum of p_i (l_1 - l_i), whose terms have one sign.
    """

    name: ClassVar[str] = "entropy"

    def __call__(self, logits: Array, tokens: Array, keys: Array) -> Array:
        top = log_probability(logits, jnp.argmax(logits, axis=-1))
        behind = logits.max(axis=-1, keepdims=True) - logits
        terms = jnp.exp(top[..., None] - behind) * behind
        return top - row_sum(jnp.where(behind < jnp.inf, terms, 0.0))


@dataclasses.dataclass(frozen=True)
class Random:
    """A uniform random number."""

    name: ClassVar[str] = "random"

    def __call__(self, logits: Array, tokens: Array, keys: Array) -> Array:
        return jnp.log(jax.vmap(lambda key: jax.random.uniform(key, minval=1e-9))(keys))


@dataclasses.dataclass(frozen=True)
class Origin(Random):
    """Dream's "origin": slots are unmasked independently of each other, by the rule `Chance`."""

    name: ClassVar[str] = "origin"


CONFIDENCES: dict[str, Any] = {
    rule.name: rule for rule in (LowConfidence, Margin, Entropy, Random, Origin)
}


def rank(confidence: Float[Array, "*rows G"]) -> Int[Array, "*rows G"]:
    """Returns the place of each slot by confidence, 0 the best; ties to the lower slot."""
    return jnp.argsort(jnp.argsort(-confidence, stable=True), stable=True)
