"""Timing on the device, and what a result must say about where it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Timing(NamedTuple):
    """Microseconds of one call: median, least and most over repeats."""

    median: float
    least: float
    most: float


def time_loop(run: Callable[..., Any], args: tuple[Any, ...], calls: int, repeats: int) -> Timing:
    """Device time of `run(*args)`, which makes `calls` calls on the device, after a warm-up.

    What starting it on the host costs is left out: three in a row less one, halved.
    """

    def seconds(times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            last = run(*args)
        jax.block_until_ready(last)
        return time.perf_counter() - begun

    seconds(1)
    spent = [(seconds(3) - seconds(1)) / 2 / calls * 1e6 for _ in range(repeats)]
    return Timing(float(np.median(spent)), min(spent), max(spent))


def copy_bandwidth(gigabytes: float = 2.0, calls: int = 50) -> float:
    """Bytes a second, read and written, of the fastest of three ways to go through a large array.

    x + 1 in bfloat16 and in float32 in a loop on the device, and the driver's own copy.
    """

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x + jnp.ones((), x.dtype), x)

    def in_place(dtype: Any) -> float:
        run = jax.jit(add, donate_argnums=0)
        x = jnp.ones((int(gigabytes * 2**30) // jnp.dtype(dtype).itemsize,), dtype)
        x = jax.block_until_ready(run(x))
        begun = time.perf_counter()
        x = jax.block_until_ready(run(x))
        return 2 * x.nbytes * calls / (time.perf_counter() - begun)

    def driver() -> float:
        x = jnp.ones((int(gigabytes * 2**30) // 4,), jnp.float32)
        run = jax.jit(jnp.copy)
        jax.block_until_ready(run(x))
        begun = time.perf_counter()
        for _ in range(calls):
            y = run(x)
        jax.block_until_ready(y)
        return 2 * x.nbytes * calls / (time.perf_counter() - begun)

    ways = (lambda: in_place(jnp.bfloat16), lambda: in_place(jnp.float32), driver)
    return max(way() for way in ways for _ in range(3))


def command() -> str:
    """The command line, but for where the record goes."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word != "--out" or not next(words, None)]
    return shlex.join(["scripts/benchmark.py", *kept])


def conditions() -> dict[str, Any]:
    """Hardware and versions."""
    device = jax.devices()[0]
    record = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }
    if flags := os.environ.get("XLA_FLAGS", "").strip():
        record["XLA_FLAGS"] = flags
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        record["driver, max SM clock"] = found.splitlines()[0].strip() if found else None
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """The record as JSON, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
