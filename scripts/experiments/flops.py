"""Floating-point operations of an answer: two for each multiply-add of every matrix product.

They follow from the true lengths (docs/algorithm.md's tables of rows). Padding, norms, softmax and
rotations are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from experiments.grids import DENSE, Cell
from pdllm_jax.method.scorers import SCORERS, OracleScorer
from pdllm_jax.network.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of one example. chunks: true length of every chunk; kept: ids of the kept ones."""

    prefix: int
    query: int
    response: int
    context: int
    chunks: Sequence[int] = ()
    kept: Sequence[int] = ()


class Counter:
    """Counts the operations of rows of a network."""

    def __init__(self, model: ModelConfig):
        d, kv = model.d_model, model.n_kv_heads * model.head_dim
        self.row = 2 * model.n_layers * (2 * d * d + 2 * d * kv + 3 * d * model.mlp_hidden_size)
        self.pair = 4 * model.n_layers * d
        self.word = 2 * d * model.embedding_size

    def rows(self, count: float, keys: float) -> float:
        """Counts rows that attend to `keys` keys each."""
        return count * (self.row + self.pair * keys)


def answer_flops(
    model: ModelConfig, cell: Cell, sizes: Sizes, evaluations: int
) -> dict[str, float] | None:
    """Counts by phase: draft, score (the pass over the document), encode, decode.

    Returns None for re-selection: records do not say how much was encoded again.
    """
    count = Counter(model)
    if cell.selection in DENSE:
        return _dense(count, cell, sizes, evaluations)
    if cell.reselect != "never":
        return None
    size = sum(sizes.chunks[i] for i in sizes.kept)
    config = cell.selection_config()
    named = isinstance(config.scorer, OracleScorer)
    keeps_all = len(sizes.chunks) <= config.top_k and not named
    scorer = "all" if cell.selection == "all" or keeps_all else config.scorer.name
    live = sizes.query + sizes.response
    view = sizes.prefix + size + live

    draft = 0.0
    if scorer == "draft":
        rows = sizes.prefix + sizes.query + cell.draft_length
        once = count.rows(rows, rows) + cell.draft_length * count.word
        draft = cell.draft_steps * once

    encode = 0.0
    if cell.encoding == "joint":
        encode = count.rows(view, view)
    elif cell.encoding == "query-conditioned":
        for i in sizes.kept:
            rows = sizes.prefix + sizes.chunks[i] + sizes.query
            encode += count.rows(rows, rows)
    elif cell.encoding == "bridge":
        share = math.ceil(config.encoding.share * cell.chunk_size)
        rows = sum(min(share, sizes.chunks[i]) for i in sizes.kept) + live
        encode = count.rows(rows, view)
        if config.encoding.tokens == "attention":
            encode += count.rows(live, view)
    if config.keep_tokens is not None and config.keep_tokens < cell.chunk_size:
        encode += count.rows(live, view)
        view += sum(min(config.keep_tokens, sizes.chunks[i]) for i in sizes.kept) - size

    decode = evaluations * (count.rows(sizes.response, view) + sizes.response * count.word)
    if cell.encoding in ("independent", "query-conditioned"):
        decode += count.rows(sizes.query, view)  # live KV of the query, in the first evaluation
    return {
        "draft": draft,
        "score": _pass(count, cell, scorer, sizes),
        "encode": encode,
        "decode": decode,
    }


def _dense(count: Counter, cell: Cell, sizes: Sizes, evaluations: int) -> dict[str, float]:
    total = sizes.prefix + sizes.context + sizes.query + sizes.response
    wide = evaluations if cell.selection == "dense" else 1
    decode = wide * count.rows(total, total)
    decode += (evaluations - wide) * count.rows(sizes.response, total)
    decode += evaluations * sizes.response * count.word
    return {"draft": 0.0, "score": 0.0, "encode": 0.0, "decode": decode}


def _pass(count: Counter, cell: Cell, scorer: str, sizes: Sizes) -> float:
    """Counts the pass over all chunks, with the query copies that run with each."""
    pooled = cell.encoding in ("independent", "bridge") or scorer == "attention"
    if not SCORERS[scorer].needs_pool and not pooled and cell.encoding == "joint":
        return 0.0
    cost = count.rows(sizes.prefix, sizes.prefix)
    if SCORERS[scorer].in_pass or pooled:
        cost += sum(count.rows(c, sizes.prefix + c) for c in sizes.chunks)
    if scorer == "attention":
        keys = sizes.prefix + sum(sizes.chunks) + sizes.query
        cost += count.rows(sizes.query, keys)
    elif SCORERS[scorer].in_pass:
        rows = sizes.query + (0 if scorer == "query" else cell.draft_length)
        scored = {
            "draft": sizes.query + cell.draft_steps,
            "query": sizes.query,
            "confidence": cell.draft_length,
        }[scorer]
        copies = 1 if scorer == "confidence" else (cell.masked_copies or scored)
        for c in sizes.chunks:
            cost += count.rows(copies * rows, sizes.prefix + c + rows) + scored * count.word
    return cost
