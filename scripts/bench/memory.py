"""Compares the memory plan with the device's peak, each setting in a new process.

The peak counter of a device never goes back, so every setting needs a process. Measured is the most
that the allocator has handed out from the weights to the answer, compiling included. --compiled
also compiles every setting without running it, for what XLA says of its programs. With --target
FILE nothing runs and no device is needed: FILE describes one as the files of openxla/xla under
backends/gpu/target_config/specs do, and jax[cuda13] must be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.record import conditions, in_process, write
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.memory import Plan
from pdllm_jax.method.cache_methods import Method
from pdllm_jax.network.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """An answer to plan and to compute. chunks: of each document, all full."""

    chunks: int
    query: int = 32
    batch: int | None = None
    questions: int | None = None
    method: Method = "prefilling"
    select: SelectionConfig = SelectionConfig()
    decode: DecodeConfig = DecodeConfig(steps=1)

    def document(self, chunk_size: int) -> int:
        return self.chunks * (chunk_size - 1)

    def request(self, chunk_size: int) -> dict[str, Any]:
        """Returns the arguments of `plan_memory`."""
        return {
            "query": self.query, "batch": self.batch, "questions": self.questions,
            "method": self.method, "chunking": ChunkConfig(chunk_size), "selection": self.select,
            "decode": self.decode,
        }  # fmt: skip

    def plan(self, config: ModelConfig, chunk_size: int, **paths: Any) -> Plan:
        from pdllm_jax import plan_memory

        return plan_memory(config, self.document(chunk_size), **self.request(chunk_size), **paths)


LONG = DecodeConfig(gen_length=128, block_length=32, steps=4)
_select = SelectionConfig
_independent = functools.partial(SelectionConfig, encoding="independent")
SETTINGS = {
    "joint, 32 chunks": Setting(32),
    "joint, K = 16, query of 256": Setting(32, query=256, select=_select(top_k=16)),
    "joint, leave-one-out": Setting(
        16, select=_select(masked_copies=None, encode_batch=4, top_k=2), decode=LONG
    ),
    "joint, 32 chunks a group": Setting(64, select=_select(encode_batch=32)),
    "streamed, 128 chunks": Setting(128, select=_independent()),
    "streamed, 128 chunks, 2 a group": Setting(128, select=_independent(encode_batch=2, top_k=8)),
    "half of the tokens kept": Setting(16, select=_independent(keep_tokens=512)),
    "query-conditioned": Setting(16, select=_select(encoding="query-conditioned")),
    "bridge by attention": Setting(
        16, select=_select(encoding="bridge", bridge_tokens="attention", top_k=8)
    ),
    "whole pool for scorer attention": Setting(16, select=_independent(scorer="attention")),
    "re-selection": Setting(8, select=_independent(reselect="block"), decode=LONG),
    "8 requests, joint": Setting(4, batch=8),
    "4 requests, pool kept": Setting(8, batch=4, select=_independent()),
    "8 questions on one document": Setting(32, questions=8),
    "plain, 8 chunks": Setting(8, method="plain"),
    "dual-cache, 32 chunks": Setting(32, method="dual-cache", decode=LONG),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py memory`."""
    option = parser.add_argument
    option("--out", type=Path, default=Path("benchmarks/memory.json"))
    option("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    option("--tiny", action="store_true", help="a tiny model, to try the script")
    option("--layers", type=int, help="of the model, instead of LLaDA-8B's 32")
    option("--chunk-size", type=int, default=1024)
    option("--compiled", action="store_true", help="what the compiler says as well")
    option("--target", type=Path, help="compile for a device that is not there")
    option("--one", choices=("run", "compile", "where"), help=argparse.SUPPRESS)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Returns the model's config at the options' size."""
    config = ModelConfig.tiny() if args.tiny else ModelConfig.llada_8b()
    return config if args.layers is None else dataclasses.replace(config, n_layers=args.layers)


def run(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Computes the answer in this process; returns the device's peak."""
    import jax

    from bench.run import cheap_model
    from pdllm_jax import Engine, Request

    config, chunking = model_config(args), ChunkConfig(args.chunk_size)
    model, rng = cheap_model(config), np.random.default_rng(0)
    document = setting.document(args.chunk_size)
    engine = Engine(
        model, chunking=chunking, selection=setting.select, decoding=setting.decode,
        method=setting.method,
    )  # fmt: skip

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, config.vocab_size - 8, n)

    if setting.questions is not None:
        cache = engine.encode(draw(document), prefix=draw(16))
        engine.ask(cache, [draw(setting.query) for _ in range(setting.questions)])
    else:
        requests = [
            Request(draw(document), draw(setting.query), prefix=draw(16))
            for _ in range(setting.batch or 1)
        ]
        engine.answer_batch(requests)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        **planned(setting.plan(config, args.chunk_size)),
        "measured": stats.get("peak_bytes_in_use"),
        "limit": stats.get("bytes_limit"),
        "held_at_end": stats.get("bytes_in_use"),
    }


