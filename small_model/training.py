"""Masked diffusion training of the small model: loss, optimiser, stages, saved state."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from small_model import lora, network
from small_model.evaluation import Evaluator
from small_model.feed import Feed, Source
from small_model.masking import GROUPS, Batch
from small_model.network import Params, Shape


@dataclasses.dataclass(frozen=True)
class Stage:
    """Training at one length, for a number of steps or of seconds."""

    length: int
    amount: float
    timed: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line sets; see train_small.py."""

    stages: tuple[Stage, ...]
    corpora: str
    state: Path
    out: Path | None = None
    rank: int = 48
    alpha: float = 32.0
    full: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 100
    tokens_per_step: int = 32768
    least_batch: int = 8  # t is stratified over the batch
    row_share: float = 0.125
    seed: int = 0
    workers: int = 4
    limit: float = math.inf
    eval_examples: int = 64
    earlier_steps: int = 0  # that the adapter to start from has behind it
    log_every: int = 20


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Reads "1024:120s,2048:300s" (seconds) or "1024:500,2048:800" (steps), one unit for all."""
    stages = []
    for part in text.split(","):
        length, _, amount = part.partition(":")
        timed = amount.endswith("s")
        stages.append(Stage(int(length), float(amount.removesuffix("s")), timed))
    if len({stage.timed for stage in stages}) != 1:
        raise ValueError(f"--stages must be all seconds or all steps, got {text!r}")
    return tuple(stages)


def initial(base: Params, rank: int, seed: int) -> Params:
    """Trainable parameters that leave the base as it is: A uniform, B zero."""
    rng = np.random.default_rng(seed)
    adapters = {}
    for name in network.LINEAR:
        layers, rows, columns = base[name].shape
        bound = columns**-0.5
        a = rng.uniform(-bound, bound, (layers, rank, columns)).astype(np.float32)
        adapters[name] = {"a": a, "b": np.zeros((layers, rows, rank), np.float32)}
    norms = {name: np.float32(base[name]) for name in (*network.NORMS, "final_norm")}
    return {"lora": adapters, "norms": norms, "special": np.float32(base["embedding"][:6])}


def loss_of(
    trainable: Params, base: Params, batch: Batch, shape: Shape, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The batch's loss, and [3, groups]: summed cross-entropy, right predictions, rows."""
    params = network.merge(base, trainable, dtype)
    hidden = network.encode(params, shape, batch.tokens)
    rows = hidden.reshape(-1, hidden.shape[-1])[batch.rows]
    logits = network.head(params, rows)
    right = jnp.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - right
    counted = jnp.where(batch.weights > 0, 1.0, 0.0)
    hits = (logits.argmax(axis=-1) == batch.targets) * counted
    by_group = jax.nn.one_hot(batch.groups, len(GROUPS))  # [R, groups]
    sums = jnp.stack([entropy * counted, hits, counted]) @ by_group
    return jnp.sum(entropy * batch.weights), sums


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which every step is given."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(weight_decay),
    )


