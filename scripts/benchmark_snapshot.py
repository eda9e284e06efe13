#!/usr/bin/env python3
"""Measures writing and reading a KV snapshot against copying the same files.

    benchmark_snapshot.py WORK [--chunks 4] [--repeat 3] [--output benchmarks/snapshot.json]

WORK is a folder on the disk to measure, with room for two snapshots; what is made there is removed
again, also where it is interrupted (exit status 130). The snapshot is a document's: random KV at
LLaDA-8B's shapes, bfloat16, C = 1024. In every round, one after the other: the snapshot is written
(arrays in memory, everything flushed at the end); `cp -r` of it from a cold page cache, flushed,
and then the snapshot is read from a cold page cache, every checksum compared; both again from a
warm one. The fingerprint of the model is not in these times: it is made once for a model.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_convert import evict, sync
from command_line import status

from pdllm_jax import ChunkCache, ChunkConfig, ModelConfig
from pdllm_jax.method.cache import ChunkPool
from pdllm_jax.storage.fingerprint import ModelIdentity
from pdllm_jax.storage.snapshot import load_document, save_document

C = 1024


def random_kv(shape: tuple[int, ...], generator: np.random.Generator) -> jax.Array:
    """Finite bfloat16 numbers, made in pieces."""
    out = np.empty(shape, np.uint16)
    for layer in out:
        bits = generator.integers(0, 1 << 16, layer.shape, np.uint16)
        np.bitwise_and(bits, 0xBFFF, out=layer)
    return jax.block_until_ready(jax.device_put(out.view(jnp.bfloat16)))


def document(config: ModelConfig, chunks: int) -> ChunkCache:
    generator = np.random.default_rng(0)
    shape = (config.n_layers, chunks, config.n_kv_heads, C, config.head_dim)
    lengths = jnp.full((chunks,), C, jnp.int32)
    return ChunkCache(
        pool=ChunkPool(random_kv(shape, generator), random_kv(shape, generator), lengths),
        tokens=jnp.zeros((chunks, C), jnp.int32),
        lengths=lengths,
        prefix_ids=jnp.zeros((32,), jnp.int32),
        prefix_length=jnp.int32(3),
        prefix_k=random_kv((config.n_layers, 32, config.n_kv_heads, config.head_dim), generator),
        prefix_v=random_kv((config.n_layers, 32, config.n_kv_heads, config.head_dim), generator),
    )


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="scratch folder on the disk to measure")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    return status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measures, and removes what was made."""
    config = ModelConfig.llada_8b()
    identity = ModelIdentity(config, "bfloat16", "0" * 64)
    cache = document(config, options.chunks)
    work = options.work / "benchmark_snapshot"
    work.mkdir(parents=True)
    path, copied = work / "snapshot", work / "copied"

    def copy() -> None:
        subprocess.run(["cp", "-r", path, copied], check=True)
        sync(copied)

    def read() -> ChunkCache:
        return jax.block_until_ready(load_document(path, identity).cache)

    try:
        rounds = []
        for _ in range(options.repeat):
            shutil.rmtree(path, ignore_errors=True)
            os.sync()
            took = {"load_average": round(os.getloadavg()[0], 1)}
            took["write"] = seconds(
                lambda: save_document(path, identity, cache, chunking=ChunkConfig(C))
            )
            files = [p for p in path.rglob("*") if p.is_file()]
            nbytes = sum(p.stat().st_size for p in files)
            for state, prepare in (("cold", evict), ("warm", warm)):
                prepare(path)
                took[f"copy_{state}"] = seconds(copy)
                shutil.rmtree(copied)
                os.sync()
                prepare(path)
                took[f"read_{state}"] = seconds(read)
            speed = {
                f"{name}_gb_per_s": round(nbytes / time / 1e9, 3)
                for name, time in took.items()
                if name != "load_average"
            }
            ratios = {
                "write_over_copy_warm": took["copy_warm"] / took["write"],
                "read_cold_over_copy_cold": took["copy_cold"] / took["read_cold"],
                "read_warm_over_copy_warm": took["copy_warm"] / took["read_warm"],
            }
            rounds.append(
                {
                    "load_average": took["load_average"],
                    **speed,
                    **{name: round(ratio, 2) for name, ratio in ratios.items()},
                }
            )
            print(json.dumps(rounds[-1]), file=sys.stderr)
        found = load_document(path, identity).cache
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
            assert all(
                x.tobytes() == y.tobytes() for x, y in zip(*map(np.atleast_1d, (a, b)), strict=True)
            )
        result = {
            "benchmark": "KV snapshot against cp -r of its files",
            "date": datetime.date.today().isoformat(),
            "hardware": options.hardware,
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name)
                    for name in ("jax", "numpy", "orbax-checkpoint", "tensorstore")
                },
            },
            "command": "python scripts/benchmark_snapshot.py WORK "
            f"--chunks {options.chunks} --repeat {options.repeat}",
            "conditions": "LLaDA-8B shapes, bfloat16, C = 1024; writing and copying end with fsync "
            "of every file and folder; reading compares every checksum and ends with arrays on the "
            "device; cold: the files were dropped from the page cache; sizes in 1e9 bytes",
            "size_gb": round(nbytes / 1e9, 3),
            "files": len(files),
            "rounds": rounds,
        }
        text = json.dumps(result, indent=1) + "\n"
        print(text, end="")
        if options.output:
            options.output.write_text(text)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
