"""The network on live rows: prefix, query and response around the chunks that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, OwnKV, Partial
from pdllm_jax.method.cache import ChunkPool, DenoiseState, LiveCache, dynamic_updates
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention, chunk_attention
from pdllm_jax.network.transformer import MaskPredictor

# (layer, q [B, T, H, D] unrotated, attention of those rows, carry) -> carry.
LayerHook = Callable[[int, Array, Partial, Any], Any]


class RowRotations(NamedTuple):
    """How rows at given positions see the live rows and each chunk.

    own: rotation of the rows among live rows; meeting [B, K + 1, T]: of the rows as chunk j, whose
      keys are rotated at chunk-local positions, meets them, and last as live rows do; total [B]:
      live rows there are.
    """

    own: Rotation
    meeting: Rotation
    total: Int[Array, "B"]


def live_positions(state: DenoiseState, row: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions in the prompt of rows of the live cache: prefix, query, response, without gaps."""
    prefix = state.prefix_length[:, None]
    return jnp.where(row < prefix, row, row - prefix + state.query_start[:, None])


def row_rotations(
    config: ModelConfig, state: DenoiseState, positions: Int[Array, "B T"]
) -> RowRotations:
    """The view of rows at these positions."""
    starts = jnp.pad(state.chunk_starts, ((0, 0), (0, 1)))
    return RowRotations(
        rotation(config, positions),
        rotation(config, positions[:, None] - starts[..., None]),
        state.prefix_length + state.query_length + state.tokens.shape[1],
    )


def attend_all(
    view: RowRotations,
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
    """Attention of rows over all live rows and the chosen chunks."""
    if pool is None or not chunk_ids.shape[1]:
        return attention(mesh, rotate(q, view.own), live_k, live_v, view.total, need_lse=need_lse)
    return chunk_attention(
        mesh,
        rotate(q[:, None], view.meeting),
        pool.k,
        pool.v,
        chunk_ids,
        pool.lengths,
        layer=layer,
        near=OwnKV(live_k, live_v, view.total),
        implementation=implementation,
    )


def response_rows(state: DenoiseState) -> Int[Array, "B R"]:
    """Tokens of query and response, without a gap, then padding."""
    rows = jnp.pad(state.query, ((0, 0), (0, state.tokens.shape[1])))
    return dynamic_updates(rows, state.query_length, state.tokens)


def live_forward(
    model: MaskPredictor,
    pool: ChunkPool | None,
    state: DenoiseState,
    rows: Int[Array, "B T"],
    start: Int[Array, "B"],
    keep: Bool[Array, "B T"] | None,
    implementation: Implementation | None,
    *,
    reading: Bool[Array, "B"] | None = None,
    watch: LayerHook | None = None,
    hook_carry: Any = None,
) -> tuple[Float[Array, "B T M"], LiveCache | None, Any]:
    """The network on live rows start[b].. whose tokens are `rows`; writes their KV, except `keep`.

    Without a live cache the rows see each other alone.

    reading: requests whose chunks are read at all, by default all; the others' rows mean nothing.
    watch: called in every layer, with `watched` as its carry.

    Returns:
      The residual stream, the live cache, and what was watched.
    """
    view = row_rotations(
        model.config, state, live_positions(state, start[:, None] + jnp.arange(rows.shape[1]))
    )
    chunk_ids = state.chunk_ids
    if reading is not None:
        chunk_ids = jnp.where(reading[:, None], chunk_ids, -1)

    def attend(layer: int, q: Array, k: Array, v: Array, carry):
        live, hook_carry = carry
        turned = rotate(k, view.own)
        live_k, live_v = turned, v
        if live is not None:
            live = live.write(layer, turned, v, start, keep, mesh=model.mesh)
            live_k, live_v = live.k[layer], live.v[layer]
        seen = attend_all(
            view, layer, q, live_k, live_v, pool, chunk_ids, implementation,
            need_lse=watch is not None, mesh=model.mesh,
        )  # fmt: skip
        if watch is not None:
            hook_carry = watch(layer, q, seen, hook_carry)
        return seen.out, (live, hook_carry)

    x, (live, hook_carry) = model.run(rows, attend, (state.live, hook_carry))
    return x, live, hook_carry
