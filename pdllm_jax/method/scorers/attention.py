"""The scorer "attention": the attention that query rows pay to a chunk."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import merge
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.question import Question
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, chunk_attention_mass
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class AttentionScorer(Scorer):
    """A chunk's share of the attention that the query pays to the document.

    The query goes through the network once, behind the prefix, and attends to every chunk as if
    the chunk lay directly before it. Mean over layers, heads and rows. In re-selection the unmasked
    slots of the response count too.
    """

    name: ClassVar[str] = "attention"
    needs_pool: ClassVar[bool] = True

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns shares that add up to 1 over the chunks."""
        question, counted = _counted_rows(request)
        pool, row = cache.pool, jnp.arange(question.query.shape[1])
        assert pool is not None
        document = cache.document_of(question.query.shape[0])
        chunk_ids = jnp.where(request.wanted, jnp.arange(request.wanted.shape[1]), -1)
        places, chunk_size = cache.places(chunk_ids), cache.tokens.shape[-1]
        by_chunk = rotation(model.config, chunk_size + row)
        start = cache.prefix_length[document, None] + chunk_size
        by_prefix = rotation(model.config, start + row)
        weights = counted.astype(jnp.float32)

        def attend(layer: int, q: Array, k: Array, v: Array, total: Array) -> tuple[Array, Array]:
            turned = rotate(q, by_chunk)
            query_kv = rotate(k, by_chunk), v
            parts = [attention(model.mesh, turned, *query_kv, question.query_length, need_lse=True)]
            if cache.prefix_k is not None and cache.prefix_v is not None:
                parts.append(
                    attention(
                        model.mesh,
                        rotate(q, by_prefix),
                        cache.prefix_k[layer][document],
                        cache.prefix_v[layer][document],
                        cache.prefix_length[document],
                        need_lse=True,
                    )
                )
            seen, mass = chunk_attention_mass(
                model.mesh, turned, pool.k, pool.v, places, pool.lengths,
                layer=layer, implementation=request.implementation,
            )  # fmt: skip
            share = jnp.einsum("bhtn,bt->bn", mass, weights)
            share /= jnp.maximum(weights.sum(axis=-1), 1)[:, None] * q.shape[2]
            return merge(seen, *parts).out, total + share

        zeros = jnp.zeros(places.shape, jnp.float32)
        _, total = model.run(question.query, attend, zeros)
        return total / model.config.n_layers


def _counted_rows(request: ScoreRequest) -> tuple[Question, Bool[Array, "B T"]]:
    """Returns the rows that go through the network, and which of them count."""
    question, response = request.question, request.response
    if response is None:
        row = jnp.arange(question.query.shape[1])
        return question, row < question.query_length[:, None]
    slots = response.tokens.shape[1]
    rows = jnp.pad(question.query, ((0, 0), (0, slots)))
    counted = jnp.arange(rows.shape[1]) < question.query_length[:, None]
    return (
        question._replace(
            query=dynamic_updates(rows, question.query_length, response.tokens),
            query_length=question.query_length + slots,
        ),
        dynamic_updates(counted, question.query_length, response.unmasked),
    )
