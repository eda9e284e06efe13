"""The planner's figures beside what the device measures, each setting in a process of its own.

A device's peak counter never goes back, so that every setting needs a new process. Measured is the
most that the allocator has handed out from the weights to the answer, compiling included. With
--compiled, every setting is also compiled without running it, for what XLA says of its programs;
with --target FILE nothing is run at all, and the device need not be there: FILE describes it as
those of openxla/xla under backends/gpu/target_config/specs do, and jax[cuda13] must be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.memory import Plan
from pdllm_jax.method.cache_methods import Method
from pdllm_jax.network.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """An answer to plan and to give. chunks: of each document, full but for nothing."""

    chunks: int
    query: int = 32
    batch: int | None = None
    questions: int | None = None
    method: Method = "prefilling"
    select: SelectionConfig = SelectionConfig()
    decode: DecodeConfig = DecodeConfig(steps=1)

    def document(self, chunk_size: int) -> int:
        return self.chunks * (chunk_size - 1)

    def plan(self, config: ModelConfig, chunk_size: int, **paths: Any) -> Plan:
        from pdllm_jax import plan_memory

        return plan_memory(
            config, self.document(chunk_size),
            query=self.query, batch=self.batch, questions=self.questions, method=self.method,
            chunking=ChunkConfig(chunk_size), selection=self.select, decode=self.decode, **paths,
        )  # fmt: skip


def _select(**changes: Any) -> SelectionConfig:
    return SelectionConfig(**changes)


LONG = DecodeConfig(gen_length=128, block_length=32, steps=4)
SETTINGS = {
    "joint, 32 chunks": Setting(32),
    "joint, K = 16, query of 256": Setting(32, query=256, select=_select(top_k=16)),
    "joint, leave-one-out": Setting(
        16, select=_select(masked_copies=None, encode_batch=4, top_k=2), decode=LONG
    ),
    "joint, 32 chunks a group": Setting(64, select=_select(encode_batch=32)),
    "streamed, 128 chunks": Setting(128, select=_select(encoding="independent")),
    "streamed, 128 chunks, 2 a group": Setting(
        128, select=_select(encoding="independent", encode_batch=2, top_k=8)
    ),
    "half of the tokens kept": Setting(
        16, select=_select(encoding="independent", keep_tokens=512)
    ),
    "query-conditioned": Setting(16, select=_select(encoding="query-conditioned")),
    "bridge by attention": Setting(
        16, select=_select(encoding="bridge", bridge_tokens="attention", top_k=8)
    ),
    "whole pool for scorer attention": Setting(
        16, select=_select(encoding="independent", scorer="attention")
    ),
    "re-selection": Setting(
        8, select=_select(encoding="independent", reselect="block"), decode=LONG
    ),
    "8 requests, joint": Setting(4, batch=8),
    "4 requests, pool kept": Setting(8, batch=4, select=_select(encoding="independent")),
    "8 questions on one document": Setting(32, questions=8),
    "plain, 8 chunks": Setting(8, method="plain"),
    "dual-cache, 32 chunks": Setting(32, method="dual-cache", decode=LONG),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py memory`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.json"))
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--layers", type=int, help="of the model, instead of LLaDA-8B's 32")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--compiled", action="store_true", help="what the compiler says as well")
    parser.add_argument("--target", type=Path, help="compile for a device that is not there")
    parser.add_argument("--one", choices=("run", "compile", "where"), help=argparse.SUPPRESS)


def model_config(args: argparse.Namespace) -> ModelConfig:
    config = ModelConfig.tiny() if args.tiny else ModelConfig.llada_8b()
    return config if args.layers is None else dataclasses.replace(config, n_layers=args.layers)


def run(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Gives the answer in this process; what the device held at most."""
    import jax

    from bench.weights import cheap_model
    from pdllm_jax import ask_ids, chunk_prompt, encode_document, generate_batch_ids, generate_ids

    config = model_config(args)
    planned = setting.plan(config, args.chunk_size)
    model = cheap_model(config)
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, config.vocab_size - 8, n)

    document, settings = setting.document(args.chunk_size), {
        "selection": setting.select, "decode": setting.decode,
    }  # fmt: skip
    chunking = ChunkConfig(args.chunk_size)
    if setting.questions is not None:
        prompt = chunk_prompt(draw(16), draw(document), draw(1), chunking, tight=True)
        cache = encode_document(model, prompt, encode_batch=setting.select.encode_batch)
        queries = [draw(setting.query) for _ in range(setting.questions)]
        ask_ids(model, cache, queries, **settings)
    elif setting.batch is not None:
        requests = [(draw(16), draw(document), draw(setting.query)) for _ in range(setting.batch)]
        generate_batch_ids(model, requests, chunking=chunking, **settings)
    else:
        generate_ids(
            model, draw(16), draw(document), draw(setting.query),
            method=setting.method, chunking=chunking, **settings,
        )  # fmt: skip
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "planned": planned.peak,
        "planned_phases": {phase.name: phase.nbytes for phase in planned.phases},
        "phase": planned.largest.name,
        "measured": stats.get("peak_bytes_in_use"),
        "limit": stats.get("bytes_limit"),
        "held_at_end": stats.get("bytes_in_use"),
    }


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """The library's choices of implementation as a Hopper GPU would have them."""
    import jax

    from pallas_kernels import compat

    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(compat, "compute_capability", return_value="9.0"),
    ):
        yield


