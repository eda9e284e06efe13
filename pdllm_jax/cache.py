"""KV state as pytrees: the pool of context chunks, and the live rows around it.

Axes: L layers, N chunks, G KV heads, C chunk length, B batch, S live rows, D head size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.config import ModelConfig
from pdllm_jax.parallel import by_heads, constrain, local, rows_axis

_LIVE_MULTIPLE = 128  # rows; the kernel reads them in blocks of as many
# Runs of rows that are written by a copy in place each. More go as one scatter: XLA's fusion takes
# time that grows with the square of such copies, minutes for a step of 32 requests.
_ONE_BY_ONE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkPool:
    """KV of chunks, each [C, D] block of a chunk and head contiguous.

    k: keys rotated at chunk-local positions 0..C-1, so that a chunk can be placed anywhere.
    lengths: valid rows of each chunk; what lies behind is never attended to.
    """

    k: Float[Array, "L N G C D"]
    v: Float[Array, "L N G C D"]
    lengths: Int[Array, "N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkCache:
    """What is kept of a document, or of a batch of them, once it went through `prefill`.

    pool: KV of every chunk, encoded on its own behind the prefix (None where only scores were
      wanted: joint encoding makes its own). Chunk n of document b is the pool's b N + n.
    tokens [*B, N, C], lengths [*B, N]: the chunks themselves, from which joint encoding starts.
    prefix_ids [*B, P], prefix_length [*B]: the prefix.
    prefix_k, prefix_v [L, *B, P, G, D]: its KV, keys rotated at 0..P-1 (None for an empty prefix,
      and without a pool).
    streamed: the pool holds the kept chunks alone, at the places that the selection names.
    anchors: chunks begin with an anchor.
    """

    pool: ChunkPool | None
    tokens: Int[Array, "*B N C"]
    lengths: Int[Array, "*B N"]
    prefix_ids: Int[Array, "*B P"]
    prefix_length: Int[Array, "*B"]
    prefix_k: Float[Array, "L *B P G D"] | None
    prefix_v: Float[Array, "L *B P G D"] | None
    streamed: bool = dataclasses.field(default=False, metadata={"static": True})
    anchors: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def batched(self) -> bool:
        """Whether there is a document for each request, rather than one for all."""
        return self.tokens.ndim == 3

    def per_document(self) -> ChunkCache:
        """With an axis of documents, if only of one."""
        if self.batched:
            return self

        def add(x: Array | None) -> Array | None:
            return None if x is None else x[:, None]

        return dataclasses.replace(
            self,
            tokens=self.tokens[None],
            lengths=self.lengths[None],
            prefix_ids=self.prefix_ids[None],
            prefix_length=self.prefix_length[None],
            prefix_k=add(self.prefix_k),
            prefix_v=add(self.prefix_v),
        )

    def without_pool(self) -> ChunkCache:
        """What decoding against a state's own chunks needs of it."""
        return dataclasses.replace(self, pool=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiveCache:
    """KV of prefix, query and response, in that order and without gaps, then padding up to whole
    blocks of the kernel; an array for each layer, so that attention takes it as it is.

    k: keys rotated at their positions in the prompt.
    """

    k: tuple[Float[Array, "B S G D"], ...]
    v: tuple[Float[Array, "B S G D"], ...]

    def write(
        self,
        layer: int,
        k: Float[Array, "B T G D"],
        v: Float[Array, "B T G D"],
        start: Int[Array, "B"],
        keep: Bool[Array, "B T"] | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> LiveCache:
        """With T rows of a layer written from start[b] on; those where `keep` stay as they were.

        mesh: that the cache lies on.
        """
        batch = start.shape[0]
        heads, each = by_heads(mesh, batch, 2), PartitionSpec(rows_axis(mesh, batch))
        write = local(mesh, _write_rows, (heads, heads, each, each), heads)

        def put(stores: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
            written = write(stores[layer], rows, start, keep)
            return (*stores[:layer], written, *stores[layer + 1 :])

        return LiveCache(put(self.k, k), put(self.v, v))


def init_pool(
    config: ModelConfig, chunks: int, size: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> ChunkPool:
    """An empty pool of `chunks` chunks of `size` rows. mesh: that it lies on; under jit."""
    shape = (config.n_layers, chunks, config.n_kv_heads, size, config.head_dim)
    pool = ChunkPool(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((chunks,), jnp.int32)
    )
    return constrain(mesh, pool, "pool")


def live_rows(rows: int) -> int:
    """Rows that a live cache for so many has."""
    return -(-rows // _LIVE_MULTIPLE) * _LIVE_MULTIPLE


def init_live(
    config: ModelConfig, batch: int, rows: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> LiveCache:
    """An empty live cache of `live_rows(rows)` rows for each of `batch` requests.

    mesh: that it lies on; under jit.
    """
    shape = (batch, live_rows(rows), config.n_kv_heads, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in range(2))
    return constrain(mesh, LiveCache(k, v), "live")


def _write_rows(
    store: Float[Array, "B S G D"],
    rows: Float[Array, "B T G D"],
    start: Int[Array, "B"],
    keep: Bool[Array, "B T"] | None,
) -> Float[Array, "B S G D"]:
    if keep is not None:
        old = jax.vmap(lambda c, s: lax.dynamic_slice_in_dim(c, s, rows.shape[1]))(store, start)
        rows = jnp.where(keep[..., None, None], old, rows)
    rows = rows.astype(store.dtype)
    batch, count = rows.shape[:2]
    if batch > _ONE_BY_ONE:
        places = start[:, None] + jnp.arange(count)
        return store.at[jnp.arange(batch)[:, None], places].set(rows, mode="drop")
    for b in range(batch):
        store = lax.dynamic_update_slice(store, rows[b : b + 1], (b, start[b], 0, 0))
    return store


def write_chunks(
    pool: ChunkPool, layer: int, k: Float[Array, "N C G D"], v: Array, where: int | Array
) -> ChunkPool:
    """Writes one layer's KV of chunks: at consecutive places from `where` on, or at `where` [N]."""

    def put(store: Array, rows: Array) -> Array:
        rows = rows.transpose(0, 2, 1, 3)[None].astype(store.dtype)
        if jnp.ndim(where) == 0:
            return lax.dynamic_update_slice(store, rows, (layer, where, 0, 0, 0))
        if rows.shape[1] > _ONE_BY_ONE:
            return store.at[layer, where].set(rows[0], mode="drop")
        for i in range(rows.shape[1]):
            one = rows[:, i : i + 1]
            store = lax.dynamic_update_slice(store, one, (layer, jnp.asarray(where)[i], 0, 0, 0))
        return store

    return dataclasses.replace(pool, k=put(pool.k, k), v=put(pool.v, v))
