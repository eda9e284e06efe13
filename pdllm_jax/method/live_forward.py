"""The network on live rows (prefix, query, response), which attend to the chosen chunks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, OwnKV, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import (
    ChunkCache,
    ChunkPool,
    DenoiseState,
    LiveCache,
    Placement,
    dynamic_updates,
)
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention, chunk_attention
from pdllm_jax.network.transformer import MaskPredictor

# (layer, q [B, T, H, D] unrotated, attention of those rows, carry) -> carry.
LayerHook = Callable[[int, Array, Partial, Any], Any]


class RowRotations(NamedTuple):
    """Rotations of rows at given positions.

    live: for keys, and for queries that attend to live rows alone.
    per_chunk [B, K + 1, T]: for queries. Entry j attends to chunk j, whose keys are rotated at
      chunk-local positions; the last entry attends to live rows.
    """

    live: Rotation
    per_chunk: Rotation


class QueryRows(NamedTuple):
    """Query and response of each request.

    query, query_length: the query, padded.
    ids: query and response without a gap, then padding.
    """

    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    ids: Int[Array, "B R"]


def query_rows(state: DenoiseState) -> QueryRows:
    """Returns query and response of a state."""
    rows = jnp.pad(state.query, ((0, 0), (0, state.tokens.shape[1])))
    ids = dynamic_updates(rows, state.query_length, state.tokens)
    return QueryRows(state.query, state.query_length, ids)


def live_positions(placement: Placement, row: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the positions in the prompt of rows of the live cache."""
    prefix = placement.prefix_length[:, None]
    return jnp.where(row < prefix, row, row - prefix + placement.query_start[:, None])


def row_rotations(
    config: ModelConfig, placement: Placement, positions: Int[Array, "B T"]
) -> RowRotations:
    """Returns the rotations of rows at these positions."""
    starts = jnp.pad(placement.chunk_starts, ((0, 0), (0, 1)))
    per_chunk = rotation(config, positions[:, None] - starts[..., None])
    return RowRotations(rotation(config, positions), per_chunk)


def predicting_rows(
    model: MaskPredictor,
    x: Float[Array, "B T M"],
    first: Int[Array, "B"],
    count: int,
    start: Int[Array, "B"] | int = 0,
) -> Float[Array, "B count M"]:
    """Returns the rows of a pass that predict the tokens of rows first[b] to first[b] + count - 1.

    start: row of the sequence with which x begins.
    """
    rows = model.predicting_row(first[:, None] + jnp.arange(count)) - jnp.reshape(start, (-1, 1))
    return jax.vmap(lambda x, rows: x[rows])(x, rows)


