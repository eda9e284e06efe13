"""Step 5: the tokens of a chosen chunk that matter to the question, per layer and KV head.

A token's score is the attention that it receives from the query's last rows, in a pass of query and
response over all chosen chunks: softmax over all that those rows attend to, summed over the rows,
maximum over a window of neighbors, mean over the query heads of a KV head (as SnapKV,
arXiv 2404.14469). Kept tokens are compacted in a new pool. Their keys stay rotated at chunk-local
positions, so the same attention reads them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import EMPTY_LSE, Implementation, Partial
from pdllm_jax.method.cache import ChunkPool, LiveCache, Placement, init_pool
from pdllm_jax.method.live_forward import QueryRows, live_forward, live_positions
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import heads_spec, local, rows_axis
from pdllm_jax.network.transformer import MaskPredictor

LAST_ROWS = 8  # of the query, whose attention counts
WINDOW = 7  # tokens that share the highest score among them


class _LastRows(NamedTuple):
    """The query's last rows, and the chosen chunks' tokens that they attend to.

    row [B, rows]: index among query rows; counts: rows that exist; by_chunk: their rotation for
    each chunk. ids [B, K]: pool places; lengths [B, K], valid [B, K, C]: tokens that exist.
    """

    row: Int[Array, "B rows"]
    counts: Bool[Array, "B rows"]
    by_chunk: Rotation
    ids: Int[Array, "B K"]
    lengths: Int[Array, "B K"]
    valid: Bool[Array, "B K C"]


def _last_rows(
    model: MaskPredictor, pool: ChunkPool, placement: Placement, rows: QueryRows
) -> _LastRows:
    count = min(LAST_ROWS, rows.query.shape[1])
    last = rows.query_length[:, None] - count + jnp.arange(count)
    row = jnp.maximum(last, 0)
    position = live_positions(placement, placement.prefix_length[:, None] + row)
    ids = jnp.maximum(placement.chunk_ids, 0)
    lengths = jnp.where(placement.chunk_ids >= 0, pool.lengths[ids], 0)
    return _LastRows(
        row,
        last >= 0,
        rotation(model.config, position[:, None] - placement.chunk_starts[..., None]),
        ids,
        lengths,
        jnp.arange(pool.k.shape[3]) < lengths[..., None],
    )


def _received(
    model: MaskPredictor, pool: ChunkPool, last: _LastRows, layer: int, q: Array, seen: Partial
) -> Float[Array, "B K G C"]:
    """Returns the attention that each token receives; -inf where there is no token.

    On a mesh, each device has the tokens of its own KV heads.
    """
    spec = functools.partial(heads_spec, model.mesh, q.shape[0])
    batch = PartitionSpec(rows_axis(model.mesh, q.shape[0]))
    inputs = spec(2), spec(1), spec(2), batch, batch, batch, batch
    received = local(model.mesh, _received_by_heads, inputs, spec(2))
    keys = pool.k[layer, last.ids]
    return received(q, seen.lse, keys, last.by_chunk, last.row, last.counts, last.valid)


def _best_rows(
    model: MaskPredictor,
    received: Float[Array, "B K G C"],
    keys: Float[Array, "B K G C D"],
    values: Float[Array, "B K G C D"],
    count: int,
    keep_first: bool,
) -> tuple[Float[Array, "B K G count D"], Float[Array, "B K G count D"]]:
    """Returns keys and values of each head's `count` best tokens."""

    def pick(received: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        places = best_tokens(received, count, keep_first)
        places = jnp.minimum(places, received.shape[-1] - 1)[..., None]
        keys, values = (jnp.take_along_axis(x, places, axis=3) for x in (keys, values))
        return keys, values

    heads = heads_spec(model.mesh, received.shape[0], 2)
    return local(model.mesh, pick, heads, heads)(received, keys, values)


def _received_by_heads(
    q: Float[Array, "B T H D"],
    lse: Float[Array, "B H T"],
    keys: Float[Array, "B K G C D"],
    by_chunk: Rotation,
    row: Int[Array, "B rows"],
    counts: Bool[Array, "B rows"],
    valid: Bool[Array, "B K C"],
) -> Float[Array, "B K G C"]:
    """Returns softmax weights summed over rows, window maximum, mean over a KV head's heads."""
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


def token_attention(
    model: MaskPredictor,
    pool: ChunkPool,
    placement: Placement,
    rows: QueryRows,
    live: LiveCache | None,
    implementation: Implementation | None = None,
) -> Float[Array, "B K C"]:
    """Returns what tokens of the chosen chunks receive, the mean over layers and KV heads.

    -inf where there is no token. Costs one pass of query and response; `live` stays as it is.
    """
    last = _last_rows(model, pool, placement, rows)

    def add(layer: int, q: Array, seen: Partial, total: Array) -> Array:
        return total + _received(model, pool, last, layer, q, seen).mean(axis=2)

    _, _, total = live_forward(
        model,
        pool,
        placement,
        live,
        rows.ids,
        placement.prefix_length,
        implementation=implementation,
        hook=add,
        hook_carry=jnp.zeros(last.valid.shape, jnp.float32),
    )
    return total / model.config.n_layers


def best_tokens(
    scores: Float[Array, "*rows C"], count: int, keep_first: bool
) -> Int[Array, "*rows count"]:
    """Returns the places of the `count` best tokens, ascending; C behind them where fewer exist.

    Ties to the earlier token. keep_first: includes token 0, if it exists.
    """
    size = scores.shape[-1]
    if keep_first:
        first = (jnp.arange(size) == 0) & (scores > -jnp.inf)
        scores = jnp.where(first, jnp.inf, scores)
    best, places = lax.top_k(scores, count)
    return jnp.sort(jnp.where(best > -jnp.inf, places, size), axis=-1)


def keep_tokens(
    model: MaskPredictor,
    pool: ChunkPool,
    placement: Placement,
    rows: QueryRows,
    live: LiveCache | None,
    count: int,
    *,
    anchors: bool = True,
    implementation: Implementation | None = None,
) -> ChunkPool:
    """Returns a pool of `count` tokens of each chosen chunk: slot j of request b at b K + j.

    Per layer and KV head; a chunk with fewer tokens keeps them all. Costs one pass of query and
    response.

    Args:
      pool: which placement.chunk_ids index.
      count: at most C.
      anchors: chunks begin with an anchor, which is always kept.
    """
    last = _last_rows(model, pool, placement, rows)
    kept = init_pool(model.config, placement.chunk_ids.size, count, pool.k.dtype, model.mesh)
    kept = dataclasses.replace(kept, lengths=jnp.minimum(last.lengths, count).reshape(-1))

    def keep(layer: int, q: Array, seen: Partial, kept: ChunkPool) -> ChunkPool:
        received = _received(model, pool, last, layer, q, seen)
        keys, values = pool.k[layer, last.ids], pool.v[layer, last.ids]
        k, v = _best_rows(model, received, keys, values, count, anchors)

        def put(store: Array, rows: Array) -> Array:
            return store.at[layer].set(rows.reshape(store.shape[1:]))

        return dataclasses.replace(kept, k=put(kept.k, k), v=put(kept.v, v))

    _, _, kept = live_forward(
        model,
        pool,
        placement,
        live,
        rows.ids,
        placement.prefix_length,
        implementation=implementation,
        hook=keep,
        hook_carry=kept,
    )
    return kept
