"""Trains the small model: loss, optimizer, stages and saved state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from small_model import lora, network
from small_model.evaluation import Evaluator
from small_model.feed import Source, make_batches
from small_model.masking import GROUPS, Batch
from small_model.network import Params, Shape

ALPHA = 32.0  # the adapters' scale is ALPHA / rank
LEAST_BATCH = 8  # t is stratified over the batch
ROW_SHARE = 0.125  # rows of the loss for each token of a batch
LOG_EVERY = 20  # steps
FINAL_RATE = 0.05  # of the peak learning rate
NORM_RATE = 0.1  # norm weights are small here and each scales a whole row


class Stage(NamedTuple):
    """Training at one length for an amount of seconds (timed) or steps."""

    length: int
    amount: float
    timed: bool


class Options(NamedTuple):
    """Settings of a training run; see train_small.py."""

    stages: tuple[Stage, ...]
    corpora: str
    state: Path
    rank: int = 48
    learning_rate: float = 1e-3
    warmup: int = 100
    tokens_per_step: int = 32768
    seed: int = 0
    workers: int = 4
    limit: float = math.inf
    eval_examples: int = 64
    earlier_steps: int = 0  # steps that made the adapter to start from


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Parses "1024:120s,2048:300s" (seconds) or "1024:500,2048:800" (steps)."""
    stages = []
    for part in text.split(","):
        length, _, amount = part.partition(":")
        stages.append(Stage(int(length), float(amount.removesuffix("s")), amount.endswith("s")))
    if len({stage.timed for stage in stages}) != 1:
        raise ValueError(f"--stages must be all seconds or all steps, got {text!r}")
    return tuple(stages)


def initial(base: Params, rank: int, seed: int) -> Params:
    """Returns trainable parameters that do not change the base: A uniform, B zero."""
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
    """Returns the loss, and [3, groups]: summed cross-entropy, correct predictions, rows."""
    params = network.merge(base, trainable, dtype)
    hidden = network.encode(params, shape, batch.tokens)
    logits = network.head(params, hidden.reshape(-1, hidden.shape[-1])[batch.rows])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    counted = jnp.where(batch.weights > 0, 1.0, 0.0)
    hits = (logits.argmax(axis=-1) == batch.targets) * counted
    by_group = jax.nn.one_hot(batch.groups, len(GROUPS))  # [R, groups]
    sums = jnp.stack([entropy * counted, hits, counted]) @ by_group
    return jnp.sum(entropy * batch.weights), sums


# AdamW without weight decay and without its learning rate, which is an argument of each step.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))