def planned(plan: Plan) -> dict[str, Any]:
    """Returns the plan's part of a row."""
    phases = {phase.name: phase.nbytes for phase in plan.phases}
    return {"planned": plan.peak, "planned_phases": phases, "phase": plan.largest.name}


@contextlib.contextmanager
def device_for(target: Path | None) -> Iterator[Any]:
    """Yields the sharding to compile for, None for this machine's device.

    With a target the library chooses implementations as on a Hopper GPU.
    """
    if target is None:
        yield None
        return
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import compat

    described = target.read_text(encoding="utf-8")
    topology = topologies.get_topology_desc("", "cuda", target_config=described, topology="1x1x1")
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(compat, "compute_capability", return_value="9.0"),
    ):
        yield SingleDeviceSharding(topology.devices[0])


def compile_only(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Returns what the compiler says that every program takes; nothing runs."""
    import jax.numpy as jnp

    from bench.programs import programs

    config = model_config(args)
    with device_for(args.target) as sharding:
        plan = setting.plan(config, args.chunk_size)
        phases = {}
        for program in programs(
            config, plan.shapes, plan.selection, plan.decode, dtype=jnp.bfloat16, sharding=sharding
        ):
            sizes = program.lower().compile().memory_analysis()
            phases[program.phase] = {
                "held": program.held,
                "made": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                "scratch": sizes.temp_size_in_bytes,
            }
    most = max(sum(parts.values()) for parts in phases.values())
    return {**planned(plan), "compiled": most, "compiled_phases": phases}


def main(args: argparse.Namespace) -> int:
    """Measures every setting; writes the record after each."""
    if args.one is not None:
        # In a process of its own: a process that looks at a GPU takes its memory.
        setting = SETTINGS[args.settings[0]]
        call = {"run": run, "compile": compile_only, "where": lambda *_: conditions()}[args.one]
        print(json.dumps(call(args, setting)))
        return 0
    options = ["--chunk-size", args.chunk_size]
    options += ["--tiny"] * args.tiny + ["--layers", args.layers] * (args.layers is not None)
    options += ["--target", args.target] * (args.target is not None)
    # The plugin asks the driver for its version, unless nothing will run on a GPU.
    environment = {"JAX_PLATFORMS": "cpu"} if args.target is not None else {}
    record: dict[str, Any] = {
        "command": "scripts/benchmark.py memory" + " --compiled" * args.compiled,
        **in_process("memory", "--one", "where", **environment),
        "target": None if args.target is None else args.target.stem,
        "model": dataclasses.asdict(model_config(args)),
        "rows": [],
    }
    kinds = ["compile"] if args.target else ["run"] + ["compile"] * args.compiled
    for name in args.settings:
        row: dict[str, Any] = {"setting": name, **dataclasses.asdict(SETTINGS[name])}
        for kind in kinds:
            row |= in_process("memory", "--one", kind, "--settings", name, *options, **environment)
        figures = [f"planned {row['planned'] / 1e9:7.2f} GB ({row['phase']})"]
        for kind in ("measured", "compiled"):
            if row.get(kind):
                row[f"planned_over_{kind}"] = row["planned"] / row[kind]
                figures.append(f"{kind} {row[kind] / 1e9:7.2f} ({row[f'planned_over_{kind}']:.3f})")
        print(f"{name:34} {', '.join(figures)}", flush=True)
        record["rows"].append(row)
        write(args.out, record)
    return 0
