"""Floating-point operations of an answer: two for each multiply-add of every matrix product.

They follow from the true lengths (docs/algorithm.md's tables of rows). Padding, norms, softmax and
rotations are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.grids import Cell
from pdllm_jax import SelectionConfig
from pdllm_jax.method.scorers import SCORERS
from pdllm_jax.method.scorers.attention import AttentionScorer
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

    word: of a row's logits. keys_values: of a row's keys and values in one layer. layers: that run.
    """

    def __init__(self, model: ModelConfig, layers: int | None = None):
        d, kv = model.d_model, model.n_kv_heads * model.head_dim
        self.layers = layers = model.n_layers if layers is None else layers
        self.row = 2 * layers * (2 * d * d + 2 * d * kv + 3 * d * model.mlp_hidden_size)
        self.pair = 4 * layers * d
        self.word = 2 * d * model.embedding_size
        self.keys_values = 4 * d * kv

    def __call__(self, rows: float, keys: float, words: float = 0) -> float:
        """Counts rows that attend to `keys` keys each, with logits of `words` of them."""
        return rows * (self.row + self.pair * keys) + words * self.word


class RowCounter(Counter):
    """Counts the rows themselves; one that runs a share of the layers counts as this share."""

    def __init__(self, model: ModelConfig, layers: int | None = None):
        self.layers = model.n_layers if layers is None else layers
        self.row = self.layers / model.n_layers
        self.pair = self.word = self.keys_values = 0


def answer_flops(
    model: ModelConfig,
    cell: Cell,
    sizes: Sizes,
    evaluations: int,
    selection: SelectionConfig | None = None,
    *,
    rows: float = 0.0,
    counter: type[Counter] = Counter,
) -> dict[str, float] | None:
    """Counts by phase: draft, score (the pass over the document), encode, decode.

    selection: the cell's, where a calibration has added to it. rows: that a method on the whole
    prompt computed; each counts as if it attended to everything. counter: what is counted.
    Returns None for re-selection: records do not say how much was encoded again.
    """
    count, response = counter(model), sizes.response
    if not cell.method.uses_chunks:
        total = sizes.prefix + sizes.context + sizes.query + response
        decode = count(rows, total, evaluations * response)
        return {"draft": 0.0, "score": 0.0, "encode": 0.0, "decode": decode}
    if cell.reselect != "never":
        return None
    config, kept = selection or cell.selection_config(), [sizes.chunks[i] for i in sizes.kept]
    keeps_all = len(sizes.chunks) <= config.top_k and config.scorer.name != "oracle"
    scorer = "all" if cell.selection == "all" or keeps_all else config.scorer.name
    live = sizes.query + response
    view = sizes.prefix + sum(kept) + live

    draft = encode = 0.0
    if scorer in ("draft", "causal"):
        rows = sizes.prefix + sizes.query + cell.draft_length
        draft = cell.draft_steps * count(rows, rows, cell.draft_length)

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
    if cell.selects_only:
        encode = decode = 0.0
    score = _pass(count, cell, scorer, sizes)
    if isinstance(config.scorer, AttentionScorer) and scorer == config.scorer.name:
        heads = config.scorer.counted(model)
        layers = len(heads)
        first, short = counter(model, layers), counter(model, layers - 1)
        score += sum(short(chunk, sizes.prefix + chunk) for chunk in sizes.chunks)
        behind = [sizes.prefix + chunk + sizes.query for chunk in sizes.chunks]
        score += sum(first(sizes.query, seen) for seen in behind)
        score += sum(sizes.chunks) * count.keys_values
        sharpened = int(heads.any(axis=1).sum()) * counter(model, 1).pair
        score += sharpened * sizes.query * sum(sizes.prefix + chunk for chunk in sizes.chunks)
        if not config.encoding.keeps_prefix:
            score += first(sizes.prefix, sizes.prefix)
    return {"draft": draft, "score": score, "encode": encode, "decode": decode}


def _pass(count: Counter, cell: Cell, scorer: str, sizes: Sizes) -> float:
    """Counts the pass over all chunks with their query copies, or over the kept ones without."""
    own = sizes.query + (0 if scorer == "query" else cell.draft_length)
    if scorer == "chunk-draft":
        conditioned = [sizes.prefix + chunk + own for chunk in sizes.chunks]
        cost = sum(count(rows, rows, cell.draft_length) for rows in conditioned)
        words = sizes.query + cell.draft_steps
        return cost + sum(count(1 + own, rows, words) for rows in conditioned)
    in_pass, encoded = SCORERS[scorer].in_pass, sizes.chunks
    if not in_pass and cell.encoding == "joint":
        return 0.0
    if not in_pass:
        pooled = cell.encoding in ("independent", "bridge")
        encoded = [sizes.chunks[i] for i in sizes.kept] if pooled else []
    cost = count(sizes.prefix, sizes.prefix)
    cost += sum(count(chunk, sizes.prefix + chunk) for chunk in encoded)
    if in_pass:
        # In the last layer the chunks' rows are keys and values alone.
        queries = sum(count(chunk, sizes.prefix + chunk) for chunk in encoded) / count.layers
        cost -= queries - sum(encoded) * count.keys_values
        drafted = dict.fromkeys(("draft", "causal"), sizes.query + cell.draft_steps)
        scored = {**drafted, "confidence": cell.draft_length}.get(scorer, sizes.query)
        alone = scorer in ("causal", "confidence")
        copies = 1 if alone else (cell.masked_copies or scored)
        rows = copies * own + (scorer == "causal")  # and the chunk's last row again
        cost += sum(count(rows, sizes.prefix + c + own, scored) for c in sizes.chunks)
    return cost
