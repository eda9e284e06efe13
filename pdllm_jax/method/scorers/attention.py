"""The scorers "attention" and "heads": the attention that query rows pay to a chunk."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import EMPTY_LSE, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest, Scores
from pdllm_jax.method.scorers.calibration import read_heads
from pdllm_jax.method.scorers.copies import for_groups
from pdllm_jax.method.scorers.prefix import (
    encode_prefix,
    prefix_attention,
    prefix_keys,
    rotated_keys,
)
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation, rows_of
from pdllm_jax.network.sharding import (
    attention,
    chunk_attention,
    constrain,
    whole_groups,
)
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import Heads, heads_of, require

# Factor of a head's scores where its attention to the chunks is compared. A needle is a few tokens:
# at 1, hundreds of others that get little each outweigh it.
SHARPNESS = 2.0
Sums = tuple[Float[Array, "P H T"], ...]  # of exp(score) over a chunk's keys, as logarithms


@dataclasses.dataclass(frozen=True)
class AttentionScorer(Scorer):
    """A chunk's share of the sharpened attention that the query pays to the document.

    The query goes through the network behind each chunk alone, and attends to prefix, chunk and
    itself, whatever the document's length. The shares compare, over all chunks, the sum of
    exp(SHARPNESS * score) over a chunk's keys. Mean over `heads` and rows. In re-selection the
    unmasked slots of the response count too. Reads the chunks' KV where the cache has it.
    Otherwise groups of chunks go through the network in front of the query, and nothing of them is
    held. The layers behind the last one with such a head do not run.

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
    question, response = request.question, request.response
    if response is None:
        counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
    else:
        query_length = question.query_length
        question, counted = question.with_tail(response)
        counted = dynamic_updates(counted, query_length, response.confirmed)
    if cache.prefix_k is None:
        prefix = encode_prefix(model, cache.prefix_ids, cache.prefix_length, len(heads))
        cache = prefix.placed_in(model, cache)
    (batch, n), size, rows = request.wanted.shape, cache.tokens.shape[-1], counted.shape[1]
    wanted, document, mesh = request.wanted.reshape(-1), cache.document_of(batch), model.mesh
    pool, path = None if cache.streamed else cache.pool, request.implementation
    places = cache.places(jnp.where(request.wanted, jnp.arange(n), -1)).reshape(-1)
    # Of kept KV, as many rows at once as an encoding pass has.
    group = request.encode_batch * (1 if pool is None else max(1, size // rows))
    group = whole_groups(mesh, min(group, batch * n))
    inside, behind = jnp.arange(size), size + jnp.arange(rows)
    chunk_by, by = rotation(model.config, inside), rotation(model.config, behind)
    all_by = rotation(model.config, jnp.arange(size + rows))

    def score_group(pair: Array, valid: Array, found: Sums) -> Sums:
        asked, exists = pair // n, valid & wanted[pair]
        at = document[asked], pair % n
        ids, own_length = question.query[asked], question.query_length[asked]
        lengths = jnp.where(exists, cache.lengths[at], 0)

        def see(q: Array, k: Array, v: Array, lengths: Array) -> Partial:
            return attention(mesh, q, k, v, lengths, need_lse=True, finite=True)

        if pool is None:
            far = prefix_keys(model, cache, at[0])

            def attend_all(layer: int, q: Array, k: Array, v: Array, sums: Sums):
                # In the last layer the query's rows alone have queries.
                q, ahead = rotate(q, rows_of(all_by, slice(-q.shape[1], None))), q.shape[1] - rows
                (k, own_k), (v, own_v) = (jnp.split(x, [size], axis=1) for x in (k, v))
                keys = rotated_keys(k, v, lengths, chunk_by, far and far(layer))
                seen, own_q = see(q, *keys), q[:, ahead:]
                if heads[layer].any():
                    sums = (*sums, see(SHARPNESS * own_q, keys.k, keys.v, lengths).lse)
                itself = see(own_q, rotate(own_k, by), own_v, own_length)
                out = merge(Partial(seen.out[:, ahead:], seen.lse[..., ahead:]), itself).out
                return jnp.concatenate([seen.out[:, :ahead], out], axis=1), sums

            together, read = jnp.concatenate([cache.tokens[at], ids], axis=1), slice(size, None)
            _, sums = model.run(together, attend_all, (), layers=len(heads), read=read)
        else:
            to_prefix = prefix_attention(model, cache, at[0], behind)
            place = jnp.where(exists, places[pair], -1)[:, None]
            kept = pool.k, pool.v, place, pool.lengths

            def attend_kept(layer: int, q: Array, k: Array, v: Array, sums: Sums):
                to_chunk = functools.partial(
                    chunk_attention, mesh, layer=layer, implementation=path
                )
                turned = rotate(q, by)
                if heads[layer].any():
                    sums = (*sums, to_chunk(SHARPNESS * turned, *kept).lse)
                itself = see(turned, rotate(k, by), v, own_length)
                return merge(to_chunk(turned, *kept), itself, *to_prefix(layer, q)).out, sums

            _, sums = model.run(ids, attend_kept, (), layers=len(heads))
        target = jnp.where(exists, pair, batch * n)
        return jax.tree.map(lambda x, new: x.at[target].set(new, mode="drop"), found, sums)

    empty = jnp.full((batch * n, model.config.n_heads, rows), EMPTY_LSE, jnp.float32)
    none = (empty,) * int(heads.any(axis=1).sum())
    sums = constrain(mesh, for_groups(wanted, group, score_group, none))
    return tuple(_shares(x.reshape(batch, n, *x.shape[1:]), counted) for x in sums)


def _shares(lse: Float[Array, "B N H T"], rows: Bool[Array, "B T"]) -> Float[Array, "B N H"]:
    """Returns each chunk's share in the sum over all chunks, mean over the rows that count.

    The order of sums does not depend on padding.
    """
    top = jnp.maximum(lse.max(axis=1, keepdims=True), EMPTY_LSE)
    weights = jnp.where(lse <= EMPTY_LSE / 2, 0, jnp.exp(lse - top))
    total = row_sum(jnp.moveaxis(weights, 1, -1))[:, None]
    shares = jnp.where(rows[:, None, None], weights / jnp.where(total == 0, 1, total), 0)
    return row_sum(shares) / jnp.maximum(rows.sum(axis=1), 1)[:, None, None]
