"""The scorer "attention": the attention that query rows pay to a chunk."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import merge
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest, Scores, prefix_attention
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, chunk_attention_mass
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class AttentionScorer(Scorer):
    """A chunk's share of the attention that the query pays to the document.

    Mean over layers, heads and rows, see `attention_shares`. In re-selection the unmasked slots of
    the response count too.
    """

    name: ClassVar[str] = "attention"
    needs_pool: ClassVar[bool] = True

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns shares that add up to 1 over the chunks."""
        return attention_shares(model, cache, request).mean(axis=(0, 2))


def attention_shares(
    model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
) -> Float[Array, "L B H N"]:
    """Returns which share of its attention to the document each head pays to each chunk, float32.

    The query goes through the network once, behind the prefix, and attends to every chunk as if
    the chunk lay directly before it. Mean over the query's rows.

    Args:
      cache: with the KV of every chunk.
    """
    question, response, pool = request.question, request.response, cache.pool
    assert pool is not None
    if response is None:
        counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
    else:
        query_length = question.query_length
        question, counted = question.with_tail(response)
        counted = dynamic_updates(counted, query_length, response.confirmed)
    weights = counted.astype(jnp.float32)
    chunk_ids = jnp.where(request.wanted, jnp.arange(request.wanted.shape[1]), -1)
    places = cache.places(chunk_ids)
    offset = cache.tokens.shape[-1] + jnp.arange(counted.shape[1])
    by = rotation(model.config, offset)
    document = cache.document_of(counted.shape[0])
    to_prefix = prefix_attention(model, cache, document, offset)
    path = request.implementation
    to_chunks = functools.partial(chunk_attention_mass, model.mesh, implementation=path)
    Shares = tuple[Array, ...]

    def attend(layer: int, q: Array, k: Array, v: Array, shares: Shares) -> tuple[Array, Shares]:
        turned = rotate(q, by)
        query_kv = rotate(k, by), v
        itself = attention(model.mesh, turned, *query_kv, question.query_length, need_lse=True)
        before = to_prefix(layer, q)
        seen, mass = to_chunks(turned, pool.k, pool.v, places, pool.lengths, layer=layer)
        share = jnp.einsum("bhtn,bt->bhn", mass, weights)
        share /= jnp.maximum(weights.sum(axis=-1), 1)[:, None, None]
        return merge(seen, itself, *before).out, (*shares, share)

    _, shares = model.run(question.query, attend, ())
    return jnp.stack(shares)
