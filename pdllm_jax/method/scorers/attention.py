"""The scorers "attention" and "heads": the attention that query rows pay to a chunk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import EMPTY_LSE, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.scorers.base import Question, Scorer, ScoreRequest, Scores
from pdllm_jax.method.scorers.calibration import read_heads
from pdllm_jax.method.scorers.copies import for_groups
from pdllm_jax.method.scorers.prefix import encode_prefix, prefix_attention
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import (
    attention,
    chunk_attention_mass,
    constrain,
    whole_groups,
)
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import Heads, heads_of, require

SHARPNESS = 2.0

@dataclasses.dataclass(frozen=True)
class AttentionScorer(Scorer):
    """A chunk's share of the attention that the query pays to the document.

    The query goes through the network once, behind the prefix, and attends to every chunk as if
    the chunk lay directly before it. Mean over `heads` and rows. In re-selection the unmasked slots
    of the response count too. Reads the chunks' KV where the cache has it. Otherwise the chunks go
    through the network with the query, layer by layer: what is held is their residual stream, not
    their KV. The layers behind the last one with such a head do not run.

    heads: pairs (layer, head); None for all.
    """

    name: ClassVar[str] = "attention"

    heads: Heads | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", heads_of(self.heads))

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for heads that the model does not have."""
        for layer, head in self.heads or ():
            inside = layer < config.n_layers and head < config.n_heads
            sizes = f"{config.n_layers} layers of {config.n_heads} heads"
            require(inside, f"heads: the model has {sizes}, got layer {layer}, head {head}")

    def counted(self, config: ModelConfig) -> Bool[np.ndarray, "m H"]:
        """Returns which heads count, of the layers up to the last one with such a head."""
        if self.heads is None:
            return np.ones((config.n_layers, config.n_heads), bool)
        layers, heads = np.array(self.heads).T
        counted = np.zeros((1 + layers.max(), config.n_heads), bool)
        counted[layers, heads] = True
        return counted

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns shares that add up to 1 over the chunks."""
        self.check(model.config)
        heads = self.counted(model.config)
        shares = attention_shares(model, cache, request, heads)
        total = jnp.zeros(request.wanted.shape, jnp.float32)
        for row, of_heads in zip(heads[heads.any(axis=1)], shares, strict=True):
            # The order of this sum does not depend on padding.
            total += row_sum(jnp.where(row, of_heads, 0))
        return total / heads.sum()


@dataclasses.dataclass(frozen=True)
class HeadScorer(AttentionScorer):
    """`AttentionScorer` of retrieval heads: those that a calibration has found for the model.

    Needs its heads: `calibrated` reads those that are saved with a checkpoint.
    """

    name: ClassVar[str] = "heads"

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError without heads, and for heads that the model does not have."""
        find = "scripts/calibrate.py CHECKPOINT (pdllm-calibrate) finds and saves them"
        require(self.heads is not None, f"scorer 'heads' needs the model's retrieval heads: {find}")
        super().check(config)

    def calibrated(self, checkpoint: Path) -> HeadScorer:
        """Returns the scorer with the heads saved in a checkpoint's folder, unless it has some."""
        if self.heads is not None:
            return self
        return dataclasses.replace(self, heads=read_heads(checkpoint))


def attention_shares(
    model: MaskPredictor, cache: ChunkCache, request: ScoreRequest, heads: Bool[np.ndarray, "m H"]
) -> tuple[Float[Array, "B N H"], ...]:
    """Returns which share of its attention to the document each head pays to each chunk, float32.

    Mean over the query's rows; `AttentionScorer` says how they attend.

    Args:
      heads: which of them are wanted, of the first m layers, which run.

    Returns:
      The shares of each layer with such a head, of all its heads.
    """
    question, response, pool = request.question, request.response, cache.pool
    if response is None:
        counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
    else:
        query_length = question.query_length
        question, counted = question.with_tail(response)
        counted = dynamic_updates(counted, query_length, response.confirmed)
    if cache.prefix_k is None:
        prefix = encode_prefix(model, cache.prefix_ids, cache.prefix_length, len(heads))
        cache = prefix.placed_in(model, cache)
    queries = _queries(model, cache, question, heads)
    if pool is None or cache.streamed:
        shares = [_shares(lse) for lse in _chunk_pass(model, cache, request, queries)]
    else:
        wanted, path = request.wanted, request.implementation
        kept = pool.k, pool.v, cache.places(jnp.where(wanted, jnp.arange(wanted.shape[1]), -1))
        shares = [
            chunk_attention_mass(model.mesh, q, *kept, pool.lengths, layer=i, implementation=path)
            .mass.transpose(0, 3, 1, 2)
            for i, q in queries.items()
        ]
    # The order of this sum does not depend on padding.
    sums = [row_sum(jnp.where(counted[:, None, None], x, 0)) for x in shares]
    rows = jnp.maximum(counted.sum(axis=1), 1)[:, None, None]
    return tuple(constrain(model.mesh, x) / rows for x in sums)


