"""Runs cells, batch by batch, into files of records; goes on where an earlier run stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ablation.grid import Cell
from ablation.records import CellFile, write_json

CELLS, LOOKS = "cells", ("attention", "order", "speed")
_POLL = 2.0  # seconds between looks at what the other processes have written


def cell_path(folder: Path, cell: Cell) -> Path:
    return folder / CELLS / f"{cell.key}.jsonl"


def header(cell: Cell, identity: Mapping[str, Any]) -> dict[str, Any]:
    """A file's first line: the cell, and what its records must have in common."""
    return {"cell": cell.settings(), **identity}


class Bar:
    """Progress with the time left on a terminal; a line for each finished cell elsewhere."""

    def __init__(self, total: int, initial: int, *, quiet: bool = False):
        self.terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(
            total=total, initial=initial, unit="answer", dynamic_ncols=True,
            disable=not self.terminal,
        )  # fmt: skip
        self.begun = time.monotonic()

    def update(self, count: int) -> None:
        self.bar.update(count)

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.begun:5.0f} s  {text}"
        if self.terminal:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def run_cells(
    bench: Any,
    cells: Sequence[Cell],
    wanted: int,
    folder: Path,
    *,
    deadline: float = float("inf"),
    note: Mapping[str, Any] | None = None,
    quiet: bool = False,
    parent: int | None = None,
) -> bool:
    """Answers what is missing of `wanted` examples a cell; False where the deadline came first.

    bench: has `identity`, `batch_size(cell)` and `records(cell, indices)`. deadline: of
    time.monotonic; no batch is begun that would not end before it, judged by the slowest so far.
    note: what the process says of itself in every file that it writes. parent: process without
    which it does not go on.
    """
    files = [CellFile(cell_path(folder, cell), header(cell, bench.identity)) for cell in cells]
    done = [file.read() for file in files]
    found = sum(min(wanted, len(records)) for records in done)
    bar = Bar(len(cells) * wanted, found, quiet=quiet)
    first, later = 0.0, 0.0  # slowest batches, with and without compiling
    for cell, file, records in zip(cells, files, done, strict=True):
        missing = [index for index in range(wanted) if index not in records]
        size, said = bench.batch_size(cell), False
        for start in range(0, len(missing), size):
            begun = time.monotonic()
            if begun + (later if said else first) > deadline or parent not in (None, os.getppid()):
                return False
            rows = bench.records(cell, missing[start : start + size])
            file.append(rows if said else [{"run": dict(note or {})}, *rows])
            took = time.monotonic() - begun
            first, later = (first, max(later, took)) if said else (max(first, took), later)
            said = True
            records |= {row["example"]: row for row in rows}
            bar.update(len(rows))
        if said:
            hits = sum(row["right"] for row in records.values())
            bar.say(f"{hits} of {len(records)} right  {cell.label()}")
    bar.bar.close()
    return True


def share_of(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """One process's share of the cells, in their order: programs are compiled in one alone."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.programs(), []).append(cell)

    def load(group: list[Cell]) -> float:
        # Compiling takes about as long as two cells of 4,096 tokens.
        return 2 + sum(cell.length / 4096 for cell in group)

    loads, mine = [0.0] * count, set()
    for group in sorted(groups.values(), key=load, reverse=True):
        least = loads.index(min(loads))
        loads[least] += load(group)
        if least == index:
            mine.update(group)
    return [cell for cell in cells if cell in mine]


def count_records(folder: Path, cells: Sequence[Cell], wanted: int) -> int:
    """Records that there are, by their lines; cheap enough to be asked often."""
    total = 0
    for cell in cells:
        path = cell_path(folder, cell)
        if path.exists():
            total += min(wanted, path.read_bytes().count(b'\n{"example"'))
    return total


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, without beginning anything on a GPU; none on a CPU."""
    if not set(os.environ.get("JAX_PLATFORMS", "cuda").split(",")) & {"cuda", "gpu", ""}:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()


def run_processes(
    command: Sequence[str], processes: int, cells: Sequence[Cell], wanted: int, folder: Path
) -> int:
    """The same command in several processes, each with its share of the cells (`--shard`).

    Tracing and compiling, which take most of the time of small cells, then overlap. GPUs are given
    out in turn, and the memory of each is divided among those that share it. Returns the worst exit
    status.
    """
    # Converted once, and by a process of its own: this one must not hold the GPU's memory.
    ready = {**os.environ, "JAX_PLATFORMS": "cpu"}
    code = subprocess.run([*command, "--shard", "prepare"], env=ready, check=False).returncode
    if code:
        return code
    gpus = visible_gpus()
    sharing = -(-processes // max(1, len(gpus)))
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or str(round(0.9 / sharing, 3))
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": share}

    def of_process(index: int) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        return {**environment, **own}

    bar = Bar(len(cells) * wanted, count_records(folder, cells, wanted))
    children = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{processes}"], env=of_process(i), stdin=subprocess.DEVNULL
        )
        for i in range(processes)
    ]
    try:
        while any(child.poll() is None for child in children):
            time.sleep(_POLL)
            bar.update(count_records(folder, cells, wanted) - bar.bar.n)
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        codes = [child.wait() for child in children]
        bar.bar.close()
    return max(codes, key=abs)


def note_call(folder: Path, seconds: float) -> list[float]:
    """Adds a call's wall time to those of the calls before it that came to their end."""
    path = folder / "calls.json"
    known = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else []
    known.append(round(seconds, 1))
    write_json(path, {"seconds": known})
    return known


def run_looks(
    bench: Any,
    names: Sequence[str],
    cell: Cell,
    folder: Path,
    *,
    deadline: float = float("inf"),
    note: Mapping[str, Any] | None = None,
    tiny: bool = False,
) -> bool:
    """What is missing of the pictures' own measurements; False where the deadline came first."""
    from ablation import looks

    complete = True
    for name in names:
        path = folder / f"{name}.json"
        identity = {**bench.identity, "run": dict(note or {})}
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known and any(known.get(key) != value for key, value in bench.identity.items()):
            raise ValueError(f"{path} is of another model or other texts: give another folder")
        if known.get("complete"):
            continue
        if time.monotonic() > deadline:
            return False
        if name == "speed":
            known = {**identity, **known}
            lengths = (256, 512) if tiny else looks.SPEED_LENGTHS
            repeats = 1 if tiny else 5
            known["complete"] = looks.look_at_speed(
                bench, cell, path, known, lengths=lengths, repeats=repeats, deadline=deadline
            )
        elif name == "attention":
            few = {"examples": 2, "encodings": ("joint",)} if tiny else {}
            found = looks.look_at_attention(bench, cell, **few)
            known = {**identity, **found, "complete": True}
        else:
            known = {**identity, **looks.look_at_order(bench, cell), "complete": True}
        complete &= known["complete"]
        write_json(path, known)
    return complete
