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

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from bench.record import command, conditions, in_process, replace
from bench.run import MODEL, cheap_model, draw, model_config
from pallas_kernels import compat
from pdllm_jax import Engine, MaskPredictor, Request, plan_memory
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine import programs as engine
from pdllm_jax.engine.plan import Plan
from pdllm_jax.method.caches import Method


@dataclasses.dataclass(frozen=True)
class Setting:
    """An answer to plan and to compute.

    chunks: of each document, all full. shifted: measured for models with a logit shift alone.
    """

    chunks: int
    query: int = 32
    batch: int | None = None
    questions: int | None = None
    method: Method = "prefilling"
    select: SelectionConfig = SelectionConfig()
    decode: DecodeConfig = DecodeConfig(steps=1)
    shifted: bool = False


LONG = DecodeConfig(gen_length=128, block_length=32, steps=4)
_select = SelectionConfig
_independent = functools.partial(SelectionConfig, encoding="independent")
_all_masked = _select(masked_copies=None, encode_batch=4, top_k=2)
_by_attention = _select(encoding="bridge", bridge_tokens="attention", top_k=8)
SETTINGS = {
    "joint, 8 chunks": Setting(8),
    "joint, 32 chunks": Setting(32),
    "joint, K = 16, query of 256": Setting(32, query=256, select=_select(top_k=16)),
    "joint, leave-one-out": Setting(16, select=_all_masked, decode=LONG),
    "joint, 32 chunks a group": Setting(64, select=_select(encode_batch=32)),
    "streamed, 128 chunks": Setting(128, select=_independent()),
    "streamed, 128 chunks, 2 a group": Setting(128, select=_independent(encode_batch=2, top_k=8)),
    "half of the tokens kept": Setting(16, select=_independent(keep_tokens=512)),
    "query-conditioned": Setting(16, select=_select(encoding="query-conditioned")),
    "bridge by attention": Setting(16, select=_by_attention),
    "layer by layer, scorer attention": Setting(32, select=_select(scorer="attention")),
    "re-selection": Setting(8, select=_independent(reselect="block"), decode=LONG),
    "8 requests, joint": Setting(4, batch=8),
    "4 requests, pool kept": Setting(8, batch=4, select=_independent()),
    "8 questions on one document": Setting(32, questions=8),
    "plain, 8 chunks": Setting(8, method="plain"),
    "dual-cache, 32 chunks": Setting(32, method="dual-cache", decode=LONG),
    "causal, 32 chunks": Setting(32, select=_select.paper(), shifted=True),
    "a draft per chunk": Setting(32, select=_select.paper_retained(), shifted=True),
}


OPTIONS = MODEL | {
    "--settings": (tuple(SETTINGS), ""),
    "--weights": ("full", "full, fp8 or int8"),
    "--layers": (int, "of the model, instead of its own number"),
    "--chunk-size": (1024, ""),
    "--compiled": (False, "what the compiler says as well"),
    "--target": (Path, "compile for a device that is not there"),
}