class JointRows(NamedTuple):
    """Rows of one forward without gaps: prefix, chosen chunks, rows behind them, then padding.

    ids, positions: of each row. total: valid rows.
    chunk_row: the row of each chunk token, any row where there is none. own_start: the first row
      behind the chunks.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    total: Int[Array, "B"]
    chunk_row: Int[Array, "B K C"]
    own_start: Int[Array, "B"]


def joint_rows(
    cache: ChunkCache, selected: Int[Array, "B K"], placement: Placement, own_ids: Int[Array, "B R"]
) -> JointRows:
    """Lays prefix, chosen chunks and `own_ids` without gaps, at the placement's positions.

    own_ids: rows from placement.query_start on, padded; placement.total counts the valid ones with
    the prefix.
    """
    slots, prefix_length = selected.shape[1], placement.prefix_length
    size, prefix_rows = cache.tokens.shape[2], cache.prefix_ids.shape[1]
    tokens, lengths = cache.chosen(selected)
    ends = jnp.cumsum(lengths, axis=1)
    # Each part overwrites the padding of the one before it.
    rows = jnp.zeros((len(selected), prefix_rows + slots * size + own_ids.shape[1]), jnp.int32)
    rows = rows.at[:, :prefix_rows].set(cache.prefix_ids)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    inside = jnp.arange(size)
    starts = prefix_length[:, None] + ends - lengths  # first row of each chunk, [B, K]
    for j in range(slots):
        rows = dynamic_updates(rows, starts[:, j], tokens[:, j])
        chunk_positions = placement.chunk_starts[:, j, None] + inside
        positions = dynamic_updates(positions, starts[:, j], chunk_positions)
    own_start = prefix_length + ends[:, -1]
    rows = dynamic_updates(rows, own_start, own_ids)
    own_positions = placement.query_start[:, None] + jnp.arange(own_ids.shape[1])
    positions = dynamic_updates(positions, own_start, own_positions)
    chunk_row = jnp.minimum(starts[..., None] + inside, rows.shape[1] - 1)
    return JointRows(rows, positions, placement.total + ends[:, -1], chunk_row, own_start)


class Shadow(NamedTuple):
    """Rows beside the live rows: each stands for one of them, at its position.

    A shadow row attends to all that there is but the live row that it stands for, and to the shadow
    rows. No live row attends to a shadow row, whose KV is not kept.

    ids: their tokens. start: the live row that the first of them stands for.
    behind: live rows from there on that there may be, their own among them.
    """

    ids: Int[Array, "B T"]
    start: Int[Array, "B"]
    behind: int


class Context(NamedTuple):
    """What live rows attend to, and the implementation of attention over chunks.

    pool: which placement.chunk_ids index; None without chunks.
    live: None where rows attend to each other and to chunks alone.
    """

    pool: ChunkPool | None
    placement: Placement
    live: LiveCache | None
    implementation: Implementation | None = None

    def attend(
        self,
        model: MaskPredictor,
        layer: int,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S G D"],
        v: Float[Array, "B S G D"],
        by: RowRotations,
        start: Int[Array, "B"] | Int[Array, "B S"],
        keep: Bool[Array, "B S"] | None = None,
        *,
        need_lse: bool = False,
    ) -> tuple[Partial, LiveCache | None]:
        """Writes live rows, keys rotated; attends from unrotated queries to all that there is."""
        live = self.live
        if live is not None:
            live = live.write(layer, k, v, start, keep, mesh=model.mesh)
            k, v = live.k[layer], live.v[layer]
        return self.over(model, layer, q, k, v, by, self.placement.total, need_lse), live

    def over(
        self,
        model: MaskPredictor,
        layer: int,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S G D"],
        v: Float[Array, "B S G D"],
        by: RowRotations,
        total: Int[Array, "B"],
        need_lse: bool,
    ) -> Partial:
        """Attends from unrotated queries to the chunks and the first `total` live rows, k and v."""
        pool, chunk_ids = self.pool, self.placement.chunk_ids
        if pool is None or not chunk_ids.shape[1]:
            return attention(model.mesh, rotate(q, by.live), k, v, total, need_lse=need_lse)
        return chunk_attention(
            model.mesh,
            rotate(q[:, None], by.per_chunk),
            *(pool.k, pool.v, chunk_ids, pool.lengths),
            layer=layer,
            own_kv=OwnKV(k, v, total),
            implementation=self.implementation,
        )


def live_forward(
    model: MaskPredictor,
    context: Context,
    rows: Int[Array, "B T"],
    start: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    keep: Bool[Array, "B T"] | None = None,
    *,
    hook: LayerHook | None = None,
    hook_carry: Any = None,
    shadow: Shadow | None = None,
) -> tuple[Float[Array, "B T M"], LiveCache | None, Any]:
    """Runs the network on tokens `rows`, which are live rows start[b] and on, else the query's.

    Writes their KV into the live cache, except where `keep`. Requests without chunks in the
    placement read none. The hook is called in every layer.

    start: the first of T consecutive rows, or [B, T] the number of each row, in any order.
    shadow: rows that go through the network behind `rows`.

    Returns:
      The residual stream, the live cache, and the hook's last carry.
    """
    placement = context.placement
    start = placement.prefix_length if start is None else start
    row = start if start.ndim == 2 else start[:, None] + jnp.arange(rows.shape[1])
    positions = live_positions(placement, row)
    by = row_rotations(model.config, placement, positions)
    count = rows.shape[1]

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        live, hook_carry = carry
        shadow_qkv = [x[:, count:] for x in (q, k, v)]
        if shadow is not None:
            q, k, v = (x[:, :count] for x in (q, k, v))
        k = rotate(k, by.live)
        seen, live = context._replace(live=live).attend(
            model, layer, q, k, v, by, start, keep, need_lse=hook is not None
        )
        if hook is not None:
            hook_carry = hook(layer, q, seen, hook_carry)
        if shadow is None:
            return seen.out, (live, hook_carry)
        k, v = (k, v) if live is None else (live.k[layer], live.v[layer])
        own = beside(layer, *shadow_qkv, k, v)
        return jnp.concatenate([seen.out, own], axis=1), (live, hook_carry)

    if shadow is not None:
        beside = _beside(model, context, shadow)
        rows = jnp.concatenate([rows, shadow.ids], axis=1)
    x, (live, hook_carry) = model.run(rows, attend, (context.live, hook_carry))
    return x, live, hook_carry


def _beside(model: MaskPredictor, context: Context, shadow: Shadow) -> Callable[..., Array]:
    """Returns the attention of shadow rows: (layer, their q, k, v, live k, v) -> [B, T, H, D]."""
    placement, count = context.placement, shadow.ids.shape[1]
    positions = live_positions(placement, shadow.start[:, None] + jnp.arange(count))
    by = row_rotations(model.config, placement, positions)
    row = shadow.start[:, None] + jnp.arange(shadow.behind)
    at = jnp.arange(len(row))[:, None], row
    exists = jnp.pad(row < placement.total[:, None], ((0, 0), (0, count)), constant_values=True)
    another = jnp.arange(shadow.behind + count) != jnp.arange(count)[:, None]
    seen = exists[:, None] & another

    def attend(layer: int, q: Array, k: Array, v: Array, live_k: Array, live_v: Array) -> Array:
        in_front = context.over(model, layer, q, live_k, live_v, by, shadow.start, need_lse=True)
        q, k = rotate(q, by.live), rotate(k, by.live)
        k, v = (
            jnp.concatenate([live.at[at].get(mode="clip"), own], axis=1)
            for live, own in ((live_k, k), (live_v, v))
        )
        return merge(in_front, _masked_attention(q, k, v, seen)).out

    return attend


def _masked_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    seen: Bool[Array, "B T S"],
) -> Partial:
    """Returns attention of few rows to few keys: those that each row sees, at least one."""
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], -1, d)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = row_sum(weights)
    shares = (weights / total[..., None]).astype(v.dtype)
    out = jnp.einsum("bgrts,bsgd->btgrd", shares, v, preferred_element_type=jnp.float32)
    lse = (top + jnp.log(total)).reshape(b, h, t)
    return Partial(out.astype(v.dtype).reshape(b, t, h, d), lse)
