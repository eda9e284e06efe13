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

from bench.record import ROOT, SPREAD, replace, run_script
from bench.report import Record, table
from bench.run import on

_CASE = "{implementation}, batch {batch}, K {slots}, rows {rows}, heads {heads}/{kv_heads}"
# Of a record's rows: their key, a name for each, its time, and the seconds of the time's unit.
TIMES = (
    ("step", "step, {cached_tokens} cached", "ms", 1e-3),
    ("step", "step, {cached_tokens} cached, from Python", "ms_from_python", 1e-3),
    ("end_to_end", "{method}{by}, {chunks} chunks, {tokens} tokens", "seconds", 1.0),
    ("stream", "streamed, {document_tokens} tokens", "seconds", 1.0),
    ("rows", _CASE + ", ragged {ragged}", "us", 1e-6),
)
OPTIONS = {
    "--out": (Path, "where both checkouts' times are written"),
    "--rounds": (2, "runs of each checkout"),
    "checkout": (Path, "folder of the other checkout"),
    "benchmark": (argparse.REMAINDER, "the command and its options"),
}


def main(args: argparse.Namespace) -> None:
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


def times(record: Record) -> dict[str, float]:
    """Returns every time of a record of `speed`, `method` or `kernel` by name, in seconds."""
    result = {name: row[SPREAD[0]] for name, row in record.get("seconds", {}).items()}
    for key, form, field, unit in TIMES:
        for row in record.get(key, ()):
            if field in row:
                by = f", {row['scorer']}" if row.get("scorer") else ""
                result[form.format_map({**row, "by": by}) + on(row)] = row[field] * unit
    return result
