"""Floating-point operations of an answer: two for each multiply-add of every matrix product.

They follow from the true lengths (docs/algorithm.md's tables of rows). Padding, norms, softmax and
rotations are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.grids import DENSE, Cell
from pdllm_jax.method.scorers import SCORERS
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
    """Counts the operations of rows of a network, or of its first layers.

    word: of a row's logits. key: of a row's keys in one layer.
    """

    def __init__(self, model: ModelConfig, layers: int | None = None):
        d, kv = model.d_model, model.n_kv_heads * model.head_dim
        n = model.n_layers if layers is None else layers
        self.row = 2 * n * (2 * d * d + 2 * d * kv + 3 * d * model.mlp_hidden_size)
        self.pair = 4 * n * d
        self.key = 2 * d * kv
        self.word = 2 * d * model.embedding_size

    def __call__(self, rows: float, keys: float, words: float = 0) -> float:
        """Counts rows that attend to `keys` keys each, with logits of `words` of them."""
        return rows * (self.row + self.pair * keys) + words * self.word


def answer_flops(
    model: ModelConfig, cell: Cell, sizes: Sizes, evaluations: int, layers: int | None = None
) -> dict[str, float] | None:
    """Counts by phase: draft, score (the pass over the document), encode, decode.

    layers: that the scorer runs, by default all.
    Returns None for re-selection: records do not say how much was encoded again.
    """
    count, response = Counter(model), sizes.response
    if cell.selection in DENSE:
        total = sizes.prefix + sizes.context + sizes.query + response
        wide = evaluations if cell.selection == "dense" else 1
        decode = count(wide * total, total, evaluations * response)
        decode += count((evaluations - wide) * response, total)
        return {"draft": 0.0, "score": 0.0, "encode": 0.0, "decode": decode}
    if cell.reselect != "never":
        return None
    config, kept = cell.selection_config(), [sizes.chunks[i] for i in sizes.kept]
    keeps_all = len(sizes.chunks) <= config.top_k and config.scorer.name != "oracle"
    scorer = "all" if cell.selection == "all" or keeps_all else config.scorer.name
    live = sizes.query + response
    view = sizes.prefix + sum(kept) + live

    score = _pass(model, cell, scorer, sizes, layers)
    draft = encode = 0.0
    if scorer in ("draft", "causal"):
        rows = sizes.prefix + sizes.query + cell.draft_length
        draft = cell.draft_steps * count(rows, rows, cell.draft_length)
    if cell.selects_only:
        return {"draft": draft, "score": score, "encode": 0.0, "decode": 0.0}

    if cell.encoding == "joint":
        encode = count(view, view)
    elif cell.encoding == "query-conditioned":
        lengths = [sizes.prefix + chunk + sizes.query for chunk in kept]
        encode = sum(count(rows, rows) for rows in lengths)
    elif cell.encoding == "bridge":
        share = config.encoding.recomputed(cell.chunk_size)
        encode = count(sum(min(share, chunk) for chunk in kept) + live, view)
        if config.encoding.tokens == "attention":
            encode += count(live, view)
    if config.keep_tokens is not None and config.keep_tokens < cell.chunk_size:
        encode += count(live, view)
        view += sum(min(config.keep_tokens, chunk) for chunk in kept) - sum(kept)

    decode = evaluations * count(response, view, response)
    if cell.encoding in ("independent", "query-conditioned"):
        decode += count(sizes.query, view)  # live KV of the query, in the first evaluation
    return {"draft": draft, "score": score, "encode": encode, "decode": decode}


def _pass(model: ModelConfig, cell: Cell, scorer: str, sizes: Sizes, layers: int | None) -> float:
    """Counts the pass over the chunks, with the query copies that run with each.

    Where scores come before the pass, it has the kept chunks alone, if their KV is read at all.
    """
    count, prefix, query = Counter(model), sizes.prefix, sizes.query
    own = query + (0 if scorer == "query" else cell.draft_length)
    if scorer == "chunk-draft":
        conditioned = [prefix + chunk + own for chunk in sizes.chunks]
        cost = sum(count(rows, rows, cell.draft_length) for rows in conditioned)
        words = query + cell.draft_steps
        return cost + sum(count(1 + own, rows, words) for rows in conditioned)
    cost = 0.0
    if scorer in ("attention", "heads"):
        asked, passed = Counter(model, layers), Counter(model, (layers or model.n_layers) - 1)
        cost += sum(passed(chunk, prefix + chunk) + chunk * passed.key for chunk in sizes.chunks)
        cost += asked(query, prefix + sum(sizes.chunks) + query)
        cost += asked(prefix, prefix) if cell.encoding == "joint" else 0.0
    if SCORERS[scorer].in_pass or cell.encoding != "joint":
        cost += count(prefix, prefix)
    if SCORERS[scorer].in_pass or cell.encoding in ("independent", "bridge"):
        chunks = sizes.chunks
        if not SCORERS[scorer].in_pass:
            chunks = [sizes.chunks[i] for i in sizes.kept]
        cost += sum(count(chunk, prefix + chunk) for chunk in chunks)
    if SCORERS[scorer].in_pass:
        drafted = dict.fromkeys(("draft", "causal"), query + cell.draft_steps)
        scored = {**drafted, "confidence": cell.draft_length}.get(scorer, query)
        alone = scorer in ("causal", "confidence")
        copies = 1 if alone else (cell.masked_copies or scored)
        rows = copies * own + (scorer == "causal")  # and the chunk's last row again
        cost += sum(count(rows, prefix + c + own, scored) for c in sizes.chunks)
    return cost
