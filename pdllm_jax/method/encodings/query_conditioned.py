"""Query-conditioned encoding: prefix, the chunk and the query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.encodings.base import Encoding, slot_ids
from pdllm_jax.method.encodings.joint import encode_jointly
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class QueryConditioned(Encoding):
    """Full attention among prefix, one chunk and the query."""

    name: ClassVar[str] = "query-conditioned"

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        state: DenoiseState,
        implementation: Implementation | None,
    ) -> DenoiseState:
        """Returns the state with its pool."""
        return encode_with_query(model, cache, state)


def encode_with_query(model: MaskPredictor, cache: ChunkCache, state: DenoiseState) -> DenoiseState:
    """One forward for each chosen chunk, over prefix, chunk and query, full attention among them.

    The query lies behind the chunk's full slot. Its rows and the prefix's are not kept: live KV is
    as stale as it was.
    """
    batch, slots = state.selected.shape

    def each(x: Array) -> Array:
        """What a request has, for each of its chunks."""
        return jnp.repeat(x, slots, axis=0)

    apart = dataclasses.replace(
        state,
        tokens=jnp.zeros((batch * slots, 0), jnp.int32),
        query=each(state.query),
        query_length=each(state.query_length),
        prefix_length=each(state.prefix_length),
        selected=state.selected.reshape(-1, 1),
        chunk_starts=each(state.prefix_length)[:, None],
        query_start=each(state.prefix_length) + cache.tokens.shape[2],
        live=None,
        pool=None,
    )
    if cache.documents > 1:
        cache = dataclasses.replace(
            cache.without_pool(),
            tokens=each(cache.tokens),
            lengths=each(cache.lengths),
            prefix_ids=each(cache.prefix_ids),
            prefix_length=each(cache.prefix_length),
        )
    pool = encode_jointly(model, cache, apart).pool
    own = jnp.where(state.selected >= 0, slot_ids(state), -1)
    return dataclasses.replace(state, pool=pool, chunk_ids=own)