def _queries(
    model: MaskPredictor, cache: ChunkCache, question: Question, heads: Bool[np.ndarray, "m H"]
) -> dict[int, Float[Array, "B T H D"]]:
    """Returns the sharpened queries of each layer with a wanted head, rotated behind a chunk.

    Its rows attend to the prefix and to each other: a chunk's place before them is empty.
    """
    behind = cache.tokens.shape[-1] + jnp.arange(question.query.shape[1])
    by, document = rotation(model.config, behind), cache.document_of(len(question.query))
    to_prefix = prefix_attention(model, cache, document, behind)

    def attend(layer: int, q: Array, k: Array, v: Array, queries: Any) -> tuple[Array, Any]:
        turned, kv = rotate(q, by), (rotate(k, by), v)
        if heads[layer].any():
            queries = {**queries, layer: SHARPNESS * turned}
        itself = attention(model.mesh, turned, *kv, question.query_length, need_lse=True)
        return merge(itself, *to_prefix(layer, q)).out, queries

    return model.run(question.query, attend, {}, layers=len(heads))[1]


def _chunk_pass(
    model: MaskPredictor,
    cache: ChunkCache,
    request: ScoreRequest,
    queries: dict[int, Float[Array, "B T H D"]],
) -> list[Float[Array, "B N H T"]]:
    """Returns the log-sum-exps of queries over the keys of each chunk, layer by layer.

    Groups of chunks go through the network as far as the last of these layers, in which they are
    keys alone.
    """
    (batch, n), size, last = request.wanted.shape, cache.tokens.shape[-1], max(queries)
    wanted, document = request.wanted.reshape(-1), cache.document_of(batch)
    group = whole_groups(model.mesh, min(request.encode_batch, batch * n))
    inside = jnp.arange(size)
    by = rotation(model.config, inside)

    def score_group(pair: Array, valid: Array, sums: list[Array]) -> list[Array]:
        request, exists = pair // n, valid & wanted[pair]
        at = document[request], pair % n
        lengths = jnp.where(exists, cache.lengths[at], 0)
        to_prefix = prefix_attention(model, cache, at[0], inside)

        def see(q: Array, k: Array, v: Array) -> Partial:
            return attention(model.mesh, q, k, v, lengths, need_lse=True)

        def attend(layer: int, q: Array, k: Array, v: Array, new: Any) -> tuple[Array, Any]:
            k = rotate(k, by)
            if layer in queries:
                new = [*new, see(queries[layer][request], k, v).lse]
            return merge(see(rotate(q, by), k, v), *to_prefix(layer, q)).out, new

        x, new = model.run(cache.tokens[at], attend, [], layers=last)
        k = rotate(model.keys(last, x), by)
        new = [*new, see(queries[last][request], k, k).lse]
        target = jnp.where(exists, pair, batch * n)
        return [x.at[target].set(lse, mode="drop") for x, lse in zip(sums, new, strict=True)]

    rows, heads = queries[last].shape[1:3]
    empty = jnp.full((batch * n, heads, rows), EMPTY_LSE, jnp.float32)
    sums = for_groups(wanted, group, score_group, [empty] * len(queries))
    return [x.reshape(batch, n, heads, rows) for x in sums]


def _shares(lse: Float[Array, "B N H T"]) -> Float[Array, "B N H T"]:
    """Returns each chunk's share in the sum over all chunks."""
    top = jnp.maximum(lse.max(axis=1, keepdims=True), EMPTY_LSE)
    weights = jnp.where(lse <= EMPTY_LSE / 2, 0, jnp.exp(lse - top))
    total = row_sum(jnp.moveaxis(weights, 1, -1))[:, None]
    return weights / jnp.where(total == 0, 1, total)
