"""Bridge encoding: independent KV, of which a share is recomputed with everything in view."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, ChunkPool, DenoiseState, chosen_chunks
from pdllm_jax.method.encodings.base import Encoding, slot_ids
from pdllm_jax.method.live_forward import attend_all, response_rows, row_rotations
from pdllm_jax.method.token_selection import best_tokens, token_attention
from pdllm_jax.network.config import is_number, require
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.transformer import MaskPredictor

BridgeTokens = Literal["start", "attention"]


@dataclasses.dataclass(frozen=True)
class Bridge(Encoding):
    """Independent KV, then a share of the tokens recomputed with the other chunks in view.

    share: of a chunk's C tokens, in (0, 1]; tokens: those at its "start", or those that get most
      "attention" from the query's last rows.
    """

    name: ClassVar[str] = "bridge"
    needs_pool: ClassVar[bool] = True
    live_encoded: ClassVar[bool] = True

    share: float = 0.15
    tokens: BridgeTokens = "start"

    def __post_init__(self) -> None:
        require(
            is_number(self.share) and 0 < self.share <= 1,
            f"bridge_share must lie in (0, 1], got {self.share!r}",
        )
        known = get_args(BridgeTokens)
        require(
            self.tokens in known,
            f"bridge_tokens {self.tokens!r} is not known ({', '.join(known)})",
        )

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        state: DenoiseState,
        implementation: Implementation | None,
    ) -> DenoiseState:
        """Returns the state with its pool and fresh live KV."""
        return bridge(model, cache, state, self, implementation)


def bridge(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    config: Bridge,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Independent KV, of which a share of the tokens is recomputed with everything in view.

    One forward over the chosen tokens of every chunk, the query and the masked response; each row
    attends to prefix, all chosen chunks (whose KV this forward replaces layer by layer, where it
    recomputes it), query and response. Live KV is then fresh. The share of 1 is joint encoding but
    for the prefix, which has seen itself alone.

    Of config.tokens: "start", the first tokens of each chunk, or "attention", those that
    receive most from the query's last rows over all layers (`token_attention`), the anchor among
    them.
    """
    pool = cache.pool
    assert pool is not None
    batch, slots = state.selected.shape
    size = pool.k.shape[3]
    count = min(size, math.ceil(config.share * size))
    ids = jnp.maximum(state.chunk_ids, 0)
    lengths = jnp.where(state.chunk_ids >= 0, pool.lengths[ids], 0)  # [B, K]
    if config.tokens == "start":
        places = jnp.broadcast_to(jnp.arange(count), (batch, slots, count))
        places = jnp.where(places < lengths[..., None], places, size)
    else:
        received = token_attention(model, pool, state, implementation)
        places = best_tokens(received, count, cache.anchors)  # [B, K, count]
    chunk_rows = slots * count
    flat = places.reshape(batch, chunk_rows)
    own_rows = response_rows(state)
    own_positions = state.query_start[:, None] + jnp.arange(own_rows.shape[1])
    positions = (state.chunk_starts[..., None] + places).reshape(batch, chunk_rows)
    positions = jnp.concatenate([positions, own_positions], axis=1)
    view = row_rotations(model.config, state, positions)
    local = rotation(model.config, flat)
    slot = (jnp.arange(batch)[:, None] * slots + jnp.arange(slots))[..., None]  # [B, K, 1]

    own = ChunkPool(pool.k[:, ids.reshape(-1)], pool.v[:, ids.reshape(-1)], lengths.reshape(-1))
    state = dataclasses.replace(
        state, chunk_ids=jnp.where(state.chunk_ids >= 0, slot_ids(state), -1)
    )

    def replace(store: Array, layer: int, rows: Array) -> Array:
        """store [L, B K, G, C, D] with rows [B, K count, G, D] at their places; C is nowhere."""
        rows = rows.reshape(batch, slots, count, *rows.shape[2:])
        return store.at[layer, slot, :, places].set(rows.astype(store.dtype), mode="drop")

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        own, live = carry
        own = dataclasses.replace(
            own,
            k=replace(own.k, layer, rotate(k[:, :chunk_rows], local)),
            v=replace(own.v, layer, v[:, :chunk_rows]),
        )
        turned, live_v = rotate(k, view.own)[:, chunk_rows:], v[:, chunk_rows:]
        live_k = turned
        if live is not None:
            live = live.write(layer, turned, live_v, state.prefix_length, mesh=model.mesh)
            live_k, live_v = live.k[layer], live.v[layer]
        seen = attend_all(
            view, layer, q, live_k, live_v, own, state.chunk_ids, implementation, mesh=model.mesh
        )
        return seen.out, (own, live)

    tokens, _ = chosen_chunks(cache, state.selected)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(places, size - 1), axis=2)
    rows = jnp.concatenate([tokens.reshape(batch, chunk_rows), own_rows], axis=1)
    _, (own, live) = model.run(rows, attend, (own, state.live))
    return dataclasses.replace(state, pool=own, live=live, stale=jnp.zeros((batch,), bool))
