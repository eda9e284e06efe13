"""Makes one JSON object of a run's records: cells with intervals, comparisons, checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.checks import check_all, holds_needle
from experiments.grids import DENSE, GRIDS, Cell, Grid, all_cells
from experiments.records import read_folder, read_json
from experiments.retrieval import records_of

Rows = dict[int, dict[str, Any]]
MEASUREMENTS = ("attention", "order", "speed")
_SCORES_SHOWN, _WRONG_SHOWN = 6, 3


def summarise(
    folder: Path, grids: Sequence[str], wanted: int, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Summarises the records of these grids, as many as exist."""
    asked = all_cells(grids, changes)
    done, runs = read_folder(folder)
    cells = {cell: rows for cell in asked if (rows := records_of(cell, done, wanted))}
    settings = folder / "settings.json"
    record: dict[str, Any] = {
        "identity": read_json(settings) if settings.exists() else None,
        "runs": runs,
        "wanted": wanted,
        "complete": all(len(cells.get(cell, ())) >= wanted for cell in asked),
        "cells": {cell.key: describe(cell, rows) for cell, rows in cells.items()},
        "grids": {name: compare(GRIDS[name], cells, changes) for name in grids},
        "checks": check_all(cells),
        "chunk_scores": score_examples(cells),
    }
    for name in MEASUREMENTS:
        path = folder / f"{name}.json"
        record[name] = read_json(path) if path.exists() else None
    return record


def _mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row.get(name, 0.0) for row in rows])) for name in rows[0]}


def describe(cell: Cell, records: Rows) -> dict[str, Any]:
    """Returns a cell's numbers, shares and means with their 95% intervals."""
    rows = list(records.values())
    right = [row["score"] for row in rows]
    by_task, by_depth = defaultdict(list), defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["score"])
        if row["asked_depth"] is not None:
            by_depth[row["asked_depth"]].append(row["score"])
    wrong = [row for row in rows if not row["score"]][:_WRONG_SHOWN]
    cell_summary: dict[str, Any] = {
        "settings": cell.settings(),
        "label": cell.label(),
        "examples": len(rows),
        "accuracy": share(right),
        "by_task": {task: share(values) for task, values in by_task.items()},
        "by_depth": [[depth, share(values)] for depth, values in sorted(by_depth.items())],
        "evaluations": statistics.mean([row["evaluations"] for row in rows]),
        "seconds": _mean_by_name([row["seconds"] for row in rows]),
        "flops": None,
        "recall": None,
        "wrong": [[row["example"], row["task"], *row["answers"], row["response"]] for row in wrong],
    }
    if by_depth:
        columns = [np.array(right), *zones(rows)]
        cell_summary["middle_less_ends"] = statistics.bootstrap(middle_less_ends, *columns)
    if all(row["flops"] for row in rows):
        flops = _mean_by_name([row["flops"] for row in rows])
        cell_summary["flops"] = {**flops, "total": sum(flops.values())}
    if cell.selection not in DENSE:
        cell_summary |= {
            "recall": share([holds_needle(row) for row in rows]),
            "chunks": float(np.mean([row["n_chunks"] for row in rows])),
            "cut": float(np.mean([len(row["needle"]) > 1 for row in rows])),
            "kept": float(np.mean([len(row["chunks"]) for row in rows])),
        }
    scored = [row for row in rows if cell.selection == "top-k" and row["scores"] is not None]
    if scored:
        leads = [lead(row) for row in scored]
        margins = [x for row in scored if (x := margin(row, cell.top_k)) is not None]
        cell_summary |= {
            "recall_at_1": share([x > 0 for x in leads]),
            "lead": statistics.mean(leads),
            "margin": statistics.mean(margins) if margins else None,
        }
    return cell_summary


def share(values: Sequence[float]) -> list[float]:
    """Returns [proportion, low, high, hits, n]."""
    hits = sum(map(bool, values))
    return [*statistics.wilson(hits, len(values)), hits, len(values)]


def zones(rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Marks the examples whose needle is in the middle of the document, and near its ends."""
    depth = np.array([row["asked_depth"] for row in rows])
    middle = (depth > 0.25) & (depth < 0.75)
    return [middle.astype(float), (~middle).astype(float)]


def middle_less_ends(value: np.ndarray, middle: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the mean in the middle minus the mean near the ends, over the last axis."""
    with np.errstate(invalid="ignore"):
        inside = (value * middle).sum(axis=-1) / middle.sum(axis=-1)
        return inside - (value * ends).sum(axis=-1) / ends.sum(axis=-1)


def lead(record: Mapping[str, Any]) -> float:
    """Returns the score of the needle's chunk (the worse of two) minus the best other score."""
    scores = np.array(record["scores"])
    others = np.delete(scores, record["needle"])
    return float(scores[record["needle"]].min() - (others.max() if others.size else 0.0))


def margin(record: Mapping[str, Any], k: int) -> float | None:
    """Returns that score minus the best score that must stay out; positive where it is kept.

    None where so many chunks are kept that no other chunk competes.
    """
    scores = np.array(record["scores"])
    others = np.sort(np.delete(scores, record["needle"]))[::-1]
    rank = k - len(record["needle"])
    if not 0 <= rank < len(others):
        return None
    return float(scores[record["needle"]].min() - others[rank])


def compare(
    grid: Grid, cells: Mapping[Cell, Rows], changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Compares arms with their reference over common examples; Holm's p is over the grid."""
    groups, tested = [], []
    for reference, arms in grid.groups(changes):
        rows = []
        for arm in arms:
            row: dict[str, Any] = {"cell": arm.key, "label": arm.label(reference)}
            both = sorted({*cells.get(reference, {})} & {*cells.get(arm, {})})
            if both:
                a, b = (np.array([cells[c][i]["score"] for i in both]) for c in (reference, arm))
                row |= statistics.paired(a, b)._asdict()
                if reference.depths is not None:
                    places = zones([cells[reference][i] for i in both])
                    row["middle_less_ends"] = statistics.bootstrap(middle_less_ends, b - a, *places)
                tested.append(row)
            rows.append(row)
        over = {name: getattr(reference, name) for name in grid.over}
        groups.append({"over": over, "reference": reference.key, "arms": rows})
    adjusted = statistics.holm([row["p"] for row in tested])
    for row, p in zip(tested, adjusted, strict=True):
        row["p_holm"] = p
    return {"question": grid.question, "groups": groups}


def score_examples(cells: Mapping[Cell, Rows]) -> list[dict[str, Any]]:
    """Returns the first examples' scores, of the longest scored cell of the default settings."""
    scored = {
        cell: rows
        for cell, records in cells.items()
        if (cell.selection, cell.scorer) == ("top-k", "draft")
        and (rows := [row for row in records.values() if row["scores"] is not None])
    }
    if not scored:
        return []
    cell = max(scored, key=lambda cell: (cell.length, cell.encoding == "joint", cell.anchors))
    names = ("example", "task", "scores", "needle", "chunks")
    return [
        {"cell": cell.key, **{name: row[name] for name in names}, "right": bool(row["score"])}
        for row in scored[cell][:_SCORES_SHOWN]
    ]
