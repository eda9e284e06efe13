"""Step 5: a chosen chunk's tokens that matter to the question, per layer and KV head.

A token's score is the attention that it receives from the last rows of the query, in a pass of
query and response over all chosen chunks: softmax over everything that those rows see, summed over
them, the maximum over a window of neighbours, the mean over the query heads of a KV head (as
SnapKV does, arXiv 2404.14469). Kept tokens lie compacted in a pool of the state's own, their keys
still rotated at chunk-local positions, so that the same attention serves.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import EMPTY_LSE, Implementation, Partial
from pdllm_jax.method.cache import ChunkPool, DenoiseState, init_pool
from pdllm_jax.method.live_forward import live_forward, live_positions, response_rows
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import heads_spec, local, rows_axis
from pdllm_jax.network.transformer import MaskPredictor

LAST_ROWS = 8  # of the query, whose attention counts
WINDOW = 7  # tokens that share the highest score among them


class _Received:
    """Attention that the tokens of the chosen chunks receive in a layer.

    On a mesh, each device has the tokens of its own KV heads.
    """

    def __init__(self, model: MaskPredictor, pool: ChunkPool, state: DenoiseState):
        self.pool, self.mesh = pool, model.mesh
        size = pool.k.shape[3]
        count = min(LAST_ROWS, state.query.shape[1])
        last = state.query_length[:, None] - count + jnp.arange(count)  # [B, rows]
        self.counts = last >= 0
        self.row = jnp.maximum(last, 0)
        position = live_positions(state, state.prefix_length[:, None] + self.row)
        self.by_chunk = rotation(model.config, position[:, None] - state.chunk_starts[..., None])
        self.ids = jnp.maximum(state.chunk_ids, 0)
        self.lengths = jnp.where(state.chunk_ids >= 0, pool.lengths[self.ids], 0)
        self.valid = jnp.arange(size) < self.lengths[..., None]  # [B, K, C]

    def keys(self, layer: int) -> Float[Array, "B K G C D"]:
        return self.pool.k[layer, self.ids]

    def values(self, layer: int) -> Float[Array, "B K G C D"]:
        return self.pool.v[layer, self.ids]

    def __call__(self, layer: int, q: Array, seen: Partial) -> Float[Array, "B K G C"]:
        """-inf where there is no token."""
        rows, over = q.shape[0], functools.partial(heads_spec, self.mesh, q.shape[0])
        each = PartitionSpec(rows_axis(self.mesh, rows))
        inputs = over(2), over(1), over(2), each, each, each, each
        received = local(self.mesh, _received, inputs, over(2))
        return received(
            q, seen.lse, self.keys(layer), self.by_chunk, self.row, self.counts, self.valid
        )

    def best(
        self, layer: int, received: Float[Array, "B K G C"], count: int, keep_first: bool
    ) -> tuple[Float[Array, "B K G count D"], Float[Array, "B K G count D"]]:
        """Keys and values of each head's `count` best tokens."""

        def pick(received: Array, keys: Array, values: Array) -> tuple[Array, Array]:
            places = best_tokens(received, count, keep_first)
            places = jnp.minimum(places, received.shape[-1] - 1)[..., None]
            keys, values = (jnp.take_along_axis(x, places, axis=3) for x in (keys, values))
            return keys, values

        heads = heads_spec(self.mesh, received.shape[0], 2)
        picked = local(self.mesh, pick, heads, heads)
        return picked(received, self.keys(layer), self.values(layer))


