"""What benchmarks of whole programs share: a model, a record, programs compiled side by side."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.record import command, conditions, write
from pdllm_jax import ChunkConfig, MaskPredictor, ModelConfig, chunk_prompt
from pdllm_jax.network.sharding import mesh_name


@dataclasses.dataclass
class Run:
    """A model with random weights, the record, and programs compiled side by side."""

    args: argparse.Namespace
    model: MaskPredictor
    record: dict[str, Any]
    begun: float
    tracer: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1))
    lowered: dict[str, Any] = dataclasses.field(default_factory=dict)
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prompt(self, chunks: int, query: int = 32, seed: int = 0):
        rng = np.random.default_rng(seed)
        vocab, size = self.model.config.vocab_size - 8, self.args.chunk_size
        context = rng.integers(0, vocab, chunks * (size - 1))
        return chunk_prompt(
            rng.integers(0, vocab, 16), context, rng.integers(0, vocab, query), ChunkConfig(size)
        )

    def timed(self, name: str, call: Callable[[], Any], repeats: int | None = None) -> Any:
        """Result of the call; its seconds go into the record under `name`."""
        seconds, result = [], jax.block_until_ready(call())
        for _ in range(self.args.repeats if repeats is None else repeats):
            del result
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        self.keep(name, seconds)
        return result

    def keep(self, name: str, seconds: list[float]) -> None:
        """Median and spread into the record."""
        row = {"median": float(np.median(seconds)), "least": min(seconds), "most": max(seconds)}
        self.record["seconds"][name] = row
        print(
            f"{time.monotonic() - self.begun:5.0f} s  {name:52} {1000 * row['median']:9.1f} ms "
            f"[{1000 * row['least']:.1f}, {1000 * row['most']:.1f}]",
            flush=True,
        )
        write(self.args.out, self.record)

    def note(self, name: str, value: float) -> None:
        self.record["ratios"][name] = value
        print(f"         {name:44} {value:9.3f}", flush=True)
        write(self.args.out, self.record)

    def median(self, name: str) -> float:
        return self.record["seconds"][name]["median"]

    def lower(self, **programs: Callable[[], Any]) -> None:
        """Has programs traced and lowered while others run, in the order in which they come."""
        for name, make in programs.items():
            self.lowered[name] = self.tracer.submit(make)

    def compile(self, *names: str) -> dict[str, Any]:
        """Programs by name, compiled side by side unless they are already."""
        new = [name for name in names if name not in self.programs]
        start = time.perf_counter()
        lowered = {name: self.lowered[name].result() for name in new}
        middle = time.perf_counter()
        with ThreadPoolExecutor(max(1, len(new))) as pool:
            futures = {name: pool.submit(lowered[name].compile) for name in new}
            self.programs |= {name: future.result() for name, future in futures.items()}
        if new:
            row = {"waiting for traces": middle - start, "compiling": time.perf_counter() - middle}
            self.record["compile_seconds"][" + ".join(new)] = row
            print(f"compiled {', '.join(new)}: {row}", flush=True)
        return self.programs


def peak() -> int:
    """Most bytes that the device has held so far."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


def begin(args: argparse.Namespace) -> Run:
    """Random bfloat16 weights of LLaDA-8B, or with args.tiny of a tiny model; an empty record."""
    begun = time.monotonic()
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
    print(f"{time.monotonic() - begun:5.0f} s  model made", flush=True)
    return Run(args, model, record, begun)


def on(model: MaskPredictor) -> str:
    """What names the model's mesh behind a row's name."""
    return "".join(f", mesh {name}" for name in of_mesh(model).values())


def of_mesh(model: MaskPredictor) -> dict[str, str]:
    """What names the model's mesh in a row, and what makes its sums where that isn't XLA."""
    if model.mesh is None:
        return {}
    return {"mesh": mesh_name(model.mesh) + (", mosaic_gpu" if model.links is not None else "")}
