"""A model with random weights and the record of its times, for benchmarks of whole programs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from bench.record import Record, clock, spread
from pallas_kernels import Scaled, quantise
from pallas_kernels.scaled import EightBits
from pdllm_jax import ChunkConfig, MaskPredictor, ModelConfig, SelectionConfig, chunk_prompt
from pdllm_jax.network.config import PRESETS, WeightFormat
from pdllm_jax.network.eight_bits import abstract_state
from pdllm_jax.network.sharding import mesh_name

# The request that benchmarks time: 4 chunks kept, a question of 32 tokens, blocks of 32.
SELECT = SelectionConfig(top_k=4, masked_copies=4, draft_length=4, draft_steps=2)
BLOCK, PREFIX, QUERY = 32, 16, 32
# Options of every benchmark with a model, and of those with a `Run`.
MODEL: dict[str, tuple[Any, str]] = {
    "--model": ("llada-8b", f"whose sizes to take: {', '.join(PRESETS)}"),
    "--tiny": (False, "a tiny model, to try the script"),
}
MODEL_OPTIONS = MODEL | {
    "--chunk-size": (1024, ""),
    "--repeats": (3, ""),
    "--limit": (math.inf, "seconds in all"),
    "--weights": (["full"], "formats of the weights, full, fp8 or int8: all sections with each"),
}


class Run:
    """A model, the record of its times, and the options of the command line.

    Weights are random: the sizes of args.model in bfloat16, or with args.tiny a tiny model's.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.monotonic()
        config = model_config(args, args.weights[0])
        self.model = cheap_model(config)
        # A model with a logit shift is asked as in the paper: one causal copy of the question.
        self.select = SelectionConfig.paper() if config.logit_shift else SELECT
        self.record = Record(args.out, model=dataclasses.asdict(config))
        self.record |= {name: {} for name in ("seconds", "ratios", "compile_seconds", "memory")}
        self.record["left_out"] = []
        self.fitting: dict[str, list[Any]] = {}  # requests that the device can hold, by `on`
        # Compiled ahead: all of them, and those of each request.
        self.programs: tuple[Any, dict[Any, Any]] | None = None
        self.say("weights are drawn")

    def formats(self) -> Iterator[WeightFormat]:
        """Yields the formats of --weights, the same random weights in each of them in turn."""
        for weights in self.args.weights:
            if weights != self.model.config.weight_format:
                del self.model  # frees the weights before
                self.model = cheap_model(model_config(self.args, weights))
            yield weights

    def prompt(self, chunks: int, query: int = QUERY, seed: int = 0):
        """Returns a random prompt whose chunks are all full."""
        rng, size = np.random.default_rng(seed), self.args.chunk_size
        lengths = (PREFIX, chunks * (size - 1), query)
        prefix, context, asked = (draw(rng, self.model.config, length) for length in lengths)
        return chunk_prompt(prefix, context, asked, ChunkConfig(size))

    def timed(self, name: str, call: Callable[[], Any], repeats: int | None = None) -> Any:
        """Returns the result of the call; times it after a first call that compiles."""
        repeats, seconds, result = repeats or self.args.repeats, [], jax.block_until_ready(call())
        for _ in range(repeats):
            del result
            spent, result = clock(call)
            seconds.append(spent)
        self.keep(name, seconds)
        return result

    def keep(self, name: str, seconds: list[float]) -> None:
        """Records median, least and most, under the name and what it says of the model."""
        name += self.on
        row = self.record["seconds"][name] = spread(seconds)
        figures = "{:9.1f} ms [{:.1f}, {:.1f}]".format(*(1e3 * value for value in row.values()))
        self.say(f"{name:52} {figures}")

    def note(self, name: str, value: float) -> None:
        """Records a ratio or a rate, under the name and what it says of the model."""
        self.record["ratios"][name + self.on] = value
        self.say(f"{name + self.on:52} {value:9.3f}")

    def say(self, text: str) -> None:
        """Prints a line with the time since the start, and writes the record."""
        self.record.say(f"{time.monotonic() - self.start:5.0f} s  {text}")

    def late(self, name: str) -> bool:
        """Returns whether --limit is over; then names in the record what is left out."""
        late = time.monotonic() - self.start > self.args.limit
        if late:
            self.record["left_out"].append(name + self.on)
            self.say(f"left out: {name}{self.on}")
        return late

    def median(self, name: str) -> float:
        return self.record["seconds"][name + self.on]["median"]

    def sections(self, table: dict[str, Callable[[Run], None]], names: list[str]) -> None:
        """Runs sections in order until --limit."""
        for name in names:
            if not self.late(name):
                table[name](self)

    @property
    def of_model(self) -> dict[str, str]:
        """{"weights": their format}; also "mesh": its name, with "mosaic_gpu" for its sums."""
        of_model = {"weights": self.model.config.weight_format}
        if self.model.mesh is not None:
            sums = ", mosaic_gpu" if self.model.links is not None else ""
            of_model["mesh"] = mesh_name(self.model.mesh) + sums
        return of_model

    @property
    def on(self) -> str:
        """What a row's name says of the model."""
        return on(self.of_model)


