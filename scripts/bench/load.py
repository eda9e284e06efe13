"""Loading a checkpoint: GB/s against the disk's own read speed, and the host memory that it takes.

Every load is a process of its own, from a cold page cache and from a warm one, between two readings
of the same files by plain reads of 16 MiB. Peak host memory is what the process held beyond what it
held when JAX had started; on the CPU it includes the weights themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py load`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/load.json"))
    parser.add_argument("--checkpoint", type=Path, help="a converted folder (default: one is made)")
    parser.add_argument("--layers", type=int, default=32, help="of the one made, at 8B's shapes")
    parser.add_argument("--work", type=Path, help="where it is made, and removed again")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)


def status_bytes(name: str) -> int:
    """VmHWM (the peak) or VmRSS of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def load_one(folder: Path) -> dict[str, Any]:
    """Loads in this process."""
    import jax

    from pdllm_jax import load_model

    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    model = load_model(folder)
    jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.perf_counter() - start
    nbytes = sum(x.nbytes for x in jax.tree.leaves(model))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "bytes": nbytes,
        "gb_per_s": nbytes / seconds / 1e9,
        "host_peak_bytes": status_bytes("VmHWM") - before,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "cpu_seconds": time.process_time(),
    }


def in_process(*arguments: str | Path, **environment: str) -> dict[str, Any]:
    """The last line that this script prints in a process of its own, as JSON."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *map(str, arguments)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows of (disk, load) pairs, cold and warm."""
    from bench.checkpoint import BLOCK, evict, read

    rows = []
    buffer = np.ones(BLOCK, np.uint8)
    for _ in range(repeats):
        for cache in ("cold", "warm"):
            if cache == "cold":
                evict(folder)
            seconds, nbytes = read(folder, buffer)
            if cache == "cold":
                evict(folder)
            row = {
                "page_cache": cache,
                "disk_gb_per_s": nbytes / seconds / 1e9,
                **in_process("load", "--one", "--checkpoint", folder),
            }
            row["of_disk"] = row["gb_per_s"] / row["disk_gb_per_s"]
            rows.append(row)
            print(
                f"{cache}: plain reads {row['disk_gb_per_s']:.2f} GB/s, load {row['gb_per_s']:.2f} "
                f"GB/s ({row['of_disk']:.2f}), {row['seconds']:.1f} s, host peak "
                f"{row['host_peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    return rows


def main(args: argparse.Namespace) -> int:
    """Measures and writes the record."""
    if args.one:
        print(json.dumps(load_one(args.checkpoint)))
        return 0
    from bench.checkpoint import make
    from bench.record import conditions, write

    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pdllm-load-", dir=args.work) as work:
        folder = args.checkpoint
        if folder is None:
            folder = Path(work) / "checkpoint"
            make(folder, args.layers)
        rows = measure(folder, args.repeats)
    best = {cache: [r for r in rows if r["page_cache"] == cache] for cache in ("cold", "warm")}
    record = {
        # Without the name of the folder, which is this machine's.
        "command": f"scripts/benchmark.py load --layers {args.layers} --repeats {args.repeats}",
        **conditions(),
        "processors": os.cpu_count(),
        "bytes": rows[0]["bytes"],
        "median": {
            cache: {
                key: float(np.median([row[key] for row in found]))
                for key in ("gb_per_s", "disk_gb_per_s", "of_disk", "seconds", "host_peak_bytes")
            }
            for cache, found in best.items()
        },
        "rows": rows,
    }
    write(args.out, record)
    return 0
