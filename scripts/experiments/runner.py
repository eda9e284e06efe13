"""Runs an experiment: asks what has no record yet, in one process or in several."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.records import Key, Records, count_lines

_POLL = 2.0  # seconds between two looks at what the other processes have written


class Work(NamedTuple):
    """Examples that are answered together. group: what shares compiled programs."""

    group: str
    keys: Sequence[Key]
    answer: Callable[[], Sequence[Mapping[str, Any]]]


def run(
    work: Iterable[Work],
    records: Records,
    *,
    total: int,
    started: int = 0,
    deadline: float = float("inf"),
    note: Mapping[str, Any] | None = None,
    show: bool = True,
    labels: Mapping[str, str] | None = None,
) -> bool:
    """Answers all work that is given and records each piece before the next begins.

    Args:
        total, started: answers of the whole experiment, and how many of them exist already.
        deadline: time.monotonic at which to stop. No piece begins that would not end before it,
            judged by the slowest piece so far.
        note: what this process notes of itself in the records.
        show: a progress bar, where stderr is a terminal.
        labels: of groups that are methods; a line on stderr tells the score of a finished one.

    Returns:
        False where it stopped before the end: at the deadline, or because its parent process died.
    """
    parent, begun = multiprocessing.parent_process(), time.monotonic()
    slowest = {True: 0.0, False: 0.0}  # of pieces that compile, the first ones, and of the others
    show = show and sys.stderr.isatty()
    with tqdm(total=total, initial=started, unit="answer", disable=not show) as bar:
        for group, pieces in itertools.groupby(work, lambda piece: piece.group):
            for place, piece in enumerate(pieces):
                compiles, now = place == 0, time.monotonic()
                if now + slowest[compiles] > deadline or (parent and not parent.is_alive()):
                    return False
                rows = dict(zip(piece.keys, piece.answer(), strict=True))
                records.add_all(rows, note)
                note = None
                slowest[compiles] = max(slowest[compiles], time.monotonic() - now)
                bar.update(len(rows))
            if labels is not None:
                scores = [row["score"] for key, row in records.done.items() if key.method == group]
                right = f"{sum(scores):.0f} of {len(scores)} right"
                took = f"{time.monotonic() - begun:5.0f} s"
                tqdm.write(f"{took}  {right}  {labels[group]}", file=sys.stderr)
    return True


def visible_gpus() -> list[str]:
    """Returns what CUDA_VISIBLE_DEVICES may name, without opening a GPU; empty on a CPU."""
    if not set(os.environ.get("JAX_PLATFORMS", "cuda").split(",")) & {"cuda", "gpu", ""}:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()


def start(call: Callable[[], Any], **environment: str) -> SpawnProcess:
    """Starts a call in a new process, which opens no GPU before these variables are set."""
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_call, args=(call, environment), daemon=True)
    process.start()
    return process


def _call(call: Callable[[], Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    sys.exit(call())


def run_processes(calls: Sequence[Callable[[], int]], folder: Path, total: int) -> int:
    """Runs each call in its own process; returns the worst of the statuses that they return.

    Tracing and compiling, which take most of the time of small cells, then overlap. GPUs are given
    out in turn, and processes that share a GPU divide its memory.
    """
    gpus, fraction = visible_gpus(), "XLA_PYTHON_CLIENT_MEM_FRACTION"
    sharing = -(-len(calls) // max(1, len(gpus)))
    environment = {fraction: os.environ.get(fraction) or str(round(0.9 / sharing, 3))}
    children = []
    for index, call in enumerate(calls):
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        children.append(start(call, **environment))
    with tqdm(total=total, unit="answer", disable=not sys.stderr.isatty()) as bar:
        while any(child.is_alive() for child in children):
            time.sleep(_POLL)
            bar.update(min(total, count_lines(folder)) - bar.n)
    return max((child.exitcode or 0 for child in children), key=abs)
