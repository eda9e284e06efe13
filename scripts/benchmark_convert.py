#!/usr/bin/env python3
"""Measures the converter on a synthetic checkpoint at LLaDA-8B's shapes.

    benchmark_convert.py WORK [--layers 32] [--output benchmarks/convert.json]

WORK is a folder on the disk to measure, with room for 35 GB at 32 layers; what is made there is
removed again, also where it is interrupted (exit status 130). In one run, each from a cold page
cache and with everything synced to disk at the end: `cp -r` of the checkpoint, and its conversion
by the command line (time, peak resident memory). Then --verify, the way back compared byte for
byte, and a conversion killed halfway.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from command_line import status

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 5_000_000_000
BLOCK = 32 << 20


def config(layers: int) -> dict[str, Any]:
    """config.json of LLaDA-8B, with that many layers."""
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_heads": 32,
        "n_kv_heads": 32, "n_layers": layers, "mlp_hidden_size": 12288, "mlp_ratio": 4,
        "activation_type": "silu", "block_type": "llama", "rope": True, "rope_theta": 500000.0,
        "rope_full_precision": True, "layer_norm_type": "rms", "rms_norm_eps": 1e-5,
        "max_sequence_length": 4096, "vocab_size": 126464, "embedding_size": 126464,
        "weight_tying": False, "include_bias": False, "include_qkv_bias": False,
        "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
    }  # fmt: skip


def shapes(layers: int) -> dict[str, list[int]]:
    """Tensors of LLaDA-8B in the order of the published files; written without the converter."""
    model, hidden, rows = 4096, 12288, 126464
    block = {
        "attn_norm": [model], "attn_out": [model, model], "ff_norm": [model],
        "ff_out": [model, hidden], "ff_proj": [hidden, model], "k_proj": [model, model],
        "q_proj": [model, model], "up_proj": [hidden, model], "v_proj": [model, model],
    }  # fmt: skip
    prefix = "model.transformer."
    names = {
        f"{prefix}blocks.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in block.items()
    }
    names[f"{prefix}ff_out.weight"] = [rows, model]
    names[f"{prefix}ln_f.weight"] = [model]
    names[f"{prefix}wte.weight"] = [rows, model]
    return names


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes random finite bfloat16 tensors as sharded safetensors; returns their bytes."""
    folder.mkdir()
    shards: list[dict[str, list[int]]] = []
    filled = SHARD_BYTES
    for name, shape in shapes(layers).items():
        nbytes = 2 * int(np.prod(shape))
        if filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    generator, weight_map, total = np.random.default_rng(0), {}, 0
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in members.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for begin in range(0, end, BLOCK):
                words = -(-min(BLOCK, end - begin) // 8)
                # Clearing the exponent's highest bit leaves finite values below 2.
                bits = generator.integers(0, 1 << 64, words, np.uint64) & np.uint64(
                    0xBFFFBFFFBFFFBFFF
                )
                out.write(bits.tobytes()[: end - begin])
        total += end
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def sync(folder: Path) -> None:
    """fsync of every file and folder, as the converter does before its rename."""
    for root, _, files in os.walk(folder):
        for path in [*(Path(root, name) for name in files), Path(root)]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache; they must be on disk already."""
    sync(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def command(*arguments: str | Path) -> list[str]:
    script = ROOT / "scripts" / "convert_checkpoint.py"
    return [sys.executable, str(script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def measure(*arguments: str | Path) -> dict[str, float]:
    """Runs the command line: wall seconds, start of Python included, and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{arguments} failed with status {status}")
    # Linux counts ru_maxrss in KiB; for an exec'ed process it is VmHWM.
    return {"seconds": round(seconds, 2), "peak_resident_gb": round(usage.ru_maxrss * 1024e-9, 3)}


def tensors(folder: Path) -> dict[str, tuple[Path, int, int, dict[str, Any]]]:
    """Name -> (file, first byte, last, description), by a second and simpler reader."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry.pop("data_offsets")
            found[name] = (path, 8 + length + begin, 8 + length + end, entry)
    return found


def identical(first: Path, second: Path) -> bool:
    """Whether two safetensors folders hold the same tensors, byte for byte."""
    left, right = tensors(first), tensors(second)
    if {name: entry[3] for name, entry in left.items()} != {
        name: entry[3] for name, entry in right.items()
    }:
        return False
    for name, (path, begin, end, _) in left.items():
        other, other_begin, *_ = right[name]
        with path.open("rb") as a, other.open("rb") as b:
            a.seek(begin)
            b.seek(other_begin)
            for position in range(begin, end, BLOCK):
                count = min(BLOCK, end - position)
                if a.read(count) != b.read(count):
                    return False
    return True


def kill_halfway(source: Path, destination: Path, total: int) -> dict[str, Any]:
    """SIGKILL when half of the bytes are written, then what can be loaded, then a second run."""
    process = subprocess.Popen(command(source, destination), env=environment())
    partial = destination.with_name(f".{destination.name}.partial")
    written = 0
    while written < total / 2:
        time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit("the conversion ended before it could be killed")
        written = 0
        for path in partial.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                written += path.stat().st_size
    process.send_signal(signal.SIGKILL)
    process.wait()
    sys.path.insert(0, str(ROOT))
    from pdllm_jax.storage.checkpoint import load_model
    from pdllm_jax.storage.manifest import CheckpointError

    loadable = []
    for folder in (destination, partial, partial / "params"):
        with contextlib.suppress(CheckpointError):
            load_model(folder)
            loadable.append(folder.name)
    result = measure(source, destination, "--verify")
    return {
        "killed_at_gb": round(written / 1e9, 2),
        "loads_after_the_kill": loadable,
        "second_run_verified": True,
        "left_beside_it": sorted(p.name for p in destination.parent.glob(f".{destination.name}.*")),
        **{f"second_run_{key}": value for key, value in result.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="scratch folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2, help="pairs of cp and conversion")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    return status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measures, and removes what was made."""
    if options.layers < 1 or options.repeat < 1:
        raise ValueError("--layers and --repeat must be positive")
    work = options.work / "benchmark_convert"
    work.mkdir(parents=True)
    source, copy, target, back = (work / name for name in ("source", "copy", "target", "back"))
    try:
        total = make_checkpoint(source, options.layers)
        print(f"made {total / 1e9:.2f} GB", file=sys.stderr)
        pairs = []
        for _ in range(options.repeat):
            evict(source)
            start = time.perf_counter()
            subprocess.run(["cp", "-r", source, copy], check=True)
            sync(copy)
            seconds = time.perf_counter() - start
            shutil.rmtree(copy)
            evict(source)
            converted = measure(source, target)
            pairs.append(
                {
                    "copy_seconds": round(seconds, 2),
                    "copy_gb_per_s": round(total / seconds / 1e9, 3),
                    "convert_seconds": converted["seconds"],
                    "convert_gb_per_s": round(total / converted["seconds"] / 1e9, 3),
                    "convert_peak_resident_gb": converted["peak_resident_gb"],
                    "speed_relative_to_copy": round(seconds / converted["seconds"], 3),
                    "load_average": round(os.getloadavg()[0], 1),
                }
            )
            print(json.dumps(pairs[-1]), file=sys.stderr)
            if len(pairs) < options.repeat:
                shutil.rmtree(target)
        evict(target)
        reverse = measure("--reverse", target, back)
        exact = identical(source, back)
        shutil.rmtree(back)
        shutil.rmtree(target)
        print(f"round trip identical: {exact}", file=sys.stderr)
        killed = kill_halfway(source, target, total)
        result = {
            "benchmark": "conversion of a synthetic checkpoint at LLaDA-8B shapes",
            "date": datetime.date.today().isoformat(),
            "hardware": options.hardware,
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name)
                    for name in ("jax", "numpy", "orbax-checkpoint", "tensorstore")
                },
            },
            "command": "python scripts/benchmark_convert.py WORK "
            f"--layers {options.layers} --repeat {options.repeat}",
            "conditions": "cold page cache; copy and conversion both end with fsync of every file "
            "and folder; conversion includes the start of Python; load average above 1: other "
            "work ran on the machine; sizes in 1e9 bytes",
            "layers": options.layers,
            "size_gb": round(total / 1e9, 3),
            "shards": len(list(source.glob("*.safetensors"))),
            "dtype": "bfloat16",
            "runs": pairs,
            "round_trip_bit_exact": exact,
            "reverse": reverse,
            "killed_halfway": killed,
        }
        text = json.dumps(result, indent=1) + "\n"
        print(text, end="")
        if options.output:
            options.output.write_text(text)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
