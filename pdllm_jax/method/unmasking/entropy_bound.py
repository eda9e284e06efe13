"""EB-Sampler (arXiv 2505.24857): unmasks as many slots as an entropy bound allows.

The authors published no code; the rule is from the paper. Its error proxy, by which the slots are
ordered, is the confidence rule (`DecodeConfig.remasking`): confidence, margin or entropy. Some
implementations order by entropy alone. d2Cache's takes the running largest over the batch, which
for one request is the last entropy: `subtract="last"`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pdllm_jax.method.sampling import Entropy, rank
from pdllm_jax.method.unmasking.base import Choice, Rows, Seen, Unmasking
from pdllm_jax.rules import AT_LEAST_0, one_of, validate

Subtract = Literal["largest", "last"]


@dataclasses.dataclass(frozen=True)
class EntropyBound(Unmasking):
    """Takes the best slots while their entropies, less the largest of them, add up to `gamma`.

    That sum bounds the mutual information of the slots. The best slot is always taken.

    gamma: in nats.
    subtract: from the sum: the "largest" entropy, as in the paper, or that of the "last" slot.
    """

    name: ClassVar[str] = "eb"
    fills_behind: ClassVar[bool] = False

    gamma: float = 0.001
    subtract: Subtract = "largest"

    def __post_init__(self) -> None:
        rules = {"gamma": AT_LEAST_0, "subtract": one_of(get_args(Subtract))}
        validate(self, rules, "eb ")

    def read(self, logits: Float[Array, "T V"], rows: Rows, memory: Any) -> tuple[Array, Any]:
        """Returns the entropy of each prediction, in nats."""
        return -Entropy()(logits, rows.slots, rows.slots), memory

    def take(self, seen: Seen, memory: Any) -> Choice:
        entropy = jnp.where(seen.confidence > -jnp.inf, seen.reading, 0.0)
        order = jnp.argsort(-seen.confidence, stable=True)
        entropy = entropy[order]
        # The sum less the largest or last one, without the rounding of a difference.
        if self.subtract == "largest":
            entropy = jnp.minimum(entropy, _before(lax.cummax(entropy)))
        else:
            entropy = _before(entropy)
        bound = jnp.cumsum(entropy)
        return Choice(rank(seen.confidence) < (bound <= self.gamma).sum(), memory)


def _before(values: Float[Array, "G"]) -> Float[Array, "G"]:
    return jnp.pad(values, (1, 0))[:-1]
