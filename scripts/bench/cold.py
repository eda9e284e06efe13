"""Measures the time to the first token of a new process, with a cold and a warm compilation cache.

Phases: start (Python, imports, JAX's device), load (the checkpoint, or weights made up), compile
(tracing and compiling, or reading what an earlier process compiled), first block (all the rest
until it is handed out); then the same question once more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.record import Record, clock, in_process
from bench.run import MODEL, cheap_model, draw, model_config
from pdllm_jax import ChunkConfig, Engine, compilation, load_model

OPTIONS = MODEL | {
    "--checkpoint": (Path, "a converted folder instead of random weights"),
    "--tokens": (32 * 1023, "of the document"),
    "--chunk-size": (1024, ""),
    "--repeats": (1, "pairs of cold and warm"),
}


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Answers in this process, which was started at time.time() == args.one."""
    compilation.enable_compilation_cache()
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    phases = {"start": time.time() - float(args.one)}
    if args.checkpoint is not None:
        phases["load"], model = clock(lambda: load_model(args.checkpoint))
    else:
        phases["load"], model = clock(lambda: cheap_model(model_config(args)))
    rng = np.random.default_rng(0)
    prefix, context, query = (draw(rng, model.config, n) for n in (16, args.tokens, 24))

    def ask() -> tuple[float, dict[str, float]]:
        start, firsts = time.perf_counter(), []

        def handed_out(*_: object) -> None:
            firsts.append(time.perf_counter() - start)

        engine = Engine(model, chunking=ChunkConfig(args.chunk_size))
        result = engine.answer(context, query, prefix=prefix, on_block=handed_out)
        return firsts[0], result.timings

    first, timings = ask()
    total = phases["start"] + phases["load"] + first
    phases |= {"compile": timings["compile"], "first block": first - timings["compile"]}
    second = ask()[0]
    return {"seconds": phases, "to first tokens": total, "asked again": second, "phases": timings}


def main(args: argparse.Namespace) -> None:
    """Runs pairs of processes; writes the record."""
    model = "checkpoint" if args.checkpoint else "tiny" if args.tiny else args.model
    rows = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="pdllm-cold-") as cache:
            for kind in ("cold", "warm"):
                row = in_process(str(time.time()), JAX_COMPILATION_CACHE_DIR=cache)
                size = sum(path.stat().st_size for path in Path(cache).rglob("*"))
                rows.append({"cache": kind, "cache_bytes": size, **row})
                print(rows[-1], flush=True)
    # Made at the end: a process that looks at a GPU takes its memory.
    Record(args.out, model=model, document_tokens=args.tokens, rows=rows).say(f"{args.out}")
