"""Broken input by the thousand: each case follows from (kind, seed, number) and can be made again.

Cases run in worker processes with limited memory. A worker that crashes or hangs is replaced, the
case it was at is a finding, and the others go on. A case is either refused with a documented error
or loads as what its bytes say; anything else is a finding.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import mmap
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from random import Random
from typing import Any

# Cases between two messages to the supervisor.
BATCH = 25
# Bytes that a worker may allocate beside what it holds when it begins.
MEMORY = 1 << 30
# A good case takes milliseconds. Seconds of wall time, on a machine that others use too.
TIME_LIMIT = 20.0
KINDS = (
    "safetensors", "bin", "index", "config", "manifest", "params", "reverse", "tokenizer",
    "snapshot", "prompt", "benchmark", "records",
)  # fmt: skip


@dataclasses.dataclass
class Tally:
    """What has come of a kind's cases. outcomes: "refused" and "loaded", or "finding"."""

    kind: str
    seed: int
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    findings: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "outcomes": dict(sorted(self.outcomes.items()))}


def make(kind: str, folder: Path) -> Any:
    """The kind, one of KINDS or "module:class", ready in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    module, found, name = kind.partition(":")
    if found:
        return getattr(importlib.import_module(module), name)(folder)
    from campaigns import checkpoint_kinds, converted_kinds, snapshot_kinds, text_kinds, torch_kinds

    modules = (checkpoint_kinds, converted_kinds, snapshot_kinds, text_kinds, torch_kinds)
    classes = [each for module in modules for each in module.KINDS]
    return next(each for each in classes if each.name == kind)(folder)


def rng_of(kind: str, seed: int, number: int) -> Random:
    """The only source of chance in a case; the same on every machine."""
    return Random(f"{kind}/{seed}/{number}")


def run_case(made: Any, seed: int, number: int) -> str:
    """Says "refused" or "loaded"; raises what is neither."""
    made.write(rng_of(made.name, seed, number))
    try:
        loaded = made.load()
    except made.refusals:
        return "refused"
    made.check(loaded)
    return "loaded"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            stat = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = stat.st_size, stat.st_mtime_ns
    return found


def work(
    kind: str, seed: int, numbers: Sequence[int], folder: Path, place: Path, pipe: Any
) -> None:
    """A worker: runs cases one after the other and sends what comes of them."""
    from campaigns.guard import Violation, limit_memory, watch

    made = make(kind, folder / "inside")
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    # What is not broken loads; and is imported or compiled on first use before memory is counted.
    made.check(made.load())
    with place.open("r+b") as file:
        at = mmap.mmap(file.fileno(), 8)
    before = contents(outside)
    # A library's panic reports itself there, caught or not; `reproduce` shows it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    watch(folder / "inside")
    limit_memory(MEMORY)
    outcomes: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    slowest = 0.0
    for done, number in enumerate(numbers, 1):
        at[:] = number.to_bytes(8, "little")
        begun = time.perf_counter()
        try:
            outcomes[run_case(made, seed, number)] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            outcomes["finding"] += 1
            kind_of = "violation" if isinstance(error, Violation) else type(error).__name__
            last = traceback.extract_tb(error.__traceback__)[-1]
            findings.append(
                (number, f"{kind_of}: {error!s:.200} ({Path(last.filename).name}:{last.lineno})")
            )
        slowest = max(slowest, time.perf_counter() - begun)
        if done % BATCH == 0 or done == len(numbers):
            if contents(outside) != before:
                findings.append(
                    (number, "something outside was changed, in this case or shortly before")
                )
                outcomes["finding"] += 1
            pipe.send((done, outcomes, findings, slowest))
            outcomes, findings = Counter(), []
    pipe.close()


class _Worker:
    """A process with its share of the cases; begins again behind a case that it did not survive."""

    def __init__(self, context: Any, tally: Tally, numbers: Sequence[int], folder: Path) -> None:
        self._context, self._tally, self._folder = context, tally, folder
        self.numbers = list(numbers)
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(parents=True)
        self._place = folder / "at"
        self._place.write_bytes((2**64 - 1).to_bytes(8, "little"))
        self.pipe, theirs = self._context.Pipe(duplex=False)
        self.process = self._context.Process(
            target=work,
            args=(self._tally.kind, self._tally.seed, self.numbers, folder, self._place, theirs),
        )
        self.process.start()
        theirs.close()
        self._seen, self._since = b"", time.monotonic()
        self._done = 0

    def receive(self) -> bool:
        """Takes a message; False where the worker has ended."""
        try:
            done, outcomes, findings, slowest = self.pipe.recv()
        except (EOFError, OSError):
            return False
        self._tally.outcomes += outcomes
        self._tally.findings += findings
        self._tally.slowest = max(self._tally.slowest, slowest)
        self._done = done
        return True

    def hangs(self, limit: float) -> bool:
        """Whether it has been at one case for too long; its start counts as one."""
        now = self._place.read_bytes()
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        first = int.from_bytes(now, "little") == 2**64 - 1
        return time.monotonic() - self._since > (180 if first else limit)

    def replace(self, reason: str) -> bool:
        """After its end: True where a new one goes on with what is left."""
        self.process.join()
        at = int.from_bytes(self._place.read_bytes(), "little")
        left = self.numbers[self._done :]
        if not left:
            return False
        if at not in left:
            raise RuntimeError(f"a worker for {self._tally.kind} could not begin: {reason}")
        # What came after the last message is done again; the case itself is left out.
        self._tally.findings.append((at, reason))
        self._tally.outcomes["finding"] += 1
        left.remove(at)
        self.numbers = left
        if left:
            self.start()
        return bool(left)


def fuzz(
    kind: str,
    count: int,
    seed: int = 0,
    *,
    first: int = 0,
    workers: int = 2,
    time_limit: float = TIME_LIMIT,
    show: Callable[[Tally], None] | None = None,
) -> Tally:
    """Runs cases first .. first + count of a kind. show: called now and then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaigns.preload"])
    begun, tally = time.monotonic(), Tally(kind, seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_fast_folder()))
    try:
        numbers = range(first, first + count)
        running = [
            _Worker(context, tally, numbers[i::workers], folder / str(i))
            for i in range(min(workers, count))
        ]
        while running:
            ready = wait([worker.pipe for worker in running], timeout=0.2)
            for worker in list(running):
                goes_on = True
                if worker.pipe in ready:
                    if not worker.receive():
                        worker.process.join()
                        goes_on = worker.replace(f"the worker ended: {worker.process.exitcode}")
                elif worker.hangs(time_limit):
                    worker.process.kill()
                    while worker.receive():
                        pass
                    goes_on = worker.replace(f"no end after {time_limit:.0f} s")
                if not goes_on:
                    running.remove(worker)
            if show is not None:
                show(tally)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    tally.seconds = time.monotonic() - begun
    tally.findings.sort()
    return tally


def reproduce(kind: str, seed: int, number: int) -> str:
    """Runs one case here, without walls; raises what it raises."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "outside").mkdir()
    return run_case(make(kind, folder / "inside"), seed, number)


def _fast_folder() -> str | None:
    """In memory, where the system has such a place: cases are many small files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def write_record(path: Path, tallies: Sequence[Tally], conditions: dict[str, Any]) -> None:
    """The campaign as JSON."""
    record = {"conditions": conditions, "kinds": [tally.to_dict() for tally in tallies]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