def _received(
    q: Float[Array, "B T H D"],
    lse: Float[Array, "B H T"],
    keys: Float[Array, "B K G C D"],
    by_chunk: Rotation,
    row: Int[Array, "B rows"],
    counts: Bool[Array, "B rows"],
    valid: Bool[Array, "B K C"],
) -> Float[Array, "B K G C"]:
    """What the last rows of the query pay, by heads: softmax, window, mean over query heads."""
    groups, dim = keys.shape[2], q.shape[-1]
    rows = jnp.take_along_axis(q, row[..., None, None], axis=1)
    lse = jnp.take_along_axis(lse, row[:, None], axis=2)  # [B, H, rows]
    lse = jnp.where(counts[:, None], lse, -EMPTY_LSE)
    turned = rotate(rows[:, None], by_chunk)
    turned = turned.reshape(*turned.shape[:3], groups, -1, dim)  # [B, K, rows, G, R, D]
    scores = jnp.einsum(
        "bktgrd,bkgcd->bkgrtc",
        turned,
        keys,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    lse = lse.reshape(lse.shape[0], 1, groups, -1, lse.shape[-1], 1)
    weights = jnp.exp(scores * dim**-0.5 - lse).sum(axis=-2)  # [B, K, G, R, C]
    weights = jnp.where(valid[:, :, None, None], weights, 0.0)
    pooled = lax.reduce_window(
        weights,
        -jnp.inf,
        lax.max,
        (1, 1, 1, 1, WINDOW),
        (1,) * 5,
        "SAME",
    ).mean(axis=3)
    return jnp.where(valid[:, :, None], pooled, -jnp.inf)


def _watched_pass(model, pool, state, implementation, watch, start):
    """A pass of query and response whose rows are kept by nobody; what `watch` gathered."""
    _, _, found = live_forward(
        model, pool, state, response_rows(state), state.prefix_length, None, implementation,
        watch=watch, hook_carry=start,
    )  # fmt: skip
    return found


def token_attention(
    model: MaskPredictor,
    pool: ChunkPool,
    state: DenoiseState,
    implementation: Implementation | None = None,
) -> Float[Array, "B K C"]:
    """What the tokens of the chosen chunks receive, the mean over layers and KV heads.

    -inf where there is no token.
    """
    received = _Received(model, pool, state)

    def watch(layer: int, q: Array, seen: Partial, total: Array) -> Array:
        return total + received(layer, q, seen).mean(axis=2)

    start = jnp.zeros(received.valid.shape, jnp.float32)
    return _watched_pass(model, pool, state, implementation, watch, start) / model.config.n_layers


def best_tokens(
    scores: Float[Array, "*rows C"], count: int, keep_first: bool
) -> Int[Array, "*rows count"]:
    """The places of the `count` best tokens, ascending; C behind them where fewer exist.

    Ties to the earlier token; keep_first: token 0, if there is one, is among them.
    """
    size = scores.shape[-1]
    if keep_first:
        first = (jnp.arange(size) == 0) & (scores > -jnp.inf)
        scores = jnp.where(first, jnp.inf, scores)
    best, places = lax.top_k(scores, count)
    return jnp.sort(jnp.where(best > -jnp.inf, places, size), axis=-1)


@functools.partial(jax.jit, static_argnames=("count", "anchors", "implementation"))
def keep_tokens(
    model: MaskPredictor,
    pool: ChunkPool,
    state: DenoiseState,
    count: int,
    *,
    anchors: bool = True,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """The state with a pool of its own that holds `count` tokens of each chosen chunk.

    Per layer and KV head; a chunk with fewer tokens keeps them all. Costs one pass of query and
    response. At least C tokens is a no-op.

    Args:
      pool: where state.chunk_ids are; it is not changed.
      count: B, tokens kept; static.
      anchors: chunks begin with an anchor, which is always kept; static.
    """
    if count >= pool.k.shape[3]:
        return state
    received = _Received(model, pool, state)
    batch, slots = state.chunk_ids.shape

    def watch(layer: int, q: Array, seen: Partial, kept: ChunkPool) -> ChunkPool:
        k, v = received.best(layer, received(layer, q, seen), count, anchors)

        def put(store: Array, rows: Array) -> Array:
            return store.at[layer].set(rows.reshape(store.shape[1:]))

        return dataclasses.replace(kept, k=put(kept.k, k), v=put(kept.v, v))

    kept = init_pool(model.config, batch * slots, count, pool.k.dtype, model.mesh)
    kept = dataclasses.replace(kept, lengths=jnp.minimum(received.lengths, count).reshape(-1))
    kept = _watched_pass(model, pool, state, implementation, watch, kept)
    own = jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)
    return dataclasses.replace(state, pool=kept, chunk_ids=jnp.where(state.chunk_ids >= 0, own, -1))
