"""The method's arrays as pytrees: KV of chunks, KV of live rows, placement, denoising state.

Live rows are prefix, query and response. Axes: L layers, B requests, Z documents, N chunks,
K chosen chunks, C chunk length, S live rows, G KV heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Scaled, quantise
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import constrain, heads_spec, local, rows_axis


def dynamic_slices(x: Array, start: Int[Array, "B"], size: int) -> Array:
    """Returns x[b, start[b] : start[b] + size] for every request."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, size))(x, start)


def dynamic_updates(x: Array, start: Int[Array, "B"], values: Array) -> Array:
    """Returns x with values[b] written from start[b] on."""
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(lambda row, s, v: put(row, v.astype(row.dtype), s))(x, start, values)


Positions = Literal["continuous", "absolute", "reuse", "contiguous"]
KVFormat = Literal["full", "fp8"]

_LIVE_MULTIPLE = 128  # rows of a block of the attention kernel
# At most this many runs of rows are written by one copy each, in place. More become one scatter:
# XLA's fusion time grows with the square of the copies, minutes for a step of 32 requests.
_ONE_BY_ONE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkPool:
    """KV of chunks, each [C, D] block of a chunk and head contiguous.

    k: keys rotated at chunk-local positions 0..C-1, so that a chunk can be placed anywhere.
    lengths: valid rows of each chunk. Nothing attends to rows behind them.

    In the format "fp8" k and v are `Scaled`, a scale for each layer, chunk and head [L, N, G].
    """

    k: Float[Array, "L N G C D"] | Scaled
    v: Float[Array, "L N G C D"] | Scaled
    lengths: Int[Array, "N"]

    @property
    def kv_format(self) -> KVFormat:
        """The format of k and v."""
        return "fp8" if isinstance(self.k, Scaled) else "full"

    def take(self, places: Int[Array, "M"], lengths: Int[Array, "M"]) -> ChunkPool:
        """Returns a pool of the chunks at these places, with `lengths` valid rows each."""
        k, v = jax.tree.map(lambda x: x[:, places], (self.k, self.v))
        return ChunkPool(k, v, lengths)

    def rows_of(self, ids: Int[Array, "B K"]) -> tuple[Int[Array, "B K"], Int[Array, "B K"]]:
        """Returns places and valid rows of chunks; both are 0 for an empty slot."""
        places = jnp.maximum(ids, 0)
        return places, jnp.where(ids >= 0, self.lengths[places], 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkCache:
    """Documents after `prefill`, one for each request or one for all: tokens, and KV to read later.

    pool: KV of every chunk, encoded behind the prefix alone; None where decoding does not read it.
      Chunk n of document z is the pool's z N + n.
    tokens, lengths: the chunks, from which joint encoding starts.
    prefix_k, prefix_v: the prefix' KV, keys rotated at 0..P-1 (None for an empty prefix, and
      without a pool).
    streamed: the pool holds the kept chunks alone, at the places `Selection.slots`.
    anchors: chunks begin with an anchor.
    """

    pool: ChunkPool | None
    tokens: Int[Array, "Z N C"]
    lengths: Int[Array, "Z N"]
    prefix_ids: Int[Array, "Z P"]
    prefix_length: Int[Array, "Z"]
    prefix_k: Float[Array, "L Z P G D"] | None
    prefix_v: Float[Array, "L Z P G D"] | None
    streamed: bool = dataclasses.field(default=False, metadata={"static": True})
    anchors: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def documents(self) -> int:
        """Z, the number of documents."""
        return self.tokens.shape[0]

    def document_of(self, batch: int) -> Int[Array, "B"]:
        """Returns the document of each of `batch` requests.

        Raises:
          ValueError: the number of documents is neither 1 nor `batch`.
        """
        if self.documents not in (1, batch):
            raise ValueError(f"{batch} questions for a cache of {self.documents} documents")
        return jnp.arange(batch) if self.documents > 1 else jnp.zeros((batch,), jnp.int32)

    def places(self, chunk_ids: Int[Array, "B K"]) -> Int[Array, "B K"]:
        """Returns the pool places of chunks of each request's document; -1 for an empty slot."""
        first = self.document_of(chunk_ids.shape[0])[:, None] * self.tokens.shape[1]
        return jnp.where(chunk_ids >= 0, first + chunk_ids, -1)

    def chosen(self, ids: Int[Array, "B K"]) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
        """Returns tokens and valid lengths of the chosen chunks; empty slots have length 0."""
        document, at = self.document_of(ids.shape[0])[:, None], jnp.maximum(ids, 0)
        return self.tokens[document, at], jnp.where(ids >= 0, self.lengths[document, at], 0)

    def place(
        self,
        selected: Int[Array, "B K"],
        prefix_length: Int[Array, "B"],
        total: Int[Array, "B"],
        positions: Positions,
    ) -> Placement:
        """Places chosen chunks in the pool and in the prompt.

        Positions of chunk j, id n: "continuous" P + j C, "absolute" P + n C, "reuse" P. The query
        starts behind the last slot: at P + K C, P + N C or P + C; K and N count existing chunks.
        "contiguous": each chunk, and the query, behind the tokens of the kept chunks before it.
        """
        batch, (n, size) = selected.shape[0], self.tokens.shape[1:]
        valid = selected >= 0
        if positions == "continuous":
            slot = jnp.arange(selected.shape[1])[None]
            slots = jnp.count_nonzero(valid, axis=1)
        elif positions == "absolute":
            lengths = jnp.broadcast_to(self.lengths, (batch, n))
            slot, slots = jnp.maximum(selected, 0), jnp.count_nonzero(lengths, axis=1)
        elif positions == "reuse":
            slot, slots = jnp.zeros_like(selected), valid.any(axis=1).astype(jnp.int32)
        else:
            lengths = self.chosen(selected)[1]
            slot, slots, size = jnp.cumsum(lengths, axis=1) - lengths, lengths.sum(axis=1), 1
        starts = jnp.broadcast_to(prefix_length[:, None] + slot * size, selected.shape)
        query_start = prefix_length + slots * size
        return Placement(self.places(selected), starts, query_start, prefix_length, total)

    def without_pool(self) -> ChunkCache:
        """Returns the cache for decoding against the state's pool."""
        return dataclasses.replace(self, pool=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiveCache:
    """KV of prefix, query and response without gaps, then padding up to whole kernel blocks.

    One array for each layer, so that attention reads it without a copy. Keys are rotated at their
    positions in the prompt.
    """

    k: tuple[Float[Array, "B S G D"], ...]
    v: tuple[Float[Array, "B S G D"], ...]

    def write(
        self,
        layer: int,
        k: Float[Array, "B T G D"] | None,
        v: Float[Array, "B T G D"] | None,
        start: Int[Array, "B"] | Int[Array, "B T"],
        keep: Bool[Array, "B T"] | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> LiveCache:
        """Returns the cache with a layer's KV of rows written, except where `keep`.

        k, v: None leaves the old ones.
        start: the first of T consecutive rows, or the number of each row.
        """
        batch = start.shape[0]
        heads, each = heads_spec(mesh, batch, 2), PartitionSpec(rows_axis(mesh, batch))
        write = local(mesh, _write_rows, (heads, heads, each, each), heads)

        def put(stores: tuple[Array, ...], rows: Array | None) -> tuple[Array, ...]:
            if rows is None:
                return stores
            written = write(stores[layer], rows, start, keep)
            return (*stores[:layer], written, *stores[layer + 1 :])

        return LiveCache(put(self.k, k), put(self.v, v))


def pool_dtype(kv_format: KVFormat) -> Any:
    """Returns the dtype of a pool in 8 bits, None for the model's."""
    return None if kv_format == "full" else jnp.float8_e4m3fn


def init_pool(
    config: ModelConfig,
    chunks: int,
    size: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    kv_format: KVFormat = "full",
) -> ChunkPool:
    """Returns an empty pool of `chunks` chunks of `size` rows. Call under jit on a mesh.

    dtype: of the format "full".
    """
    shape = (config.n_layers, chunks, config.n_kv_heads, size, config.head_dim)

    def empty() -> Any:
        values = jnp.zeros(shape, pool_dtype(kv_format) or dtype)
        return values if kv_format == "full" else Scaled(values, jnp.ones(shape[:3], jnp.float32))

    return constrain(mesh, ChunkPool(empty(), empty(), jnp.zeros((chunks,), jnp.int32)), "pool")


def live_rows(rows: int) -> int:
    """Returns the rows of a live cache with room for `rows`: whole blocks of the kernel."""
    return -(-rows // _LIVE_MULTIPLE) * _LIVE_MULTIPLE


def init_live(
    config: ModelConfig, batch: int, rows: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> LiveCache:
    """Returns an empty live cache of `live_rows(rows)` rows. Call under jit on a mesh."""
    shape = (batch, live_rows(rows), config.n_kv_heads, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in range(2))
    return constrain(mesh, LiveCache(k, v), "live")


def _write_rows(
    store: Float[Array, "B S G D"],
    rows: Float[Array, "B T G D"],
    start: Int[Array, "B"] | Int[Array, "B T"],
    keep: Bool[Array, "B T"] | None,
) -> Float[Array, "B S G D"]:
    if start.ndim == 2:
        places = start if keep is None else jnp.where(keep, store.shape[1], start)
        rows = rows.astype(store.dtype)
        return store.at[jnp.arange(len(rows))[:, None], places].set(rows, mode="drop")
    if keep is not None:
        old = dynamic_slices(store, start, rows.shape[1])
        rows = jnp.where(keep[..., None, None], old, rows)
    rows = rows.astype(store.dtype)
    batch, count = rows.shape[:2]
    if batch > _ONE_BY_ONE:
        places = start[:, None] + jnp.arange(count)
        return store.at[jnp.arange(batch)[:, None], places].set(rows, mode="drop")
    for b in range(batch):
        store = lax.dynamic_update_slice(store, rows[b : b + 1], (b, start[b], 0, 0))
    return store


def stored(
    rows: Float[Array, "N G C D"], lengths: Int[Array, "N"], like: Array | Scaled
) -> Array | Scaled:
    """Returns KV of chunks as the array `like` of a pool holds it.

    In 8 bits rows behind `lengths` become zeros, so that no scale depends on padding.
    """
    if not isinstance(like, Scaled):
        return rows.astype(like.dtype)
    valid = jnp.arange(rows.shape[2]) < lengths[:, None]
    return quantise(jnp.where(valid[:, None, :, None], rows, 0), "fp8", trailing=2)


def write_chunks(
    pool: ChunkPool,
    layer: int,
    k: Float[Array, "N C G D"],
    v: Float[Array, "N C G D"],
    lengths: Int[Array, "N"],
    where: int | Array,
) -> ChunkPool:
    """Writes one layer's KV of chunks: at consecutive places from `where` on, or at `where` [N]."""

    def put(store: Array, rows: Array) -> Array:
        rest: list[int] = [0] * (store.ndim - 2)
        if jnp.ndim(where) == 0:
            return lax.dynamic_update_slice(store, rows[None], (layer, where, *rest))
        if len(rows) > _ONE_BY_ONE:
            return store.at[layer, where].set(rows, mode="drop")
        for i in range(len(rows)):
            at: Any = (layer, jnp.asarray(where)[i], *rest)
            store = lax.dynamic_update_slice(store, rows[None, i : i + 1], at)
        return store

    def write(store: Array | Scaled, rows: Array) -> Any:
        return jax.tree.map(put, store, stored(rows.transpose(0, 2, 1, 3), lengths, store))

    return dataclasses.replace(pool, k=write(pool.k, k), v=write(pool.v, v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the chosen chunks and the live rows of each request lie.

    chunk_ids: the chunks' places in the pool, negative for an empty slot.
    chunk_starts, query_start: positions of the first row of each chunk, and of the query.
    prefix_length, total: live rows before the query, and all valid live rows.
    """

    chunk_ids: Int[Array, "B K"]
    chunk_starts: Int[Array, "B K"]
    query_start: Int[Array, "B"]
    prefix_length: Int[Array, "B"]
    total: Int[Array, "B"]

    def only(self, active: Bool[Array, "B"]) -> Placement:
        """Returns the placement in which other requests have no chunks."""
        return dataclasses.replace(self, chunk_ids=jnp.where(active[:, None], self.chunk_ids, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoiseState:
    """Everything that changes while a response is denoised; B requests, G response tokens each.

    tokens: the response, int32; masked slots hold the mask token.
    query, query_length, prefix_length: the other live rows.
    selected: document ids of the chosen chunks, ascending, negative for an empty slot.
    chunk_ids, chunk_starts, query_start: see `Placement`.
    live: KV of the live rows; None where no step reads it.
    pool: KV of the chosen chunks (joint encoding, bridge, kept tokens); None where it is in the
      document's cache.
    block, step: current block (gen_length / block_length when the request is done), and
      evaluations in it.
    probability: of each token when it was unmasked, float32; -1 for other slots.
    text_blocks: blocks up to the end of the text: all of them, or fewer where a stop id ended it.
    stale: live KV must be recomputed before a step reads it.
    evaluations: denoising evaluations so far, without encoding and scoring.
    rescored: how often `reselect` scored the chunks.
    keys [B]: PRNG key of each request.
    rows: that went through the network in these evaluations, float32.
    memory: what the cache method keeps beside `live`; see `CacheMethod.start`.
    rule_memory: what the unmasking rule keeps; see `Unmasking.start`.
    live_encoded: the encoding computed the live KV too, so the first block starts with fresh KV.
    """

    tokens: Int[Array, "B G"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    prefix_length: Int[Array, "B"]
    selected: Int[Array, "B K"]
    chunk_ids: Int[Array, "B K"]
    chunk_starts: Int[Array, "B K"]
    query_start: Int[Array, "B"]
    live: LiveCache | None
    pool: ChunkPool | None
    block: Int[Array, "B"]
    step: Int[Array, "B"]
    probability: Float[Array, "B G"]
    text_blocks: Int[Array, "B"]
    stale: Bool[Array, "B"]
    evaluations: Int[Array, "B"]
    rescored: Int[Array, "B"]
    keys: Array
    rows: Float[Array, "B"]
    memory: Any = None
    rule_memory: Any = None
    live_encoded: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def placement(self) -> Placement:
        """Where chunks and live rows lie."""
        total = self.prefix_length + self.query_length + self.tokens.shape[1]
        places = self.chunk_ids, self.chunk_starts, self.query_start
        return Placement(*places, self.prefix_length, total)

    def pool_in(self, cache: ChunkCache | None) -> ChunkPool | None:
        """Returns the pool that `chunk_ids` index: the state's pool, or the cache's.

        Raises:
          ValueError: the state has chunks, and neither pool exists.
        """
        pool = self.pool if self.pool is not None or cache is None else cache.pool
        if pool is None and self.chunk_ids.shape[1]:
            raise ValueError("the state's chunks lie in a cache: pass the one it was made with")
        return pool
