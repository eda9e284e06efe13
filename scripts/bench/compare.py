"""Runs a benchmark in this checkout and in another one, in turn; prints the ratios of the times.

    benchmark.py compare OLD_CHECKOUT speed --sections step prefill

Each run is a process of the checkout's own scripts/benchmark.py, so that both are measured on the
same device within minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.record import ROOT, replace, run_script
from bench.tables import table, times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py compare`."""
    parser.add_argument("--rounds", type=int, default=2, help="runs of each checkout")
    parser.add_argument("--out", type=Path, help="where both checkouts' times are written")
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("benchmark", nargs=argparse.REMAINDER, help="the command and its options")


def main(args: argparse.Namespace) -> int:
    """Prints a table of the median times of both checkouts, and this one over the other."""
    seconds: dict[str, dict[str, list[float]]] = {}
    sides = {"other": args.checkout.resolve(), "this": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        for side, root in list(sides.items()) * args.rounds:
            print(run_script(*args.benchmark, "--out", out, root=root), file=sys.stderr)
            for name, value in times(json.loads(out.read_text(encoding="utf-8"))).items():
                seconds.setdefault(name, {"other": [], "this": []})[side].append(value)
    rows = []
    for name, spent in seconds.items():
        if all(spent.values()):
            row = {side: 1e3 * float(np.median(values)) for side, values in spent.items()}
            rows.append({"name": name, **row, "ratio": row["this"] / row["other"]})
    heads, cells = "time | other, ms | this, ms | this / other", "{other:.3f} | {this:.3f}"
    print("\n".join(table(heads, "{name} | " + cells + " | {ratio:.3f}", rows)))
    if args.out is not None:
        record = {"command": args.benchmark, "seconds": seconds, "rows": rows}
        replace(args.out, json.dumps(record, indent=1) + "\n")
    return 0
