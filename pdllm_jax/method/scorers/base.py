"""The extension point of step 2: what a scorer is given and what it returns.

A scorer is a frozen dataclass, because it is a static argument of jitted functions. A scorer
implements one of two methods:

  query_copies  rows that go through the network behind every chunk, in the pass that encodes the
                document, or later against the KV of that pass. `CopyScorer` is their base class.
  scores        a function of the document (its tokens, and its KV where `needs_pool`) and the
                question. Where it needs no KV it runs before the pass, so that the document can be
                streamed.

A scorer's extra pass goes through `model.run` with the attention that it needs.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.question import Question
from pdllm_jax.method.scorers.copies import Draft, QueryCopies
from pdllm_jax.network.transformer import MaskPredictor


class Response(NamedTuple):
    """A response that is being denoised, as re-selection sees it.

    tokens [B, G]; unmasked [B, G]: slots that hold a token; in_block [B, G]: slots of the current
    block.
    """

    tokens: Int[Array, "B G"]
    unmasked: Bool[Array, "B G"]
    in_block: Bool[Array, "B G"]


class ScoreRequest(NamedTuple):
    """What scores depend on besides the document.

    wanted [B, N]: chunks to score; the scores of others are ignored.
    draft: from `draft_response`; None where the scorer computes it if needed.
    response: the response so far, None before the first step.
    keys: a PRNG key for each request [B], or one for all of them. oracle [B, M]: chunk ids.
    encode_batch: chunks that go through the network together.
    implementation: of attention over chunks.
    """

    question: Question
    wanted: Bool[Array, "B N"]
    draft: Draft | None = None
    response: Response | None = None
    keys: Array | None = None
    oracle: Int[Array, "B M"] | None = None
    encode_batch: int = 8
    implementation: Implementation | None = None


@runtime_checkable
class Scorer(Protocol):
    """How relevant each chunk is to the question.

    name: in results, messages and on the command line.
    in_pass: `query_copies` gives the scores in the pass that encodes the document.
    needs_pool: `scores` reads the KV of every chunk. Without `in_pass` all of it must be kept, and
      the document cannot be streamed.
    reads_document: the scores depend on document and question; re-selection requires it.
    """

    name: ClassVar[str]
    in_pass: ClassVar[bool] = False
    needs_pool: ClassVar[bool] = False
    reads_document: ClassVar[bool] = True

    def draft(self, model: MaskPredictor, question: Question) -> Draft | None:
        """Returns a draft of the response, computed before the pass; None where none is needed."""
        return None

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies | None:
        """Returns the rows that go behind every chunk; None where `in_pass` is false."""
        return None

    def copy_sizes(self, query_rows: int) -> tuple[int, int, int] | None:
        """Returns (copies, rows of a copy, scored rows) of `query_copies`, for memory plans."""
        return None

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns a score for each chunk, float32; higher is better."""
        ...
