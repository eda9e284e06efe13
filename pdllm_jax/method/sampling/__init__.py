"""The sampling rule of a denoising step: what masked slots predict, and which of them are unmasked.

A confidence rule (`confidence.py`) ranks the predictions, an unmasking rule (`unmasking.py`) takes
the slots. Both are frozen objects, and so may a caller's function be.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.method.sampling.confidence import (
    Confidence,
    Entropy,
    LowConfidence,
    Margin,
    Random,
    log_probability,
)
from pdllm_jax.method.sampling.unmasking import Factor, Schedule, Threshold, Unmask

CONFIDENCES: dict[str, Any] = {rule.name: rule for rule in (LowConfidence, Margin, Entropy, Random)}

__all__ = [
    "CONFIDENCES",
    "Confidence",
    "Factor",
    "Schedule",
    "Threshold",
    "Unmask",
    "log_probability",
    "predict",
    "random_key",
    "transfer",
]


def predict(
    logits: Float[Array, "T V"], confidence: Confidence, temperature: float, key: Array
) -> tuple[Int[Array, "T"], Float[Array, "T"]]:
    """Returns the predicted token of each row and its log confidence, finite.

    temperature: samples by the Gumbel trick; the confidence comes from the unscaled logits.
    """
    noise_key, order_key = jax.random.split(key)
    scores = logits
    if temperature > 0:
        scores = logits + temperature * jax.random.gumbel(noise_key, logits.shape)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return tokens, confidence(logits, tokens, order_key)


def transfer(confidence: Float[Array, "G"], step: Int[Array, ""], rule: Unmask) -> Bool[Array, "G"]:
    """Returns the slots to unmask.

    Args:
      confidence: log confidence of each slot's prediction, -inf where it is not a candidate.
      step: evaluations made in this block so far.
    """
    return rule(confidence, step) & (confidence > -jnp.inf)


def random_key(seed: int) -> Array:
    """`jax.random.key`; ValueError unless the seed is a signed 64-bit integer."""
    if not isinstance(seed, int | np.integer) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must be a signed 64-bit integer, got {seed!r:.40}")
    return jax.random.key(seed)
