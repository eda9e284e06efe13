"""KLASS (arXiv 2511.05664): unmasks predictions that are sure and no longer change.

From the paper and the authors' code for LLaDA (shkim0116/KLASS). Reproduced: the divergences of a
slot go on over blocks, also those of slots behind the block; the first evaluation is compared with
probabilities of zero; a block ends after its steps, even if slots are still masked. Not reproduced:
with a temperature, the published code compares distributions with their noise; where fewer slots
are masked than a step unmasks, it overwrites others.

With a cache, a slot's divergence is that of its last two evaluations.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import row_sum
from pdllm_jax.method.sampling import rank
from pdllm_jax.method.unmasking.base import Choice, Rows, Seen, Unmasking
from pdllm_jax.rules import AT_LEAST_0, SHARE, SIZE, validate

_EPS = 1e-12  # in the logarithms, as published
# Of each slot the probabilities of its last evaluation, and its last divergences in nats.
_Memory = tuple[Float[Array, "G V"], Float[Array, "G H"]]


@dataclasses.dataclass(frozen=True)
class Klass(Unmasking):
    """Takes slots with a confidence above `threshold` whose last divergences are below `kl`.

    Where there is none, it takes as many of the best slots as the even schedule: `steps` of
    `DecodeConfig`, by default one slot a step.

    kl: bound on KL(now, at the evaluation before), in nats.
    history: divergences that must be below it.
    """

    name: ClassVar[str] = "klass"
    reads_response: ClassVar[bool] = True
    fills_behind: ClassVar[bool] = False
    reads_steps: ClassVar[bool] = True

    threshold: float = 0.9
    kl: float = 0.01
    history: int = 2

    def __post_init__(self) -> None:
        validate(self, {"threshold": SHARE, "kl": AT_LEAST_0, "history": SIZE}, "klass ")

    def start(self, slots: int, block_length: int, vocabulary: int) -> _Memory:
        return jnp.zeros((slots, vocabulary)), jnp.zeros((slots, self.history))

    def read(
        self, logits: Float[Array, "T V"], rows: Rows, memory: _Memory
    ) -> tuple[Bool[Array, "T"], _Memory]:
        """Returns which predictions are stable."""
        now = jax.nn.softmax(rows.logits)
        before, divergence = (x.at[rows.slots].get(mode="clip") for x in memory)
        kl = row_sum(now * (jnp.log(now + _EPS) - jnp.log(before + _EPS)))
        divergence = jnp.concatenate([divergence[:, 1:], kl[:, None]], axis=1)
        stable = (divergence < self.kl).all(axis=1) & (rows.step >= self.history - 1)
        new = zip(memory, (now, divergence), strict=True)
        kept, divergences = (x.at[rows.slots].set(values, mode="drop") for x, values in new)
        return stable, (kept, divergences)

    def take(self, seen: Seen, memory: _Memory) -> Choice:
        sure = seen.confidence > jnp.log(jnp.float32(self.threshold))
        ready = sure & seen.reading
        return Choice(jnp.where(ready.any(), ready, rank(seen.confidence) < seen.due), memory)
