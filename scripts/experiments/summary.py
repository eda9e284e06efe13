"""Makes one JSON object of a run's records: cells with intervals, comparisons, checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.calibrating import read_calibrations
from experiments.checks import check_all
from experiments.grids import GRIDS, MEASUREMENTS, Cell, Grid, all_cells
from experiments.records import read_folder, read_json
from experiments.retrieval import holds_needle, records_of

Row = Mapping[str, Any]
Rows = dict[int, dict[str, Any]]
_SCORES_SHOWN, _WRONG_SHOWN = 6, 3


def summarise(
    folder: Path, grids: Sequence[str], wanted: int, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Summarises the records of these grids, as many as exist."""
    asked = all_cells(grids, changes)
    done, runs = read_folder(folder)
    cells = {cell: rows for cell in asked if (rows := records_of(cell, done, wanted))}
    names = {name: folder / f"{name}.json" for name in ("settings", *MEASUREMENTS)}
    files = {name: read_json(path) if path.exists() else None for name, path in names.items()}
    return {
        "identity": files.pop("settings"),
        "runs": runs,
        "wanted": wanted,
        "complete": all(len(cells.get(cell, ())) >= wanted for cell in asked),
        "cells": {cell.key: describe(cell, rows) for cell, rows in cells.items()},
        "grids": {name: compare(GRIDS[name], cells, changes) for name in grids},
        "checks": check_all(cells),
        "calibrations": read_calibrations(folder),
        "chunk_scores": score_examples(cells),
        **files,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row.get(name, 0.0) for row in rows])) for name in rows[0]}


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def describe(cell: Cell, records: Rows) -> dict[str, Any]:
    """Returns a cell's numbers, shares and means with their 95% intervals."""
    rows = list(records.values())
    by_task, by_depth = defaultdict(list), defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["score"])
        if row["asked_depth"] is not None:
            by_depth[row["asked_depth"]].append(row["score"])
    wrong = [row for row in rows if not row["score"]][:_WRONG_SHOWN]
    flops = _means([row["flops"] for row in rows]) if all(row["flops"] for row in rows) else None
    result: dict[str, Any] = {
        "settings": cell.settings(),
        "label": cell.label(),
        "examples": len(rows),
        "accuracy": None if cell.selects_only else share([row["score"] for row in rows]),
        "by_task": {task: share(values) for task, values in by_task.items()},
        "by_depth": [[depth, share(values)] for depth, values in sorted(by_depth.items())],
        "rows": None if any(row.get("rows") is None for row in rows) else _mean(rows, "rows"),
        "evaluations": statistics.bootstrap(np.mean, [row["evaluations"] for row in rows]),
        "seconds": _means([row["seconds"] for row in rows]),
        "flops": flops and {**flops, "total": sum(flops.values())},
        "recall": None,
        "wrong": [[row["example"], row["task"], *row["answers"], row["response"]] for row in wrong],
    }
    if by_depth:
        result["middle_less_ends"] = middle_less_ends(rows, [row["score"] for row in rows])
    if cell.method.uses_chunks:
        uncut = [row for row in rows if len(row["needle"]) == 1]
        result |= {
            "recall": share([holds_needle(row) for row in rows]),
            "recall_uncut": share([holds_needle(row) for row in uncut]) if uncut else None,
            "chunks": float(np.mean([row["n_chunks"] for row in rows])),
            "cut": float(np.mean([len(row["needle"]) > 1 for row in rows])),
            "kept": float(np.mean([len(row["chunks"]) for row in rows])),
        }
    ranked = cell.selection in ("top-k", "random")
    scored = [row for row in rows if ranked and row["scores"] is not None]
    leads = [lead(row) for row in scored]
    if scored:
        result["recall_at_1"] = share([x > 0 for x in leads])
    if scored and cell.selection == "top-k":
        margins = [x for row in scored if (x := margin(row, cell.top_k)) is not None]
        result |= {
            "lead": statistics.bootstrap(np.mean, leads),
            "margin": statistics.bootstrap(np.mean, margins) if margins else None,
        }
    return result


def share(values: Sequence[float]) -> list[float]:
    """Returns [mean, low, high, sum, n] of scores: proportions with Wilson's interval."""
    hits = sum(values)
    if any(value not in (0, 1) for value in values):
        return [*statistics.bootstrap(np.mean, values), hits, len(values)]
    return [*statistics.wilson(int(hits), len(values)), int(hits), len(values)]


def middle_less_ends(rows: Sequence[Row], values: Sequence[float]) -> statistics.Estimate:
    """Estimates the mean value of needles in the middle of the document minus near its ends."""
    depth = np.array([row["asked_depth"] for row in rows])
    middle = (depth > 0.25) & (depth < 0.75)

    def difference(value: Any, middle: Any, ends: Any, axis: int) -> Any:
        with np.errstate(invalid="ignore"):
            inside = (value * middle).sum(axis) / middle.sum(axis)
            return inside - (value * ends).sum(axis) / ends.sum(axis)

    return statistics.bootstrap(difference, values, middle, ~middle)


def lead(record: Row) -> float:
    """Returns the score of the needle's chunk (the worse of two) minus the best other score."""
    others = np.delete(record["scores"], record["needle"])
    return _needle_score(record) - float(others.max() if others.size else 0.0)


def margin(record: Row, k: int) -> float | None:
    """Returns that score minus the best score that must stay out; positive where it is kept.

    None where no other chunk competes, because enough are kept.
    """
    others = np.sort(np.delete(record["scores"], record["needle"]))[::-1]
    rank = k - len(record["needle"])
    return _needle_score(record) - float(others[rank]) if 0 <= rank < len(others) else None


def _needle_score(record: Row) -> float:
    return min(record["scores"][i] for i in record["needle"])


def compare(
    grid: Grid, cells: Mapping[Cell, Rows], changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Compares arms with their reference over common examples; Holm's p is over the grid."""
    groups, tested = [], []
    for reference, arms in grid.groups(changes):
        rows = [_compare_arm(reference, arm, cells) for arm in arms]
        tested += [row for row in rows if "p" in row]
        over = {name: getattr(reference, name) for name in grid.over}
        groups.append({"over": over, "reference": reference.key, "arms": rows})
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {"question": grid.question, "groups": groups}


def _compare_arm(reference: Cell, arm: Cell, cells: Mapping[Cell, Rows]) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": arm.key, "label": arm.label(reference)}
    base, other = (cells.get(cell, {}) for cell in (reference, arm))
    if both := sorted({*base} & {*other}):
        a, b = (np.array([rows[i]["score"] for i in both]) for rows in (base, other))
        row |= statistics.paired(a, b)._asdict()
        row["same_tokens"] = sum(base[i]["tokens"] == other[i]["tokens"] for i in both)
        if reference.depths is not None:
            row["middle_less_ends"] = middle_less_ends([base[i] for i in both], b - a)
    return row


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
