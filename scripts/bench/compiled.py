"""What the compiler says of the GPU kernels: registers, spills, warnings, temporaries.

With --target FILE the GPU need not be there: FILE describes it as those of openxla/xla under
backends/gpu/target_config/specs do, and jax[cuda13] must be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MARK = "=== "
_KERNEL = re.compile(
    r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_WARNING = re.compile(r"^.*(?:serializ|Potential Performance Loss).*$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py compiled`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/compiled.json"))
    parser.add_argument("--target", type=Path, help="compile for a device that is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)


def compile_all(target: Path | None) -> None:
    """Compiles every case; its name and its temporaries, in bytes, go to stdout beside what the
    compiler prints.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from bench.memory import as_on_gpu
    from pallas_kernels import OwnKV, chunk_attention, matmul

    sharding, where = None, contextlib.nullcontext()
    if target is not None:
        from jax.experimental import topologies

        described = target.read_text(encoding="utf-8")
        there = topologies.get_topology_desc("", "cuda", target_config=described, topology="1x1x1")
        sharding, where = SingleDeviceSharding(there.devices[0]), as_on_gpu()

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    c_library = ctypes.CDLL(None)

    def report(name: str, call: Any, *args: Any) -> None:
        print(f"{_MARK}{name}", flush=True)
        found = jax.jit(call).lower(*args).compile().memory_analysis()
        c_library.fflush(None)  # the compiler writes to C's stdout, which a pipe holds back
        print(f"{_MARK}{found.temp_size_in_bytes}", flush=True)

    with where:
        for batch, slots, rows, heads, kv_heads, own in (
            (1, 4, 32, 32, 32, 0), (1, 8, 32, 32, 32, 0), (1, 8, 64, 32, 32, 0),
            (1, 8, 128, 32, 32, 0), (8, 4, 32, 32, 32, 0), (1, 4, 32, 28, 4, 0),
            (1, 4, 32, 32, 32, 128), (8, 4, 32, 32, 32, 128),
        ):  # fmt: skip
            pool = shape(2, 40, kv_heads, 1024, 128)
            ids, lengths = shape(batch, slots, dtype=jnp.int32), shape(40, dtype=jnp.int32)
            near = shape(batch, own, kv_heads, 128) if own else None

            def attend(q: Any, k: Any, v: Any, ids: Any, lengths: Any, near: Any) -> Any:
                if near is not None:
                    near = OwnKV(near, near, lengths[: near.shape[0]])
                return chunk_attention(
                    q, k, v, ids, lengths, layer=1, own_kv=near, implementation="mosaic_gpu"
                )

            report(
                f"attention, B = {batch}, K = {slots}, {rows} rows, {heads}/{kv_heads} heads"
                + (f", {own} near keys" if own else ""),
                attend, shape(batch, slots + (own > 0), rows, heads, 128), pool, pool, ids,
                lengths, near,
            )  # fmt: skip
        for name, rows, inner, outs in (
            ("q, k, v", 32, 4096, (4096,) * 3), ("gate, up", 32, 4096, (12288,) * 2),
            ("down", 32, 12288, (4096,)), ("output", 32, 4096, (4096,)),
            ("q, k, v", 96, 4096, (4096,) * 3), ("gate, up", 128, 4096, (12288,) * 2),
        ):  # fmt: skip
            activation: Any = "swiglu" if name == "gate, up" else "none"
            report(
                f"products of {rows} rows, {name}",
                functools.partial(matmul, activation=activation, implementation="mosaic_gpu"),
                shape(rows, inner), *(shape(out, inner) for out in outs),
            )  # fmt: skip


def parse(text: str) -> list[dict[str, Any]]:
    """Rows of what `compile_all` and the compiler printed. ValueError if no kernel is there."""
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
        rows.append(
            {
                "case": name, "temporary_bytes": int(temporary.split("\n")[0]),
                "warnings": _WARNING.findall(report), "kernels": kernels,
            }
        )  # fmt: skip
    return rows


def compiled(target: Path | None = None) -> list[dict[str, Any]]:
    """Rows for every case, compiled in a process of its own, which alone has the compiler talk."""
    script = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "compiled", "--one"]
    script += ["--target", str(target)] if target is not None else []
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cuda" if target is None else "cpu",
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
    """Writes the record; exit status 1 where anything spills or is warned of."""
    if args.one:
        compile_all(args.target)
        return 0
    from importlib.metadata import version

    from bench.record import write

    rows = compiled(args.target)
    record = {
        "command": "scripts/benchmark.py compiled" + " --target FILE" * (args.target is not None),
        "target": None if args.target is None else args.target.stem,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "rows": rows,
    }
    write(args.out, record)
    bad = [r for r in rows if r["warnings"] or any(k["spilled_bytes"] for k in r["kernels"])]
    for row in rows:
        kernels = ", ".join(
            f"{k['kernel']} {k['registers']} registers, {k['spilled_bytes']} bytes spilled"
            for k in row["kernels"]
        )
        print(f"{row['case']}: {kernels}; {row['temporary_bytes'] / 1e6:.1f} MB of temporaries")
    return 1 if bad else 0
