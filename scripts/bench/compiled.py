"""Reads what the compiler says of the GPU kernels: registers, spills, warnings, temporaries.

With --target FILE the GPU need not be there (see `benchmark.py memory --help`).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.memory import device_for
from bench.record import ROOT, write

_MARK = "=== "
_KERNEL = re.compile(
    r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_WARNING = re.compile(r"^.*(?:serializ|Potential Performance Loss).*$", re.MULTILINE)
# (requests, slots, query rows, heads, KV heads, keys that each request has for itself)
ATTENTION = (
    (1, 4, 32, 32, 32, 0), (1, 8, 32, 32, 32, 0), (1, 8, 64, 32, 32, 0), (1, 8, 128, 32, 32, 0),
    (8, 4, 32, 32, 32, 0), (1, 4, 32, 28, 4, 0), (1, 4, 32, 32, 32, 128), (8, 4, 32, 32, 32, 128),
)  # fmt: skip
# (name, rows, inner size, outer sizes)
PRODUCTS = (
    ("q, k, v", 32, 4096, (4096,) * 3), ("gate, up", 32, 4096, (12288,) * 2),
    ("down", 32, 12288, (4096,)), ("output", 32, 4096, (4096,)),
    ("q, k, v", 96, 4096, (4096,) * 3), ("gate, up", 128, 4096, (12288,) * 2),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py compiled`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/compiled.json"))
    parser.add_argument("--target", type=Path, help="compile for a device that is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)


def compile_all(target: Path | None) -> None:
    """Compiles every case; prints its name and the bytes of its temporaries around what the
    compiler prints.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import OwnKV, chunk_attention, matmul

    c_library = ctypes.CDLL(None)
    with device_for(target) as sharding:

        def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        def report(name: str, call: Any, *args: Any) -> None:
            print(f"{_MARK}{name}", flush=True)
            sizes = jax.jit(call).lower(*args).compile().memory_analysis()
            c_library.fflush(None)  # the compiler writes to C's stdout, which a pipe buffers
            print(f"{_MARK}{sizes.temp_size_in_bytes}", flush=True)

        def attend(q: Any, k: Any, v: Any, ids: Any, lengths: Any, near: Any) -> Any:
            near = None if near is None else OwnKV(near, near, lengths[: near.shape[0]])
            return chunk_attention(
                q, k, v, ids, lengths, layer=1, own_kv=near, implementation="mosaic_gpu"
            )

        for batch, slots, rows, heads, kv_heads, near in ATTENTION:
            pool = shape(2, 40, kv_heads, 1024, 128)
            report(
                f"attention, B = {batch}, K = {slots}, {rows} rows, {heads}/{kv_heads} heads"
                + (f", {near} near keys" if near else ""),
                attend, shape(batch, slots + (near > 0), rows, heads, 128), pool, pool,
                shape(batch, slots, dtype=jnp.int32), shape(40, dtype=jnp.int32),
                shape(batch, near, kv_heads, 128) if near else None,
            )  # fmt: skip
        for name, rows, inner, outs in PRODUCTS:
            activation: Any = "swiglu" if name == "gate, up" else "none"
            report(
                f"products of {rows} rows, {name}",
                functools.partial(matmul, activation=activation, implementation="mosaic_gpu"),
                shape(rows, inner), *(shape(out, inner) for out in outs),
            )  # fmt: skip


def parse(text: str) -> list[dict[str, Any]]:
    """Returns the rows of what `compile_all` and the compiler printed.

    Raises:
      ValueError: the compiler printed nothing about a kernel of a case.
    """
    rows = []
    parts = text.split(_MARK)[1:]
    for name_and_report, temporary in zip(parts[::2], parts[1::2], strict=True):
        name, _, report = name_and_report.partition("\n")
        kernels = [
            {"kernel": kernel, "registers": int(used), "spilled_bytes": int(out) + int(back)}
            for kernel, out, back, used in _KERNEL.findall(report)
        ]
        if not kernels:
            raise ValueError(f"the compiler has said nothing of {name!r}")
        rows.append({
            "case": name, "temporary_bytes": int(temporary.split("\n")[0]),
            "warnings": _WARNING.findall(report), "kernels": kernels,
        })  # fmt: skip
    return rows


def compiled(target: Path | None = None) -> list[dict[str, Any]]:
    """Returns the rows of every case, compiled in a process whose compiler prints its reports."""
    script = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "compiled", "--one"]
    script += ["--target", str(target)] if target is not None else []
    variables = {
        **os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1",
        "JAX_PLATFORMS": "cuda" if target is None else "cpu",
    }  # fmt: skip
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        script, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\nstatus {done.returncode}")
    return parse(done.stdout)


def main(args: argparse.Namespace) -> int:
    """Writes the record; exit status 1 where a kernel spills or the compiler warns."""
    if args.one:
        compile_all(args.target)
        return 0
    rows = compiled(args.target)
    record = {
        "command": "scripts/benchmark.py compiled" + " --target FILE" * (args.target is not None),
        "target": None if args.target is None else args.target.stem,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "rows": rows,
    }
    write(args.out, record)
    for row in rows:
        print(f"{row['case']}: {row['kernels']}, {row['temporary_bytes'] / 1e6:.1f} MB temporaries")
    bad = [r for r in rows if r["warnings"] or any(k["spilled_bytes"] for k in r["kernels"])]
    return 1 if bad else 0
