"""SparseD (Wang et al., 2025): all rows at every evaluation, attention over chosen tiles of keys.

Evaluations 0 to int(steps * skip) + 1 attend to everything. In the last of these each layer, head
and tile of queries chooses tiles of keys, and all later evaluations use them:

  1. softmax over all keys: the int(tiles * select) + 1 tiles of keys with the largest sums of
     weights over the tile of queries. Of these the response's tiles are dropped.
  2. softmax over the response's keys: the int(response tiles * select) + 1 best of its tiles.

Described from the authors' code (INV-WZQ/SparseD). As there: a tile that straddles the prompt's end
is the prompt's; the response has at least one tile, the last; for LLaDA the products are divided by
sqrt(heads) instead of sqrt(head size) where tiles are chosen; evaluations count over all blocks. No
more tiles are chosen than there are, where the code fails.

Nothing of size rows x rows exists. Tiles are chosen for one tile of queries at a time. Sparse
attention is `chunk_attention` from lists of tiles: the Hopper kernel where tiles have a multiple of
64 rows, else XLA, a tile of keys of each list at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import chunk_attention
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import DenoiseState
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.published import predict_block, row_count
from pdllm_jax.method.live_forward import predicting_rows
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, heads_spec, local, rows_axis
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import SHARE, SIZE, UNIT, require, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

_SPARSE, _FULL, _CHOOSING = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class SparseD(CacheMethod):
    """SparseD. The defaults are the authors' for long prompts.

    tile: rows of a tile of queries and of keys.
    select: share of the tiles of keys that a tile of queries attends to.
    skip: share of the steps that attend to everything; of gen_length steps where a rule without
      steps decides.
    """

    name: ClassVar[str] = "sparse-d"
    keeps_live: ClassVar[bool] = False
    tile: int = 128
    select: float = 0.3
    skip: float = 0.2

    def __post_init__(self) -> None:
        validate(self, {"tile": SIZE, "select": SHARE, "skip": UNIT})

    @classmethod
    def short(cls) -> SparseD:
        """Returns the authors' settings for short prompts."""
        return cls(tile=32, select=0.5)

    def check(self, model: ModelConfig, config: DecodeConfig, rows: int) -> None:
        super().check(model, config, rows)
        # Blocks that are full would skip evaluations, which count here.
        more = config.scheduled and config.schedule == "even"
        more &= config.steps_per_block > config.block_length
        message = f"needs at most one step per token, got {config.steps} steps"
        require(not more, f"method {self.name!r} {message} for {config.gen_length} tokens")

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        if len(self.widths(None, config)) == 1:
            return 0
        rows = -(-rows // self.tile) * self.tile
        sizes = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        # Scores of a tile of queries, and their weights by two selections.
        choosing = 3 * 4 * model.n_heads * self.tile * rows
        tiled = rows * 2 * sum(sizes) * itemsize
        if self.tile % 64 or itemsize > 2:
            tiled += rows * (2 * sizes[0] * itemsize + 2 * 4 * model.n_heads * self.tile)
        return max(choosing, tiled)

    def last_full(self, config: DecodeConfig) -> int:
        """The evaluation, from 0, in which tiles are chosen."""
        return int(config.steps_per_block * config.n_blocks * self.skip) + 1

    def start(
        self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig
    ) -> tuple[Int[Array, "B H n L"], ...]:
        """Returns lists of tiles for each layer, empty; -1 is no tile."""
        if len(self.widths(state, config)) == 1:
            return ()
        batch, rows = state.query.shape
        rows += config.gen_length
        room = self._room(rows, config.gen_length)
        shape = batch, model.config.n_heads, -(-rows // self.tile), room
        return tuple(jnp.full(shape, -1, jnp.int32) for _ in range(model.config.n_layers))

    def _count(self, tiles: int) -> int:
        return min(int(tiles * self.select) + 1, tiles)

    def _room(self, *rows: int) -> int:
        """Places for both selections, from the rows of all and of the response."""
        return sum(self._count(-(-n // self.tile)) for n in rows)

    def widths(self, state: DenoiseState | None, config: DecodeConfig) -> tuple[int, ...]:
        steps = config.steps_per_block * config.n_blocks
        never = config.scheduled and self.last_full(config) >= steps - 1
        return (_FULL,) if never else (_SPARSE, _FULL, _CHOOSING)

    def width(self, step: Step) -> Int[Array, "B"]:
        # Active requests have made the same number of evaluations: none needs less than another.
        behind = step.state.evaluations - self.last_full(step.config)
        return jnp.where(behind < 0, _FULL, jnp.where(behind == 0, _CHOOSING, _SPARSE))

    def evaluate(self, step: Step, width: int) -> Evaluation:
        model, state, memory = step.model, step.state, step.state.memory
        rows, total, responding = step.rows, row_count(step), state.tokens.shape[1]
        by = rotation(model.config, jnp.arange(rows.shape[1]))
        if width == _CHOOSING:
            divisor = model.config.head_dim if model.lookback else model.config.n_heads
            tiles = -(-total // self.tile)
            counts = [self._count(n) for n in range(1 + -(-rows.shape[1] // self.tile))]
            table = jnp.asarray(np.array(counts), jnp.int32)
            # The first tile that begins inside the response, else the last one.
            first = -(-(total - responding) // self.tile)
            first = jnp.minimum(first, tiles - 1)
            choose = functools.partial(
                _choose, tile=self.tile, scale=divisor**-0.5, room=memory[0].shape[-1],
                most=self._count(-(-responding // self.tile)),
            )  # fmt: skip
            numbers = total, first, table[tiles], table[tiles - first]

        def attend(layer: int, q: Array, k: Array, v: Array, memory: tuple[Array, ...]):
            q, k = rotate(q, by), rotate(k, by)
            if width == _SPARSE:
                sparse = functools.partial(_sparse_attention, tile=self.tile)
                inputs = (q, 2), (k, 2), (v, 2), (memory[layer], 1)
                return _by_heads(model.mesh, sparse, inputs, (total,), 2), memory
            if width == _CHOOSING:
                lists = _by_heads(model.mesh, choose, ((q, 2), (k, 2)), numbers, 1)
                memory = (*memory[:layer], lists, *memory[layer + 1 :])
            return attention(model.mesh, q, k, v, total).out, memory

        x, memory = model.run(rows, attend, memory)

        def logits(first: Array, size: int) -> Array:
            hidden = predicting_rows(model, x, state.query_length + first, size)
            return model.logits(model.final_norm(hidden))

        everyone = jnp.ones(step.active.shape, bool)
        return Evaluation(*predict_block(step, logits, everyone), total, memory=memory)


def _by_heads(
    mesh: Mesh | None,
    f: Callable[..., Array],
    arrays: tuple[tuple[Array, int], ...],
    numbers: tuple[Int[Array, "B"], ...],
    axis: int,
) -> Array:
    """Returns f(*arrays, *numbers), made by each device for its own heads.

    arrays: with the axis of the heads. numbers: one of each request. axis: that of the result.
    """
    batch = len(numbers[0])
    heads = [heads_spec(mesh, batch, at) for _, at in arrays]
    each = [PartitionSpec(rows_axis(mesh, batch))] * len(numbers)
    sharded = local(mesh, f, (*heads, *each), heads_spec(mesh, batch, axis))
    return sharded(*(x for x, _ in arrays), *numbers)


def _tiled(x: Float[Array, "B R N D"], tile: int) -> Float[Array, "B n tile N D"]:
    """Returns rows in tiles; zeros fill the last one."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))
    return x.reshape(len(x), -1, tile, *x.shape[2:])


def _choose(
    q: Float[Array, "B R H D"],
    k: Float[Array, "B R G D"],
    total: Int[Array, "B"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
    response_count: Int[Array, "B"],
    *,
    tile: int,
    scale: float,
    room: int,
    most: int,
) -> Int[Array, "B H n room"]:
    """Returns the tiles of keys of each head and tile of queries, -1 in places without one.

    first: the response's first tile. count, response_count: tiles of the two selections.
    most: room for the second.
    """
    batch, _, heads, dim = q.shape
    groups = k.shape[2]
    q, k = (_tiled(x, tile) for x in (q, k))
    n = k.shape[1]
    keys = k.reshape(batch, n * tile, groups, dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    row, j = jnp.arange(n * tile), jnp.arange(n)
    valid = row < total[:, None]
    of_response = row >= first[:, None] * tile

    def best(weights: Array, exists: Array, size: int, count: Array) -> Array:
        """The `count` best of the tiles [B, H, n] that exist [B, n], in `size` places."""
        weights = jnp.where(exists[:, None], weights, -1.0)
        chosen = lax.top_k(weights, size)[1]
        return jnp.where(jnp.arange(size) < count[:, None, None], chosen, -1)

    def of_tile(inputs: tuple[Array, Array]) -> Array:
        rows, i = inputs
        rows = rows.reshape(batch, tile, groups, -1, dim)
        scores = product("btghd,bsgd->bghts", rows, keys) * scale
        scores = scores.reshape(batch, heads, tile, -1)
        there = (i * tile + jnp.arange(tile) < total[:, None])[:, None, :, None]

        def mass(seen: Array) -> Array:
            masked = jnp.where(seen[:, None, None], scores, -jnp.inf)
            peak = masked.max(axis=-1, keepdims=True)
            weights = jnp.exp(masked - peak)
            weights = jnp.where(there, weights / row_sum(weights)[..., None], 0)
            return weights.sum(axis=2).reshape(batch, heads, n, tile).sum(axis=3)

        exists = j * tile < total[:, None]
        in_response = exists & (j >= first[:, None])
        everything = best(mass(valid), exists, room - most, count)
        everything = jnp.where(everything < first[:, None, None], everything, -1)
        response = best(mass(valid & of_response), in_response, most, response_count)
        return jnp.concatenate([everything, response], axis=-1)

    lists = lax.map(of_tile, (q.swapaxes(0, 1), j))
    return jnp.moveaxis(lists, 0, 2)


def _sparse_attention(
    q: Float[Array, "B R H D"],
    k: Float[Array, "B R G D"],
    v: Float[Array, "B R G D"],
    lists: Int[Array, "B H n L"],
    total: Int[Array, "B"],
    *,
    tile: int,
) -> Float[Array, "B R H D"]:
    """Attends from each tile of queries to the rows below `total` in its list of tiles.

    As attention over chunks: a tile of queries of one head is a request, and a tile of keys of one
    KV head is a chunk of the pool.
    """
    (batch, rows, heads, dim), groups = q.shape, k.shape[2]
    q, k, v = (_tiled(x, tile).transpose(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, n, tile, D]
    n = q.shape[2]
    k, v = (x.reshape(-1, 1, tile, dim) for x in (k, v))
    lengths = jnp.clip(total[:, None] - jnp.arange(n) * tile, 0, tile)
    lengths = jnp.repeat(lengths[:, None], groups, axis=1)
    head = jnp.repeat(jnp.arange(batch * groups), heads // groups).reshape(batch, heads, 1, 1)
    ids = jnp.where(lists >= 0, head * n + lists, -1)
    queries, ids = q.reshape(-1, tile, 1, dim), ids.reshape(-1, lists.shape[-1])
    out = chunk_attention(queries, k, v, ids, lengths.reshape(-1)).out
    out = out.reshape(batch, heads, -1, dim)[:, :, :rows]
    return out.swapaxes(1, 2)