def train_step(
    trainable: Params,
    moments: Any,
    base: Params,
    batch: Batch,
    rate: jax.Array,
    *,
    shape: Shape,
    dtype: Any,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Makes one update. Jit it with `trainable` and `moments` donated; a new length recompiles."""
    grad = jax.grad(loss_of, has_aux=True)
    gradients, sums = grad(trainable, base, batch, shape, dtype)
    updates, moments = OPTIMIZER.update(gradients, moments, trainable)
    factors = {"lora": 1.0, "norms": NORM_RATE, "special": 1.0}
    trainable = {
        part: jax.tree.map(
            lambda x, dx, f=factor: x - f * rate * dx, trainable[part], updates[part]
        )
        for part, factor in factors.items()
    }
    return trainable, moments, {"sums": sums, "norm": optax.tree.norm(gradients)}


class Trainer:
    """Runs the stages of a plan, starting from the saved state if there is one."""

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
        self.gain = network.gains(base, ALPHA / options.rank)
        if adapter is None:
            trainable = initial(base, options.rank, options.seed)
        else:
            trainable = lora.to_trainable(adapter, self.gain, len(base["attn_norm"]))
        self.meta = {"stage": 0, "done": 0.0, "stage_step": 0, "step": 0, "tokens": 0}
        moments = OPTIMIZER.init(trainable)
        options.state.mkdir(parents=True, exist_ok=True)
        self.saved = options.state / "state.msgpack"
        if self.saved.exists():
            fresh = (trainable, moments, self.meta)
            saved = serialization.from_bytes(fresh, self.saved.read_bytes())
            trainable, moments, self.meta = saved
            self.log(event="resumed", **self.meta)
        self.trainable, self.moments = jax.device_put((trainable, moments))
        cast = jax.tree.map(lambda x: np.asarray(x).astype(dtype), base)
        self.base = jax.device_put({**cast, "gain": self.gain})
        self.step = jax.jit(
            train_step,
            static_argnames=("shape", "dtype"),
            donate_argnames=("trainable", "moments"),
        )
        self.evaluator = Evaluator(options.corpora, shape)

    def elapsed(self) -> float:
        """Returns the seconds since the command started."""
        return time.monotonic() - self.started

    def log(self, **record: Any) -> None:
        """Prints a record as JSON and appends it to log.jsonl."""
        line = json.dumps({"time": round(self.elapsed(), 1), **record})
        print(line, flush=True)
        with (self.options.state / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rate(self) -> float:
        """Returns the learning rate: warm-up by steps, cosine decay over the whole plan."""
        plan = [stage.amount for stage in self.options.stages]
        share = (sum(plan[: self.meta["stage"]]) + self.meta["done"]) / sum(plan)
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        warm = min((self.meta["step"] + 1) / self.options.warmup, 1.0)
        return self.options.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def run(self) -> None:
        """Runs the remaining stages until the time limit; saves after each stage and at the end."""
        stages = self.options.stages
        while self.meta["stage"] < len(stages):
            stage = stages[self.meta["stage"]]
            if not self._stage(stage):
                self.save()
                self.log(event="limit reached", **self.meta)
                return
            self.meta.update(stage=self.meta["stage"] + 1, done=0.0, stage_step=0)
            self.save()
            self.evaluate(stage.length)
        self.log(event="finished", **self.meta)

    def _stage(self, stage: Stage) -> bool:
        """Runs one stage; returns False if the time limit ended it."""
        options, meta = self.options, self.meta
        size = max(options.tokens_per_step // stage.length, LEAST_BATCH)
        rows = max(int(size * stage.length * ROW_SHARE) // 128 * 128, 128)
        source = Source(options.corpora, stage.length, size, rows, options.seed)
        self.log(event="stage", length=stage.length, batch=size, rows=rows)
        window: list[dict[str, jax.Array]] = []
        last = time.monotonic()
        compiled = False
        with closing(make_batches(source, meta["stage_step"], options.workers)) as batches:
            for batch in batches:
                rate = self.rate()
                self.trainable, self.moments, metrics = self.step(
                    self.trainable,
                    self.moments,
                    self.base,
                    batch,
                    np.float32(rate),
                    shape=self.shape,
                    dtype=self.dtype,
                )
                window.append(metrics)
                # One step may run ahead of the host. The first one includes compiling.
                jax.block_until_ready(window[-2:][0])
                now = time.monotonic()
                spent, last = now - last, now
                if not compiled:
                    self.log(event="compiled", seconds=round(spent, 1))
                    compiled, window, spent, begun = True, [], 0.0, now
                meta["done"] += spent if stage.timed else 1.0
                for key, added in (("step", 1), ("stage_step", 1), ("tokens", batch.tokens.size)):
                    meta[key] += added
                if len(window) == LOG_EVERY:
                    speed = LOG_EVERY * batch.tokens.size / (now - begun)
                    self._report(stage.length, window, rate, speed)
                    window, begun = [], now
                if meta["done"] >= stage.amount:
                    return True
                if self.elapsed() > options.limit:
                    break
        return False

    def _report(
        self, length: int, window: list[dict[str, jax.Array]], rate: float, speed: float
    ) -> None:
        host = jax.device_get(window)
        sums = np.sum([metrics["sums"] for metrics in host], axis=0)
        entropy, accuracy = sums[:2] / np.maximum(sums[2], 1)
        self.log(
            step=self.meta["step"],
            length=length,
            done=round(self.meta["done"], 1),
            rate=round(rate, 6),
            loss={name: round(float(x), 3) for name, x in zip(GROUPS, entropy, strict=True)},
            right={name: round(float(x), 3) for name, x in zip(GROUPS, accuracy, strict=True)},
            norm=round(float(np.mean([metrics["norm"] for metrics in host])), 2),
            tokens_per_s=round(speed),
        )

    def evaluate(self, length: int) -> None:
        """Logs exact match and question fit on held-out text, with the quantized adapter."""
        count = min(self.options.eval_examples, 262_144 // length)
        fitted = min(self.options.eval_examples, 32)
        if not count:
            return
        length = max(length, 1024)  # the key-value blocks need this length
        begun = time.monotonic()
        stored = lora.from_trainable(jax.device_get(self.trainable), self.gain)
        trainable = lora.to_trainable(stored, self.gain, len(self.base["attn_norm"]))
        params = jax.jit(network.merge, static_argnums=2)(self.base, trainable, self.dtype)
        measures = self.evaluator(params, length, count)
        measures |= self.evaluator.question_fit(params, fitted)
        seconds = round(time.monotonic() - begun, 1)
        self.log(event="evaluation", length=length, **measures, seconds=seconds)

    def save(self) -> None:
        """Writes the state to continue from, and the adapter file."""
        host = jax.device_get((self.trainable, self.moments))
        partial = self.saved.with_suffix(".partial")
        partial.write_bytes(serialization.to_bytes((*host, self.meta)))
        partial.replace(self.saved)
        steps = self.options.earlier_steps + self.meta["step"]
        note = {"rank": str(self.options.rank), "steps": str(steps)}
        adapter = lora.from_trainable(host[0], self.gain)
        lora.save(self.options.state / "adapter.safetensors", adapter, note)
