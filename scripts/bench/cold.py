"""Measures the time to the first token of a new process, with a cold and a warm compilation cache.

Phases: start (Python, imports, JAX's device), load (the checkpoint, or weights made up), compile
(tracing and compiling, or reading what an earlier process compiled), first block (all the rest
until it is handed out); then the same question once more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import command, conditions, in_process, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py cold`."""
    option = parser.add_argument
    option("--out", type=Path, default=Path("benchmarks/cold.json"))
    option("--checkpoint", type=Path, help="a converted folder instead of random weights")
    option("--tiny", action="store_true", help="a tiny model instead of LLaDA-8B")
    option("--tokens", type=int, default=32 * 1023, help="of the document")
    option("--chunk-size", type=int, default=1024)
    option("--repeats", type=int, default=1, help="pairs of cold and warm")
    option("--one", type=float, help=argparse.SUPPRESS)


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Answers in this process, which was started at time.time() == args.one."""
    import jax

    from bench.run import cheap_model
    from pdllm_jax import ChunkConfig, Engine, ModelConfig, load_model
    from pdllm_jax.compilation import enable_compilation_cache

    enable_compilation_cache()
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    phases = {"start": time.time() - args.one}
    start = time.perf_counter()
    if args.checkpoint is not None:
        model = load_model(args.checkpoint)
    else:
        model = cheap_model(ModelConfig.tiny() if args.tiny else ModelConfig.llada_8b())
    jax.block_until_ready(jax.tree.leaves(model))
    phases["load"] = time.perf_counter() - start
    rng, vocab = np.random.default_rng(0), model.config.vocab_size - 8
    prefix, context, query = (rng.integers(3, vocab, n) for n in (16, args.tokens, 24))

    def ask() -> tuple[float, dict[str, float]]:
        start, firsts = time.perf_counter(), []
        engine = Engine(model, chunking=ChunkConfig(args.chunk_size))
        result = engine.answer(
            context, query, prefix=prefix,
            on_block=lambda *_: firsts.append(time.perf_counter() - start),
        )  # fmt: skip
        return firsts[0], result.timings

    first, timings = ask()
    phases |= {"compile": timings["compile"], "first block": first - timings["compile"]}
    return {
        "seconds": phases,
        "to first tokens": phases["start"] + phases["load"] + first,
        "asked again": ask()[0],
        "phases": timings,
    }


def main(args: argparse.Namespace) -> int:
    """Runs pairs of processes; writes the record."""
    if args.one is not None:
        print(json.dumps(one(args)))
        return 0
    options = ["--tokens", args.tokens, "--chunk-size", args.chunk_size] + ["--tiny"] * args.tiny
    options += ["--checkpoint", args.checkpoint] * (args.checkpoint is not None)
    rows = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="pdllm-cold-") as cache:
            for kind in ("cold", "warm"):
                row = in_process(
                    "cold", *options, "--one", time.time(), JAX_COMPILATION_CACHE_DIR=cache
                )
                size = sum(path.stat().st_size for path in Path(cache).rglob("*"))
                rows.append({"cache": kind, "cache_bytes": size, **row})
                print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": command(),
        **conditions(),
        "model": "checkpoint" if args.checkpoint else "tiny" if args.tiny else "llada-8b",
        "document_tokens": args.tokens,
        "rows": rows,
    }
    write(args.out, record)
    return 0
