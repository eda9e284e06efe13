"""Trains the small model: loss, optimizer, stages and saved state."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from pdllm_jax import ModelConfig
from small_model import base, lora, network
from small_model.evaluation import Evaluator
from small_model.masking import GROUPS, Batch, Source, make_batches
from small_model.network import Params

RANK = 48
ALPHA = 32.0  # the adapters' scale is ALPHA / RANK
TOKENS_PER_STEP = 32768
LEAST_BATCH = 8  # t is stratified over the batch
ROW_SHARE = 0.125  # rows of the loss for each token of a batch
LOG_EVERY = 20  # steps
FINAL_RATE = 0.05  # of the peak learning rate
NORM_RATE = 0.1  # norm weights are small here and each scales a whole row


class Stage(NamedTuple):
    """Training at one length for an amount of seconds."""

    length: int
    seconds: float


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Parses "1024:120s,2048:300s"."""
    stages = []
    for part in text.split(","):
        length, _, seconds = part.partition(":")
        if not seconds.endswith("s"):
            raise ValueError(f"--stages must be LENGTH:SECONDSs,..., got {text!r}")
        stages.append(Stage(int(length), float(seconds[:-1])))
    return tuple(stages)


def initial(base: Params, seed: int, rank: int = RANK) -> Params:
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
    trainable: Params, base: Params, batch: Batch, config: ModelConfig, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss, and [3, groups]: summed cross-entropy, correct predictions, rows."""
    params = network.merge(base, trainable, dtype)
    hidden = network.encode(params, config, batch.tokens)
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
    trainable: Params, moments: Any, base: Params, batch: Batch, rate: jax.Array, **static: Any
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Makes one update; a new length recompiles. static: `config` and `dtype` of `loss_of`."""
    gradients, sums = jax.grad(loss_of, has_aux=True)(trainable, base, batch, **static)
    updates, moments = OPTIMIZER.update(gradients, moments, trainable)
    rates = {"lora": rate, "norms": NORM_RATE * rate, "special": rate}
    trainable = {
        part: jax.tree.map(lambda x, dx, part=part: x - rates[part] * dx, values, updates[part])
        for part, values in trainable.items()
    }
    return trainable, moments, {"sums": sums, "norm": optax.tree.norm(gradients)}


