"""Records of ablations without a model."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from experiments import runner
from experiments.grids import Cell
from experiments.records import Records
from experiments.retrieval import missing_work


class Fake:
    """A bench whose answers are made up, but are the same for the same example."""

    def __init__(self, batch: int = 3, die_at: int | None = None):
        self.identity = {"model": "fake", "dtype": "float32"}
        self.batch, self.die_at, self.answered = batch, die_at, []

    def batch_size(self, cell):
        return self.batch

    def records(self, cell, indices):
        if self.die_at is not None and len(self.answered) >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.answered += indices
        return [fake_record(cell, index) for index in indices]


def answer_all(bench, cells, count: int, folder, **settings) -> bool:
    with Records(folder, bench.identity) as records:
        work = missing_work(bench, cells, count, records)
        return runner.run(work, records, total=len(cells) * count, show=False, **settings)


def fake_record(cell: Cell, index: int, n: int = 8) -> dict:
    """Needle in chunk index % n, scored best in three of four examples; right where it is kept."""
    needle, k, rng = index % n, cell.top_k, np.random.default_rng(index)
    record = {
        "example": index,
        "task": cell.tasks[index % len(cell.tasks)],
        "depth": needle / n,
        "asked_depth": cell.depth(index),
        "score": 1.0,
        "answers": ["12"],
        "response": "It is 12.",
        "tokens": [index, 7],
        "evaluations": 1 + index % 2,
        "seconds": {"decode": 0.5, "total": 0.5},
        "flops": {"decode": 1e9},
    }
    if cell.selects_only:
        record |= {"response": "", "tokens": [], "evaluations": 0}
    if not cell.method.uses_chunks:
        return record
    scores = (-1 - rng.random(n)).tolist()
    scores[needle] = -9.0 if index % 4 == 3 else -0.5
    others = [i for i in range(n) if i != needle]
    chunks = {
        "top-k": np.argsort(-np.array(scores), stable=True)[:k].tolist(),
        "random": np.random.default_rng([cell.seed, index]).permutation(n)[:k].tolist(),
        "all": range(n),
        "first": range(k),
        "last": range(n - k, n),
        "needle": [needle],
        "oracle": [needle, *others[: k - 1]],
        "without": others[:k],
    }[cell.selection]
    scored = cell.selection in ("top-k", "random") and k < n
    record |= {"chunks": sorted(chunks), "scores": scores if scored else None, "n_chunks": n}
    return {**record, "needle": [needle], "score": float(needle in chunks)}
