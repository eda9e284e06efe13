"""Time to the first token in a new process, from a cold and from a warm compilation cache.

Phases: start (Python, imports, JAX's device), load (the checkpoint, or weights made up), compile
(tracing and compiling, or reading what an earlier process compiled), first block (everything else
until it is handed out), and the whole answer asked once more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("llada-8b", "small", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py cold`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cold.json"))
    parser.add_argument("--checkpoint", type=Path, help="a converted folder instead of --model")
    parser.add_argument("--model", choices=MODELS, default="llada-8b", help="random weights")
    parser.add_argument("--tokens", type=int, default=32 * 1023, help="of the document")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1, help="pairs of cold and warm")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)


def model_config(name: str):
    """LLaDA-8B, a model of 135M's shapes, or a tiny one."""
    from pdllm_jax import ModelConfig

    if name != "small":
        return {"llada-8b": ModelConfig.llada_8b, "tiny": ModelConfig.tiny}[name]()
    return ModelConfig(
        d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, mlp_hidden_size=1536, vocab_size=49152,
        embedding_size=49280, weight_tying=True, mask_token_id=49152, eos_token_id=2,
        pad_token_id=2, bos_token_id=1,
    )  # fmt: skip


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Answers in this process, which was started at time.time() == args.one."""
    import jax

    from bench.weights import cheap_model
    from pdllm_jax import ChunkConfig, load_model
    from pdllm_jax.compilation import enable_compilation_cache
    from pdllm_jax.deprecated import generate_ids

    enable_compilation_cache()
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    marks = {"start": time.time() - args.one}
    begun = time.perf_counter()
    if args.checkpoint is not None:
        model = load_model(args.checkpoint)
    else:
        model = cheap_model(model_config(args.model))
    jax.block_until_ready(jax.tree.leaves(model))
    marks["load"] = time.perf_counter() - begun

    rng, vocab = np.random.default_rng(0), model.config.vocab_size - 8
    prefix, context, query = (rng.integers(3, vocab, n) for n in (16, args.tokens, 24))
    firsts: list[float] = []

    def ask() -> tuple[float, dict[str, float]]:
        begun = time.perf_counter()
        firsts.clear()
        result = generate_ids(
            model, prefix, context, query, chunking=ChunkConfig(args.chunk_size),
            on_block=lambda *_: firsts.append(time.perf_counter() - begun),
        )  # fmt: skip
        return firsts[0], result.timings

    first, timings = ask()
    marks["compile"] = timings["compile"]
    marks["first block"] = first - timings["compile"]
    again, _ = ask()
    return {
        "seconds": marks,
        "to first tokens": marks["start"] + marks["load"] + first,
        "asked again": again,
        "phases": timings,
    }


def main(args: argparse.Namespace) -> int:
    """Measures and writes the record."""
    if args.one is not None:
        print(json.dumps(one(args)))
        return 0
    from bench.load import in_process
    from bench.record import command, conditions, write

    options = ["--tokens", args.tokens, "--chunk-size", args.chunk_size, "--model", args.model]
    if args.checkpoint is not None:
        options += ["--checkpoint", args.checkpoint]
    rows = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="pdllm-cold-") as cache:
            for kind in ("cold", "warm"):
                found = in_process(
                    "cold", *map(str, options), "--one", str(time.time()),
                    JAX_COMPILATION_CACHE_DIR=cache,
                )  # fmt: skip
                kept = sum(path.stat().st_size for path in Path(cache).rglob("*"))
                rows.append({"cache": kind, "cache_bytes": kept, **found})
                parts = ", ".join(f"{k} {v:.1f}" for k, v in found["seconds"].items())
                print(
                    f"{kind}: {found['to first tokens']:.1f} s to the first tokens ({parts}), "
                    f"asked again {found['asked again']:.2f} s",
                    flush=True,
                )
    record = {
        "command": command(),
        **conditions(),
        "processors": os.cpu_count(),
        "model": "checkpoint" if args.checkpoint is not None else args.model,
        "document_tokens": args.tokens,
        "rows": rows,
    }
    write(args.out, record)
    return 0
