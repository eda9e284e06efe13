"""Calibrates the scorer "heads" of an experiment, on the tasks that its cells are not tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.grids import Cell
from experiments.records import read_json
from pdllm_jax import Request
from pdllm_jax.evaluation.calibration import Shares, choose_heads, measure
from pdllm_jax.evaluation.needles import Example
from pdllm_jax.method.scorers.calibration import HEADS_FILE
from pdllm_jax.rules import require
from small_model.tasks import TASKS

# (length, chunk size) of the examples, and how many there are of each.
SHAPES, EXAMPLES = ((1024, 64), (2048, 128), (4096, 128)), 24
_FIRST = 1_000_000  # index of the first example: no cell tests as many


def calibration_folder(run: Path, tested: Sequence[str]) -> Path:
    """Returns where a run keeps the calibration for cells with these tasks."""
    return run / "calibrations" / "+".join(task for task in TASKS if task not in tested)


def calibrate_heads(
    bench: Any, tested: Sequence[str], shapes: Sequence[tuple[int, int]] = SHAPES
) -> Path:
    """Chooses heads on the other tasks and saves them in the run's folder; returns the file.

    Args:
        bench: a Retrieval.

    Raises:
        ConfigError: there is no other task.
    """
    tasks = tuple(task for task in TASKS if task not in tested)
    require(len(tasks) > 0, "every task is tested: none is left to calibrate the heads on")
    shares = []
    for length, chunk_size in shapes:
        cell = Cell(length=length, chunk_size=chunk_size, tasks=tasks)
        made = [bench.example(cell, _FIRST + index) for index in range(EXAMPLES)]
        examples = [
            Example(Request(e["context"], e["query"], e["prefix"]), e["needle_span"]) for e in made
        ]
        shares.append(measure(bench.engine(cell), examples))
    # The first half of the layers: a score then costs at most 40% of draft self-information.
    half = bench.model.config.n_layers // 2
    about = {"tasks": tasks, "first_seed": bench.first_seed + _FIRST, "shapes": shapes}
    folder = calibration_folder(bench.folder, tested)
    folder.mkdir(parents=True, exist_ok=True)
    return choose_heads(Shares.joined(shares), layers=half).save(folder, about)


def missing_calibrations(run: Path, cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Returns the tested tasks for which cells need heads that the run's folder lacks."""
    tested = dict.fromkeys(cell.tasks for cell in cells if cell.scorer == "heads")
    return [x for x in tested if not (calibration_folder(run, x) / HEADS_FILE).exists()]


def read_calibrations(run: Path) -> dict[str, dict[str, Any]]:
    """Returns the run's calibrations, by the tasks that they were made on."""
    files = sorted(run.glob(f"calibrations/*/{HEADS_FILE}"))
    return {path.parent.name: read_json(path) for path in files}
