"""The extension point of decoding: what a cache method caches, recomputes and refreshes.

A cache method is a frozen dataclass, because it is a static argument of jitted functions. Its
fields are its settings. An evaluation of the network has one of a few widths, numbers that the
method chooses: 0 for a few rows and 1 for all of them, say. The requests of a batch are evaluated
together, at the largest width that one of them needs. So an evaluation that is wider than a request
needs gives this request what its own width would give: rows that would not be recomputed keep their
old KV. Then every request gets the tokens that it would get alone.

Rows of a request are numbered from the start of its live rows (`DenoiseState`): the prefix, if any,
query, response. The rows of `Step.rows` begin with the query.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.method.cache import DenoiseState, LiveCache
from pdllm_jax.naming import text_of
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import ConfigError

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step


class Prediction(NamedTuple):
    """What `Step.predict` makes of logits: the first fields of an `Evaluation`."""

    tokens: Int[Array, "B G"]
    confidence: Float[Array, "B G"]
    log_p: Float[Array, "B G"]
    reading: Any


class Evaluation(NamedTuple):
    """What one evaluation of the network gives.

    tokens, confidence, log_p: of each slot the predicted token, its confidence and its log
      probability, from `Step.predict`. The confidence of a slot that is not to be unmasked is
      -inf; slots of later blocks are not unmasked in any case.
    reading: what the unmasking rule read of the logits, and its memory; from `Step.predict`.
    rows: that went through the network, of each request; a row that went through a share of the
      layers counts as this share.
    live: KV of the live rows; None where no step reads it.
    memory: what the method keeps for later evaluations, a pytree of the same form every time.
    refreshed: the live KV is no longer stale, of each request.
    """

    tokens: Int[Array, "B G"]
    confidence: Float[Array, "B G"]
    log_p: Float[Array, "B G"]
    reading: Any
    rows: Int[Array, "B"] | Float[Array, "B"] | float
    live: LiveCache | None = None
    memory: Any = None
    refreshed: Bool[Array, "B"] | bool = True


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """How an answer is decoded: the base class of every method.

    name: in results, messages and on the command line.
    uses_chunks: the document is cut into chunks and the best are kept; otherwise prefix, document
      and query are one prompt.
    guides: classifier-free guidance is implemented.
    verifies: shadow rows are implemented, which the unmasking rule "wino" needs.
    may_lack: a step may predict fewer slots than the even schedule unmasks. A block then goes on
      after its steps, until it is full.
    keeps_live: evaluations read and write `DenoiseState.live`, KV of all live rows.
    longest: live rows that the method can hold, None for any number.
    """

    name: ClassVar[str]
    uses_chunks: ClassVar[bool] = False
    guides: ClassVar[bool] = False
    verifies: ClassVar[bool] = False
    may_lack: ClassVar[bool] = False
    keeps_live: ClassVar[bool] = True
    longest: ClassVar[int | None] = None

    def __str__(self) -> str:
        """The text that `cache_method` reads: the name, and settings that are not the defaults."""
        return text_of(self)

    def decode_config(self, config: DecodeConfig) -> DecodeConfig:
        """Returns config with this method.

        Raises:
          ConfigError: settings that exclude each other.
        """
        if config.guidance > 0 and not self.guides:
            raise ConfigError(f"guidance is implemented for method 'plain', not for {self.name!r}")
        return config if self.uses_chunks else dataclasses.replace(config, recompute=self)

    def check(self, model: ModelConfig, config: DecodeConfig, rows: int) -> None:
        """Raises ConfigError where the method cannot serve this model, these settings or length.

        rows: live rows of a request, padded.
        """
        if self.longest is not None and rows > self.longest:
            message = f"holds at most {self.longest} rows of prompt and response, got {rows}"
            raise ConfigError(f"method {self.name!r} {message}")

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        """Returns the bytes that an evaluation needs beside what every forward pass needs.

        For the plan of device memory: arrays of a request that grow with the rows, above all those
        of attention that is not the library's. Devices divide them as they divide heads.

        Args:
          rows: live rows of a request, padded.
          itemsize: bytes of an activation.
        """
        return 0

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        """Returns the memory before the first evaluation, a pytree of arrays [B, ...].

        Memory that every layer has is a tuple of arrays, so that one layer's is written in place.
        """
        return None

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        """Returns the widths that occur, ascending numbers without gaps. Each is compiled."""
        return (0,)

    def width(self, step: Step) -> Int[Array, "B"]:
        """Returns the width that each request needs now. It may read the state alone."""
        return jnp.zeros(step.active.shape, jnp.int32)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        """Evaluates the network at a width. See the head of this module about batches."""
        raise NotImplementedError

    def update(self, step: Step, after: DenoiseState) -> Any:
        """Returns the memory for the next evaluation, once slots were unmasked.

        Args:
          step: of the state before the evaluation.
          after: with the new tokens, block and memory. `after.tokens != step.state.tokens` are the
            slots that were unmasked.
        """
        return after.memory
