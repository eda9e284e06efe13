"""Sparse-dLLM (arXiv 2508.02558): a pruned cache of the keys and values outside the block.

A block begins with an empty cache. Its evaluations 0 to `delay` recompute all rows. In the last of
these each layer scores the keys outside the block, prompt and other blocks, and keeps a share of
them; this evaluation itself attends to all. The later ones recompute the block's rows, which attend
to the kept keys and to each other. The score of a key is its product with the mean query of the
block's rows, both rotated, averaged over the query heads; then the maximum of `kernel` neighbours
in the sequence without the block. One selection serves all heads.

As in the authors' code (OpenMOSS/Sparse-dLLM): scores have neither scale nor softmax; decoded rows
of the block count in the mean query; of equal scores, which the maximum makes often, the first
keys are kept, as torch.topk does on GPUs (on a CPU it promises no order). On Dream an evaluation of
the block alone shifts logits inside the block; its settings are those of
`DecodeConfig.fast_dllm_dream` with alg "entropy".
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pdllm_jax.method.cache import DenoiseState, LiveCache, dynamic_slices, init_live
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.published import predict_block, row_count
from pdllm_jax.method.live_forward import predicting_rows
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import COUNT, SIZE, UNIT, require, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

_NARROW, _WIDE = 0, 1


class _Memory(NamedTuple):
    """The kept rows of each layer in ascending order, and behind them the rows of the block.

    kept: how many rows each request keeps.
    """

    live: LiveCache
    kept: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class SparseDLLM(CacheMethod):
    """Sparse-dLLM. The defaults are the authors', with block_length 32.

    keep_ratio: share of the keys outside the block that are kept, rounded down.
    kernel: neighbours whose largest score is a key's, odd; None scores each key by itself.
    delay: the evaluation of a block, from 0, in which keys are kept. With 0, and all keys kept, it
      is the dual cache.
    """

    name: ClassVar[str] = "sparse-dllm"
    keeps_live: ClassVar[bool] = False
    keep_ratio: float = 0.5
    kernel: int | None = 3
    delay: int = 1

    def __post_init__(self) -> None:
        validate(self, {"keep_ratio": UNIT, "kernel": SIZE, "delay": COUNT})
        odd = self.kernel is None or self.kernel % 2 == 1
        require(odd, f"kernel must be an odd number or None, got {self.kernel}")

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        # K and V that a request attends to, those that are kept, and K in float32 for the scores.
        return rows * model.n_kv_heads * model.head_dim * (4 * itemsize + 4)

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> _Memory:
        batch, rows = state.query.shape
        outside = rows + config.gen_length - config.block_length
        room = int(outside * self.keep_ratio) + config.block_length
        total = state.query_length + config.gen_length - config.block_length
        counts = [int(n * self.keep_ratio) for n in range(outside + 1)]
        live = init_live(model.config, batch, room, model.dtype, model.mesh)
        return _Memory(live, jnp.asarray(np.array(counts), jnp.int32)[total])

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        short = config.scheduled and config.steps_per_block <= self.delay + 1
        return (_WIDE,) if short else (_NARROW, _WIDE)

    def width(self, step: Step) -> Int[Array, "B"]:
        return (step.state.step <= self.delay).astype(jnp.int32)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        return self._wide(step) if width == _WIDE else self._narrow(step)

    def _narrow(self, step: Step) -> Evaluation:
        """Recomputes the block against the kept rows."""
        model, state, length = step.model, step.state, step.config.block_length
        first = state.query_length + step.first
        rows = first[:, None] + jnp.arange(length)
        by = rotation(model.config, rows)

        def attend(layer: int, q: Array, k: Array, v: Array, memory: _Memory):
            live = memory.live.write(layer, rotate(k, by), v, memory.kept, mesh=model.mesh)
            keys = live.k[layer], live.v[layer], memory.kept + length
            return attention(model.mesh, rotate(q, by), *keys).out, memory._replace(live=live)

        x, memory = model.run(dynamic_slices(step.rows, first, length), attend, state.memory)
        x = predicting_rows(model, x, jnp.zeros_like(first), length)
        predicted = step.predict(model.logits(model.final_norm(x)), step.first)
        return Evaluation(*predicted, length, memory=memory)

    def _wide(self, step: Step) -> Evaluation:
        """Recomputes all rows, and keeps some in the evaluation in which it is time to.

        The other requests of the batch attend as in `_narrow`.
        """
        model, state, length = step.model, step.state, step.config.block_length
        wide, total = self.width(step) == _WIDE, row_count(step)
        first, rows = state.query_length + step.first, step.rows
        by = rotation(model.config, jnp.arange(rows.shape[1]))
        # Rows of the sequence without the block, and how many of them are valid.
        i = jnp.arange(rows.shape[1] - length)
        outside = jnp.where(i < first[:, None], i, i + length)
        valid = i < (total - length)[:, None]
        choosing = (state.step == self.delay) & step.active

        def attend(layer: int, q: Array, k: Array, v: Array, memory: _Memory):
            q, k, live, count = rotate(q, by), rotate(k, by), memory.live, memory.kept
            own = [dynamic_slices(x, first, length) for x in (q, k, v)]
            keys, values, n = k, v, total
            if len(rows) > 1:  # Requests may be at different evaluations of their blocks.
                live = live.write(layer, own[1], own[2], count, mesh=model.mesh)
                keys, values = (
                    jnp.where(wide[:, None, None, None], x, _resized(kept, x.shape[1]))
                    for x, kept in ((k, live.k[layer]), (v, live.v[layer]))
                )
                n = jnp.where(wide, total, count + length)
            out = attention(model.mesh, q, keys, values, n).out
            room = int(i.size * self.keep_ratio)
            if room:
                score = _scores(own[0], k, outside, valid, self.kernel)
                best = lax.top_k(score, room)[1]
                used = jnp.arange(room) < count[:, None]
                best = jnp.sort(jnp.where(used, best, i.size), axis=1)
                place = jnp.take_along_axis(outside, jnp.minimum(best, i.size - 1), axis=1)
                keys, values = (
                    jnp.take_along_axis(x, place[..., None, None], axis=1) for x in (k, v)
                )
                keep, start = ~(used & choosing[:, None]), jnp.zeros_like(count)
                live = live.write(layer, keys, values, start, keep, mesh=model.mesh)
            return out, memory._replace(live=live)

        x, memory = model.run(rows, attend, state.memory)

        def logits(slot: Array, size: int) -> Array:
            at = state.query_length[:, None] + slot[:, None] + jnp.arange(size)
            at = jnp.maximum(model.predicting_row(at), jnp.where(wide, 0, first)[:, None])
            hidden = jnp.take_along_axis(x, at[..., None], axis=1)
            return model.logits(model.final_norm(hidden))

        # LLaDA's may also fill masks in front of the block.
        predicted = predict_block(step, logits, wide & (model.lookback == 0))
        rows_run = jnp.where(wide, total, length)
        return Evaluation(*predicted, rows_run, memory=memory)


def _resized(x: Float[Array, "B S G D"], size: int) -> Float[Array, "B size G D"]:
    """Returns the first rows of x, or x and more rows."""
    return jnp.pad(x[:, :size], ((0, 0), (0, max(0, size - x.shape[1])), (0, 0), (0, 0)))


def _scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B R G D"],
    outside: Int[Array, "B n"],
    valid: Array,
    kernel: int | None,
) -> Float[Array, "B n"]:
    """Scores the keys outside a block for its queries; both rotated. -inf where not `valid`."""
    heads, groups = q.shape[2], k.shape[2]
    mean = q.astype(jnp.float32).mean(axis=1).reshape(len(q), groups, heads // groups, -1).sum(2)
    products = jnp.einsum("bgd,brgd->br", mean, k.astype(jnp.float32), precision="highest") / heads
    score = jnp.where(valid, jnp.take_along_axis(products, outside, axis=1), -jnp.inf)
    if kernel is None:
        return score
    pooled = lax.reduce_window(score, -jnp.inf, lax.max, (1, kernel), (1, 1), "SAME")
    return jnp.where(valid, pooled, -jnp.inf)
