"""Step 5: the tokens of a chosen chunk that matter to the question, per layer and KV head.

A token's score is the attention between it and the query's last rows: softmax over all that a row
attends to, summed over the query's rows, maximum over a window of neighbors, mean over the query
heads of a KV head (as SnapKV, arXiv 2404.14469).

  query-to-chunk  what it receives, in a pass of query and response over all chosen chunks
  chunk-to-query  what it gives, in one joint forward over prefix, chosen chunks, query and response
  both            the sum of these two scores

Kept tokens are compacted in a new pool. Their keys stay rotated at chunk-local positions, so the
same attention reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import EMPTY_LSE, Partial, restored
from pdllm_jax.method.cache import ChunkCache, ChunkPool, init_pool
from pdllm_jax.method.live_forward import (
    Context,
    QueryRows,
    joint_rows,
    live_forward,
    live_positions,
)
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention, heads_spec, local, rows_axis
from pdllm_jax.network.transformer import MaskPredictor

KeepBy = Literal["query-to-chunk", "chunk-to-query", "both"]

LAST_ROWS = 8  # of the query, whose attention counts
WINDOW = 7  # tokens that share the highest score among them


class _LastRows(NamedTuple):
    """The query's last rows, and the chosen chunks' tokens that they attend to.

    by_chunk: their rotation for each chunk. row: index among query rows. counts: rows that exist.
    valid: tokens that exist.
    """

    by_chunk: Rotation
    row: Int[Array, "B rows"]
    counts: Bool[Array, "B rows"]
    valid: Bool[Array, "B K C"]

    def received(
        self,
        q: Float[Array, "B T H D"],
        lse: Float[Array, "B H T"],
        keys: Float[Array, "B K G C D"],
    ) -> Float[Array, "B K G C"]:
        """Returns the attention that each token receives; -inf where there is no token."""
        groups, dim = keys.shape[2], q.shape[-1]
        rows = jnp.take_along_axis(q, self.row[..., None, None], axis=1)
        lse = jnp.take_along_axis(lse, self.row[:, None], axis=2)  # [B, H, rows]
        lse = jnp.where(self.counts[:, None], lse, -EMPTY_LSE)
        turned = rotate(rows[:, None], self.by_chunk)
        turned = turned.reshape(*turned.shape[:3], groups, -1, dim)  # [B, K, rows, G, R, D]
        scores = _float32_product("bktgrd,bkgcd->bkgrtc", turned, keys)
        lse = lse.reshape(lse.shape[0], 1, groups, -1, lse.shape[-1], 1)
        weights = jnp.exp(scores * dim**-0.5 - lse).sum(axis=-2)
        return _pooled(weights, self.valid)


class _ChunkRows(NamedTuple):
    """The chosen chunks' tokens, and the query's last rows that they attend to, in a joint forward.

    token, row: their rows. counts: query rows that exist. valid: tokens that exist.
    """

    token: Int[Array, "B K C"]
    row: Int[Array, "B rows"]
    counts: Bool[Array, "B rows"]
    valid: Bool[Array, "B K C"]

    def given(
        self,
        q: Float[Array, "B T H D"],
        lse: Float[Array, "B H T"],
        k: Float[Array, "B T G D"],
    ) -> Float[Array, "B K G C"]:
        """Returns the attention that each token gives, q and k rotated; -inf without a token."""
        (batch, slots, size), (groups, dim) = self.token.shape, k.shape[2:]
        token = self.token.reshape(batch, -1)
        tokens = jnp.take_along_axis(q, token[..., None, None], axis=1)
        tokens = tokens.reshape(batch, slots, size, groups, -1, dim)
        keys = jnp.take_along_axis(k, self.row[..., None, None], axis=1)
        lse = jnp.take_along_axis(lse, token[:, None], axis=2)  # [B, H, K C]
        lse = lse.reshape(batch, groups, -1, slots, size).transpose(0, 3, 1, 2, 4)
        scores = _float32_product("bkcgrd,btgd->bkgrtc", tokens, keys)
        weights = jnp.exp(scores * dim**-0.5 - lse[..., None, :])
        counts = self.counts[:, None, None, None, :, None]
        return _pooled(jnp.where(counts, weights, 0.0).sum(axis=-2), self.valid)


def _float32_product(subscripts: str, q: Array, k: Array) -> Array:
    """Returns `jnp.einsum` in float32, with true float32 products of float32 inputs."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, q, k, precision=precision, preferred_element_type=jnp.float32)


def _pooled(
    weights: Float[Array, "B K G R C"], valid: Bool[Array, "B K C"]
) -> Float[Array, "B K G C"]:
    """Returns the mean over query heads of the maximum over neighbors; -inf without a token."""
    weights = jnp.where(valid[:, :, None, None], weights, 0.0)
    window, strides = (1, 1, 1, 1, WINDOW), (1,) * 5
    pooled = lax.reduce_window(weights, -jnp.inf, lax.max, window, strides, "SAME").mean(axis=3)
    return jnp.where(valid[:, :, None], pooled, -jnp.inf)


def _last_rows(query: QueryRows) -> tuple[Int[Array, "B rows"], Bool[Array, "B rows"]]:
    """Returns the query's last rows, counted from its first one, and which of them exist."""
    count = min(LAST_ROWS, query.query.shape[1])
    last = query.query_length[:, None] - count + jnp.arange(count)
    return jnp.maximum(last, 0), last >= 0


