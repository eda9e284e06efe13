"""dLLM-Cache (arXiv 2506.06295, and what its authors' public code does).

Every layer adds two outputs to the residual stream, attention's and the MLP's. They are cached
beside K and V, and a row that is not recomputed adds the cached ones. Evaluations are counted from
0 over the whole response, whatever the block:

  prompt    recomputed when the count is a multiple of `prompt_interval`.
  response  recomputed when the count is a multiple of `response_interval`. Else V of all its rows
            is made from this layer's input and replaces the cached V, and the int(ratio * G) rows
            whose V is least like the cached one (cosine, over all heads; the lowest row of a tie)
            are recomputed. ratio 0 leaves the response as it was.

The outputs of prompt rows are cached here for one row alone, the one in front of the response, and
only where it predicts (Dream): no other row of the prompt is read between two refreshes. So a
prompt costs what its K and V cost.

`first_layer`: layer 0 recomputes all rows at every evaluation, as d2Cache's code of this method
does. The authors' own code does not (False). Then V of most slots in layer 0 is the cached one, and
rounding says which of them are recomputed: its tokens are comparable where that changes nothing,
with a ratio of 0 or 1, or of as many rows as a step unmasks.

Not reproduced: guidance, with caches and an interval of its own; evaluations in which nothing is
due (LLaDA with more steps than tokens), which the authors make and count.

All requests of a batch begin together, so that the active ones have made equally many evaluations.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.method.cache import DenoiseState, LiveCache, dynamic_slices, dynamic_updates
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.published import predict_block
from pdllm_jax.method.live_forward import predicting_rows
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import LayerParts, MaskPredictor
from pdllm_jax.rules import SIZE, SWITCH, UNIT, ConfigError, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step

# (prompt_interval, response_interval) of the authors' scripts, all with ratio 0.25. Where a script
# has two pairs, the first one: humaneval of LLaDA-Instruct has 25/5 too, gsm8k of LLaDA-Base 100/6.
_SCRIPTS: dict[str, dict[str, tuple[int, int]]] = {
    "llada-instruct": {
        "gsm8k": (50, 7), "humaneval": (50, 8), "mbpp": (100, 5), "math": (50, 1), "bbh": (50, 6),
        "gpqa": (50, 6), "mmlu": (100, 7), "mmlu-pro": (51, 3), "hotpotqa": (100, 8),
    },
    "llada-base": {
        "gsm8k": (25, 5), "humaneval": (50, 5), "mbpp": (25, 4), "math": (50, 8), "bbh": (50, 6),
        "gpqa": (100, 8), "mmlu": (100, 6), "mmlu-pro": (100, 6),
    },
    "dream-instruct": {
        "gsm8k": (25, 2), "humaneval": (50, 1), "mbpp": (10, 8), "math": (50, 1), "bbh": (10, 2),
        "gpqa": (10, 8), "mmlu": (100, 8), "mmlu-pro": (5, 1),
    },
    "dream-base": {
        "gsm8k": (100, 8), "humaneval": (5, 1), "mbpp": (25, 8), "math": (100, 4), "bbh": (25, 4),
        "gpqa": (100, 8), "mmlu": (100, 2), "mmlu-pro": (25, 2),
    },
}  # fmt: skip


class Outputs(NamedTuple):
    """What each layer's attention and MLP added to the rows of a `Tail`, at their last computation.

    Layers are a tuple, so that one layer's rows are written in place.
    """

    attention: tuple[Float[Array, "B R M"], ...]
    mlp: tuple[Float[Array, "B R M"], ...]


class Tail(NamedTuple):
    """The rows whose outputs are cached: the response, and the row in front if it predicts.

    row: their numbers. in_response: rows of the response (the others are prompt or padding).
    """

    row: Int[Array, "B R"]
    in_response: Bool[Array, "B R"]

    @classmethod
    def of(cls, model: MaskPredictor, state: DenoiseState) -> Tail:
        """Returns the tail of each request."""
        length, rows = state.tokens.shape[1], tail_rows(model, state)
        row = model.predicting_row(state.query_length)[:, None] + jnp.arange(rows)
        slot = row - state.query_length[:, None]
        return cls(row, (slot >= 0) & (slot < length))

    @property
    def start(self) -> Int[Array, "B"]:
        """The first row."""
        return self.row[:, 0]


def tail_rows(model: MaskPredictor, state: DenoiseState) -> int:
    """Returns R of a `Tail`."""
    rows = state.tokens.shape[1]
    return min(rows + model.lookback, rows + state.query.shape[1])


class Due(NamedTuple):
    """Which parts of a request an evaluation recomputes in full."""

    prompt: bool
    response: bool


class KV:
    """K and V that one evaluation reads and writes: of all live rows."""

    def __init__(self, step: Step, due: Due):
        self.step, self.mesh = step, step.model.mesh
        self.tail, self.due = Tail.of(step.model, step.state), due
        self.slots = step.state.tokens.shape[1]
        self.live = self._live()

    def _live(self) -> LiveCache:
        assert self.step.state.live is not None
        return self.step.state.live

    def cut(self, x: Float[Array, "B T M"]) -> Float[Array, "B R M"]:
        """Returns the tail's rows of the evaluation's rows."""
        rows = self.tail.row.shape[1]
        return dynamic_slices(x, self.tail.start, rows) if self.due.prompt else x

    def paste(self, x: Float[Array, "B T M"], tail: Float[Array, "B R M"]) -> Array:
        """Returns x with other rows of the tail."""
        return dynamic_updates(x, self.tail.start, tail) if self.due.prompt else tail

    def number(self, row: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Returns where rows of the request lie in `live`."""
        return row

    def of_tail(self, rows: Float[Array, "B S G D"]) -> Float[Array, "B R G D"]:
        """Returns the tail's rows of an array of `live`."""
        return dynamic_slices(rows, self.tail.start, self.tail.row.shape[1])

    def write(self, layer: int, k: Any, v: Any, row: Array, keep: Array | None) -> None:
        """Writes keys, values or both (None leaves the old ones) of these rows, except `keep`."""
        self.live = self.live.write(layer, k, v, self.number(row), keep, mesh=self.mesh)

    def attend_all(
        self, layer: int, q: Array, k: Array, v: Array, keep: tuple[Array | None, Array | None]
    ) -> Array:
        """Attends from all rows; keep [B, T]: rows whose cached k, and v, stay."""
        row = jnp.zeros_like(self.tail.start)
        self.live = self.live.write(layer, k, None, row, keep[0], mesh=self.mesh)
        self.live = self.live.write(layer, None, v, row, keep[1], mesh=self.mesh)
        return self.attend(layer, q)

    def attend(self, layer: int, q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        """Attends from rotated queries."""
        total = self.step.state.placement.total
        return attention(self.mesh, q, self.live.k[layer], self.live.v[layer], total).out

    def kept(self, outputs: Outputs) -> tuple[dict[str, Any], LiveCache | None]:
        """Returns memory and live KV behind the evaluation."""
        return {"outputs": outputs}, self.live


@dataclasses.dataclass(frozen=True)
class DLLMCache(CacheMethod):
    """dLLM-Cache: prompt and response are recomputed at intervals, and in between a few rows.

    prompt_interval, response_interval: evaluations from one refresh to the next. By default those
      of the authors' demo; `published` has those of their scripts.
    ratio: share of the response's rows that is recomputed where the response is not refreshed.
    first_layer: layer 0 recomputes all rows; False is the authors' code, see above.
    """

    name: ClassVar[str] = "dllm-cache"
    kv: ClassVar[type[KV]] = KV
    # Layer 0 recomputes the row in front of the response too.
    first_layer_prompt: ClassVar[bool] = True

    prompt_interval: int = 100
    response_interval: int = 7
    ratio: float = 0.25
    first_layer: bool = True

    def __post_init__(self) -> None:
        rules = dict.fromkeys(("prompt_interval", "response_interval"), SIZE)
        validate(self, rules | {"ratio": UNIT, "first_layer": SWITCH})

    @staticmethod
    def published(model: str, task: str) -> DLLMCache:
        """Returns the settings of the authors' script for a model and a task.

        model: "llada-instruct", "llada-base", "dream-instruct" or "dream-base".

        Raises:
          ConfigError: there is no script for the model or the task.
        """
        for kind, name, known in ("model", model, _SCRIPTS), ("task", task, _SCRIPTS.get(model)):
            if name not in (known or {}):
                raise ConfigError(f"{kind} {name!r} is not known ({', '.join(known or {})})")
        return DLLMCache(*_SCRIPTS[model][task])

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        shape = len(state.tokens), tail_rows(model, state), model.config.d_model

        def empty() -> tuple[Array, ...]:
            layers = range(model.config.n_layers)
            return tuple(jnp.zeros(shape, model.dtype) for _ in layers)

        return {"outputs": Outputs(empty(), empty())}

    def kinds(self, config: DecodeConfig) -> list[Due]:
        """Returns what occurs in the evaluations of a response, in rising order of rows."""
        limit = config.block_length + config.first_slot_alone
        counts = range(config.n_blocks * (config.steps_per_block if config.scheduled else limit))
        due = {Due(i % self.prompt_interval == 0, i % self.response_interval == 0) for i in counts}
        return sorted(due)

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        return tuple(range(len(self.kinds(config))))

    def width(self, step: Step) -> Int[Array, "B"]:
        count, kinds = step.state.evaluations, self.kinds(step.config)
        prompt, response = (count % x == 0 for x in (self.prompt_interval, self.response_interval))
        equal = [(prompt == due.prompt) & (response == due.response) for due in kinds]
        return jnp.argmax(jnp.stack(equal), axis=0)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        model, state, due = step.model, step.state, self.kinds(step.config)[width]
        kv = self.kv(step, due)
        tail, outputs = kv.tail, state.memory["outputs"]
        ids = step.rows
        if not due.prompt:
            ids = dynamic_slices(ids, tail.start, tail.row.shape[1])
        x = model.embed(ids)
        by = rotation(model.config, jnp.arange(ids.shape[1]) if due.prompt else tail.row)
        new: list[tuple[Array, Array]] = []
        for layer in range(model.config.n_layers):
            old = outputs.attention[layer], outputs.mlp[layer]
            x, added = self._run(_Layer(kv, layer, *model.parts(layer, x), x, by, old))
            new.append(added)
        x = kv.cut(x)

        def logits(first: Array, size: int) -> Array:
            hidden = predicting_rows(model, x, state.query_length + first, size, tail.start)
            return model.logits(model.final_norm(hidden))

        predicted = predict_block(step, logits, jnp.ones(step.active.shape, bool))
        memory, live = kv.kept(Outputs(*zip(*new, strict=True)))
        return Evaluation(*predicted, self._rows(step, due), live, memory)

    def _rows(self, step: Step, due: Due) -> Array | float:
        length, layers = step.state.tokens.shape[1], step.model.config.n_layers
        few = length if due.response else int(self.ratio * length)
        first = length if self.first_layer else few
        rows = (first + (layers - 1) * few) / layers
        return step.state.query_length + rows if due.prompt else rows

    def _run(self, layer: _Layer) -> tuple[Array, tuple[Array, Array]]:
        """Returns the stream behind a layer, and what it added to the tail's rows."""
        kv, old = layer.kv, layer.old
        if kv.due.response or (self.first_layer and layer.index == 0):
            front = self.first_layer_prompt and not layer.index
            return layer.many_rows(None, front and self.first_layer)
        if self.ratio > 0:
            (v,) = layer.parts.heads(kv.cut(layer.normed), "v")
            count = int(self.ratio * kv.slots)
            cached = kv.of_tail(kv.live.v[layer.index])
            chosen = _least_alike(v, cached, kv.tail.in_response, count)
            if kv.due.prompt:
                return layer.many_rows(chosen)
            if count:
                # Always true. XLA copies all cached values unless it sees that they are read first.
                v = jnp.where((chosen[:, 0] >= 0)[:, None, None, None], v, 0)
            kv.write(layer.index, None, v, kv.tail.row, ~kv.tail.in_response)
            return layer.few_rows(chosen)
        if kv.due.prompt:
            none = jnp.zeros((len(layer.x), 0), jnp.int32)
            return layer.many_rows(none, keep_values=True)
        return layer.x + old[0] + old[1], old


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer in an evaluation.

    x, normed: the stream in front of it, and the norm of that. by: rotation of its rows. old: what
    attention and MLP added to the tail's rows when these were computed last.
    """

    kv: KV
    index: int
    parts: LayerParts
    normed: Float[Array, "B T M"]
    x: Float[Array, "B T M"]
    by: Rotation
    old: tuple[Float[Array, "B R M"], Float[Array, "B R M"]]

    def many_rows(
        self, chosen: Int[Array, "B n"] | None, front: bool = False, keep_values: bool = False
    ) -> tuple[Array, tuple[Array, Array]]:
        """Computes all rows of x; returns as `few_rows`.

        chosen: rows of the response that are recomputed, as places in the tail, None for all. The
          others keep K and the cached outputs, with keep_values also V.
        front: recomputes the outputs of the row in front of the response.
        """
        kv, index, tail, x = self.kv, self.index, self.kv.tail, self.x
        fresh = tail.in_response
        if chosen is not None:
            fresh = jnp.zeros_like(fresh).at[jnp.arange(len(x))[:, None], chosen].set(True)
        stale = tail.in_response & ~fresh
        if kv.due.prompt or front:
            fresh |= ~tail.in_response
        q, k, v = self.parts.heads(self.normed, "qkv")
        q, k = rotate(q, self.by), rotate(k, self.by)
        if kv.due.prompt:
            none = jnp.zeros(x.shape[:2], bool)
            keep = None if chosen is None else dynamic_updates(none, tail.start, stale)
            seen = kv.attend_all(index, q, k, v, (keep, keep if keep_values else None))
        else:
            kv.write(index, k, v, tail.row, ~tail.in_response)
            seen = kv.attend(index, q)

        def add(x: Array, output: Array, cached: Array) -> tuple[Array, Array]:
            output_of_tail = jnp.where(fresh[..., None], kv.cut(output), cached)
            return kv.paste(x + output, kv.cut(x) + output_of_tail), output_of_tail

        x, attended = add(x, self.parts.attention_output(seen), self.old[0])
        x, transformed = add(x, self.parts.mlp_output(x), self.old[1])
        return x, (attended, transformed)

    def few_rows(self, chosen: Int[Array, "B n"]) -> tuple[Array, tuple[Array, Array]]:
        """Computes the chosen rows of the tail; the others add the cached outputs.

        Returns the stream behind the layer, and what the layer added to the tail's rows.
        """
        kv, x, (attended, transformed) = self.kv, self.x, self.old
        at = jnp.arange(len(x))[:, None], chosen
        if chosen.shape[1]:
            q, k = self.parts.heads(self.normed[at], "qk")
            row = kv.tail.row[at]
            by = rotation(kv.step.model.config, row)
            kv.write(self.index, rotate(k, by), None, row, None)
            seen = kv.attend(self.index, rotate(q, by))
            attended = attended.at[at].set(self.parts.attention_output(seen))
        x = x + attended
        if chosen.shape[1]:
            transformed = transformed.at[at].set(self.parts.mlp_output(x[at]))
        return x + transformed, (attended, transformed)


def _least_alike(
    new: Float[Array, "B R G D"],
    old: Float[Array, "B R G D"],
    valid: Bool[Array, "B R"],
    count: int,
) -> Int[Array, "B count"]:
    """Returns the valid rows with the smallest cosine of new and old, all heads together."""
    new, old = (x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in (new, old))
    norms = (jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8) for x in (new, old))
    cosine = (new * old).sum(axis=-1) / (next(norms) * next(norms))
    return lax.top_k(jnp.where(valid, -cosine, -jnp.inf), count)[1]
