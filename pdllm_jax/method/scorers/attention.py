"""The scorers "attention" and "heads": the attention that query rows pay to a chunk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import merge, merge_slots
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest, Scores
from pdllm_jax.method.scorers.calibration import read_heads
from pdllm_jax.method.scorers.layer_major import layer_major
from pdllm_jax.method.scorers.prefix import encode_prefix, prefix_attention
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import (
    attention,
    chunk_attention,
    chunk_attention_mass,
    constrain,
)
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import Heads, heads_of, require


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
            total += row_sum(jnp.where(row[:, None], of_heads, 0).swapaxes(1, 2))
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
) -> tuple[Float[Array, "B H N"], ...]:
    """Returns which share of its attention to the document each head pays to each chunk, float32.

    Mean over the query's rows; `AttentionScorer` says how they attend.

    Args:
      heads: which of them are wanted, of the first m layers, which run.

    Returns:
      The shares of each layer with such a head, of all its heads.
    """
    question, response, layers = request.question, request.response, len(heads)
    if response is None:
        counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
    else:
        query_length = question.query_length
        question, counted = question.with_tail(response)
        counted = dynamic_updates(counted, query_length, response.confirmed)
    if cache.prefix_k is None:
        prefix = encode_prefix(model, cache.prefix_ids, cache.prefix_length, layers)
        cache = prefix.placed_in(model, cache)
    wanted = request.wanted
    places = cache.places(jnp.where(wanted, jnp.arange(wanted.shape[1]), -1))
    offset = cache.tokens.shape[-1] + jnp.arange(counted.shape[1])
    by = rotation(model.config, offset)
    to_prefix = prefix_attention(model, cache, cache.document_of(len(wanted)), offset)
    pool, path, streams = cache.pool, request.implementation, None
    if pool is None or cache.streamed:
        group = request.encode_batch
        over_chunks, streams = layer_major(model, cache, wanted, group, layers - 1)

    def to_chunks(layer: int, q: Array, streams: Any) -> tuple[Any, Array | None, Any]:
        """Attention of the rows, each chunk's share [B, H, T, N] of it, streams."""
        if streams is not None:
            parts, streams = over_chunks(layer, q, streams)
            seen, shares = merge_slots(parts)
            return seen, shares.transpose(0, 2, 3, 1), streams
        assert pool is not None
        place = q, pool.k, pool.v, places, pool.lengths
        if heads[layer].any():
            shared = chunk_attention_mass(model.mesh, *place, layer=layer, implementation=path)
            return *shared, None
        seen = chunk_attention(model.mesh, *place, layer=layer, implementation=path)
        return seen, None, None

    def attend(layer: int, q: Array, k: Array, v: Array, carry: Any) -> tuple[Array, Any]:
        means, streams = carry
        turned = rotate(q, by)
        query_kv = rotate(k, by), v
        itself = attention(model.mesh, turned, *query_kv, question.query_length, need_lse=True)
        seen, shares, streams = to_chunks(layer, turned, streams)
        if shares is not None and heads[layer].any():
            means = (*means, _row_mean(model, shares, counted))
        return merge(seen, itself, *to_prefix(layer, q)).out, (means, streams)

    _, (means, _) = model.run(question.query, attend, ((), streams), layers=layers)
    return means


def _row_mean(
    model: MaskPredictor, shares: Float[Array, "B H T N"], rows: Bool[Array, "B T"]
) -> Float[Array, "B H N"]:
    """Returns the mean over the rows that count; its order of sums does not depend on padding."""
    of_rows = jnp.where(rows[:, None, :, None], shares, 0)
    total = constrain(model.mesh, row_sum(of_rows.swapaxes(2, 3)))
    return total / jnp.maximum(rows.sum(axis=1), 1)[:, None, None]
