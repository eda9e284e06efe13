"""Bridge encoding: independent KV with a recomputed share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import Scaled
from pdllm_jax.method.cache import ChunkCache, stored
from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding, slot_ids
from pdllm_jax.method.live_forward import Context, row_rotations
from pdllm_jax.method.token_selection import best_tokens, token_attention
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import SHARE, exact_share, one_of, validate

BridgeTokens = Literal["start", "attention"]


@dataclasses.dataclass(frozen=True)
class Bridge(Encoding):
    """Independent KV; a share is recomputed with attention to the other chunks.

    share: of a chunk's C tokens, in (0, 1].
    tokens: the first ones ("start"), or the ones that receive most attention from the query's last
      rows over all layers ("attention", see `token_attention`), the anchor among them.
    """

    name: ClassVar[str] = "bridge"
    needs_pool: ClassVar[bool] = True
    live_encoded: ClassVar[bool] = True

    share: float = 0.15
    tokens: BridgeTokens = "start"

    def __post_init__(self) -> None:
        validate(self, {"share": SHARE, "tokens": one_of(get_args(BridgeTokens))}, "bridge_")

    def recomputed(self, chunk_size: int) -> int:
        """Returns the tokens of a chunk that are recomputed: the share, rounded up."""
        return math.ceil(exact_share(self.share, chunk_size))

    def encode(self, model: MaskPredictor, cache: ChunkCache, request: EncodeRequest) -> Encoded:
        """Runs one forward over the recomputed tokens of every chunk, query and masked response.

        Each row attends to prefix, all chosen chunks, query and response. The forward replaces the
        chunks' KV layer by layer where it recomputes it. A share of 1 is joint encoding, except
        that the prefix has attended to itself alone.
        """
        pool, selected, placement = cache.pool, request.selected, request.placement
        assert pool is not None
        context = Context(pool, placement, request.live, request.implementation)
        batch, slots = selected.shape
        size = pool.k.shape[3]
        count = self.recomputed(size)
        ids, lengths = pool.rows_of(placement.chunk_ids)
        if self.tokens == "start":
            places = jnp.broadcast_to(jnp.arange(count), (batch, slots, count))
            places = jnp.where(places < lengths[..., None], places, size)
        else:
            received = token_attention(model, context, request.rows)
            places = best_tokens(received, count, cache.anchors)  # [B, K, count]
        chunk_rows = slots * count
        own_rows = request.rows.ids
        own_positions = placement.query_start[:, None] + jnp.arange(own_rows.shape[1])
        positions = (placement.chunk_starts[..., None] + places).reshape(batch, chunk_rows)
        positions = jnp.concatenate([positions, own_positions], axis=1)
        by = row_rotations(model.config, placement, positions)
        chunk_local = rotation(model.config, places.reshape(batch, chunk_rows))
        slot = (jnp.arange(batch)[:, None] * slots + jnp.arange(slots))[..., None]  # [B, K, 1]
        in_slots = dataclasses.replace(placement, chunk_ids=slot_ids(selected))
        flat = ids.reshape(-1)
        mixed = pool.take(flat, lengths.reshape(-1))

        def replace(store: Any, layer: int, rows: Array) -> Any:
            """Writes rows [B, K count, G, D] into store [L, B K, G, C, D]; drops place C."""
            rows = rows.reshape(batch, slots, count, *rows.shape[2:])
            if not isinstance(store, Scaled):
                return store.at[layer, slot, :, places].set(rows.astype(store.dtype), mode="drop")
            of_layer = jax.tree.map(lambda x: x[layer], store).restore(jnp.float32)
            of_layer = of_layer.at[slot, :, places].set(rows.astype(jnp.float32), mode="drop")
            again = stored(of_layer, mixed.lengths, store)
            return jax.tree.map(lambda x, new: x.at[layer].set(new), store, again)

        def attend(layer: int, q: Array, k: Array, v: Array, context: Context):
            assert context.pool is not None
            chunk_k = replace(context.pool.k, layer, rotate(k[:, :chunk_rows], chunk_local))
            chunk_v = replace(context.pool.v, layer, v[:, :chunk_rows])
            mixed = dataclasses.replace(context.pool, k=chunk_k, v=chunk_v)
            context = context._replace(pool=mixed)
            own_k, own_v = rotate(k, by.live)[:, chunk_rows:], v[:, chunk_rows:]
            start = placement.prefix_length
            seen, live = context.attend(model, layer, q, own_k, own_v, by, start)
            return seen.out, context._replace(live=live)

        tokens, _ = cache.chosen(selected)
        tokens = jnp.take_along_axis(tokens, jnp.minimum(places, size - 1), axis=2)
        rows = jnp.concatenate([tokens.reshape(batch, chunk_rows), own_rows], axis=1)
        context = context._replace(pool=mixed, placement=in_slots)
        _, context = model.run(rows, attend, context)
        return Encoded(context.pool, context.live)
