"""The extension point of a step's second half: which slots are unmasked, and which masked again.

An unmasking rule is a frozen dataclass, because it is a static argument of jitted functions; its
fields are its settings. All arrays here are one request's: the step maps rules over the batch.

The simplest rule is a function of the confidences, `__call__`. A rule that needs more overrides
`adjust` and `read`, which get the logits of the evaluated slots, keeps what later steps need as its
memory (`start`), and decides in `take`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.naming import text_of
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.rules import require


class Rows(NamedTuple):
    """Slots of a request whose logits were computed.

    logits: of each, float32.
    slots: their numbers in the response; a number of G and more is no slot.
    in_block: their numbers in the current block; block_length for a slot outside of it.
    masked: slots that hold the mask token.
    step: evaluations made in the block before this one.
    """

    logits: Float[Array, "T V"]
    slots: Int[Array, "T"]
    in_block: Int[Array, "T"]
    masked: Bool[Array, "T"]
    step: Int[Array, ""]


class Seen(NamedTuple):
    """What a rule decides by.

    confidence: logarithm of each prediction's confidence; -inf where a slot is not a candidate.
    step: evaluations made in the block before this one.
    due: slots that the even schedule unmasks in this step.
    filled: slots of the block that are not masked.
    is_mask: slots where the mask token is predicted.
    reading: what `read` returned for each slot, zeros where there was none. Of a rule with
      `verifies`, the log probability of the token of each filled slot.
    """

    confidence: Float[Array, "G"]
    step: Int[Array, ""]
    due: Int[Array, ""]
    filled: Bool[Array, "G"]
    is_mask: Bool[Array, "G"]
    reading: Any = None


class Choice(NamedTuple):
    """What a rule decides: slots to unmask, the memory, and filled slots to mask again.

    Of the slots to unmask those count that are candidates.
    """

    take: Bool[Array, "G"]
    memory: Any = None
    remask: Bool[Array, "G"] | None = None


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """The base class of all unmasking rules.

    name: in settings and on the command line.
    reads_response: an evaluation of all rows gives the rule the logits of the whole response, not
      those of the block alone.
    fills_behind: slots of earlier blocks that are still masked are candidates, where a step
      evaluates them.
    reads_steps: `DecodeConfig.steps` may be given; a block then ends after its steps.
    verifies: shadow rows go through the network with the block: mask tokens at its positions, which
      see every row but that of their own slot, and each other. No other row sees them.
    """

    name: ClassVar[str] = ""
    reads_response: ClassVar[bool] = False
    fills_behind: ClassVar[bool] = True
    reads_steps: ClassVar[bool] = False
    verifies: ClassVar[bool] = False

    def __str__(self) -> str:
        """The text that `DecodeConfig.unmask` reads: the name, and changed settings."""
        return text_of(self)

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for a model that the rule cannot decode."""
        simple = not (self.verifies and config.logit_shift)
        message = "needs a model whose rows predict their own tokens, without a logit shift"
        require(simple, f"unmask {self.name!r} {message}")

    def start(self, slots: int, block_length: int, vocabulary: int) -> Any:
        """Returns the memory of a request before its first step: arrays, tuples of them, or None.

        Args:
          slots: of the response, G.
          vocabulary: logits of a slot, V.
        """
        return None

    def adjust(self, rows: Rows, memory: Any) -> tuple[Float[Array, "T V"], Any]:
        """Returns the logits that predictions and confidences come from, and the memory."""
        return rows.logits, memory

    def read(self, logits: Float[Array, "T V"], rows: Rows, memory: Any) -> tuple[Any, Any]:
        """Returns what `take` needs of the logits, arrays [T, ...], and the memory.

        logits: that the confidences come from.
        """
        return None, memory

    def masked(self, masked: Bool[Array, "G"], step: Int[Array, ""], memory: Any) -> Array:
        """Returns the slots that count as masked, of those that hold the mask token."""
        return masked

    def take(self, seen: Seen, memory: Any) -> Choice:
        """Decides."""
        return Choice(self(seen.confidence, seen.step), memory)

    def __call__(self, confidence: Float[Array, "G"], step: Int[Array, ""]) -> Bool[Array, "G"]:
        """Returns the slots to unmask by their confidences alone."""
        raise NotImplementedError(f"{type(self).__name__} has neither take nor __call__")


@dataclasses.dataclass(frozen=True)
class Custom(Unmasking):
    """A function of the caller's: (log confidence [G], step) -> bool [G]."""

    function: Callable[[Array, Array], Array]

    def __call__(self, confidence: Float[Array, "G"], step: Int[Array, ""]) -> Bool[Array, "G"]:
        return self.function(confidence, step)


def transfer(
    confidence: Float[Array, "G"], step: Int[Array, ""], rule: Unmasking
) -> Bool[Array, "G"]:
    """Returns the slots to unmask by a rule of the confidences alone: those that are candidates."""
    return rule(confidence, step) & (confidence > -jnp.inf)