def on(row: Mapping[str, Any]) -> str:
    """Returns what a name says of a row's model: weights in 8 bits, and the mesh."""
    weights, mesh = row.get("weights", "full"), row.get("mesh")
    return f", {weights}" * (weights != "full") + f", mesh {mesh}" * (mesh is not None)


def draw(rng: np.random.Generator, config: ModelConfig, length: int) -> np.ndarray:
    """Returns random token ids, none of them the mask token."""
    ids = rng.integers(0, config.vocab_size - 1, length)
    return ids + (ids >= config.mask_token_id)


def model_config(args: argparse.Namespace, weights: WeightFormat = "full") -> ModelConfig:
    """Returns the config of args.model, or with args.tiny a tiny one."""
    config = ModelConfig.tiny() if args.tiny else ModelConfig.preset(args.model)
    return dataclasses.replace(config, weight_format=weights)


@functools.partial(jax.jit, static_argnums=0)
def random_layers(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Returns random bfloat16 values, drawn layer by layer: shape[0] layers."""
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda k: jax.random.normal(k, shape[1:], jnp.bfloat16), keys)


def cheap_model(config: ModelConfig, dtype: DTypeLike = jnp.bfloat16) -> MaskPredictor:
    """Returns a model made without temporaries, so that it does not move the peak of the device.

    Each weight is a hash of its place, with the spread of random weights; in 8 bits it is that
    weight, rounded.
    """
    graph, state = abstract_state(config, dtype)

    def fill(part: Any) -> Any:
        if not isinstance(part, dict):
            return _fill(part.shape, jnp.dtype(part.dtype))
        weight, scale = _scaled(part["weight"].shape, config.weight_format)
        bias = {name: fill(part[name]) for name in part.keys() & {"bias"}}
        return {**bias, "weight": weight, "scale": scale}

    parts = nnx.to_pure_dict(state)
    eight_bits = lambda part: isinstance(part, dict) and "scale" in part  # noqa: E731
    nnx.replace_by_pure_dict(state, jax.tree.map(fill, parts, is_leaf=eight_bits))
    return nnx.merge(graph, jax.block_until_ready(state))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 1:  # a norm, or a bias
        return jnp.ones(shape, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    bits = (row * jnp.uint32(2654435761)) ^ (column * jnp.uint32(2246822519))
    bits = (bits ^ (bits >> 15)) * jnp.uint32(3266489917)
    uniform = (bits >> 8).astype(jnp.float32) / (1 << 24) - 0.5
    return (uniform * (12 / shape[1]) ** 0.5).astype(dtype)


@functools.partial(jax.jit, static_argnames=("shape", "bits"))
def _scaled(shape: tuple[int, ...], bits: EightBits) -> Scaled:
    return quantise(_fill(shape, jnp.bfloat16), bits)
