"""Measures conversion, loading and KV snapshots against plain copies and reads of the same files.

    benchmark.py convert WORK    `cp -r` of a checkpoint and its conversion by the command line,
                                 each from a cold page cache with fsync at the end; then the way
                                 back, compared bit by bit
    benchmark.py load WORK       loads, each in a new process, cold and warm, between plain reads
    benchmark.py snapshot WORK   a document's KV written and read, cold and warm, and `cp -r` of it

Data: random weights and KV at the shapes of --model, bfloat16. WORK is a folder on the disk to
measure; it needs room for two checkpoints of 16 GB, or two snapshots. Peak host memory of a load is
what the process held beyond what it held when JAX had started; on the CPU it includes the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from bench.record import ROOT, Record, clock, in_process, peak
from bench.run import MODEL, model_config
from convert.convert import batches
from convert.mapping import targets
from convert.sources import SAFETENSORS_INDEX
from pdllm_jax import ChunkCache, ChunkConfig, load_model
from pdllm_jax.method.cache import ChunkPool
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.families import FAMILIES
from pdllm_jax.storage.fingerprint import ModelIdentity
from pdllm_jax.storage.snapshot import load_document, save_document

SHARD_BYTES = 4 << 30  # of a safetensors file
C = 1024  # chunk length of the snapshot
OPTIONS = MODEL | {
    "work": (Path, "scratch folder on the disk to measure"),
    "--repeats": (3, ""),
    "--weights": ("full", "convert: full, fp8 or int8"),
    "--chunks": (4, "snapshot: of the document"),
    "--layers": (int, "convert, load: of the checkpoint that is made, instead of the model's"),
    "--checkpoint": (Path, "load: a converted folder instead of a new one"),
}


def main(args: argparse.Namespace) -> None:
    """Measures in a folder that is removed at the end; writes the record."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    work = args.work / "benchmark"
    work.mkdir(parents=True)
    try:
        measure = {"convert": convert, "load": load, "snapshot": snapshot}[args.command]
        measured = measure(args, work)
        # Made at the end: a process that looks at a GPU takes its memory.
        Record(args.out, **measured).say(f"{args.out}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_checkpoint(folder: Path, config: ModelConfig) -> int:
    """Writes random finite bfloat16 tensors as sharded safetensors; returns their bytes.

    Names and config.json are those of the config's family.
    """
    rng, rows = np.random.default_rng(0), targets(config)
    sizes = {name: 2 * math.prod(row.shape) for name, row in rows.items()}
    family, weight_map = FAMILIES[config.family], {}
    raw = {family.key(name): value for name, value in dataclasses.asdict(config).items()}
    del raw["family"], raw["weight_format"]
    raw |= {"model_type": family.model_type, "architectures": [family.architecture]}
    folder.mkdir()
    for number, names in enumerate(batches(sizes, SHARD_BYTES)):
        file = f"model-{number:05d}.safetensors"
        bits = {name: random_bits(rows[name].shape, rng) for name in names}
        tensors = {name: values.view(ml_dtypes.bfloat16) for name, values in bits.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    for name, contents in {"config.json": raw, SAFETENSORS_INDEX: index}.items():
        (folder / name).write_text(json.dumps(contents), encoding="utf-8")
    return sum(sizes.values())


def checkpoint_config(args: argparse.Namespace) -> ModelConfig:
    config = model_config(args)
    return dataclasses.replace(config, n_layers=args.layers or config.n_layers)


def random_bits(shape: Any, rng: np.random.Generator) -> np.ndarray:
    """Returns uint16 bits of finite bfloat16 values: the top bit of the exponent is clear."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    return np.bitwise_and(bits, 0xBFFF, out=bits)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(folder: Path, *, evict: bool = False) -> None:
    """Flushes every file and folder to the disk, as the converter does.

    evict: also drops the files from the page cache.
    """
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if evict and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def evict(folder: Path) -> None:
    sync(folder, evict=True)


def read(folder: Path) -> None:
    """Reads every file from front to back."""
    subprocess.run(["cat", *files(folder)], check=True, stdout=subprocess.DEVNULL)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def copy(source: Path, target: Path) -> float:
    """Returns the seconds of `cp -r` and of flushing the copy, which is removed again."""

    def call() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        sync(target)

    seconds, _ = clock(call)
    shutil.rmtree(target)
    return seconds


# Runs the command of its arguments from a small process: Linux counts what the parent held at exec.
_MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024e-9
print(json.dumps({"seconds": round(seconds, 2), "peak_resident_gb": round(peak, 3)}))
"""


def convert_command(*arguments: str | Path) -> dict[str, float]:
    """Runs the converter's command line: seconds with the start of Python, peak resident memory."""
    script = [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), *map(str, arguments)]
    command, variables = [sys.executable, "-c", _MEASURE, *script], {"PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.check_output(command, env={**os.environ, **variables}))


def digests(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Returns dtype, shape and SHA-256 of every tensor of a safetensors folder."""
    result = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                result[name] = (tensor.dtype, tensor.shape, hashlib.sha256(tensor).digest())
    return result


def convert(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pairs of a copy and a conversion, then the way back."""
    source, target, back = (work / name for name in ("source", "target", "back"))
    config = checkpoint_config(args)
    total = make_checkpoint(source, config)
    runs = []
    for _ in range(args.repeats):
        shutil.rmtree(target, ignore_errors=True)
        evict(source)
        copied = copy(source, work / "copy")
        evict(source)
        converted = convert_command(source, target, "--weights", args.weights)
        seconds = {"copy": copied, "convert": converted["seconds"]}
        run = {f"{name}_seconds": round(s, 2) for name, s in seconds.items()}
        run |= {f"{name}_gb_per_s": round(total / s / 1e9, 3) for name, s in seconds.items()}
        run["convert_peak_resident_gb"] = converted["peak_resident_gb"]
        run["speed_relative_to_copy"] = round(copied / converted["seconds"], 3)
        runs.append({**run, "load_average": round(os.getloadavg()[0], 1)})
        print(json.dumps(runs[-1]), file=sys.stderr)
    evict(target)
    result = {
        "model": args.model,
        "layers": config.n_layers,
        "weights": args.weights,
        "size_gb": round(total / 1e9, 3),
        "runs": runs,
    }
    result["reverse"] = convert_command("--reverse", target, back)
    exact = digests(source) == digests(back)
    shards = len(list(source.glob("*.safetensors")))
    return {**result, "shards": shards, "dtype": "bfloat16", "round_trip_bit_exact": exact}


def status_bytes(name: str) -> int:
    """Returns VmHWM (the peak) or VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Loads args.checkpoint in this process; returns the row."""
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before = status_bytes("VmRSS")
    seconds, model = clock(lambda: load_model(args.checkpoint))
    nbytes = sum(x.nbytes for x in jax.tree.leaves(model))
    row = {"seconds": seconds, "bytes": nbytes, "gb_per_s": nbytes / seconds / 1e9}
    row |= {"host_peak_bytes": status_bytes("VmHWM") - before, "device_peak_bytes": peak() or None}
    return row


def load(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pairs of plain reads and a load, from a cold and from a warm page cache."""
    folder = args.checkpoint
    if folder is None:
        folder = work / "checkpoint"
        make_checkpoint(work / "source", checkpoint_config(args))
        convert_command(work / "source", folder)
        shutil.rmtree(work / "source")
    rows: list[dict[str, Any]] = []
    for cache in ("cold", "warm") * args.repeats:
        prepare: Callable[[Path], None] = evict if cache == "cold" else sync
        prepare(folder)
        seconds, _ = clock(lambda: read(folder))
        prepare(folder)
        row = {"page_cache": cache, "disk_gb_per_s": size(folder) / seconds / 1e9}
        row |= in_process("load", "--checkpoint", folder)
        rows.append({**row, "of_disk": row["gb_per_s"] / row["disk_gb_per_s"]})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return {"model": args.model, "bytes": rows[0]["bytes"], "rows": rows}


def snapshot(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds of writing, copying and reading. The fingerprint of the model is made before."""
    config, rng = model_config(args), np.random.default_rng(0)
    identity, heads = ModelIdentity(config, "bfloat16", "0" * 64), config.n_kv_heads

    def kv(*shape: int) -> Any:
        full = (config.n_layers, *shape, config.head_dim)
        return jax.block_until_ready(jax.device_put(random_bits(full, rng).view(jnp.bfloat16)))

    n, lengths = args.chunks, jnp.full((args.chunks,), C, jnp.int32)
    pool = ChunkPool(kv(n, heads, C), kv(n, heads, C), lengths)
    prefix = jnp.zeros((32,), jnp.int32), jnp.int32(3), kv(32, heads), kv(32, heads)
    cache = ChunkCache(pool, jnp.zeros((n, C), jnp.int32), lengths, *prefix)
    path, rounds = work / "snapshot", []

    def load_cache() -> Any:
        return load_document(path, identity).cache

    for _ in range(args.repeats):
        shutil.rmtree(path, ignore_errors=True)
        os.sync()
        load_average = round(os.getloadavg()[0], 1)
        write = clock(lambda: save_document(path, identity, cache, chunking=ChunkConfig(C)))
        took, nbytes = {"write": write[0]}, size(path)
        for state, prepare in (("cold", evict), ("warm", read)):
            prepare(path)
            took[f"copy_{state}"] = copy(path, work / "copy")
            os.sync()
            prepare(path)
            took[f"read_{state}"] = clock(load_cache)[0]
        row = {f"{name}_gb_per_s": round(nbytes / s / 1e9, 3) for name, s in took.items()}
        for call, copied in (("write", "warm"), ("read_cold", "cold"), ("read_warm", "warm")):
            row[f"{call}_over_copy_{copied}"] = round(took[f"copy_{copied}"] / took[call], 2)
        rounds.append({"load_average": load_average, **row})
        print(json.dumps(rounds[-1]), file=sys.stderr)
    for ours, theirs in zip(*map(jax.tree.leaves, (load_cache(), cache)), strict=True):
        if np.asarray(ours).tobytes() != np.asarray(theirs).tobytes():
            raise AssertionError("the snapshot does not hold what was written")
    return {"size_gb": round(nbytes / 1e9, 3), "files": len(files(path)), "rounds": rounds}
