"""A model with random weights and the record of its times, for benchmarks of whole programs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from bench.record import command, conditions, write
from pdllm_jax import ChunkConfig, MaskPredictor, ModelConfig, SelectionConfig, chunk_prompt
from pdllm_jax.network.sharding import mesh_name

# The request that benchmarks time: 4 chunks kept, a question of 32 tokens, blocks of 32.
SELECT = SelectionConfig(top_k=4, masked_copies=4, draft_length=4, draft_steps=2)
BLOCK, PREFIX, QUERY = 32, 16, 32


@dataclasses.dataclass
class Run:
    """A model, the record of its times, and the options of the command line."""

    args: argparse.Namespace
    model: MaskPredictor
    record: dict[str, Any]
    start: float

    def prompt(self, chunks: int, query: int = QUERY, seed: int = 0):
        """Returns a random prompt whose chunks are all full."""
        rng = np.random.default_rng(seed)
        vocab, size = self.model.config.vocab_size - 8, self.args.chunk_size
        context = rng.integers(0, vocab, chunks * (size - 1))
        return chunk_prompt(
            rng.integers(0, vocab, PREFIX), context, rng.integers(0, vocab, query),
            ChunkConfig(size),
        )  # fmt: skip

    def timed(self, name: str, call: Callable[[], Any], repeats: int | None = None) -> Any:
        """Returns the result of the call; times it after a first call that compiles."""
        seconds, result = [], jax.block_until_ready(call())
        for _ in range(self.args.repeats if repeats is None else repeats):
            del result
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        self.keep(name, seconds)
        return result

    def keep(self, name: str, seconds: list[float]) -> None:
        """Records median, least and most."""
        row = {"median": float(np.median(seconds)), "least": min(seconds), "most": max(seconds)}
        self.record["seconds"][name] = row
        self.say(
            f"{name:52} {1000 * row['median']:9.1f} ms "
            f"[{1000 * row['least']:.1f}, {1000 * row['most']:.1f}]"
        )

    def note(self, name: str, value: float) -> None:
        """Records a ratio or a rate."""
        self.record["ratios"][name] = value
        self.say(f"{name:52} {value:9.3f}")

    def say(self, text: str) -> None:
        """Prints a line with the time since the start, and writes the record as it is by now."""
        print(f"{time.monotonic() - self.start:5.0f} s  {text}", flush=True)
        write(self.args.out, self.record)

    def median(self, name: str) -> float:
        return self.record["seconds"][name]["median"]

    def sections(self, table: dict[str, Callable[[Run], None]], names: list[str]) -> None:
        """Runs sections in order until --limit; names the others in the record."""
        for name in names:
            if time.monotonic() - self.start > self.args.limit:
                self.record["left_out"].append(name + on(self.model))
            else:
                table[name](self)


def begin(args: argparse.Namespace) -> Run:
    """Makes random bfloat16 weights of LLaDA-8B, or with args.tiny of a tiny model."""
    start = time.monotonic()
    config = ModelConfig.tiny() if args.tiny else ModelConfig.llada_8b()
    model = MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    jax.block_until_ready(jax.tree.leaves(model))
    record: dict[str, Any] = {
        "command": command(),
        **conditions(),
        "model": dataclasses.asdict(config),
        "seconds": {},
        "ratios": {},
        "compile_seconds": {},
        "memory": {},
        "left_out": [],
    }
    run = Run(args, model, record, start)
    run.say("weights are drawn")
    return run


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that calls `begin`."""
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")


def of_mesh(model: MaskPredictor) -> dict[str, str]:
    """Returns {"mesh": its name, with "mosaic_gpu" where that makes the sums}; {} without one."""
    if model.mesh is None:
        return {}
    return {"mesh": mesh_name(model.mesh) + (", mosaic_gpu" if model.links is not None else "")}


def on(model: MaskPredictor) -> str:
    """Returns what a row's name says of the model's mesh."""
    return "".join(f", mesh {name}" for name in of_mesh(model).values())


def peak() -> int:
    """Returns the most bytes that the device has held so far."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def cheap_model(config: ModelConfig, dtype: DTypeLike = jnp.bfloat16) -> MaskPredictor:
    """Returns a model made without temporaries, so that it does not move the peak of the device.

    Each weight is a hash of its place, with the spread of random weights.
    """
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: _fill(leaf.shape, jnp.dtype(leaf.dtype)), state)
    return nnx.merge(graph, jax.block_until_ready(state))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 1:  # a norm
        return jnp.ones(shape, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    bits = (row * jnp.uint32(2654435761)) ^ (column * jnp.uint32(2246822519))
    bits = (bits ^ (bits >> 15)) * jnp.uint32(3266489917)
    uniform = (bits >> 8).astype(jnp.float32) / (1 << 24) - 0.5
    return (uniform * (12 / shape[1]) ** 0.5).astype(dtype)
