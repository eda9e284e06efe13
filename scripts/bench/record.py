"""Times calls on the device, and keeps the record of a benchmark with its conditions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SPREAD = ("median", "least", "most")


class Record(dict[str, Any]):
    """A record that is written to `path` after each change.

    fields: of the record, after the command line, hardware and versions.
    """

    def __init__(self, path: Path, **fields: Any):
        super().__init__(command=command(), **conditions(), **fields)
        self.path = path

    def say(self, text: str) -> None:
        """Prints a line, and writes the record as it is by now."""
        print(text, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self.path, json.dumps(self, indent=1) + "\n")

    def add(self, row: dict[str, Any], text: str | None = None) -> None:
        """Appends to "rows". text: the line to print, by default the row."""
        self["rows"].append(row)
        self.say(json.dumps(row) if text is None else text)


def replace(path: Path, text: str) -> None:
    """Writes a file and replaces the old one in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def relative(path: Path, page: Path) -> str:
    """Returns the link from a page to a path."""
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()


def spread(values: Sequence[float], names: Sequence[str] = SPREAD) -> dict[str, float]:
    """Returns median, least and most under three names."""
    figures = (float(np.median(values)), float(min(values)), float(max(values)))
    return dict(zip(names, figures, strict=True))


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call until its arrays are computed, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def time_loop(run: Callable[..., Any], args: tuple[Any, ...], calls: int, repeats: int):
    """Returns the microseconds on the device of each of `calls` calls that `run(*args)` makes.

    Median, least and most over the repeats. The cost of starting a loop on the host is subtracted:
    (three loops - one loop) / 2.
    """

    def loops(times: int) -> float:
        return clock(lambda: [run(*args) for _ in range(times)][-1])[0]

    loops(1)
    spent = [(loops(3) - loops(1)) / 2 / calls * 1e6 for _ in range(repeats)]
    return tuple(spread(spent).values())


def copy_bandwidth(gigabytes: float = 2.0, calls: int = 50) -> float:
    """Returns bytes per second, read and written, of the fastest way to copy a large array.

    Ways: x + 1 in bfloat16 and in float32 in a loop on the device, and the driver's copy.
    """

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x + jnp.ones((), x.dtype), x)

    def speed(dtype: Any, in_place: bool) -> float:
        x = jnp.ones((int(gigabytes * 2**30) // jnp.dtype(dtype).itemsize,), dtype)
        run = jax.jit(add, donate_argnums=0) if in_place else jax.jit(jnp.copy)
        x = jax.block_until_ready(run(x))
        copies = (lambda: run(x)) if in_place else (lambda: [run(x) for _ in range(calls)][-1])
        return 2 * x.nbytes * calls / clock(copies)[0]

    ways = ((jnp.bfloat16, True), (jnp.float32, True), (jnp.float32, False))
    return max(speed(*way) for way in ways for _ in range(3))


def command() -> str:
    """Returns the command line without --out, and PATH in the place of files and folders."""
    words = iter(sys.argv[2:])
    kept = [word for word in words if word != "--out" or not next(words, None)]
    named = ["PATH" if Path(word).exists() else word for word in kept]
    return shlex.join(["scripts/benchmark.py", *sys.argv[1:2], *named])


def conditions() -> dict[str, Any]:
    """Returns hardware and versions."""
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
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


def peak() -> int:
    """Returns the most bytes that the device has held so far."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def run_script(
    *arguments: object, root: Path = ROOT, stderr: int | None = None, **environment: str
) -> str:
    """Runs `benchmark.py ARGUMENTS` of a checkout in a new process; returns what it printed."""
    script = [sys.executable, str(root / "scripts" / "benchmark.py"), *map(str, arguments)]
    paths = filter(None, (str(root), os.environ.get("PYTHONPATH")))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        script, env=variables, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{shlex.join(script)}: status {done.returncode}")
    return done.stdout


def in_process(kind: str, *options: object, **environment: str) -> dict[str, Any]:
    """Returns what `one` of the command's module measures in a new process.

    kind: its args.one. options: after this process' own.
    """
    output = run_script(*sys.argv[1:], "--one", kind, *options, **environment)
    return json.loads(output.splitlines()[-1])