def _over_layers(
    model: MaskPredictor,
    context: Context,
    query: QueryRows,
    update: Callable[[int, Float[Array, "B K G C"], Any], Any],
    carry: Any,
) -> Any:
    """Hands the attention that tokens receive to `update`, layer by layer; returns its carry.

    Costs one pass of query and response. On a mesh, each device has the tokens of its KV heads.
    """
    pool, placement = context.pool, context.placement
    assert pool is not None
    row, counts = _last_rows(query)
    position = live_positions(placement, placement.prefix_length[:, None] + row)
    ids, lengths = pool.rows_of(placement.chunk_ids)
    by_chunk = rotation(model.config, position[:, None] - placement.chunk_starts[..., None])
    valid = jnp.arange(pool.k.shape[3]) < lengths[..., None]
    rows = _LastRows(by_chunk, row, counts, valid)
    batch = PartitionSpec(rows_axis(model.mesh, len(ids)))
    heads, by_head = (heads_spec(model.mesh, len(ids), axis) for axis in (2, 1))
    received = local(model.mesh, _LastRows.received, (batch, heads, by_head, heads), heads)

    def hook(layer: int, q: Array, seen: Partial, carry: Any) -> Any:
        keys = restored(jax.tree.map(lambda x: x[layer, ids], pool.k), q.dtype)
        return update(layer, received(rows, q, seen.lse, keys), carry)

    return live_forward(model, context, query.ids, hook=hook, hook_carry=carry)[2]


def token_attention(
    model: MaskPredictor, context: Context, query: QueryRows
) -> Float[Array, "B K C"]:
    """Returns what tokens of the chosen chunks receive, the mean over layers and KV heads.

    -inf where there is no token.
    """
    assert context.pool is not None
    zeros = jnp.zeros((*context.placement.chunk_ids.shape, context.pool.k.shape[3]), jnp.float32)

    def add(layer: int, received: Array, total: Array) -> Array:
        return total + received.mean(axis=2)

    return _over_layers(model, context, query, add, zeros) / model.config.n_layers


def _given(
    model: MaskPredictor,
    cache: ChunkCache,
    context: Context,
    query: QueryRows,
    selected: Int[Array, "B K"],
) -> tuple[Float[Array, "B K G C"], ...]:
    """Returns the attention that tokens give to the query's last rows, of every layer.

    Costs one forward over prefix, chosen chunks, query and response. On a mesh as `_over_layers`.
    """
    joint = joint_rows(cache, selected, context.placement, query.ids)
    row, counts = _last_rows(query)
    _, lengths = cache.chosen(selected)
    valid = jnp.arange(cache.tokens.shape[2]) < lengths[..., None]
    rows = _ChunkRows(joint.chunk_row, joint.own_start[:, None] + row, counts, valid)
    by, mesh, size = rotation(model.config, joint.positions), model.mesh, len(selected)
    batch = PartitionSpec(rows_axis(mesh, size))
    heads, by_head = (heads_spec(mesh, size, axis) for axis in (2, 1))
    given = local(mesh, _ChunkRows.given, (batch, heads, by_head, heads), heads)

    def attend(layer: int, q: Array, k: Array, v: Array, carry: tuple[Array, ...]):
        q, k = rotate(q, by), rotate(k, by)
        seen = attention(mesh, q, k, v, joint.total, need_lse=True)
        return seen.out, (*carry, given(rows, q, seen.lse, k))

    return model.run(joint.ids, attend, ())[1]


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
    cache: ChunkCache,
    context: Context,
    query: QueryRows,
    selected: Int[Array, "B K"],
    count: int,
    by: KeepBy = "query-to-chunk",
) -> ChunkPool:
    """Returns a pool of `count` tokens of each chosen chunk: slot j of request b at b K + j.

    Per layer and KV head; a chunk with fewer tokens keeps them all. An anchor is always kept.

    Args:
      cache, selected: the document and the ids of the chosen chunks.
      context: their KV. query: query and response.
      count: at most C. by: the attention that ranks tokens, as in this module's docstring.
    """
    pool, chunk_ids = context.pool, context.placement.chunk_ids
    assert pool is not None
    ids, lengths = pool.rows_of(chunk_ids)
    kind = pool.k.dtype, model.mesh, pool.kv_format
    kept = init_pool(model.config, chunk_ids.size, count, *kind)
    kept = dataclasses.replace(kept, lengths=jnp.minimum(lengths, count).reshape(-1))

    def pick(scores: Array, kv: Any) -> Any:
        """Returns keys and values [B, K, G, count, D] of each head's best tokens; scales stay."""
        places = best_tokens(scores, count, cache.anchors)
        places = jnp.minimum(places, scores.shape[-1] - 1)[..., None]

        def best(x: Array) -> Array:
            return jnp.take_along_axis(x, places, axis=3) if x.ndim == places.ndim else x

        return jax.tree.map(best, kv)

    heads = heads_spec(model.mesh, len(chunk_ids), 2)
    pick_by_heads = local(model.mesh, pick, heads, heads)

    def keep(layer: int, scores: Array, kept: ChunkPool) -> ChunkPool:
        kv = pick_by_heads(scores, jax.tree.map(lambda x: x[layer, ids], (pool.k, pool.v)))

        def put(store: Array, rows: Array) -> Array:
            return store.at[layer].set(rows.reshape(store.shape[1:]))

        k, v = jax.tree.map(put, (kept.k, kept.v), kv)
        return dataclasses.replace(kept, k=k, v=v)

    if by == "query-to-chunk":
        return _over_layers(model, context, query, keep, kept)
    given = _given(model, cache, context, query, selected)
    if by == "both":

        def keep_by_sum(layer: int, received: Array, kept: ChunkPool) -> ChunkPool:
            return keep(layer, received + given[layer], kept)

        return _over_layers(model, context, query, keep_by_sum, kept)
    for layer, scores in enumerate(given):
        kept = keep(layer, scores, kept)
    return kept
