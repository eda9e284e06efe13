"""The denoising state, and where its chunks are placed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pdllm_jax.cache import ChunkCache, ChunkPool, LiveCache
from pdllm_jax.config import Positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoiseState:
    """Everything that changes while a response is denoised; B requests, G response tokens each.

    tokens [B, G] int32: the response; masked slots hold the mask token.
    query [B, Q], query_length [B], prefix_length [B]: the other live rows.
    selected [B, K]: ids of the document's chunks that are kept, ascending, negative for an empty
      slot.
    chunk_ids [B, K]: their places in the pool that is attended to, negative for an empty slot.
    chunk_starts [B, K]: position of each chunk's first row.
    query_start [B]: position of the query's first row, behind the last chunk's full slot.
    live: KV of the live rows; None where nothing is ever read from it.
    pool: chunks of the state's own (joint encoding, bridge, kept tokens); None where the document's
      cache serves.
    block [B], step [B]: block being denoised (all done at gen_length / block_length), and the
      evaluations made in it.
    stale [B]: live KV must be recomputed before it is used.
    evaluations [B]: denoising evaluations so far; encoding and scoring are not among them.
    rescored [B]: how often the chunks were scored anew (`reselect`).
    keys [B]: PRNG key of each request.
    live_encoded: live KV was made with the chunks' (joint encoding, bridge), so that it is stale
      after a block alone.
    """

    tokens: Int[Array, "B G"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    prefix_length: Int[Array, "B"]
    selected: Int[Array, "B K"]
    chunk_ids: Int[Array, "B K"]
    chunk_starts: Int[Array, "B K"]
    query_start: Int[Array, "B"]
    live: LiveCache | None
    pool: ChunkPool | None
    block: Int[Array, "B"]
    step: Int[Array, "B"]
    stale: Bool[Array, "B"]
    evaluations: Int[Array, "B"]
    rescored: Int[Array, "B"]
    keys: Array
    live_encoded: bool = dataclasses.field(default=False, metadata={"static": True})


def placed(
    state: DenoiseState, cache: ChunkCache, selected: Int[Array, "B K"], positions: Positions
) -> DenoiseState:
    """The state with these chunks chosen, at their places in the cache's pool and in the prompt.

    Positions of chunk j, id n: "continuous" P + j C, "absolute" P + n C, "reuse" P. The query
    starts behind the full slot of the last: at P + K C, P + N C or P + C, K and N counting what
    exists.
    """
    documents = cache.per_document()
    n, size = documents.tokens.shape[1:]
    there = selected >= 0
    document = jnp.arange(selected.shape[0]) if cache.batched else jnp.zeros((), jnp.int32)
    lengths = jnp.broadcast_to(documents.lengths, (selected.shape[0], n))
    if positions == "continuous":
        slot = jnp.arange(selected.shape[1])[None]
        slots = jnp.count_nonzero(there, axis=1)
    elif positions == "absolute":
        slot, slots = jnp.maximum(selected, 0), jnp.count_nonzero(lengths, axis=1)
    else:
        slot, slots = jnp.zeros_like(selected), there.any(axis=1).astype(jnp.int32)
    start = state.prefix_length[:, None]
    return dataclasses.replace(
        state,
        selected=selected,
        chunk_ids=jnp.where(there, document[..., None] * n + selected, -1),
        chunk_starts=jnp.broadcast_to(start + slot * size, selected.shape),
        query_start=state.prefix_length + slots * size,
    )


def chosen_chunks(
    cache: ChunkCache, selected: Int[Array, "B K"]
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """Tokens and valid lengths of the chosen chunks; empty slots have length 0."""
    documents = cache.per_document()
    batch, ids = selected.shape[0], jnp.maximum(selected, 0)
    document = jnp.arange(batch)[:, None] if cache.batched else jnp.zeros((batch, 1), jnp.int32)
    lengths = jnp.where(selected >= 0, documents.lengths[document, ids], 0)
    return documents.tokens[document, ids], lengths
