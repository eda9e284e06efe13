"""Elastic-Cache (arXiv 2510.14973), described from the paper alone; official code was not seen.

KV and the inputs of all layers are cached for all rows. Evaluation 0 computes all of them. A later
one computes the active rows: the first `window` masks, what was unmasked last, and with a logit
shift the row in front of each of these masks. All others are read from the cache, masks behind the
window too.

Each layer watches a token: of the known ones that with the largest sum of weights (mean of the
heads) from the window's rows. The next evaluation compares the weights that the rows of the last
window gave to this token then and now. In the first layer in which their cosine is below `gamma`,
all later layers compute all rows, from the cached inputs of those that are not active.

What the paper leaves open and is settled here: the mean of the heads; which rows are compared; of
equal sums the first token; layers that compute all rows watch by the window's rows too.

An evaluation first runs the active rows through all layers. If a layer calls for more, a second
pass runs the layers behind it, and replaces what the first one wrote there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.method.cache import DenoiseState, LiveCache
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.chosen_rows import true_numbers
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import Attend, MaskPredictor
from pdllm_jax.rules import AT_LEAST_0, SIZE, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

_ACTIVE, _EVERYTHING = 0, 1


class _Memory(NamedTuple):
    """What is cached beside the live KV, and what each layer watches.

    inputs: of every layer but the first, [B, R, M].
    window [B, W]: rows of the masks of the last window; R and more where there is none.
    unmasked [B, G]: slots of the last evaluation.
    watched [B], weights [B, W]: of each layer, the row of its token, and the weights from the
      window's rows to it.
    """

    inputs: tuple[Array, ...]
    window: Int[Array, "B W"]
    unmasked: Bool[Array, "B G"]
    watched: tuple[Array, ...]
    weights: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class ElasticCache(CacheMethod):
    """Elastic-Cache. The defaults are the paper's, with threshold 0.9.

    The paper has no blocks: block_length is then gen_length. In blocks, masks of later ones may be
    in the window, but are not unmasked.

    window: masks that an evaluation recomputes.
    gamma: the cosine of weights below which later layers compute all rows. Above 1 every layer
      computes all rows every time.
    """

    name: ClassVar[str] = "elastic-cache"
    window: int = 16
    gamma: float = 0.9

    def __post_init__(self) -> None:
        validate(self, {"window": SIZE, "gamma": AT_LEAST_0})

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        # Scores and weights of the rows of two windows.
        return 2 * 4 * model.n_heads * 2 * min(self.window, config.gen_length) * rows

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> _Memory:
        (batch, rows), layers = state.query.shape, range(model.config.n_layers)
        rows, window = rows + config.gen_length, min(self.window, config.gen_length)
        return _Memory(
            tuple(jnp.zeros((batch, rows, model.config.d_model), model.dtype) for _ in layers[1:]),
            jnp.full((batch, window), rows, jnp.int32),
            jnp.zeros(state.tokens.shape, bool),
            tuple(jnp.zeros((batch,), jnp.int32) for _ in layers),
            tuple(jnp.zeros((batch, window), jnp.float32) for _ in layers),
        )

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        return (_EVERYTHING,) if self.gamma > 1 else (_ACTIVE, _EVERYTHING)

    def width(self, step: Step) -> Int[Array, "B"]:
        # Active requests have made the same number of evaluations: none needs less than another.
        return (step.state.evaluations == 0).astype(jnp.int32)

    def update(self, step: Step, after: DenoiseState) -> _Memory:
        return after.memory._replace(unmasked=after.tokens != step.state.tokens)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        work = _Work(step, self)
        layers, everyone = step.model.config.n_layers, jnp.ones(step.active.shape, bool)
        x = step.model.embed(step.rows)
        if width == _EVERYTHING:
            carry, refresh = (work.live, work.memory), jnp.full(step.active.shape, -1)
            for layer in range(layers):
                x, carry = work.all_rows(layer, x, everyone, carry)
            hidden = jnp.take_along_axis(x, work.predicting[..., None], axis=1)
        else:
            hidden, refresh, carry = work.active_rows(x)
            carry, hidden = _once(
                (refresh < layers - 1).any(),
                lambda inputs: work.refresh(refresh, *inputs),
                (carry, hidden),
            )
        live, memory = carry
        model = step.model
        logits = model.logits(model.final_norm(hidden))
        behind = layers - 1 - refresh
        rows = (work.count * (layers - behind) + work.total * behind) / layers
        predicted = step.predict_at(logits, work.slots)
        memory = memory._replace(window=work.window)
        return Evaluation(*predicted, rows, live, memory)


def _once(due: Array, f: Callable[[Any], Any], x: Any) -> Any:
    """Returns f(x) if due, else x, in place: lax.cond would copy what it passes on."""
    body = lambda carry: (jnp.zeros_like(due), f(carry[1]))  # noqa: E731
    return lax.while_loop(lambda carry: carry[0], body, (due, x))[1]


class _Work:
    """The rows of an evaluation, and its two passes.

    slots, window, predicting [B, W]: of the window's masks the slot, the row, and the row that
      predicts it; G and R where there is no mask, a valid row in `predicting`.
    active [B, R], rows [B, A]: the active rows, and their numbers, `none` behind the last.
    count: active rows. total: all valid ones. watchable [B, R]: known tokens.
    """

    def __init__(self, step: Step, method: ElasticCache):
        state, model = step.state, step.model
        self.step, self.model, self.method = step, model, method
        assert state.live is not None
        self.live, self.memory, self.ids = state.live, state.memory, step.rows
        size, slots = self.ids.shape[1], state.tokens.shape[1]
        batch = jnp.arange(len(self.ids))[:, None]
        slot, row = jnp.arange(slots), jnp.arange(size)
        window = self.memory.window.shape[1]
        self.slots = true_numbers(step.masked, window, slots)
        there = self.slots < slots
        query = state.query_length[:, None]
        self.window = jnp.where(there, query + self.slots, size)
        self.predicting = jnp.where(there, model.predicting_row(self.window), 0)
        unmasked = jnp.where(self.memory.unmasked, query + slot, size)
        places = jnp.concatenate(
            [self.window, jnp.where(there, self.predicting, size), unmasked], axis=1
        )
        self.active = jnp.zeros(self.ids.shape, bool).at[batch, places].set(True, mode="drop")
        self.none = self.live.k[0].shape[1]
        most = min(size, (2 + model.lookback) * window)
        self.rows = true_numbers(self.active, most, self.none)
        self.count, self.total = self.active.sum(axis=1), step.context.placement.total
        known = row < self.total[:, None]
        self.watchable = known & (self.ids != model.config.mask_token_id)

    def place(self, row: Int[Array, "B n"]) -> Int[Array, "B n"]:
        """Returns where active rows are in `rows`; any place for a row behind the last."""
        place = jnp.cumsum(self.active, axis=1) - 1
        place = jnp.take_along_axis(place, jnp.minimum(row, place.shape[1] - 1), axis=1)
        return jnp.clip(place, 0, self.rows.shape[1] - 1)

    def attention(self, rows: Array, start: Array, of: Array, keep: Array | None = None) -> Attend:
        """Returns attention of rows for `MaskPredictor.advance`.

        It takes live KV, writes the rows from `start` on except where `keep`, and returns it with
        the weights [B, m, S] of the rows at the places `of` [B, m].
        """
        model = self.model
        by = rotation(model.config, rows)

        def attend(layer: int, q: Array, k: Array, v: Array, live: LiveCache) -> Any:
            q = rotate(q, by)
            live = live.write(layer, rotate(k, by), v, start, keep, mesh=model.mesh)
            k, v = live.k[layer], live.v[layer]
            out = attention(model.mesh, q, k, v, self.total).out
            seen = jnp.take_along_axis(q, of[..., None, None], axis=1)
            return out, (live, _weights(seen, k, self.total))

        return attend

    def watch(self, layer: int, weights: Array, who: Array, memory: _Memory) -> _Memory:
        """Chooses the layer's token for the requests `who`, by weights [B, W, S] of the window."""
        there = (self.window < self.ids.shape[1])[..., None]
        weights = jnp.where(there, weights, 0)[..., : self.ids.shape[1]]
        sums = jnp.where(self.watchable, weights.sum(axis=1), -1.0)
        token = jnp.argmax(sums, axis=1).astype(jnp.int32)
        given = jnp.take_along_axis(weights, token[:, None, None], axis=2)[..., 0]
        watched, old = memory.watched[layer], memory.weights[layer]
        token = jnp.where(who, token, watched)
        given = jnp.where(who[:, None], given, old)
        return memory._replace(
            watched=_replaced(memory.watched, layer, token),
            weights=_replaced(memory.weights, layer, given),
        )

    def all_rows(self, layer: int, x: Array, who: Array, carry: tuple[LiveCache, _Memory]):
        """Runs a layer on all rows; requests not in `who` keep everything."""
        live: Any = carry[0]  # What the layer hands on has the weights beside it.
        row = jnp.arange(self.ids.shape[1])
        keep = jnp.broadcast_to(~who[:, None], self.ids.shape)
        of = jnp.minimum(self.window, row.size - 1)
        attend = self.attention(row, jnp.zeros(who.shape, jnp.int32), of, keep)
        x, (live, weights) = self.model.advance(layer, x, attend, live)
        memory = self.watch(layer, weights, who, carry[1])
        if layer < len(memory.inputs):
            old = memory.inputs[layer]
            new = jnp.where(who[:, None, None], x, old)
            memory = memory._replace(inputs=_replaced(memory.inputs, layer, new))
        return x, (live, memory)

    def active_rows(self, x: Float[Array, "B R M"]):
        """Runs the active rows through all layers.

        Returns:
          The stream of the predicting rows [B, W, M]; the layer behind which all rows are due, the
          last one for none; live KV and memory.
        """
        step, layers = self.step, self.model.config.n_layers
        last, memory = self.memory, self.memory
        batch = jnp.arange(len(x))[:, None]
        ids = jnp.minimum(self.rows, x.shape[1] - 1)
        x = jnp.take_along_axis(x, ids[..., None], axis=1)
        window = last.window.shape[1]
        of = self.place(jnp.concatenate([last.window, self.window], axis=1))
        compared = last.window < self.ids.shape[1]
        attend = self.attention(self.rows, self.rows, of)
        refresh = jnp.full(step.active.shape, layers - 1)
        live: Any = self.live  # What a layer hands on has the weights beside it.
        everyone = jnp.ones(step.active.shape, bool)
        for layer in range(layers):
            x, (live, weights) = self.model.advance(layer, x, attend, live)
            token = last.watched[layer][:, None, None]
            now = jnp.take_along_axis(weights[:, :window], token, axis=2)[..., 0]
            now = jnp.where(compared, now, 0)
            low = step.active & (_cosine(last.weights[layer], now) < self.method.gamma)
            # One use of the last value: with two, XLA's time doubles with every layer.
            refresh = jnp.minimum(refresh, jnp.where(low, layer, layers - 1))
            memory = self.watch(layer, weights[:, window:], everyone, memory)
            if layer < len(memory.inputs):
                new = memory.inputs[layer].at[batch, self.rows].set(x, mode="drop")
                memory = memory._replace(inputs=_replaced(memory.inputs, layer, new))
        hidden = jnp.take_along_axis(x, self.place(self.predicting)[..., None], axis=1)
        return hidden, refresh, (live, memory)

    def refresh(self, refresh: Array, carry: tuple[LiveCache, _Memory], hidden: Array):
        """Runs all rows through the layers behind `refresh` of each request.

        Returns live KV and memory, and the stream of the predicting rows, replaced where due.
        """
        layers = self.model.config.n_layers
        for layer in range(1, layers):
            who = refresh < layer

            def run(inputs: Any, layer: int = layer, who: Array = who) -> Any:
                carry, hidden = inputs
                x, carry = self.all_rows(layer, carry[1].inputs[layer - 1], who, carry)
                if layer == layers - 1:
                    new = jnp.take_along_axis(x, self.predicting[..., None], axis=1)
                    hidden = jnp.where(who[:, None, None], new, hidden)
                return carry, hidden

            carry, hidden = _once(who.any(), run, (carry, hidden))
        return carry, hidden


def _replaced(arrays: tuple[Array, ...], at: int, new: Array) -> tuple[Array, ...]:
    return (*arrays[:at], new, *arrays[at + 1 :])


def _weights(
    q: Float[Array, "B n H D"], k: Float[Array, "B S G D"], total: Int[Array, "B"]
) -> Float[Array, "B n S"]:
    """Returns the softmax weights of a few rows, float32, the mean of the heads."""
    groups = k.shape[2]
    rows = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "bngrd,bsgd->bgrns", rows, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores / q.shape[-1] ** 0.5
    valid = (jnp.arange(k.shape[1]) < total[:, None])[:, None, None, None]
    scores = jnp.where(valid, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))


def _cosine(a: Float[Array, "B W"], b: Float[Array, "B W"]) -> Float[Array, "B"]:
    norms = (jnp.linalg.norm(x, axis=1) for x in (a, b))
    one, other = (jnp.maximum(norm, 1e-8) for norm in norms)
    return (a * b).sum(axis=1) / (one * other)
