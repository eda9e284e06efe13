"""SIGKILL at random points of what writes: conversion, snapshots, evaluation.

A kill comes at a random moment of the work, or as the n-th file is opened, renamed or removed, n
being random. After each: what was complete before is there and the same, what is not complete does
not load, and the next run ends with the result of an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from campaigns.jobs import Job, job_of
from campaigns.kind import require

KINDS = ("conversion", "bin", "snapshot", "evaluation")
_EVENTS = frozenset(
    ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
)


@dataclasses.dataclass
class Tally:
    """What has come of a kind's kills. found: what lay there after a kill, and how often."""

    kind: str
    seed: int
    kills: int = 0
    by: Counter[str] = dataclasses.field(default_factory=Counter)
    found: Counter[str] = dataclasses.field(default_factory=Counter)
    ended_before: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        counters = {"by": dict(self.by), "found": dict(sorted(self.found.items()))}
        return {**dataclasses.asdict(self), **counters}


def _child(name: str, sources: Path, folder: Path, turn: int, event: int, pipe: Any) -> None:
    """The process that is killed; kills itself at the event-th file event, if that is not 0."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(sources / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    job = job_of(name, sources)
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is there
    events = 0

    def count(kind: str, _: tuple[Any, ...]) -> None:
        nonlocal events
        if kind in _EVENTS:
            events += 1
            if events == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    pipe.send("ready")
    job.work(folder, turn)
    pipe.send(events)


def _start(job: Job, folder: Path, turn: int, event: int = 0) -> tuple[Any, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaigns.preload"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(job.name, job.sources, folder, turn, event, theirs)
    )
    process.start()
    theirs.close()
    if not ours.poll(300) or ours.recv() != "ready":
        raise RuntimeError(f"a process for {job.name} could not begin")
    return process, ours


def _undisturbed(job: Job, folder: Path, turn: int) -> tuple[float, int]:
    """(seconds, file events) of a run in a process of its own, to its end."""
    process, pipe = _start(job, folder, turn)
    begun = time.monotonic()
    require(pipe.poll(300), f"{job.name} does not end")
    events = pipe.recv()
    seconds = time.monotonic() - begun
    process.join()
    require(process.exitcode == 0, f"{job.name} failed: {process.exitcode}")
    return seconds, events


def kill(
    kind: str, count: int, seed: int = 0, *, show: Callable[[Tally], None] | None = None
) -> Tally:
    """Kills `count` runs of a kind at random points, and looks at what each left."""
    draw, begun, tally = Random(f"{kind}/{seed}"), time.monotonic(), Tally(kind, seed)
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        (root / "sources").mkdir()
        job = job_of(kind, root / "sources")
        job.prepare()
        folder = root / "work"
        folder.mkdir()
        for turn in job.turns:  # the second measures; what the first compiles is kept
            fresh = root / f"fresh{turn}"
            fresh.mkdir()
            _undisturbed(job, fresh, turn)
            job.expect(fresh, turn)
        again = root / "again"
        again.mkdir()
        longest, events = _undisturbed(job, again, job.turns[-1])
        before: int | None = None
        runs = 0
        while tally.kills < count:
            turn = job.turns[runs % len(job.turns)]
            runs += 1
            by_event = draw.random() < 0.5
            event = 1 + draw.randrange(events) if by_event else 0
            delay = draw.uniform(0, longest)
            process, pipe = _start(job, folder, turn, event)
            if not by_event:
                process.join(delay)
                process.kill()
            process.join()
            pipe.close()
            if process.exitcode != -signal.SIGKILL:
                require(process.exitcode == 0, f"a run failed: {process.exitcode}")
                tally.ended_before += 1
                job.check_complete(folder, turn)
                before = turn if len(job.turns) > 1 else None
                continue
            tally.kills += 1
            tally.by["file event" if by_event else "time"] += 1
            try:
                tally.found[job.check(folder, before, turn)] += 1
                # Runs that replace are made good each time; an evaluation goes on, killed again.
                if len(job.turns) > 1:
                    job.work(folder, turn)
                    job.check_complete(folder, turn)
                    before = turn
                elif draw.random() < 0.2:
                    _undisturbed(job, folder, turn)
                    job.check_complete(folder, turn)
            except Exception as error:
                how = f"event {event} of {events}" if by_event else f"{delay:.3f} s"
                tally.findings.append(
                    f"kill {tally.kills} at {how}: {type(error).__name__}: {error}"
                )
                job.begin_anew(folder)
                before = None
            if show is not None:
                show(tally)
        if len(job.turns) == 1:
            _undisturbed(job, folder, 0)
            job.check_complete(folder, 0)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        shutil.rmtree(root, ignore_errors=True)
    tally.seconds = time.monotonic() - begun
    return tally


def write_record(path: Path, tallies: Sequence[Tally], conditions: dict[str, Any]) -> None:
    """The campaign as JSON."""
    record = {"conditions": conditions, "kinds": [tally.to_dict() for tally in tallies]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
