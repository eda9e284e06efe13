"""Times calls on the device, and writes a record with the conditions it was measured under."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.pages import replace

ROOT = Path(__file__).resolve().parents[2]


class Timing(NamedTuple):
    """Microseconds of one call: median, least and most over repeats."""

    median: float
    least: float
    most: float


def time_loop(run: Callable[..., Any], args: tuple[Any, ...], calls: int, repeats: int) -> Timing:
    """Returns the device time of one call, where `run(*args)` makes `calls` calls on the device.

    The cost of starting a loop on the host is subtracted: (three loops - one loop) / 2.
    """

    def seconds(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            last = run(*args)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    seconds(1)
    spent = [(seconds(3) - seconds(1)) / 2 / calls * 1e6 for _ in range(repeats)]
    return Timing(float(np.median(spent)), min(spent), max(spent))


def copy_bandwidth(gigabytes: float = 2.0, calls: int = 50) -> float:
    """Returns bytes per second, read and written, of the fastest way to copy a large array.

    Ways: x + 1 in bfloat16 and in float32 in a loop on the device, and the driver's copy.
    """

    def in_place(dtype: Any) -> float:
        def add(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, calls, lambda _, x: x + jnp.ones((), x.dtype), x)

        run = jax.jit(add, donate_argnums=0)
        x = jnp.ones((int(gigabytes * 2**30) // jnp.dtype(dtype).itemsize,), dtype)
        x = jax.block_until_ready(run(x))
        start = time.perf_counter()
        x = jax.block_until_ready(run(x))
        return 2 * x.nbytes * calls / (time.perf_counter() - start)

    def driver() -> float:
        x = jnp.ones((int(gigabytes * 2**30) // 4,), jnp.float32)
        run = jax.jit(jnp.copy)
        jax.block_until_ready(run(x))
        start = time.perf_counter()
        for _ in range(calls):
            y = run(x)
        jax.block_until_ready(y)
        return 2 * x.nbytes * calls / (time.perf_counter() - start)

    ways = (lambda: in_place(jnp.bfloat16), lambda: in_place(jnp.float32), driver)
    return max(way() for way in ways for _ in range(3))


def command() -> str:
    """Returns the command line without --out."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word != "--out" or not next(words, None)]
    return shlex.join(["scripts/benchmark.py", *kept])


def conditions() -> dict[str, Any]:
    """Returns hardware and versions."""
    device = jax.devices()[0]
    record = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }
    if flags := os.environ.get("XLA_FLAGS", "").strip():
        record["XLA_FLAGS"] = flags
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        record["driver, max SM clock"] = lines.splitlines()[0].strip() if lines else None
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the record as JSON and replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(record, indent=1) + "\n")


def in_process(*arguments: object, root: Path = ROOT, **environment: str) -> dict[str, Any]:
    """Runs `benchmark.py ARGUMENTS` of a checkout in a new process; its last line is JSON."""
    script = [sys.executable, str(root / "scripts" / "benchmark.py"), *map(str, arguments)]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    done = subprocess.run(script, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(script)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def times(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns every time of a record of `speed`, `method` or `kernel` by name, in seconds."""
    result = {name: row["median"] for name, row in record.get("seconds", {}).items()}
    for row in record.get("step", ()):
        name = f"step, {row['cached_tokens']} cached{_on(row)}"
        result[name] = row["ms"] / 1e3
        result[f"{name}, from Python"] = row["ms_from_python"] / 1e3
    for row in record.get("end_to_end", ()):
        name = f"{row['method']}, {row['chunks']} chunks, {row['tokens']} tokens{_on(row)}"
        result[name] = row["seconds"]
    for row in record.get("stream", ()):
        result[f"streamed, {row['document_tokens']} tokens{_on(row)}"] = row["seconds"]
    for row in record.get("rows", ()):
        if "us" in row:
            keys = ("implementation", "batch", "slots", "rows", "heads", "kv_heads", "ragged")
            result[", ".join(f"{key} {row[key]}" for key in keys)] = row["us"] / 1e6
    return result


def _on(row: Mapping[str, Any]) -> str:
    return f", mesh {row['mesh']}" if "mesh" in row else ""
