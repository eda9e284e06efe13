"""WINO (arXiv 2507.18578): unmasks many slots, and masks again those that it no longer believes.

From the paper and the authors' code for LLaDA (Feng-Hong/WINO-DLLM). Reproduced: the numbers below,
which the paper does not vary; slots are verified by what the evaluation saw, so not those that the
same step unmasks; a predicted mask token counts as filled until the block ends.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pdllm_jax.method.sampling import rank
from pdllm_jax.method.unmasking.base import Choice, Seen, Unmasking
from pdllm_jax.rules import SHARE, validate

# A step unmasks at most 7 tenths of the masked slots, and between 5 and 20.
_TENTHS, _FEWEST, _MOST = 7, 5, 20
_FIRST_ACCEPTED = 30  # stands for the step before a block's first one
# The number of slots that the last step unmasked, and the slots filled with the mask token.
_Memory = tuple[Int[Array, ""], Bool[Array, "G"]]


@dataclasses.dataclass(frozen=True)
class Wino(Unmasking):
    """Takes slots with a confidence above `threshold`; re-masks filled ones below `threshold_back`.

    A filled slot of the block is verified by a shadow row, a mask token in its place that sees all
    but the slot itself: it is masked again if the row gives its token less than `threshold_back`.
    Only steps that unmask several slots mask some again, and fewer than the step before unmasked.
    """

    name: ClassVar[str] = "wino"
    verifies: ClassVar[bool] = True

    threshold: float = 0.6
    threshold_back: float = 0.9

    def __post_init__(self) -> None:
        validate(self, {"threshold": SHARE, "threshold_back": SHARE}, "wino ")

    def start(self, slots: int, block_length: int, vocabulary: int) -> _Memory:
        return jnp.int32(_FIRST_ACCEPTED), jnp.zeros((slots,), bool)

    def masked(self, masked: Array, step: Array, memory: _Memory) -> Array:
        """Leaves out slots that this block's steps filled with the mask token."""
        return masked & ((step == 0) | ~memory[1])

    def take(self, seen: Seen, memory: _Memory) -> Choice:
        accepted, mask_tokens = memory
        place = rank(seen.confidence)
        candidates = (seen.confidence > -jnp.inf).sum()
        most = jnp.clip(_TENTHS * candidates // 10, _FEWEST, _MOST)
        take = seen.confidence > jnp.log(jnp.float32(self.threshold))
        take = jnp.where(take.sum() > most, place < most, take | (place == 0))
        take &= seen.confidence > -jnp.inf
        count, first = take.sum(), seen.step == 0
        before = jnp.where(first, _FIRST_ACCEPTED, accepted)
        belief = jnp.where(seen.filled, seen.reading, jnp.inf)
        remask = belief < jnp.log(jnp.float32(self.threshold_back))
        least = rank(-belief) < before - 1
        remask = jnp.where(remask.sum() >= before, least, remask) & (count > 1)
        mask_tokens = mask_tokens & ~first & ~remask | take & seen.is_mask
        return Choice(take, (count, mask_tokens), remask)
