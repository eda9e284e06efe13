"""Credit decoding of dInfer: predictions that recur gain confidence.

From the code of dInfer (`CreditThresholdParallelDecoder`), down to the bound just below the best
confidence, and to slots that predict the mask token, which are not unmasked.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pdllm_jax.method.unmasking.base import Choice, Rows, Seen, Unmasking
from pdllm_jax.rules import AT_LEAST_0, SHARE, UNIT, validate

_NEAR = 1e-5  # slots this close to the best are taken with it


@dataclasses.dataclass(frozen=True)
class Credit(Unmasking):
    """Takes slots with at least the confidence `threshold`, and the best, of logits with credit.

    In each step of a block the credit of its slots and tokens is multiplied by `decay`; then the
    likeliest token of each masked slot gains p ** `boost`. The logits gain
    `alpha` log(1 + credit), for prediction and confidence.
    """

    name: ClassVar[str] = "credit"
    fills_behind: ClassVar[bool] = False

    threshold: float = 0.9
    alpha: float = 0.7
    boost: float = 0.2
    decay: float = 0.8

    def __post_init__(self) -> None:
        rules = {"threshold": SHARE, "alpha": AT_LEAST_0, "boost": AT_LEAST_0, "decay": UNIT}
        validate(self, rules, "credit ")

    def start(self, slots: int, block_length: int, vocabulary: int) -> Float[Array, "block V"]:
        return jnp.zeros((block_length, vocabulary))

    def adjust(
        self, rows: Rows, memory: Float[Array, "block V"]
    ) -> tuple[Float[Array, "T V"], Float[Array, "block V"]]:
        """Adds credit."""
        logits = rows.logits
        credit = memory.at[rows.in_block].get(mode="fill", fill_value=0.0)
        credit = jnp.where(rows.step == 0, 0.0, self.decay * credit)
        best = jnp.argmax(logits, axis=-1)
        gain = jnp.where(rows.masked, jax.nn.softmax(logits).max(axis=-1) ** self.boost, 0.0)
        credit = credit.at[jnp.arange(len(best)), best].add(gain)
        memory = memory.at[rows.in_block].set(credit, mode="drop")
        return logits + self.alpha * jnp.log(credit + 1), memory

    def take(self, seen: Seen, memory: Any) -> Choice:
        candidates = (seen.confidence > -jnp.inf) & ~seen.is_mask
        confidence = jnp.where(candidates, jnp.exp(seen.confidence), -1.0)
        bound = jnp.minimum(confidence.max() - _NEAR, self.threshold)
        return Choice(candidates & (confidence >= bound), memory)
