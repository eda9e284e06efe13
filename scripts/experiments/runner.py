"""Runs an experiment: asks what has no record yet, in one process or in several."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    parent: int | None = None,
    show: bool | None = None,
    on_group: Callable[[str], str] | None = None,
) -> bool:
    """Answers all work that is given and records each piece before the next begins.

    Args:
        total, started: answers of the whole experiment, and how many of them exist already.
        deadline: time.monotonic at which to stop. No piece begins that would not end before it,
            judged by the slowest piece so far.
        note: what this process notes of itself in the records.
        parent: process id; the run stops when another process has become the parent.
        show: a progress bar on stderr; by default where stderr is a terminal.
        on_group: makes a line for stderr of a group that was finished.

    Returns:
        False where it stopped before the end.
    """
    show = sys.stderr.isatty() if show is None else show
    first, later = 0.0, 0.0  # slowest pieces, with and without compiling
    begun, group, noted = time.monotonic(), None, False
    with tqdm(total=total, initial=started, unit="answer", disable=not show) as bar:

        def end_group() -> None:
            if on_group is not None and group is not None:
                line = f"{time.monotonic() - begun:5.0f} s  {on_group(group)}"
                tqdm.write(line, file=sys.stderr)

        for piece in work:
            if piece.group != group:
                end_group()
            same, group = piece.group == group, piece.group
            now = time.monotonic()
            if now + (later if same else first) > deadline or parent not in (None, os.getppid()):
                return False
            rows = dict(zip(piece.keys, piece.answer(), strict=True))
            records.add_all(rows, None if noted or note is None else note)
            noted = True
            took = time.monotonic() - now
            first, later = (first, max(later, took)) if same else (max(first, took), later)
            bar.update(len(rows))
        end_group()
    return True


def share_of(groups: Mapping[Any, float], index: int, count: int) -> set[Any]:
    """Returns the groups of one process of `count`, so that all have about the same load."""
    loads, share = [0.0] * count, set()
    for group, load in sorted(groups.items(), key=lambda item: item[1], reverse=True):
        least = loads.index(min(loads))
        loads[least] += load
        if least == index:
            share.add(group)
    return share


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


def run_processes(command: Sequence[str], processes: int, folder: Path, total: int) -> int:
    """Runs the same command in several processes, each with `--shard INDEX/COUNT`.

    Tracing and compiling, which take most of the time of small cells, then overlap. GPUs are given
    out in turn, and processes that share a GPU divide its memory. Returns the worst exit status.
    """
    # The checkpoint is converted once, by a process that does not hold the GPU's memory.
    on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if code := subprocess.run([*command, "--shard", "prepare"], env=on_cpu, check=False).returncode:
        return code
    gpus = visible_gpus()
    sharing = -(-processes // max(1, len(gpus)))
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or str(round(0.9 / sharing, 3))
    children = []
    for index in range(processes):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        shard = [*command, "--shard", f"{index}/{processes}"]
        children.append(subprocess.Popen(shard, env=environment, stdin=subprocess.DEVNULL))
    try:
        with tqdm(total=total, unit="answer", disable=not sys.stderr.isatty()) as bar:
            while any(child.poll() is None for child in children):
                time.sleep(_POLL)
                bar.update(min(total, count_lines(folder)) - bar.n)
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        codes = [child.wait() for child in children]
    return max(codes, key=abs)
