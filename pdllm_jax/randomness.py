"""PRNG keys: from a request's seed to one key for each draw.

`random_key` is the only way from a seed to a key. `derive` folds the use of a key in before
anything else, so that no key serves two purposes. What a slot draws depends on request, evaluation
and slot alone: not on other requests, padding, or how many rows are read together.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pdllm_jax.rules import SEED, require


class Use(enum.IntEnum):
    """What a derived key is for."""

    REQUEST = 1  # request b of a batch that was given one key
    SCORES = 2  # of chunks
    CHUNK = 3  # of those, one chunk
    EVALUATION = 4
    NOISE = 5  # of the logits, in an evaluation, by slot
    ORDER = 6  # of unmasking, in an evaluation, by slot
    MASK_COUNTS = 7  # of a log-likelihood
    MASKS = 8
    ORDER_NOISE = 9  # of confidences, in an evaluation, by slot


def random_key(seed: int) -> Array:
    """Returns the PRNG key of a seed; all 64 bits count.

    Raises:
      ConfigError: the seed is not an integer in [0, 2**64).
    """
    require(SEED.allows(seed), SEED.message.format("seed", seed))
    # Threefry by name: the bits of "rbg" keys depend on how many keys a vmap maps over.
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed), impl="threefry2x32")


def derive(key: Array, use: Use, number: Int[Array, "*n"] | int = 0) -> Array:
    """Returns the keys for a use, numbered; key and number broadcast against each other."""
    fold = jnp.vectorize(jax.random.fold_in)
    return fold(fold(key, use.value), number)