class Measured:
    """A setting at the size of the command line's options."""

    def __init__(self, args: argparse.Namespace, setting: Setting):
        self.target, self.setting = args.target, setting
        self.config = dataclasses.replace(model_config(args), weight_format=args.weights)
        if args.layers is not None:
            self.config = dataclasses.replace(self.config, n_layers=args.layers)
        self.settings: dict[str, Any] = {"chunking": ChunkConfig(args.chunk_size)}
        self.settings |= {"selection": setting.select, "method": setting.method}
        self.document = setting.chunks * (args.chunk_size - 1)

    def plan(self) -> tuple[Plan, dict[str, Any]]:
        """Returns the plan, and its part of a row."""
        sizes = {name: getattr(self.setting, name) for name in ("query", "batch", "questions")}
        settings = {**self.settings, **sizes, "decode": self.setting.decode}
        plan = plan_memory(self.config, self.document, **settings)
        phases = {phase.name: phase.nbytes for phase in plan.phases}
        name = plan.largest.name
        return plan, {"planned": plan.peak, "planned_phases": phases, "phase": name}

    def run(self) -> dict[str, Any]:
        """Computes the answer in this process; returns the device's peak."""
        model, rng = cheap_model(self.config), np.random.default_rng(0)
        engine = Engine(model, decoding=self.setting.decode, **self.settings)

        words = functools.partial(draw, rng, self.config)
        if self.setting.questions is not None:
            cache = engine.encode(words(self.document), prefix=words(16))
            engine.ask(cache, [words(self.setting.query) for _ in range(self.setting.questions)])
        else:
            lengths = [(self.document, self.setting.query)] * (self.setting.batch or 1)
            engine.answer_batch([Request(words(n), words(m), prefix=words(16)) for n, m in lengths])
        stats = jax.devices()[0].memory_stats() or {}
        names = {"measured": "peak_bytes_in_use", "limit": "bytes_limit"}
        names["held_at_end"] = "bytes_in_use"
        return {**self.plan()[1], **{name: stats.get(key) for name, key in names.items()}}

    def compile(self) -> dict[str, Any]:
        """Returns what the compiler says that every program takes; nothing runs."""
        phases = {}
        with device_for(self.target) as sharding:
            plan, row = self.plan()
            settings = (plan.shapes, plan.selection, plan.decode)
            for program, lowered in programs(self.config, *settings, sharding=sharding):
                sizes = lowered.compile().memory_analysis()
                phases[program.phase] = {
                    "held": tree_bytes(dict(program.held)),
                    "made": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                    "scratch": sizes.temp_size_in_bytes,
                }
        most = max(sum(parts.values()) for parts in phases.values())
        return {**row, "compiled": most, "compiled_phases": phases}


def programs(
    config: Any, *settings: Any, dtype: Any = jnp.bfloat16, sharding: Any = None, **path: Any
) -> Iterator[tuple[engine.Program, Any]]:
    """Yields the programs of an answer in the order in which it runs them, and each lowered.

    settings, path: of `pdllm_jax.engine.programs`, for example from a plan. sharding: of all
    arguments, to compile for a device that this machine does not have. Nothing is allocated.
    """

    def placed(x: Any) -> Any:
        shaped = hasattr(x, "dtype")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if shaped else x

    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))
    for program in engine.programs(model, *settings, **path):
        arguments, options = jax.tree.map(placed, (program.args, dict(program.settings)))
        yield program, program.function.lower(*arguments, **options)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree's arrays, or of the shapes in their place."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def device_for(target: Path | None) -> Iterator[Any]:
    """Yields the sharding to compile for, None for this machine's device.

    With a target the library chooses implementations as on a Hopper GPU.
    """
    if target is None:
        yield None
        return
    described = target.read_text(encoding="utf-8")
    topology = topologies.get_topology_desc("", "cuda", target_config=described, topology="1x1x1")
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(compat, "compute_capability", return_value="9.0"),
    ):
        yield SingleDeviceSharding(topology.devices[0])


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the first setting, or says where it would be measured.

    In a new process, for a process that looks at a GPU takes its memory.
    """
    measured = Measured(args, SETTINGS[args.settings[0]])
    kinds = {"run": measured.run, "compile": measured.compile, "where": conditions}
    return kinds[args.one]()


def main(args: argparse.Namespace) -> None:
    """Measures every setting; writes the record after each."""
    # The plugin asks the driver for its version, unless nothing will run on a GPU.
    environment = {"JAX_PLATFORMS": "cpu"} if args.target is not None else {}
    record = {"command": command(), **in_process("where", **environment)}
    record["target"] = None if args.target is None else args.target.stem
    config = Measured(args, Setting(1)).config
    record |= {"model": dataclasses.asdict(config), "rows": []}
    kinds = ["compile"] if args.target else ["run"] + ["compile"] * args.compiled
    for name in args.settings:
        if SETTINGS[name].shifted and not config.logit_shift:
            continue
        row: dict[str, Any] = {"setting": name, **dataclasses.asdict(SETTINGS[name])}
        for kind in kinds:
            row |= in_process(kind, "--settings", name, **environment)
        figures = [f"planned {row['planned'] / 1e9:7.2f} GB ({row['phase']})"]
        for kind in ("measured", "compiled"):
            if row.get(kind):
                row[f"planned_over_{kind}"] = row["planned"] / row[kind]
                figures.append(f"{kind} {row[kind] / 1e9:7.2f} ({row[f'planned_over_{kind}']:.3f})")
        print(f"{name:34} {', '.join(figures)}", flush=True)
        record["rows"].append(row)
        replace(args.out, json.dumps(record, indent=1) + "\n")
