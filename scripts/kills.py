#!/usr/bin/env python3
"""Kills conversion, snapshot writing and evaluation at random moments, and checks what remains.

  scripts/kills.py 100
  scripts/kills.py 20 --kinds snapshot --seed 1

Every run is a process that is killed (SIGKILL) after a random time, or at a random file event. Then
a folder that loads must hold the old or the new result, and a complete result must not be lost.
Half of the killed runs are repeated to their end, which must give the result of an undisturbed run.

Exit status: 0; 1 after a finding; 2 and one line for bad input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import jax
import numpy as np

from convert import convert
from pdllm_jax import load_document, load_model, save_document
from pdllm_jax.cli.errors import Parser, seed, status
from pdllm_jax.storage.fingerprint import model_identity
from tests.support import convert_sources as sources
from tests.support import workers

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.workers", "orbax.checkpoint", "convert"])
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")


class Job:
    """Work that makes the folder `target`: `work(turn)` is killed, `read(folder)` returns what a
    complete folder holds and raises ValueError or OSError for any other. Turns are 0 and 1;
    `prepare` writes what they read. restarts: a finished run leaves nothing to do for the next.
    """

    restarts = False

    def __init__(self, root: Path) -> None:
        self.root, self.target = root, root / "target"

    def prepare(self) -> None: ...


class Conversion(Job):
    """Converts one checkpoint of safetensors over another."""

    def prepare(self) -> None:
        for turn in range(2):
            sources.make(self.root / str(turn), seed=turn, shards=2)

    def work(self, turn: int) -> None:
        convert(self.root / str(turn) / "source", self.target, overwrite=True)

    def read(self, folder: Path) -> Any:
        return model_identity(load_model(folder))


class Snapshot(Job):
    """Writes the KV of one document over another's."""

    def work(self, turn: int) -> None:
        cache = workers.document(chunks=5 + turn, seed=turn)
        save_document(self.target, workers.IDENTITY, cache, chunking=workers.CHUNKS, overwrite=True)

    def read(self, folder: Path) -> Any:
        cache = load_document(folder, workers.IDENTITY).cache
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(cache)]


class Evaluation(Job):
    """Runs scripts/evaluate.py on a tiny model, four examples by two methods."""

    restarts = True

    def prepare(self) -> None:
        from tests.oracles import checkpoints  # needs PyTorch

        settings = checkpoints.tiny_config(n_kv_heads=2, max_sequence_length=256)
        tensors = checkpoints.random_tensors(settings)
        checkpoints.write_checkpoint(self.root / "source", tensors, settings, tokenizer=True)
        convert(self.root / "source", self.root / "model")
        (self.root / "text.txt").write_text("Anne lives at Kellynch Hall. Louisa jumps. " * 6)

    def work(self, turn: int) -> None:
        command = (
            f"{self.root}/model needle {self.root}/text.txt --out {self.target} --lengths 160 "
            "--depths 4 --needle Key:7. --question Key? --expect 7 --chunk-size 32 --top-k 1 "
            "--encode-batch 2 --gen-length 4 --methods plain prefilling --no-chat"
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if evaluate.main(command.split()) != 0:
                raise RuntimeError("the evaluation failed")

    def read(self, folder: Path) -> Any:
        lines = (folder / "records.jsonl").read_text().splitlines()
        rows = [*map(json.loads, lines), *json.loads((folder / "summary.json").read_text())["rows"]]
        # A line "run" says that a process began to write: a run that goes on has two.
        rows = [row for row in rows if "run" not in row]
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


KINDS = {"conversion": Conversion, "snapshot": Snapshot, "evaluation": Evaluation}


def child(job: Job, turn: int, last: int, pipe: Any) -> None:
    """Works; kills itself at file event `last`, if not 0."""
    jax.config.update("jax_compilation_cache_dir", str(job.root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
    count = 0

    def audit(event: str, _: tuple[Any, ...]) -> None:
        nonlocal count
        count += event in EVENTS
        if count == last and event in EVENTS:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    pipe.send("ready")
    job.work(turn)
    pipe.send(count)


def run(job: Job, turn: int, last: int = 0, seconds: float | None = None) -> int:
    """Runs the work in a process. Returns its number of file events, 0 if it was killed."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(job, turn, last, sender))
    process.start()
    sender.close()
    receiver.recv()
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the work ended with exit status {process.exitcode}")
    return receiver.recv() if process.exitcode == 0 else 0


def result(job: Job, folder: Path) -> Any:
    """Returns what a folder holds; None if it is refused."""
    with contextlib.suppress(ValueError, OSError):
        return job.read(folder)


def kill(job: Job, kills: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kills runs. Returns how often each state of the folder was left, and what was wrong."""
    draw, states, findings = Random(seed), Counter[str](), list[str]()
    aside, partial = (job.root / f".target.{x}" for x in ("replaced", "partial"))
    job.prepare()
    wanted, before = [], None
    for turn in range(2):  # the second run finds compiled programs
        begin = time.monotonic()
        events = run(job, turn)
        longest = time.monotonic() - begin
        wanted.append(job.read(job.target))
        shutil.rmtree(job.target)
    while states.total() < kills:
        turn = draw.randrange(2)
        moments = {"last": draw.randint(1, events)}, {"seconds": draw.uniform(0, longest)}
        moment = draw.choice(moments)
        ended = run(job, turn, **moment) > 0
        left, state = result(job, job.target), "the new result"
        if left is None:
            state = "nothing complete" if before is None else "the old result, aside"
            left = None if before is None else result(job, aside)
        elif left == before != wanted[turn]:
            state = "the old result"
        states[state] += not ended
        problems = {
            "a complete result is gone": left is None and (before is not None or ended),
            "the folder holds another result": left not in (None, before, wanted[turn]),
            "a half-written folder loads": result(job, partial) not in (None, *wanted),
        }
        before = None if job.restarts else left
        if ended or draw.random() < 0.5:
            run(job, turn)
            before = result(job, job.target)
            problems["the next run gives another result"] = before != wanted[turn]
            problems["the next run leaves files behind"] = aside.exists() or partial.exists()
            if job.restarts or any(problems.values()):
                shutil.rmtree(job.target, ignore_errors=True)
                before = None
        findings += [f"{moment}: {problem}" for problem, seen in problems.items() if seen]
    return states, findings


def campaign(args: argparse.Namespace) -> int:
    """Kills every kind. Returns 1 after a finding."""
    if args.kills < 1:
        raise ValueError(f"N must be at least 1, got {args.kills}")
    failed = False
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="kills-") as root:
            states, findings = kill(KINDS[kind](Path(root)), args.kills, args.seed)
        remains = ", ".join(f"{state} {n} times" for state, n in sorted(states.items()) if n)
        lines = [f"{kind}: {args.kills} kills left {remains}; {len(findings)} findings", *findings]
        print("\n  ".join(lines), flush=True)
        failed |= bool(findings)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kills", type=int, metavar="N", help="kills of each kind")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    p.add_argument("--seed", type=seed, default=0)
    args = p.parse_args(argv)
    return status(lambda: campaign(args))


if __name__ == "__main__":
    sys.exit(main())
