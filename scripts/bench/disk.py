"""Measures conversion, loading and KV snapshots against plain copies and reads of the same files.

    benchmark.py convert WORK    `cp -r` of a checkpoint and its conversion by the command line,
                                 each from a cold page cache with fsync at the end; then the way
                                 back, compared bit by bit
    benchmark.py load WORK       loads, each in a new process, cold and warm, between plain reads
    benchmark.py snapshot WORK   a document's KV written and read, cold and warm, and `cp -r` of it

Data: random weights and KV at the shapes of LLaDA-8B, bfloat16. WORK is a folder on the disk to
measure; it needs room for two checkpoints of 16 GB, or two snapshots. Peak host memory of a load is
what the process held beyond what it held when JAX had started; on the CPU it includes the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import ROOT, conditions, in_process, write
from pdllm_jax.network.config import ModelConfig

BLOCK = 16 << 20
SHARD_LAYERS = 10  # of a safetensors file: 4 GB
C = 1024  # chunk length of the snapshot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py convert`, `load` and `snapshot`."""
    command = parser.get_default("command")
    option = parser.add_argument
    option("work", type=Path, help="scratch folder on the disk to measure")
    option("--out", type=Path, default=Path("benchmarks") / f"{command}.json")
    option("--repeats", type=int, default=3)
    if command == "snapshot":
        option("--chunks", type=int, default=4, help="of the document")
    else:
        option("--layers", type=int, default=32, help="of the checkpoint that is made")
    if command == "load":
        option("--checkpoint", type=Path, help="a converted folder instead of a new one")
        option("--one", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Measures in a folder that is removed at the end; writes the record."""
    if getattr(args, "one", False):
        print(json.dumps(load_one(args.work)))
        return 0
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    size = f"chunks {args.chunks}" if args.command == "snapshot" else f"layers {args.layers}"
    work = args.work / "benchmark"
    work.mkdir(parents=True)
    try:
        measure = {"convert": convert, "load": load, "snapshot": snapshot}[args.command]
        record = {
            "command": f"scripts/benchmark.py {args.command} WORK --{size} --repeats "
            f"{args.repeats}",
            **conditions(),
            **measure(args, work),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write(args.out, record)
    return 0


def config_json(layers: int) -> dict[str, Any]:
    """Returns config.json of LLaDA-8B with that many layers."""
    config = dataclasses.asdict(dataclasses.replace(ModelConfig.llada_8b(), n_layers=layers))
    names = (
        "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "rope_theta",
        "rms_norm_eps", "max_sequence_length", "vocab_size", "embedding_size", "mask_token_id",
        "eos_token_id", "pad_token_id", "bos_token_id",
    )  # fmt: skip
    return {"model_type": "llada", **{name: config[name] for name in names}}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes random finite bfloat16 tensors as sharded safetensors; returns their bytes."""
    import ml_dtypes
    from safetensors.numpy import save_file

    raw, rng, total = config_json(layers), np.random.default_rng(0), 0
    model, hidden, rows = raw["d_model"], raw["mlp_hidden_size"], raw["embedding_size"]
    narrow = model // raw["n_heads"] * raw["n_kv_heads"]
    block = {
        "attn_norm": [model], "attn_out": [model, model], "ff_norm": [model],
        "ff_out": [model, hidden], "ff_proj": [hidden, model], "k_proj": [narrow, model],
        "q_proj": [model, model], "up_proj": [hidden, model], "v_proj": [narrow, model],
    }  # fmt: skip
    shards = [{"ff_out": [rows, model], "ln_f": [model], "wte": [rows, model]}]
    for first in range(0, layers, SHARD_LAYERS):
        members = range(first, min(first + SHARD_LAYERS, layers))
        shards.append({f"blocks.{i}.{n}": shape for i in members for n, shape in block.items()})
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names = {f"model.transformer.{name}.weight": shape for name, shape in shard.items()}
        tensors = {
            n: random_bits(shape, rng).view(ml_dtypes.bfloat16) for n, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def random_bits(shape: Any, rng: np.random.Generator) -> np.ndarray:
    """Returns uint16 bits of finite bfloat16 values: the top bit of the exponent is clear."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    return np.bitwise_and(bits, 0xBFFF, out=bits)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """Flushes every file and folder to the disk, as the converter does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def evict(folder: Path) -> None:
    """Flushes a folder's files and drops them from the page cache."""
    sync(folder)
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path) -> int:
    """Reads every file from front to back into one buffer; returns the bytes."""
    buffer, total = memoryview(np.ones(BLOCK, np.uint8)), 0
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def copy(source: Path, target: Path) -> float:
    """Returns the seconds of `cp -r` and of flushing the copy, which is removed again."""

    def call() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        sync(target)

    elapsed = seconds(call)
    shutil.rmtree(target)
    return elapsed


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
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, *script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(result.stdout)


def identical(first: Path, second: Path) -> bool:
    """Returns whether two safetensors folders hold the same tensors, bit by bit."""
    from safetensors import safe_open

    def digests(folder: Path) -> dict[str, tuple[Any, ...]]:
        result = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    result[name] = (tensor.dtype, tensor.shape, hashlib.sha256(tensor).digest())
        return result

    return digests(first) == digests(second)


def convert(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pairs of a copy and a conversion, then the way back."""
    source, target, back = (work / name for name in ("source", "target", "back"))
    total = make_checkpoint(source, args.layers)
    runs = []
    for _ in range(args.repeats):
        shutil.rmtree(target, ignore_errors=True)
        evict(source)
        copied = copy(source, work / "copy")
        evict(source)
        converted = convert_command(source, target)
        runs.append({
            "copy_seconds": round(copied, 2),
            "copy_gb_per_s": round(total / copied / 1e9, 3),
            "convert_seconds": converted["seconds"],
            "convert_gb_per_s": round(total / converted["seconds"] / 1e9, 3),
            "convert_peak_resident_gb": converted["peak_resident_gb"],
            "speed_relative_to_copy": round(copied / converted["seconds"], 3),
            "load_average": round(os.getloadavg()[0], 1),
        })  # fmt: skip
        print(json.dumps(runs[-1]), file=sys.stderr)
    evict(target)
    reverse = convert_command("--reverse", target, back)
    return {
        "layers": args.layers, "size_gb": round(total / 1e9, 3), "runs": runs, "reverse": reverse,
        "shards": len(list(source.glob("*.safetensors"))), "dtype": "bfloat16",
        "round_trip_bit_exact": identical(source, back),
    }  # fmt: skip


def status_bytes(name: str) -> int:
    """Returns VmHWM (the peak) or VmRSS of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def load_one(folder: Path) -> dict[str, Any]:
    """Loads in this process; returns the row."""
    import jax

    from pdllm_jax import load_model

    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    model = load_model(folder)
    jax.block_until_ready(jax.tree.leaves(model))
    elapsed = time.perf_counter() - start
    nbytes = sum(x.nbytes for x in jax.tree.leaves(model))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": elapsed,
        "bytes": nbytes,
        "gb_per_s": nbytes / elapsed / 1e9,
        "host_peak_bytes": status_bytes("VmHWM") - before,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "cpu_seconds": time.process_time(),
    }


def load(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pairs of plain reads and a load, from a cold and from a warm page cache."""
    folder = args.checkpoint
    if folder is None:
        folder = work / "checkpoint"
        make_checkpoint(work / "source", args.layers)
        convert_command(work / "source", folder)
        shutil.rmtree(work / "source")
    rows: list[dict[str, Any]] = []
    for cache in ("cold", "warm") * args.repeats:
        if cache == "cold":
            evict(folder)
        start = time.perf_counter()
        disk = read(folder) / (time.perf_counter() - start) / 1e9
        if cache == "cold":
            evict(folder)
        row = {"page_cache": cache, "disk_gb_per_s": disk, **in_process("load", folder, "--one")}
        rows.append({**row, "of_disk": row["gb_per_s"] / row["disk_gb_per_s"]})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return {"bytes": rows[0]["bytes"], "rows": rows}


def snapshot(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds of writing, copying and reading. The fingerprint of the model is made before."""
    import jax
    import jax.numpy as jnp

    from pdllm_jax import ChunkCache, ChunkConfig
    from pdllm_jax.method.cache import ChunkPool
    from pdllm_jax.storage.fingerprint import ModelIdentity
    from pdllm_jax.storage.snapshot import load_document, save_document

    config, rng = ModelConfig.llada_8b(), np.random.default_rng(0)
    identity = ModelIdentity(config, "bfloat16", "0" * 64)

    def kv(*shape: int) -> Any:
        full = (config.n_layers, *shape, config.head_dim)
        return jax.block_until_ready(jax.device_put(random_bits(full, rng).view(jnp.bfloat16)))

    lengths, heads = jnp.full((args.chunks,), C, jnp.int32), config.n_kv_heads
    cache = ChunkCache(
        pool=ChunkPool(kv(args.chunks, heads, C), kv(args.chunks, heads, C), lengths),
        tokens=jnp.zeros((args.chunks, C), jnp.int32), lengths=lengths,
        prefix_ids=jnp.zeros((32,), jnp.int32), prefix_length=jnp.int32(3),
        prefix_k=kv(32, heads), prefix_v=kv(32, heads),
    )  # fmt: skip
    path, rounds = work / "snapshot", []

    def load_cache() -> Any:
        return jax.block_until_ready(load_document(path, identity).cache)

    for _ in range(args.repeats):
        shutil.rmtree(path, ignore_errors=True)
        os.sync()
        load_average = round(os.getloadavg()[0], 1)
        took = {
            "write": seconds(lambda: save_document(path, identity, cache, chunking=ChunkConfig(C)))
        }
        nbytes = sum(file.stat().st_size for file in files(path))
        for state, prepare in (("cold", evict), ("warm", read)):
            prepare(path)
            took[f"copy_{state}"] = copy(path, work / "copy")
            os.sync()
            prepare(path)
            took[f"read_{state}"] = seconds(load_cache)
        speeds = {f"{name}_gb_per_s": round(nbytes / s / 1e9, 3) for name, s in took.items()}
        ratios = {
            f"{a}_over_{b}": round(took[b] / took[a], 2)
            for a, b in (
                ("write", "copy_warm"), ("read_cold", "copy_cold"), ("read_warm", "copy_warm")
            )
        }  # fmt: skip
        rounds.append({"load_average": load_average, **speeds, **ratios})
        print(json.dumps(rounds[-1]), file=sys.stderr)
    for ours, theirs in zip(*map(jax.tree.leaves, (load_cache(), cache)), strict=True):
        if np.asarray(ours).tobytes() != np.asarray(theirs).tobytes():
            raise AssertionError("the snapshot does not hold what was written")
    return {"size_gb": round(nbytes / 1e9, 3), "files": len(files(path)), "rounds": rounds}
