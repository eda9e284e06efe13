"""Reads what the compiler says of the GPU kernels: registers, spills, warnings, temporaries.

With --target FILE the GPU need not be there (see `benchmark.py memory --help`).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.memory import device_for
from bench.record import command, replace, run_script
from pallas_kernels import OwnKV, Scaled, chunk_attention, matmul

_MARK = "=== "
_KERNEL = re.compile(
    r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_WARNING = re.compile(r"^.*(?:serializ|Potential Performance Loss).*$", re.MULTILINE)
# (requests, slots, query rows, heads, KV heads, keys that each request has for itself)
ATTENTION = (
    (1, 4, 32, 32, 32, 0),
    (1, 8, 32, 32, 32, 0),
    (1, 8, 64, 32, 32, 0),
    (1, 8, 128, 32, 32, 0),
    (8, 4, 32, 32, 32, 0),
    (1, 4, 32, 28, 4, 0),
    (1, 8, 33, 28, 4, 0),
    (1, 4, 32, 32, 32, 128),
    (8, 4, 32, 32, 32, 128),
)
# (name, rows, inner size, outer sizes); products of different sizes have biases
_PRODUCTS = (
    ("q, k, v", 32, 4096, (4096,) * 3),
    ("gate, up", 32, 4096, (12288,) * 2),
    ("down", 32, 12288, (4096,)),
    ("output", 32, 4096, (4096,)),
    ("q, k, v", 96, 4096, (4096,) * 3),
    ("gate, up", 128, 4096, (12288,) * 2),
    ("q, k, v, 28/4 heads", 33, 3584, (3584, 512, 512)),
    ("gate, up", 33, 3584, (18944,) * 2),
    ("down", 33, 18944, (3584,)),
)
# The same with weights of 8 bits.
PRODUCTS = [
    (*case, dtype) for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8) for case in _PRODUCTS
]
WIDE_ROWS: tuple[tuple[Any, int], ...] = (("swiglu", 12288), ("add_norm", 4096))
OPTIONS = {"--target": (Path, "compile for a device that is not there")}


def one(args: argparse.Namespace) -> None:
    """Compiles every case; prints name and bytes of temporaries around the compiler's report."""
    from pallas_kernels.matmul.hopper_rows import build_rows

    c_library = ctypes.CDLL(None)

    def attend(q: Any, k: Any, v: Any, ids: Any, lengths: Any, near: Any) -> Any:
        nearby = None if near is None else OwnKV(near, near, lengths[: near.shape[0]])
        settings: Any = {"own_kv": nearby, "layer": 1, "implementation": "mosaic_gpu"}
        return chunk_attention(q, k, v, ids, lengths, **settings)

    def multiply(activation: Any, x: Any, weights: Any, biases: Any) -> Any:
        settings: Any = {"activation": activation, "implementation": "mosaic_gpu"}
        return matmul(x, *weights, biases=biases, **settings)

    with device_for(args.target) as sharding:

        def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        def report(name: str, call: Any, *arrays: Any) -> None:
            print(f"{_MARK}{name}", flush=True)
            sizes = jax.jit(call).lower(*arrays).compile().memory_analysis()
            c_library.fflush(None)  # the compiler writes to C's stdout, which a pipe buffers
            print(f"{_MARK}{sizes.temp_size_in_bytes}", flush=True)

        for batch, slots, rows, heads, kv_heads, near in ATTENTION:
            name = f"attention, B = {batch}, K = {slots}, {rows} rows, {heads}/{kv_heads} heads"
            q, pool = shape(batch, slots + (near > 0), rows, heads, 128), (2, 40, kv_heads, 1024)
            ids, lengths = shape(batch, slots, dtype=jnp.int32), shape(40, dtype=jnp.int32)
            kv = [shape(*pool, 128)] * 2
            nearby = shape(batch, near, kv_heads, 128) if near else None
            name += f", {near} near keys" if near else ""
            report(name, attend, q, *kv, ids, lengths, nearby)
        for name, rows, inner, outs, dtype in PRODUCTS:
            product = functools.partial(multiply, "swiglu" if name == "gate, up" else "none")
            weights: list[Any] = [shape(out, inner, dtype=dtype) for out in outs]
            if dtype != jnp.bfloat16:
                scales = [shape(out, dtype=jnp.float32) for out in outs]
                weights = list(map(Scaled, weights, scales))
                name += f", {jnp.dtype(dtype).name}"
            biases = tuple(shape(out) for out in outs if len(set(outs)) > 1)
            report(f"products of {rows} rows, {name}", product, shape(rows, inner), weights, biases)
        for kind, columns in WIDE_ROWS:
            rows_and_scale = *[shape(9344, columns)] * 2, shape(9344, dtype=jnp.float32)
            kinds = jnp.float32, jnp.float32 if kind == "swiglu" else jnp.bfloat16
            by_column = (shape(columns, dtype=dtype) for dtype in kinds)
            run = build_rows(kind, 9344, columns)
            report(f"9344 rows in fp8, {kind}", run, *rows_and_scale, *by_column)


def parse(text: str) -> list[dict[str, Any]]:
    """Returns the rows of what `one` and the compiler printed.

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
        size, warnings = int(temporary.split("\n")[0]), _WARNING.findall(report)
        rows.append({"case": name, "temporary_bytes": size, "warnings": warnings})
        rows[-1]["kernels"] = kernels
    return rows


def compiled(target: Path | None = None) -> list[dict[str, Any]]:
    """Returns the rows of every case, compiled in a process whose compiler prints its reports."""
    options = [] if target is None else ["--target", target]
    variables = {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    variables["JAX_PLATFORMS"] = "cuda" if target is None else "cpu"
    output = run_script("compiled", "--one", "all", *options, stderr=subprocess.STDOUT, **variables)
    return parse(output)


def main(args: argparse.Namespace) -> int:
    """Writes the record; exit status 1 where a kernel spills or the compiler warns."""
    rows = compiled(args.target)
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    target = None if args.target is None else args.target.stem
    record = {"command": command(), "target": target, "versions": versions, "rows": rows}
    replace(args.out, json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(f"{row['case']}: {row['kernels']}, {row['temporary_bytes'] / 1e6:.1f} MB temporaries")
    return int(any(r["warnings"] or any(k["spilled_bytes"] for k in r["kernels"]) for r in rows))
