"""SIGKILL at random points of what writes: conversion, snapshots, evaluation.

A kill comes at a random moment of the work, or as the n-th file is opened, renamed or removed, n
being random. After each: what was complete before is there and the same, what is not complete does
not load, and the next run ends with the result of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
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
from typing import Any, ClassVar

from campaigns.kind import require

KINDS = ("conversion", "bin", "snapshot", "evaluation")
_EVENTS = frozenset(
    ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
)


class Job:
    """Work that writes into a folder. turn: 0 or 1, which of two results is to come."""

    name: ClassVar[str]

    def __init__(self, sources: Path) -> None:
        """sources: made by `prepare`, read only."""
        self.sources = sources

    def prepare(self) -> None:
        """Makes what the work starts from; once, before anything is killed."""

    def work(self, folder: Path, turn: int) -> None:
        """What is killed."""
        raise NotImplementedError

    def expect(self, folder: Path, turn: int) -> None:
        """Takes in what an undisturbed run has left."""
        raise NotImplementedError

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        """After a kill: what is there now, in a word. before: the result that was complete."""
        raise NotImplementedError

    def check_complete(self, folder: Path, turn: int) -> None:
        """After a run that ended: AssertionError unless all is as an undisturbed run left it."""
        raise NotImplementedError


class Replacing(Job):
    """A folder that is replaced as a whole."""

    refusal: ClassVar[type[ValueError]]
    target: ClassVar[str] = "target"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        self.results: dict[int, Any] = {}

    def read(self, folder: Path) -> Any:
        """What a folder holds, comparable; raises `refusal`."""
        raise NotImplementedError

    def expect(self, folder: Path, turn: int) -> None:
        self.results[turn] = self.read(folder / self.target)

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        partial, aside = (folder / f".{self.target}.{x}" for x in ("partial", "replaced"))
        if partial.exists():
            # With all in it but the name, or refused.
            with contextlib.suppress(self.refusal):
                require(self.read(partial) == self.results[turn], "something half-written loads")
        target = folder / self.target
        if not target.exists():
            if before is None:
                return "nothing yet"
            require(aside.exists(), "what was complete is gone")
            require(self.read(aside) == self.results[before], "what was complete was changed")
            return "the old one aside"
        found = self.read(target)
        if found == self.results[turn] and turn != before:
            return "the new one"
        require(before is not None, "half of it has the name")
        require(found == self.results[before], "what was complete was changed")
        return "the old one"

    def check_complete(self, folder: Path, turn: int) -> None:
        require(self.read(folder / self.target) == self.results[turn], "another result")
        left = [path.name for path in folder.iterdir() if path.name != self.target]
        require(not left, f"left behind: {left}")


class Conversion(Replacing):
    """Converts one checkpoint over another."""

    name = "conversion"
    source: ClassVar[dict[str, str]] = {}  # what `samples.write_checkpoint` shall write

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        from pdllm_jax.checkpoint import CheckpointError

        self.refusal = CheckpointError  # type: ignore[misc]

    def prepare(self) -> None:
        from campaigns import samples

        for turn in (0, 1):
            samples.write_checkpoint(
                self.sources / str(turn), shards=1 + turn, seed=turn, **self.source
            )

    def work(self, folder: Path, turn: int) -> None:
        from convert import convert

        convert(self.sources / str(turn), folder / self.target, overwrite=True, verify=True)

    def read(self, folder: Path) -> Any:
        from pdllm_jax.checkpoint import load_model
        from pdllm_jax.fingerprint import model_identity

        return model_identity(load_model(folder))


class BinConversion(Conversion):
    """The same of PyTorch's .bin files."""

    name = "bin"
    source: ClassVar[dict[str, str]] = {"stem": "pytorch_model", "suffix": ".bin"}


class Snapshot(Replacing):
    """Writes one document's KV over another's."""

    name = "snapshot"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        from pdllm_jax.snapshot_format import SnapshotError

        self.refusal = SnapshotError  # type: ignore[misc]

    def work(self, folder: Path, turn: int) -> None:
        from campaigns import snapshot_kinds as kinds
        from pdllm_jax.snapshot import save_document

        save_document(
            folder / self.target, kinds.IDENTITY, kinds.document(turn, 5 + turn),
            chunking=kinds.CHUNKS, overwrite=True,
        )  # fmt: skip

    def read(self, folder: Path) -> Any:
        import numpy as np

        from campaigns import snapshot_kinds as kinds
        from pdllm_jax.snapshot import load_document
        from pdllm_jax.snapshot_tree import arrays_of

        cache = load_document(folder, kinds.IDENTITY).cache
        return {k: np.asarray(x).tobytes() for k, x in arrays_of(cache, "cache").items()}


