"""A request as a caller gives it, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.chunking import TokenIds, check_token_ids
from pdllm_jax.method.scorers import OracleScorer
from pdllm_jax.method.selection import EMPTY_SLOT
from pdllm_jax.tokenizer import Tokenizer

Text = str | TokenIds
Item, Result = TypeVar("Item"), TypeVar("Result")


class Request(NamedTuple):
    """A question about a document.

    context, question: both text, or both token ids.
    prefix: token ids before the document, BOS first; text has the engine's instruction instead.
    oracle: ids of the chunks to keep, at most `top_k`, for the scorer "oracle" alone.
    seed: from which all randomness follows; the same seed gives the same tokens.
    """

    context: Text
    question: Text
    prefix: TokenIds | None = None
    oracle: Sequence[int] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RequestReader:
    """Turns the text of requests into token ids, and checks ids.

    vocabulary: its size and the mask token, for `check_token_ids`.
    turn: `chat` and `system` of `Tokenizer.encode_prompt`.
    parts: False where a prompt is one sequence, so that its text is tokenized in one part and no
      part of it must have tokens.
    """

    tokenizer: Tokenizer | None
    vocabulary: tuple[int, int]
    instruction: str
    turn: Mapping[str, Any]
    parts: bool

    def _tokenizer(self, name: str, text: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{name} is text, the engine has no tokenizer: give token ids")
        if not text.strip():
            raise ValueError(f"{name} is empty")
        return self.tokenizer

    def _checked(self, name: str, value: TokenIds) -> np.ndarray:
        ids = check_token_ids(name, value, *self.vocabulary)
        if ids.size == 0 and self.parts:
            raise ValueError(f"{name} is empty")
        return ids

    def document(self, context: Text, prefix: TokenIds | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (prefix, context), int32."""
        if isinstance(context, str):
            tokenizer = self._tokenizer("context", context)
            if prefix is not None:
                raise ValueError("prefix is for token ids: text has the engine's instruction")
            prefix, context = tokenizer.encode_document(context, self.instruction, **self.turn)
        ids = check_token_ids("prefix", [] if prefix is None else prefix, *self.vocabulary)
        return ids, self._checked("context", context)

    def question(self, question: Text) -> np.ndarray:
        """Returns the ids behind a document, int32."""
        if isinstance(question, str):
            question = self._tokenizer("question", question).query(question, **self.turn)
        return self._checked("question", question)

    def request(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (prefix, context, question), int32."""
        context, question = request.context, request.question
        if isinstance(context, str) != isinstance(question, str):
            raise ValueError("context and question must both be text, or both token ids")
        prefix, ids = self.document(context, request.prefix)
        last = self.question(question)
        if self.parts or self.tokenizer is None or not isinstance(question, str):
            return prefix, ids, last
        after = self.tokenizer.after_document(question, chat=self.turn["chat"])
        message = f"{self.instruction}\n\n{context}{after}"
        ids = self._checked("question", self.tokenizer.encode_message(message, **self.turn))
        return ids[:0], ids[:0], ids


def map_named(kind: str, read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns `read` of each item; of several, a ValueError has the item's number."""
    results = []
    for i, item in enumerate(items):
        try:
            results.append(read(item))
        except ValueError as error:
            if len(items) == 1:
                raise
            raise type(error)(f"{kind} {i}: {error}") from None
    return results


def oracle_ids(
    oracle: Sequence[int] | None, config: SelectionConfig, n_chunks: int
) -> np.ndarray | None:
    """Validated, sorted, unique chunk ids, int32; None for all scorers but "oracle"."""
    if not isinstance(config.scorer, OracleScorer):
        if oracle is not None:
            raise ValueError(
                f"oracle ids are for the scorer 'oracle', not for {config.scorer.name!r}"
            )
        return None
    ids = np.unique(np.asarray([] if oracle is None else oracle))
    if ids.size == 0:
        raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"oracle ids must be integers, got {ids.dtype}")
    if ids[0] < 0 or ids[-1] >= n_chunks:
        raise ValueError(f"oracle ids {ids.tolist()} are not all inside [0, {n_chunks})")
    if ids.size > config.top_k:
        raise ValueError(f"oracle names {ids.size} chunks, top_k is {config.top_k}")
    return ids.astype(np.int32)


def stack_ids(named: Sequence[np.ndarray | None], size: int) -> np.ndarray | None:
    """Chunk ids of all requests, [size, M], EMPTY_SLOT behind them; None where none are given."""
    given = [ids for ids in named if ids is not None]
    if not given:
        return None
    table = np.full((size, max(ids.size for ids in given)), EMPTY_SLOT, np.int32)
    for row, ids in zip(table, given, strict=False):
        row[: ids.size] = ids
    return table
