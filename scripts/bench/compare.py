"""Runs a benchmark in this checkout and in another one, in turn; prints the ratios of the times.

    benchmark.py compare OLD_CHECKOUT speed --sections step prefill

Each run is a process of the checkout's own scripts/benchmark.py, so that both are measured on the
same device within minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import ROOT, times, write
from bench.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py compare`."""
    parser.add_argument("--rounds", type=int, default=2, help="runs of each checkout")
    parser.add_argument("--out", type=Path, help="where both checkouts' times are written")
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("benchmark", nargs=argparse.REMAINDER, help="the command and its options")


def main(args: argparse.Namespace) -> int:
    """Prints a table of the median times of both checkouts, and this one over the other."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.rounds):
        for side, root in (("other", args.checkout), ("this", ROOT)):
            for name, value in times(_run(root, args.benchmark)).items():
                seconds.setdefault(name, {"other": [], "this": []})[side].append(value)
    rows: list[dict[str, Any]] = []
    for name, sides in seconds.items():
        if sides["other"] and sides["this"]:
            other, this = (1e3 * float(np.median(sides[side])) for side in ("other", "this"))
            rows.append({"name": name, "other": other, "this": this, "ratio": this / other})
    columns = {"time": "{name}", "other, ms": "{other:.3f}", "this, ms": "{this:.3f}",
               "this / other": "{ratio:.3f}"}  # fmt: skip
    print("\n".join(table(columns, rows)))
    if args.out is not None:
        write(args.out, {"command": args.benchmark, "seconds": seconds, "rows": rows})
    return 0


def _run(root: Path, benchmark: list[str]) -> dict[str, Any]:
    """Returns the record of one run of a checkout's script."""
    root = root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        script = [sys.executable, str(root / "scripts" / "benchmark.py"), *benchmark]
        subprocess.run(
            [*script, "--out", str(out)], check=True, stdout=sys.stderr,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        return json.loads(out.read_text(encoding="utf-8"))