def train_step(
    trainable: Params,
    moments: Any,
    base: Params,
    batch: Batch,
    rate: jax.Array,
    *,
    shape: Shape,
    dtype: Any,
    weight_decay: float,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """One update. Jitted with `trainable` and `moments` donated; recompiles for a new length."""
    grad = jax.grad(loss_of, has_aux=True)
    gradients, sums = grad(trainable, base, batch, shape, dtype)
    norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(gradients)))
    updates, moments = make_optimizer(weight_decay).update(gradients, moments, trainable)

    def apply(path: tuple[Any, ...], value: jax.Array, update: jax.Array) -> jax.Array:
        # Norm weights are small here and shared by a whole row: a tenth of the rate.
        factor = 0.1 if any("norm" in str(getattr(key, "key", "")) for key in path) else 1.0
        return value - factor * rate * update

    trainable = jax.tree_util.tree_map_with_path(apply, trainable, updates)
    return trainable, moments, {"sums": sums, "norm": norm}


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path, as host arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def unflatten(like: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """A tree of the shape of `like` from what `flatten` made."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], like)


class Trainer:
    """Runs the stages of a plan from where the saved state stands."""

    def __init__(
        self,
        options: Options,
        base: Params,
        shape: Shape,
        dtype: Any,
        started: float,
        adapter: Mapping[str, np.ndarray] | None = None,
    ):
        self.options, self.shape, self.dtype, self.started = options, shape, dtype, started
        gain = network.gains(base, options.alpha / options.rank)
        self.gain = gain
        if options.full:
            trainable = {"full": jax.tree.map(np.float32, base)}
        elif adapter is not None:
            trainable = lora.to_trainable(adapter, gain, len(base["attn_norm"]))
        else:
            trainable = initial(base, options.rank, options.seed)
        self.meta = {"stage": 0, "done": 0.0, "stage_step": 0, "step": 0, "tokens": 0}
        moments = make_optimizer(options.weight_decay).init(trainable)
        saved = options.state / "state.safetensors"
        if saved.exists():
            flat = load_file(saved)
            trainable, moments = unflatten((trainable, moments), flat)
            self.meta = json.loads((options.state / "meta.json").read_text())
            self.log(event="resumed", **self.meta)
        self.trainable, self.moments = jax.device_put((trainable, moments))
        cast = jax.tree.map(lambda x: np.asarray(x).astype(dtype), base)
        self.base = jax.device_put({**cast, "gain": gain})
        self.step = jax.jit(
            train_step,
            static_argnames=("shape", "dtype", "weight_decay"),
            donate_argnames=("trainable", "moments"),
        )
        self.evaluator = Evaluator(options.corpora, shape)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def log(self, **record: Any) -> None:
        line = json.dumps({"time": round(self.elapsed(), 1), **record})
        print(line, flush=True)
        for folder in (self.options.state, self.options.out):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def rate(self, done: float) -> float:
        """Warm-up by steps, then a cosine over the whole plan down to a twentieth."""
        plan = [stage.amount for stage in self.options.stages]
        share = (sum(plan[: self.meta["stage"]]) + done) / sum(plan)
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        warm = min((self.meta["step"] + 1) / self.options.warmup, 1.0)
        return self.options.learning_rate * warm * (0.05 + 0.95 * cosine)

    def run(self) -> None:
        """All stages that are left, or what fits the limit; saves after each and at the end."""
        stages = self.options.stages
        while self.meta["stage"] < len(stages):
            if not self._stage(stages[self.meta["stage"]]):
                self.save()
                self.log(event="limit reached", **self.meta)
                return
            self.meta.update(stage=self.meta["stage"] + 1, done=0.0, stage_step=0)
            self.save()
            self.evaluate(stages[self.meta["stage"] - 1].length)
        self.log(event="finished", **self.meta)

    def _stage(self, stage: Stage) -> bool:
        """One stage; False where the time limit came first."""
        options, meta = self.options, self.meta
        size = max(options.tokens_per_step // stage.length, options.least_batch)
        rows = max(int(size * stage.length * options.row_share) // 128 * 128, 128)
        tokenizer = str(Path(options.corpora) / "tokenizer.json")
        source = Source(options.corpora, tokenizer, stage.length, size, rows, options.seed)
        feed = Feed(source, meta["stage_step"], options.workers)
        self.log(event="stage", length=stage.length, batch=size, rows=rows)
        finished = False
        try:
            pending: list[dict[str, jax.Array]] = []
            window, begun, last = [], None, time.monotonic()
            for batch in feed:
                rate = np.float32(self.rate(meta["done"]))
                self.trainable, self.moments, metrics = self.step(
                    self.trainable, self.moments, self.base, batch, rate,
                    shape=self.shape, dtype=self.dtype, weight_decay=options.weight_decay,
                )  # fmt: skip
                pending.append(metrics)
                if len(pending) > 2 or begun is None:
                    window.append(jax.device_get(pending.pop(0)))
                now = time.monotonic()
                spent = now - last if stage.timed else 1.0
                if begun is None:  # the first step's seconds are the compiler's
                    self.log(event="compiled", seconds=round(now - last, 1))
                    begun = waited_from = now
                    window, spent = [], 0.0 if stage.timed else spent
                meta["done"] += spent
                last = now
                for key, more in (("step", 1), ("stage_step", 1), ("tokens", size * stage.length)):
                    meta[key] += more
                if len(window) >= options.log_every:
                    self._report(stage, size, rows, window, now - waited_from, float(rate))
                    window, waited_from = [], now
                if meta["done"] >= stage.amount:
                    finished = True
                    break
                if self.elapsed() > options.limit:
                    break
        finally:
            feed.close()
        return finished

    def _report(
        self, stage: Stage, size: int, rows: int, window: list, seconds: float, rate: float
    ) -> None:
        sums = np.sum([one["sums"] for one in window], axis=0)
        entropy, accuracy = sums[:2] / np.maximum(sums[2], 1)
        speed = len(window) * size * stage.length / seconds
        linear = sum(self.base[name].size for name in network.LINEAR)
        width = self.base["embedding"].shape[1]
        depth = len(self.base["attn_norm"])
        per_token = 6 * linear + 12 * depth * width * stage.length
        per_token += 6 * self.base["embedding"].size * rows / (size * stage.length)
        self.log(
            step=self.meta["step"],
            length=stage.length,
            done=round(self.meta["done"], 1),
            rate=round(rate, 6),
            loss={name: round(float(x), 3) for name, x in zip(GROUPS, entropy, strict=True)},
            right={name: round(float(x), 3) for name, x in zip(GROUPS, accuracy, strict=True)},
            norm=round(float(np.mean([one["norm"] for one in window])), 2),
            tokens_per_s=round(speed),
            tflops=round(speed * per_token / 1e12, 1),
        )

    def evaluate(self, length: int) -> None:
        """Exact match and question fit on held-out text, with the adapter as it would be stored."""
        count = min(self.options.eval_examples, 262_144 // length)
        fitted = min(self.options.eval_examples, 32)
        if not count:
            return
        length = max(length, 1024)  # what the key-value blocks need
        begun = time.monotonic()
        trainable = self.trainable
        if not self.options.full:
            stored = lora.from_trainable(jax.device_get(trainable), self.gain)
            trainable = lora.to_trainable(stored, self.gain, len(self.base["attn_norm"]))
        params = jax.jit(network.merge, static_argnums=2)(self.base, trainable, self.dtype)
        found = {
            **self.evaluator(params, length, count),
            **self.evaluator.question_fit(params, fitted),
        }
        self.log(
            event="evaluation", length=length, **found, seconds=round(time.monotonic() - begun, 1)
        )

    def save(self) -> None:
        """State to go on from, and the adapter as the repository carries it."""
        folder = self.options.state
        folder.mkdir(parents=True, exist_ok=True)
        host = jax.device_get((self.trainable, self.moments))
        partial = folder / "state.partial"
        save_file(flatten(host), partial)
        partial.replace(folder / "state.safetensors")
        (folder / "meta.json").write_text(json.dumps(self.meta))
        if not self.options.full:
            steps = self.options.earlier_steps + self.meta["step"]
            note = {"rank": str(self.options.rank), "steps": str(steps)}
            adapter = lora.from_trainable(host[0], self.gain)
            for place in {folder, self.options.out or folder}:
                place.mkdir(parents=True, exist_ok=True)
                lora.save(place / "adapter.safetensors", adapter, note)
