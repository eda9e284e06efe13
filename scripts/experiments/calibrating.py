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
from small_model.tasks import TASKS, Task

# (length, chunk size) of the examples, and how many there are of each.
SHAPES, EXAMPLES = ((4096, 256), (8192, 256), (16384, 512)), 24
_FIRST = 1_000_000  # index of the first example: no cell tests as many


def calibration_folder(run: Path, cell: Cell) -> Path:
    """Returns where a run keeps the calibration for cells like this one."""
    name = "+".join(_other_tasks(cell))
    return run / "calibrations" / (f"{name}-{cell.head_layers}" if cell.head_layers else name)


def _other_tasks(cell: Cell) -> tuple[Task, ...]:
    return tuple(task for task in TASKS if task not in cell.tasks)


def missing_calibrations(run: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Returns a cell for each calibration that cells need and the run's folder lacks."""
    wanted = {calibration_folder(run, cell): cell for cell in cells if cell.scorer == "heads"}
    return [cell for folder, cell in wanted.items() if not (folder / HEADS_FILE).exists()]


def calibrate_heads(
    bench: Any, cells: Sequence[Cell], shapes: Sequence[tuple[int, int]] = SHAPES
) -> None:
    """Chooses heads for each cell on the tasks that it does not test; saves them with the run.

    Args:
        bench: a Retrieval.

    Raises:
        ConfigError: a cell tests every task.
    """
    measured: dict[tuple[Task, ...], Shares] = {}
    for cell in cells:
        tasks = _other_tasks(cell)
        require(len(tasks) > 0, "every task is tested: none is left to calibrate the heads on")
        if tasks not in measured:
            measured[tasks] = Shares.joined([_shares(bench, tasks, *shape) for shape in shapes])
        about = {"tasks": tasks, "first_seed": bench.first_seed + _FIRST, "shapes": shapes}
        folder = calibration_folder(bench.folder, cell)
        folder.mkdir(parents=True, exist_ok=True)
        choose_heads(measured[tasks], layers=cell.head_layers).save(folder, about)


def _shares(bench: Any, tasks: tuple[Task, ...], length: int, chunk_size: int) -> Shares:
    cell = Cell(length=length, chunk_size=chunk_size, tasks=tasks)
    made = [bench.example(cell, _FIRST + index) for index in range(EXAMPLES)]
    examples = [
        Example(Request(e["context"], e["query"], e["prefix"]), e["needle_span"]) for e in made
    ]
    return measure(bench.engine(cell), examples)


def read_calibrations(run: Path) -> dict[str, dict[str, Any]]:
    """Returns the run's calibrations by name: their tasks, and most layers where limited."""
    files = sorted(run.glob(f"calibrations/*/{HEADS_FILE}"))
    return {path.parent.name: read_json(path) for path in files}
