"""Scorers by masked copies of the query: "draft", "query" and "confidence"."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.question import Question
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest
from pdllm_jax.method.scorers.copies import (
    Draft,
    QueryCopies,
    masked_copies,
    masked_draft,
    open_slots_copy,
    score_copies,
    write_draft,
)
from pdllm_jax.network.config import require, size
from pdllm_jax.network.transformer import MaskPredictor


class CopyScorer(Scorer):
    """Base of scorers whose `query_copies` are scored behind every chunk."""

    in_pass: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = True

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns the mean log-probability of the scored rows, from the KV of every chunk."""
        copies = self.query_copies(model, request)
        assert copies is not None
        return score_copies(
            model,
            cache,
            copies,
            request.wanted,
            encode_batch=request.encode_batch,
            implementation=request.implementation,
        )


@dataclasses.dataclass(frozen=True)
class QueryScorer(CopyScorer):
    """Self-information of the query given the chunk.

    masked_copies: R, copies of the query; copy r has the slots s with s % R == r masked. None is
      leave-one-out, a copy for every scored slot.
    """

    name: ClassVar[str] = "query"

    masked_copies: int | None = 4

    def __post_init__(self) -> None:
        if self.masked_copies is not None:
            size("masked_copies", self.masked_copies)

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns copies in which the query alone is scored, the response behind it visible."""
        response, batch = request.response, request.question.query.shape[0]
        tail = masked_draft(model, batch, 0)
        if response is not None:
            tail = Draft(response.tokens, response.unmasked)
        return masked_copies(model, request.question, tail, self.masked_copies, 0)

    def copy_sizes(self, query_rows: int) -> tuple[int, int, int]:
        """Returns (copies, rows of a copy, scored rows)."""
        return self.masked_copies or query_rows, query_rows, query_rows


@dataclasses.dataclass(frozen=True)
class DraftScorer(QueryScorer):
    """Self-information of query and draft given the chunk.

    draft_length: masks behind prefix and query, d. draft_steps: how many of them are denoised.
    """

    name: ClassVar[str] = "draft"

    draft_length: int = 4
    draft_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        size("draft_length", self.draft_length)
        size("draft_steps", self.draft_steps)
        require(
            self.draft_steps <= self.draft_length,
            f"draft_steps must be at most draft_length {self.draft_length}, got {self.draft_steps}",
        )

    def draft(self, model: MaskPredictor, question: Question) -> Draft:
        """Returns guesses of the response's first tokens, from prefix and query alone."""
        return write_draft(model, question, self.draft_length, self.draft_steps)

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns copies in which the query and the draft, or the response so far, are scored."""
        question, response = request.question, request.response
        if response is not None:
            tail, most = Draft(response.tokens, response.unmasked), response.tokens.shape[1]
        else:
            tail = self.draft(model, question) if request.draft is None else request.draft
            most = min(self.draft_steps, tail.tokens.shape[1])
        return masked_copies(model, question, tail, self.masked_copies, most)

    def copy_sizes(self, query_rows: int) -> tuple[int, int, int]:
        """Returns (copies, rows of a copy, scored rows)."""
        scored = query_rows + self.draft_steps
        return self.masked_copies or scored, query_rows + self.draft_length, scored


@dataclasses.dataclass(frozen=True)
class ConfidenceScorer(CopyScorer):
    """Mean log-probability of the likeliest token in each mask behind the query.

    draft_length: masks behind the query.
    """

    name: ClassVar[str] = "confidence"

    draft_length: int = 4

    def __post_init__(self) -> None:
        size("draft_length", self.draft_length)

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns one copy with its masks scored; of a response, the masks of the current block."""
        response, batch = request.response, request.question.query.shape[0]
        tail = masked_draft(model, batch, self.draft_length)
        if response is not None:
            tail = Draft(response.tokens, response.unmasked | ~response.in_block)
        return open_slots_copy(request.question, tail)

    def copy_sizes(self, query_rows: int) -> tuple[int, int, int]:
        """Returns (copies, rows of a copy, scored rows)."""
        return 1, query_rows + self.draft_length, self.draft_length
