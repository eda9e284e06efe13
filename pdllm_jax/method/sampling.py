"""The sampling rule of a denoising step: what each masked slot predicts and which slots are kept.

Sources: LLaDA (arXiv 2502.09992, reverse process with low-confidence or random remasking),
Fast-dLLM (arXiv 2505.22618, threshold and factor rules), Dream (arXiv 2508.15487, margin, entropy).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import row_sum
from pdllm_jax.config import DecodeConfig

_LEAST = -1e30  # finite: -inf would say that a slot is no candidate


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


def predict(
    logits: Float[Array, "T V"], config: DecodeConfig, key: Array
) -> tuple[Int[Array, "T"], Float[Array, "T"]]:
    """Predicted token of each row, and the logarithm of its confidence, finite.

    Temperature samples by the Gumbel trick; the confidence comes from the unscaled logits, or is
    a uniform random number for remasking "random", or what a function given there returns.
    """
    noise_key, order_key = jax.random.split(key)
    scores = logits
    if config.temperature > 0:
        scores = logits + config.temperature * jax.random.gumbel(noise_key, logits.shape)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if callable(config.remasking):
        return tokens, config.remasking(logits, tokens, order_key)
    if config.remasking == "random":
        return tokens, jnp.log(jax.random.uniform(order_key, tokens.shape, minval=1e-9))
    if config.remasking == "margin":
        return tokens, log_margin(logits)
    if config.remasking == "entropy":
        return tokens, negative_entropy(logits)
    return tokens, log_probability(logits, tokens)


def transfer(
    confidence: Float[Array, "G"], step: Int[Array, ""], config: DecodeConfig
) -> Bool[Array, "G"]:
    """Slots to unmask now. confidence: its logarithm for each slot's prediction, -inf where it is
    no candidate; step: evaluations already made in this block.
    """
    candidate = confidence > -jnp.inf
    if config.unmask is not None:
        return config.unmask(confidence, step) & candidate
    rank = jnp.argsort(jnp.argsort(-confidence, stable=True), stable=True)
    if config.threshold is not None:
        keep = (rank == 0) | (confidence >= jnp.log(jnp.float32(config.threshold)))
    elif config.factor is not None:
        keep = rank < _factor_count(confidence, candidate.sum(), config.factor)
    else:
        base, remainder = divmod(config.block_length, config.steps_per_block)
        keep = rank < base + (step < remainder)
    return keep & candidate


def _factor_count(confidence: Array, n: Array, factor: float) -> Array:
    """Fast-dLLM's factor rule: how many of the n best slots to unmask.

    With confidences sorted downwards and bounds 1 - factor / (i + 2), i from 0, where the first
    bound always holds: the index of the first slot under its bound, or the last index where none
    is; one more where that is the first or the last index, as published.
    """
    best = jnp.exp(jnp.sort(confidence)[::-1])
    index = jnp.arange(confidence.shape[0])
    below = (index > 0) & (index < n) & (best < 1 - factor / (index + 2))
    first = jnp.where(below.any(), jnp.argmax(below), n - 1)
    return first + ((first == 0) | (first == n - 1))


def random_key(seed: int) -> Array:
    """`jax.random.key`; ValueError for what is no integer of 64 bits with a sign."""
    if not isinstance(seed, int | np.integer) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r:.40}")
    return jax.random.key(seed)
