#!/usr/bin/env python3
"""Retrieval accuracy of the small model by method, on held-out text and keys.

  scripts/evaluate_small.py CHECKPOINT --corpora DIR --out benchmarks/small_model.json

The same examples for every method. A row is a cell (task, length, method): exact match of the
value asked for with its Wilson 95% interval, and for the selecting methods recall of the chunk that
holds the needle. Corpora come from scripts/small/corpus.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from small import tasks
from small.corpus import load
from tqdm import tqdm

from convert import converted
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    SelectionConfig,
    Tokenizer,
    generate_ids,
    load_config,
    load_model,
)
from pdllm_jax.compilation import enable_compilation_cache

BASELINES = ("plain", "dual-cache")
# The method with its default settings ("prefilling"), and with one of them changed.
CHANGES: dict[str, dict[str, Any]] = {
    "prefilling": {},
    "random": {"scorer": "random"},
    "independent": {"encoding": "independent"},
    "query-conditioned": {"encoding": "query-conditioned"},
    "bridge-start": {"encoding": "bridge"},
    "bridge-attention": {"encoding": "bridge", "bridge_tokens": "attention"},
    "half-tokens": {"keep_tokens": 0.5},
    "reselect-step": {"reselect": "step"},
    "adaptive": {"margin": 0.1},
}
METHODS = (*BASELINES, *CHANGES)


def settings_of(change: dict[str, Any], top_k: int, chunk_size: int) -> SelectionConfig:
    """The default settings with one change; a share of kept tokens is of the chunk's.

    Adaptive K begins at 1 and may go up to K, so that it costs no more than the default.
    """
    change = dict(change)
    if "keep_tokens" in change:
        change["keep_tokens"] = int(change["keep_tokens"] * chunk_size)
    if "margin" in change:
        change |= {"top_k": 1, "max_k": top_k}
    return SelectionConfig(**{"top_k": top_k, **change})


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion."""
    p, spread = hits / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def needle_chunks(span: tuple[int, int], chunking: ChunkConfig) -> set[int]:
    """Chunks that hold the whole needle, or where none does, those that hold a part of it."""
    size = chunking.chunk_size - int(chunking.anchors)
    start, end = span
    chunks = range(start // chunking.stride + 1)
    whole = {
        i for i in chunks if i * chunking.stride <= start and end <= i * chunking.stride + size
    }
    last = (end - 1) // chunking.stride
    return whole or set(range(start // chunking.stride, last + 1))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=tasks.TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--first", type=int, default=100_000, help="seed of the first example")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--implementation", choices=("mosaic_gpu", "cudnn", "xla"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    enable_compilation_cache()

    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    model = load_model(folder)
    encode = tasks.Encoder(tokenizer.backend)
    tokenizer.backend.encode_special_tokens = False  # the tasks spell the template out
    corpora = load(args.corpora, held_out=True)
    chunking = ChunkConfig(args.chunk_size)
    select = SelectionConfig(top_k=args.top_k)
    variants = {
        name: settings_of(change, args.top_k, args.chunk_size) for name, change in CHANGES.items()
    }
    decode = DecodeConfig(
        gen_length=tasks.RESPONSE_LENGTH,
        block_length=tasks.RESPONSE_LENGTH,
        threshold=args.threshold,
    )
    cells = [(t, n, m) for n in args.lengths for t in args.tasks for m in args.methods]
    rows, started = [], time.time()
    progress = tqdm(total=len(cells) * args.examples, disable=not sys.stderr.isatty())
    for task, length, method in cells:
        exact, found, kept, evaluations, seconds, wrong, paths = [], [], [], [], [], [], {}
        digest = hashlib.sha256()  # runs that differ in nothing but speed have the same
        for i in range(args.examples):
            example = tasks.make_example(
                task, length, args.first + i, corpora=corpora, encode=encode
            )
            result = generate_ids(
                model, example["prefix"], example["context"], example["query"],
                method=method if method in BASELINES else "prefilling",
                chunking=chunking, decode=decode, bos_id=tokenizer.bos_id, seed=i,
                implementation=args.implementation, selection=variants.get(method, select),
            )  # fmt: skip
            paths = result.paths
            digest.update(np.array(result.tokens, np.int32).tobytes())
            exact.append(tasks.score(encode, example["answer"], result.tokens))
            if not exact[-1] and len(wrong) < 3:
                wrong.append([example["answer"], tokenizer.decode(result.tokens)])
            evaluations.append(result.evaluations)
            seconds.append(result.timings["total"] - result.timings["compile"])
            if result.selection is not None:
                wanted = needle_chunks(example["needle_span"], chunking)
                kept.append(len(result.selection["chunks"]))
                found.append(wanted <= set(result.selection["chunks"]))
            progress.update()
        hits = sum(exact)
        row = {
            "task": task, "length": length, "method": method, "examples": len(exact),
            "exact_match": hits / len(exact), "interval": wilson(hits, len(exact)),
            "recall": sum(found) / len(found) if found else None,
            "recall_interval": wilson(sum(found), len(found)) if found else None,
            "chunks_kept": float(np.mean(kept)) if kept else None,
            "evaluations": float(np.mean(evaluations)),
            "seconds_median": float(np.median(seconds)), "wrong": wrong, "paths": paths,
            "tokens_sha256": digest.hexdigest(),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{time.time() - started:6.0f} s  {task:14} {length:5} {method:12} "
            f"exact {row['exact_match']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] "
            f"recall {row['recall'] if found else '-'} evaluations {row['evaluations']:.1f} "
            f"{1000 * row['seconds_median']:.0f} ms",
            flush=True,
        )
        record = {
            "command": " ".join(["scripts/evaluate_small.py", *sys.argv[1:]]),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
            "settings": {
                "chunking": dataclasses.asdict(chunking), "selection": dataclasses.asdict(select),
                "decode": dataclasses.asdict(decode), "first_seed": args.first,
                "changes": CHANGES,
            },
            "cells": rows,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
