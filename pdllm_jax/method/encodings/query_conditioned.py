"""Query-conditioned encoding: prefix, the chunk and the query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, Placement
from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding
from pdllm_jax.method.encodings.joint import encode_rows
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class QueryConditioned(Encoding):
    """Full attention among prefix, one chunk and the query."""

    name: ClassVar[str] = "query-conditioned"

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        request: EncodeRequest,
        implementation: Implementation | None,
    ) -> Encoded:
        """Runs one forward for each chosen chunk, the query behind the chunk's full slot.

        Keeps the KV of the chunk's rows alone.
        """
        slots = request.selected.shape[1]

        def per_chunk(x: Array) -> Array:
            """Repeats the value of a request for each of its chunks."""
            return jnp.repeat(x, slots, axis=0)

        selected, query = request.selected.reshape(-1, 1), per_chunk(request.rows.query)
        prefix = per_chunk(request.placement.prefix_length)
        placement = Placement(
            chunk_ids=selected,
            chunk_starts=prefix[:, None],
            query_start=prefix + cache.tokens.shape[2],
            prefix_length=prefix,
            total=prefix + per_chunk(request.rows.query_length),
        )
        if cache.documents > 1:
            cache = dataclasses.replace(
                cache.without_pool(),
                tokens=per_chunk(cache.tokens),
                lengths=per_chunk(cache.lengths),
                prefix_ids=per_chunk(cache.prefix_ids),
                prefix_length=per_chunk(cache.prefix_length),
            )
        pool = encode_rows(model, cache, selected, placement, query, None).pool
        return Encoded(pool, request.live)
