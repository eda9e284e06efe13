"""MaskKV (arXiv 2510.09309), from the paper alone: its authors have not published their code.

It is dLLM-Cache (`dllm_cache.py`), and of the prompt every KV head keeps the keys and values that
matter to the masks:

  importance  of a key for a KV head: the weights that the masks give it in evaluation 0, in the
              softmax over all keys, summed over masks and the head's query heads.
  kept        the `budget` most important ones of each layer and head, from evaluation 1 on; the
              earlier one of a tie. They stay the same for the whole response.

An evaluation that refreshes the prompt recomputes all its rows. They and the response then attend
to all keys, and K and V of the kept ones are replaced. So a request holds K and V of the kept
tokens and of the response, and of the whole prompt only inside such an evaluation.

The paper leaves open what is settled here: grouped heads share their kept keys, and the prompt is
whole where it is refreshed. Row P-1, from which Dream reads the first slot, keeps its outputs until
the prompt is refreshed; layer 0 does not recompute it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pdllm_jax.method.cache import (
    DenoiseState,
    LiveCache,
    dynamic_slices,
    dynamic_updates,
    live_rows,
)
from pdllm_jax.method.caches.dllm_cache import KV, DLLMCache, Due, Outputs
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import attention, constrain, heads_spec, local, rows_axis
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import SIZE, is_index, require

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

Budgets = tuple[tuple[int, ...], ...]  # [layer][KV head]


class KeptKV(KV):
    """K and V of the response, then of the kept tokens of the prompt, then padding.

    places: of each layer the rows of the prompt that are kept, ascending, [B, G, n]; what is not a
      row of the prompt stands behind them.
    """

    def __init__(self, step: Step, due: Due):
        super().__init__(step, due)
        method = step.method
        assert isinstance(method, MaskKV)
        self.counts = [method.counts(step.model.config, layer) for layer in self._layers()]
        self.places = list(step.state.memory["kept"])

    def _layers(self) -> range:
        return range(self.step.model.config.n_layers)

    def _live(self) -> LiveCache:
        live: LiveCache = self.step.state.memory["live"]
        return live

    def number(self, row: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return row - self.step.state.query_length[:, None]

    def of_tail(self, rows: Float[Array, "B S G D"]) -> Float[Array, "B R G D"]:
        number = jnp.clip(self.number(self.tail.row), 0)[..., None, None]
        return jnp.take_along_axis(rows, number, axis=1)

    def attend_all(
        self, layer: int, q: Array, k: Array, v: Array, keep: tuple[Array | None, Array | None]
    ) -> Array:
        mesh, state, live = self.mesh, self.step.state, self.live

        def whole(new: Array, cached: Array, keep: Array | None) -> Array:
            if keep is None:
                return new
            old = dynamic_updates(new, self.tail.start, self.of_tail(cached))
            return jnp.where(keep[..., None, None], old, new)

        k, v = whole(k, live.k[layer], keep[0]), whole(v, live.v[layer], keep[1])
        seen = attention(mesh, q, k, v, state.placement.total, need_lse=True)
        batch, shape = len(q), (state.tokens.shape[1], live.k[layer].shape[1])
        choose = functools.partial(_keep, shape=shape, counts=self.counts[layer])
        heads, by_head = (heads_spec(mesh, batch, axis) for axis in (2, 1))
        each = PartitionSpec(rows_axis(mesh, batch))
        inputs = (heads, heads, heads, by_head, each, each, by_head)
        keeping = local(mesh, choose, inputs, (heads, heads, by_head))
        first = state.evaluations == 0
        given = q, k, v, seen.lse, state.query_length, first, self.places[layer]
        k, v, self.places[layer] = keeping(*given)
        put = lambda rows, new: (*rows[:layer], new, *rows[layer + 1 :])  # noqa: E731
        self.live = LiveCache(put(live.k, k), put(live.v, v))
        return seen.out

    def attend(self, layer: int, q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        k, v, state = self.live.k[layer], self.live.v[layer], self.step.state
        counts = jnp.asarray(self.counts[layer])
        lengths = state.tokens.shape[1] + jnp.minimum(counts, state.query_length[:, None])
        if len(set(self.counts[layer])) == 1:
            return attention(self.mesh, q, k, v, lengths[:, 0]).out
        # Heads keep different numbers of keys: each is a request with one KV head.
        (batch, rows, heads, dim), groups = q.shape, k.shape[2]
        q = q.reshape(batch, rows, groups, -1, dim).transpose(0, 2, 1, 3, 4)
        k, v = (x.transpose(0, 2, 1, 3).reshape(batch * groups, -1, 1, dim) for x in (k, v))
        out = attention(None, q.reshape(batch * groups, rows, -1, dim), k, v, lengths.ravel()).out
        out = out.reshape(batch, groups, rows, -1, dim).transpose(0, 2, 1, 3, 4)
        return out.reshape(batch, rows, heads, dim)

    def kept(self, outputs: Outputs) -> tuple[dict[str, Any], LiveCache | None]:
        return {"outputs": outputs, "live": self.live, "kept": tuple(self.places)}, None


def _keep(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    lse: Float[Array, "B H T"],
    prompt: Int[Array, "B"],
    first: Array,
    kept: Int[Array, "B G n"],
    *,
    shape: tuple[int, int],
    counts: Sequence[int],
) -> tuple[Array, Array, Array]:
    """Returns K and V of the response and of the kept rows, [B, S, G, D], and the kept rows.

    prompt: its length. first [B]: rows are chosen, not those of `kept`. shape: response slots, S.
    counts: rows that each KV head keeps; on a mesh all the same.
    """
    (slots, size), (rows, groups) = shape, k.shape[1:3]
    asked = dynamic_slices(q, prompt, slots)
    lse = dynamic_slices(lse.transpose(0, 2, 1), prompt, slots)
    importance = _importance(asked, k, lse)
    importance = jnp.where(jnp.arange(rows) < prompt[:, None, None], importance, -jnp.inf)
    best, places = lax.top_k(importance, kept.shape[2])
    counted = jnp.arange(kept.shape[2]) < jnp.asarray(counts[:groups])[:, None]
    places = jnp.sort(jnp.where(counted & (best > -jnp.inf), places, rows), axis=-1)
    kept = jnp.where(first[:, None, None], places, kept)

    def stored(x: Array) -> Array:
        at = jnp.minimum(kept, rows - 1)[..., None]
        chosen = jnp.take_along_axis(x.transpose(0, 2, 1, 3), at, axis=2).transpose(0, 2, 1, 3)
        x = jnp.concatenate([dynamic_slices(x, prompt, slots), chosen], axis=1)
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))

    return stored(k), stored(v), kept


def _importance(
    q: Float[Array, "B T H D"], k: Float[Array, "B S G D"], lse: Float[Array, "B T H"]
) -> Float[Array, "B G S"]:
    """Returns the weights that keys get, summed over rows and query heads; a head at a time."""
    groups, dim = k.shape[2:]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def of_head(x: tuple[Array, Array, Array]) -> Array:
        q, k, lse = x
        scores = jnp.einsum(
            "btrd,bsd->btrs", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        return jnp.exp(scores * dim**-0.5 - lse[..., None]).sum(axis=(1, 2))

    q = jnp.moveaxis(q.reshape(*q.shape[:2], groups, -1, dim), 2, 0)
    lse = jnp.moveaxis(lse.reshape(*lse.shape[:2], groups, -1), 2, 0)
    return jnp.moveaxis(lax.map(of_head, (q, jnp.moveaxis(k, 2, 0), lse)), 0, 1)


@dataclasses.dataclass(frozen=True)
class MaskKV(DLLMCache):
    """MaskKV: dLLM-Cache that keeps a part of the prompt's K and V.

    budget: tokens of the prompt that every KV head keeps; or such numbers [layer][KV head], on one
      device. `mask_kv_budgets` makes them as the paper does. The paper measures 16 to 512.
    others: as of `DLLMCache`, with the paper's defaults.
    """

    name: ClassVar[str] = "mask-kv"
    keeps_live: ClassVar[bool] = False
    kv: ClassVar[type[KV]] = KeptKV
    first_layer_prompt: ClassVar[bool] = False

    prompt_interval: int = 50
    response_interval: int = 5
    budget: int | Budgets = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.budget, int):
            given: Any = self.budget
            layers = given if isinstance(given, list | tuple) else ()
            valid = bool(layers) and all(isinstance(x, list | tuple) and x for x in layers)
            valid = valid and all(is_index(n) and n > 0 for heads in layers for n in heads)
            message = "budget must be a positive integer, or such numbers [layer][KV head]"
            require(valid, f"{message}, got {self.budget!r:.80}")
            object.__setattr__(self, "budget", tuple(map(tuple, layers)))
        else:
            require(SIZE.allows(self.budget), SIZE.message.format("budget", self.budget))

    def check(self, model: ModelConfig, config: DecodeConfig, rows: int) -> None:
        super().check(model, config, rows)
        if isinstance(self.budget, tuple):
            got = len(self.budget), sorted({len(heads) for heads in self.budget})
            want = model.n_layers, [model.n_kv_heads]
            message = f"budget has {got[0]} layers with {got[1]} KV heads"
            require(got == want, f"{message}, the model has {want[0]} layers with {want[1]}")

    def counts(self, model: ModelConfig, layer: int) -> tuple[int, ...]:
        """Returns the tokens that each KV head of a layer keeps."""
        budget = self.budget
        return budget[layer] if isinstance(budget, tuple) else (budget,) * model.n_kv_heads

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        # Where kept keys are chosen: scores and weights of a KV head, in float32.
        return 2 * 4 * (model.n_heads // model.n_kv_heads) * config.gen_length * rows

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        (batch, slots), c = state.tokens.shape, model.config
        heads, kv, kept = c.n_kv_heads, [], []
        for counts in (self.counts(c, layer) for layer in range(c.n_layers)):
            same = len(set(counts)) == 1 or model.mesh is None
            require(same, f"method {self.name!r}: budgets that differ need one device, not a mesh")
            most = min(max(counts), state.query.shape[1])
            kv.append(jnp.zeros((batch, live_rows(slots + most), heads, c.head_dim), model.dtype))
            kept.append(jnp.zeros((batch, heads, most), jnp.int32))
        live = constrain(model.mesh, LiveCache(tuple(kv), tuple(map(jnp.zeros_like, kv))), "live")
        outputs = super().start(model, state, config)
        return {**outputs, "live": live, "kept": tuple(kept)}


def mask_kv_budgets(
    mean: int,
    importance: Sequence[float],
    preference: Sequence[Sequence[float]],
    groups: Sequence[Sequence[int]],
    *,
    alpha: float = 0.1,
    beta: float = 0.4,
) -> Budgets:
    """Returns the paper's budgets: more for layers that change much, and heads that look back.

    Args:
      mean: tokens that a head keeps on average.
      importance: of each layer, 1 - the mean cosine of the stream in front of attention and behind.
      preference: of each layer and KV head, the share of the prompt in a mask's attention to prompt
        and masks; only the proportions inside a layer count.
      groups: layers that share evenly, each layer in one of them: the first and last ones, and the
        middle.
      alpha, beta: share that is the same for all heads of a layer, and for all layers.

    Returns:
      Tokens [layer][KV head], 1 at least.
    """
    layers, base = len(importance), math.floor(beta * mean)
    named = sorted(layer for group in groups for layer in group)
    require(named == list(range(layers)), f"groups must name {layers} layers once, got {groups!r}")
    rest, budgets = layers * (mean - base), [0.0] * layers
    for group in groups:
        share = sum(importance[layer] for layer in group) / sum(importance)
        for layer in group:
            budgets[layer] = base + rest * share / len(group)

    def heads(budget: float, shares: Sequence[float]) -> tuple[int, ...]:
        scale = (1 - alpha) * len(shares) * budget / sum(shares)
        return tuple(max(1, math.floor(alpha * budget + scale * share)) for share in shares)

    return tuple(map(heads, budgets, preference))