class Evaluation(Job):
    """Runs scripts/evaluate.py on a tiny model; goes on in the same folder when killed."""

    name = "evaluation"

    def __init__(self, sources: Path) -> None:
        super().__init__(sources)
        self.records: list[Any] = []
        self.rows: list[Any] = []
        self.kept = b""

    def prepare(self) -> None:
        from campaigns import samples
        from convert import convert

        samples.write_checkpoint(self.sources / "source")
        convert(self.sources / "source", self.sources / "model")
        (self.sources / "haystack.txt").write_text(samples.SENTENCES * 3)

    def work(self, folder: Path, turn: int) -> None:
        import evaluate

        arguments = [
            self.sources / "model", "needle", self.sources / "haystack.txt", "--out", folder,
            "--lengths", 160, "--depths", 4, "--needle", "The key is 7.", "--question", "Key?",
            "--expect", "7", "--chunk-size", 32, "--top-k", 1, "--encode-batch", 2,
            "--gen-length", 4, "--methods", "plain", "prefilling", "--no-chat",
        ]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = evaluate.main(list(map(str, arguments)))
        require(status == 0, f"exit status {status}")

    @staticmethod
    def _lines(folder: Path) -> list[Any]:
        path = folder / "records.jsonl"
        content = path.read_bytes() if path.exists() else b""
        rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    @staticmethod
    def _rows(folder: Path) -> list[Any]:
        rows = json.loads((folder / "summary.json").read_text())["rows"]
        return [{k: v for k, v in row.items() if k != "seconds_median"} for row in rows]

    def expect(self, folder: Path, turn: int) -> None:
        self.records, self.rows = self._lines(folder), self._rows(folder)
        require(len(self.records) == 8, f"{len(self.records)} records")

    def check(self, folder: Path, before: int | None, turn: int) -> str:
        path = folder / "records.jsonl"
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        require(whole.startswith(self.kept), "records were lost or changed")
        self.kept = whole
        found = self._lines(folder)
        require(found == self.records[: len(found)], "other records")
        if (folder / "summary.json").exists():
            require(self._rows(folder) == self.rows, "a summary of half a run")
        cut = ", one cut off" if whole != content else ""
        return f"{len(found)} of {len(self.records)} records{cut}"

    def check_complete(self, folder: Path, turn: int) -> None:
        require(self._lines(folder) == self.records, "other records")
        require(self._rows(folder) == self.rows, "another summary")
        self.kept = b""
        shutil.rmtree(folder)
        folder.mkdir()


def job_of(kind: str, sources: Path) -> Job:
    """The job, one of KINDS or "module:class"."""
    module, found, name = kind.partition(":")
    if found:
        return getattr(importlib.import_module(module), name)(sources)
    jobs: tuple[type[Job], ...] = (Conversion, BinConversion, Snapshot, Evaluation)
    return {job.name: job for job in jobs}[kind](sources)


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
        turns = (0, 1) if isinstance(job, Replacing) else (0,)
        for turn in turns:  # the second measures; what the first compiles is kept
            fresh = root / f"fresh{turn}"
            fresh.mkdir()
            _undisturbed(job, fresh, turn)
            job.expect(fresh, turn)
        again = root / "again"
        again.mkdir()
        longest, events = _undisturbed(job, again, turns[-1])
        before: int | None = None
        runs = 0
        while tally.kills < count:
            turn = turns[runs % len(turns)]
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
                before = turn if len(turns) > 1 else None
                continue
            tally.kills += 1
            tally.by["file event" if by_event else "time"] += 1
            try:
                tally.found[job.check(folder, before, turn)] += 1
                # Runs that replace are made good each time; an evaluation goes on, killed again.
                if len(turns) > 1:
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
                shutil.rmtree(folder)
                folder.mkdir()
                before = None
                if isinstance(job, Evaluation):
                    job.kept = b""
            if show is not None:
                show(tally)
        if len(turns) == 1:
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