class Trainer:
    """Runs the stages of a plan, starting from the saved state if there is one.

    args: options of scripts/train_small.py. tensors: of the base. started: time.monotonic() as the
    command started.
    """

    def __init__(self, args: argparse.Namespace, tensors: Mapping[str, np.ndarray], started: float):
        self.args, self.started, self.stages = args, started, parse_stages(args.stages)
        self.config = ModelConfig.from_dict(base.CONFIG)
        params = network.stack(tensors, self.config.n_layers)
        self.gain, self.earlier_steps = network.gains(params, ALPHA / RANK), 0
        if args.adapter is None:
            trainable = initial(params, args.seed)
        else:
            trainable = lora.to_trainable(lora.load(args.adapter), self.gain, self.config.n_layers)
            self.earlier_steps = int(lora.load_note(args.adapter).get("steps", 0))
        self.meta = {"stage": 0, "done": 0.0, "stage_step": 0, "step": 0, "tokens": 0}
        moments = OPTIMIZER.init(trainable)
        args.state.mkdir(parents=True, exist_ok=True)
        self.saved = args.state / "state.msgpack"
        if self.saved.exists():
            fresh = (trainable, moments, self.meta)
            saved = serialization.from_bytes(fresh, self.saved.read_bytes())
            trainable, moments, self.meta = saved
            self.log(event="resumed", **self.meta)
        self.trainable, self.moments = jax.device_put((trainable, moments))
        self.dtype = jnp.dtype("bfloat16" if jax.default_backend() == "gpu" else "float32")
        cast = jax.tree.map(lambda x: np.asarray(x).astype(self.dtype), params)
        self.base = jax.device_put({**cast, "gain": self.gain})
        static, donated = ("config", "dtype"), ("trainable", "moments")
        self.step = jax.jit(train_step, static_argnames=static, donate_argnames=donated)
        self.evaluator = Evaluator(args.corpora)
        arguments = {key: str(value) for key, value in vars(args).items()}
        self.log(event="ready", device=jax.devices()[0].device_kind, arguments=arguments)

    def elapsed(self) -> float:
        """Returns the seconds since the command started."""
        return time.monotonic() - self.started

    def log(self, **record: Any) -> None:
        """Prints a record as JSON and appends it to log.jsonl."""
        line = json.dumps({"time": round(self.elapsed(), 1), **record})
        print(line, flush=True)
        with (self.args.state / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rate(self) -> float:
        """Returns the learning rate: warm-up by steps, cosine decay over the whole plan."""
        plan = [stage.seconds for stage in self.stages]
        share = (sum(plan[: self.meta["stage"]]) + self.meta["done"]) / sum(plan)
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        warm = min((self.meta["step"] + 1) / self.args.warmup, 1.0)
        return self.args.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def run(self) -> None:
        """Runs the remaining stages until the time limit; saves after each stage and at the end."""
        for number in range(self.meta["stage"], len(self.stages)):
            stage = self.stages[number]
            if not self._stage(stage):
                self.save()
                self.log(event="limit reached", **self.meta)
                return
            self.meta.update(stage=number + 1, done=0.0, stage_step=0)
            self.save()
            self.evaluate(stage.length)
        self.log(event="finished", **self.meta)

    def _stage(self, stage: Stage) -> bool:
        """Runs one stage; returns False if the time limit ended it."""
        args, meta = self.args, self.meta
        size = max(TOKENS_PER_STEP // stage.length, LEAST_BATCH)
        rows = max(int(size * stage.length * ROW_SHARE) // 128 * 128, 128)
        source = Source(args.corpora, stage.length, size, rows, args.seed)
        self.log(event="stage", length=stage.length, batch=size, rows=rows)
        static = {"config": self.config, "dtype": self.dtype}
        window: list[dict[str, jax.Array]] = []
        last = time.monotonic()
        compiled = False
        with closing(make_batches(source, meta["stage_step"], args.workers)) as batches:
            for batch in batches:
                rate = self.rate()
                inputs = (self.trainable, self.moments, self.base, batch, np.float32(rate))
                self.trainable, self.moments, metrics = self.step(*inputs, **static)
                window.append(metrics)
                # One step may run ahead of the host. The first one includes compiling.
                jax.block_until_ready(window[-2:][0])
                now = time.monotonic()
                spent, last = now - last, now
                if not compiled:
                    self.log(event="compiled", seconds=round(spent, 1))
                    compiled, window, spent, begun = True, [], 0.0, now
                added = {"done": spent, "step": 1, "stage_step": 1, "tokens": batch.tokens.size}
                meta.update({key: meta[key] + value for key, value in added.items()})
                if len(window) == LOG_EVERY:
                    speed = LOG_EVERY * batch.tokens.size / (now - begun)
                    self._report(stage.length, window, rate, speed)
                    window, begun = [], now
                if meta["done"] >= stage.seconds:
                    return True
                if self.elapsed() > args.limit:
                    break
        return False

    def _report(self, length: int, window: list[Any], rate: float, speed: float) -> None:
        host = jax.device_get(window)
        sums = np.sum([metrics["sums"] for metrics in host], axis=0)

        def by_group(values: np.ndarray) -> dict[str, float]:
            shares = values / np.maximum(sums[2], 1)
            return {name: round(float(x), 3) for name, x in zip(GROUPS, shares, strict=True)}

        norm = round(float(np.mean([metrics["norm"] for metrics in host])), 2)
        step, done = self.meta["step"], round(self.meta["done"], 1)
        record = {"step": step, "length": length, "done": done, "rate": round(rate, 6)}
        record |= {"loss": by_group(sums[0]), "right": by_group(sums[1])}
        self.log(**record, norm=norm, tokens_per_s=round(speed))

    def evaluate(self, length: int) -> None:
        """Logs what `Evaluator` measures with the quantized adapter."""
        count = min(self.args.eval_examples, 262_144 // length)
        if not count:
            return
        length = max(length, 1024)  # the key-value blocks need this length
        begun = time.monotonic()
        stored = lora.from_trainable(jax.device_get(self.trainable), self.gain)
        trainable = lora.to_trainable(stored, self.gain, self.config.n_layers)
        params = jax.jit(network.merge, static_argnums=2)(self.base, trainable, self.dtype)
        measures = self.evaluator(network.to_model(params, self.config), length, count)
        seconds = round(time.monotonic() - begun, 1)
        self.log(event="evaluation", length=length, **measures, seconds=seconds)

    def save(self) -> None:
        """Writes the state to continue from, and the adapter file."""
        host = jax.device_get((self.trainable, self.moments))
        partial = self.saved.with_suffix(".partial")
        partial.write_bytes(serialization.to_bytes((*host, self.meta)))
        partial.replace(self.saved)
        note = {"rank": str(RANK), "steps": str(self.earlier_steps + self.meta["step"])}
        adapter = lora.from_trainable(host[0], self.gain)
        lora.save(self.args.state / "adapter.safetensors", adapter, note)