def compile_only(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """What the compiler says that every program takes; nothing runs."""
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from bench.programs import programs
    from pdllm_jax.engine.memory import shapes_of

    config, sharding, where = model_config(args), None, contextlib.nullcontext()
    if args.target is not None:
        described = args.target.read_text(encoding="utf-8")
        there = topologies.get_topology_desc("", "cuda", target_config=described, topology="1x1x1")
        sharding, where = SingleDeviceSharding(there.devices[0]), as_on_gpu()
    with where:
        planned = setting.plan(config, args.chunk_size)
        shapes, select, decode = shapes_of(
            setting.document(args.chunk_size), query=setting.query, batch=setting.batch,
            questions=setting.questions, method=setting.method,
            chunking=ChunkConfig(args.chunk_size), selection=setting.select, decode=setting.decode,
        )  # fmt: skip
        phases = {}
        for program in programs(
            config, shapes, select, decode, dtype=jnp.bfloat16, sharding=sharding
        ):
            found = program.lower().compile().memory_analysis()
            phases[program.phase] = {
                "held": program.held,
                "made": found.output_size_in_bytes - found.alias_size_in_bytes,
                "scratch": found.temp_size_in_bytes,
            }
    return {
        "planned": planned.peak,
        "planned_phases": {phase.name: phase.nbytes for phase in planned.phases},
        "phase": planned.largest.name,
        "compiled": max(sum(parts.values()) for parts in phases.values()),
        "compiled_phases": phases,
    }


def main(args: argparse.Namespace) -> int:
    """Every setting, each written as soon as it is there."""
    from bench.record import conditions, write

    if args.one == "where":
        print(json.dumps(conditions()))
        return 0
    if args.one is not None:
        setting = SETTINGS[args.settings[0]]
        print(json.dumps((run if args.one == "run" else compile_only)(args, setting)))
        return 0
    from bench.load import in_process

    options = ["--chunk-size", args.chunk_size]
    options += ["--tiny"] * args.tiny + ["--layers", args.layers] * (args.layers is not None)
    if args.target is not None:
        options += ["--target", args.target]
    # The plugin asks a driver for its version, unless it is told that nothing will run on a GPU.
    environment = {"JAX_PLATFORMS": "cpu"} if args.target is not None else {}
    record: dict[str, Any] = {
        "command": "scripts/benchmark.py memory" + " --compiled" * args.compiled,
        # Not asked here: a process that looks at a GPU takes its memory.
        **in_process("memory", "--one", "where", **environment),
        "target": None if args.target is None else args.target.stem,
        "model": dataclasses.asdict(model_config(args)),
        "rows": [],
    }
    for name in args.settings:
        row: dict[str, Any] = {"setting": name, **dataclasses.asdict(SETTINGS[name])}
        kinds = ["compile"] if args.target else ["run"] + ["compile"] * args.compiled
        for kind in kinds:
            row |= in_process(
                "memory", "--one", kind, "--settings", name, *map(str, options), **environment
            )
        figures = [f"planned {row['planned'] / 1e9:7.2f} GB ({row['phase']})"]
        for kind in ("measured", "compiled"):
            if row.get(kind):
                row[f"planned_over_{kind}"] = row["planned"] / row[kind]
                figures.append(f"{kind} {row[kind] / 1e9:7.2f} ({row[f'planned_over_{kind}']:.3f})")
        print(f"{name:34} {', '.join(figures)}", flush=True)
        record["rows"].append(row)
        write(args.out, record)
    return 0
