"""The network on live rows (prefix, query, response), which attend to the chosen chunks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, OwnKV, Partial
from pdllm_jax.method.cache import ChunkPool, DenoiseState, LiveCache, Placement, dynamic_updates
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
    total [B]: valid live rows.
    """

    live: Rotation
    per_chunk: Rotation
    total: Int[Array, "B"]


class QueryRows(NamedTuple):
    """Query and response of each request, as encodings read them.

    query [B, Q], query_length [B]: the query, padded.
    ids [B, R]: query and response without a gap, then padding.
    """

    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    ids: Int[Array, "B R"]


def query_rows(state: DenoiseState) -> QueryRows:
    """Returns query and response of a state."""
    rows = jnp.pad(state.query, ((0, 0), (0, state.tokens.shape[1])))
    ids = dynamic_updates(rows, state.query_length, state.tokens)
    return QueryRows(state.query, state.query_length, ids)


def response_rows(state: DenoiseState) -> Int[Array, "B R"]:
    """Returns the tokens of query and response, without a gap, then padding."""
    return query_rows(state).ids


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
    return RowRotations(rotation(config, positions), per_chunk, placement.total)


def attend_all(
    rotations: RowRotations,
    layer: int,
    q: Float[Array, "B T H D"],
    live_k: Float[Array, "B S G D"],
    live_v: Float[Array, "B S G D"],
    pool: ChunkPool | None,
    chunk_ids: Int[Array, "B K"],
    implementation: Implementation | None,
    *,
    need_lse: bool = False,
    mesh: Mesh | None = None,
) -> Partial:
    """Attends from rows to all live rows and the chosen chunks."""
    total = rotations.total
    if pool is None or not chunk_ids.shape[1]:
        return attention(mesh, rotate(q, rotations.live), live_k, live_v, total, need_lse=need_lse)
    return chunk_attention(
        mesh,
        rotate(q[:, None], rotations.per_chunk),
        pool.k,
        pool.v,
        chunk_ids,
        pool.lengths,
        layer=layer,
        own_kv=OwnKV(live_k, live_v, total),
        implementation=implementation,
    )


def live_forward(
    model: MaskPredictor,
    pool: ChunkPool | None,
    placement: Placement,
    live: LiveCache | None,
    rows: Int[Array, "B T"],
    start: Int[Array, "B"],
    keep: Bool[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
    *,
    hook: LayerHook | None = None,
    hook_carry: Any = None,
) -> tuple[Float[Array, "B T M"], LiveCache | None, Any]:
    """Runs the network on tokens `rows`, which are live rows start[b] and on.

    Writes their KV into the live cache, except where `keep`. Without a live cache the rows attend
    to each other and to the chunks. Requests without chunks in `placement` read none.

    Args:
      hook: called in every layer, with `hook_carry` as its carry.

    Returns:
      The residual stream, the live cache, and the hook's last carry.
    """
    positions = live_positions(placement, start[:, None] + jnp.arange(rows.shape[1]))
    rotations = row_rotations(model.config, placement, positions)

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        live, hook_carry = carry
        live_k, live_v = rotate(k, rotations.live), v
        if live is not None:
            live = live.write(layer, live_k, v, start, keep, mesh=model.mesh)
            live_k, live_v = live.k[layer], live.v[layer]
        seen = attend_all(
            rotations,
            layer,
            q,
            live_k,
            live_v,
            pool,
            placement.chunk_ids,
            implementation,
            need_lse=hook is not None,
            mesh=model.mesh,
        )
        if hook is not None:
            hook_carry = hook(layer, q, seen, hook_carry)
        return seen.out, (live, hook_carry)

    x, (live, hook_carry) = model.run(rows, attend, (live, hook_carry))
    return x, live, hook_carry
