"""The network on live rows (prefix, query, response), which attend to the chosen chunks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, OwnKV, Partial
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
        pool, live, chunk_ids = self.pool, self.live, self.placement.chunk_ids
        total = self.placement.total
        if live is not None:
            live = live.write(layer, k, v, start, keep, mesh=model.mesh)
            k, v = live.k[layer], live.v[layer]
        if pool is None or not chunk_ids.shape[1]:
            return attention(model.mesh, rotate(q, by.live), k, v, total, need_lse=need_lse), live
        seen = chunk_attention(
            model.mesh,
            rotate(q[:, None], by.per_chunk),
            *(pool.k, pool.v, chunk_ids, pool.lengths),
            layer=layer,
            own_kv=OwnKV(k, v, total),
            implementation=self.implementation,
        )
        return seen, live


def live_forward(
    model: MaskPredictor,
    context: Context,
    rows: Int[Array, "B T"],
    start: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    keep: Bool[Array, "B T"] | None = None,
    *,
    hook: LayerHook | None = None,
    hook_carry: Any = None,
) -> tuple[Float[Array, "B T M"], LiveCache | None, Any]:
    """Runs the network on tokens `rows`, which are live rows start[b] and on, else the query's.

    Writes their KV into the live cache, except where `keep`. Requests without chunks in the
    placement read none. The hook is called in every layer.

    start: the first of T consecutive rows, or [B, T] the number of each row, in any order.

    Returns:
      The residual stream, the live cache, and the hook's last carry.
    """
    placement = context.placement
    start = placement.prefix_length if start is None else start
    row = start if start.ndim == 2 else start[:, None] + jnp.arange(rows.shape[1])
    positions = live_positions(placement, row)
    by = row_rotations(model.config, placement, positions)

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        live, hook_carry = carry
        seen, live = context._replace(live=live).attend(
            model, layer, q, rotate(k, by.live), v, by, start, keep, need_lse=hook is not None
        )
        if hook is not None:
            hook_carry = hook(layer, q, seen, hook_carry)
        return seen.out, (live, hook_carry)

    x, (live, hook_carry) = model.run(rows, attend, (context.live, hook_carry))
    return x, live, hook_carry
