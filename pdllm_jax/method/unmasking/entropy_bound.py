"""EB-Sampler (arXiv 2505.24857): unmasks as many slots as an entropy bound allows.

The authors published no code; the rule is from the paper. Its error proxy, by which the slots are
ordered, is the confidence rule (`DecodeConfig.remasking`): confidence, margin or entropy. Some
implementations order by entropy alone, or take the running largest over a batch: not reproduced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pdllm_jax.method.sampling import Entropy, rank
from pdllm_jax.method.unmasking.base import Choice, Rows, Seen, Unmasking
from pdllm_jax.rules import AT_LEAST_0, validate


@dataclasses.dataclass(frozen=True)
class EntropyBound(Unmasking):
    """Takes the best slots while their entropies, less the largest of them, add up to `gamma`.

    That sum bounds the mutual information of the slots. The best slot is always taken.

    gamma: in nats.
    """

    name: ClassVar[str] = "eb"
    fills_behind: ClassVar[bool] = False

    gamma: float = 0.001

    def __post_init__(self) -> None:
        validate(self, {"gamma": AT_LEAST_0}, "eb ")

    def read(self, logits: Float[Array, "T V"], rows: Rows, memory: Any) -> tuple[Array, Any]:
        """Returns the entropy of each prediction, in nats."""
        return -Entropy()(logits, rows.slots, rows.slots), memory

    def take(self, seen: Seen, memory: Any) -> Choice:
        entropy = jnp.where(seen.confidence > -jnp.inf, seen.reading, 0.0)
        order = jnp.argsort(-seen.confidence, stable=True)
        entropy = entropy[order]
        largest = jnp.pad(lax.cummax(entropy), (1, 0))[:-1]
        # The sum less the largest, without the rounding of the difference.
        bound = jnp.cumsum(jnp.minimum(entropy, largest))
        return Choice(rank(seen.confidence) < (bound <= self.gamma).sum(), memory)
