"""From a run's records to one JSON: cells with intervals, comparisons, checks, pictures' data."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablation import statistics
from ablation.checks import check_all, holds_needle
from ablation.grid import DENSE, GRIDS, Cell
from ablation.records import CellFile, RecordError
from ablation.run import CELLS, LOOKS, cell_path

Records = dict[int, dict[str, Any]]
_EXAMPLES_SHOWN = 6  # of chunk scores, and of wrong answers half as many


def summarise(
    folder: Path, grids: Sequence[str], wanted: int, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The summary of what is there of these grids."""
    cells: dict[Cell, Records] = {}
    identity, runs = None, []
    asked = list(dict.fromkeys(c for name in grids for c in GRIDS[name].cells(changes)))
    for cell in asked:
        path = cell_path(folder, cell)
        if not path.exists():
            continue
        with path.open("rb") as lines:
            first = json.loads(lines.readline() or b"{}")
        own = {key: value for key, value in first.items() if key != "cell"}
        identity = identity or own
        if own != identity:
            raise RecordError(f"{path} is of another model or other texts than {CELLS}'s others")
        file = CellFile(path, {"cell": cell.settings(), **identity})
        records = {i: r for i, r in sorted(file.read().items()) if i < wanted}
        if records:
            cells[cell] = records
            runs += [run for run in file.runs() if run not in runs]
    made = {cell.key: describe(cell, records) for cell, records in cells.items()}
    record: dict[str, Any] = {
        "identity": identity,
        "runs": runs,
        "wanted": wanted,
        "complete": all(len(cells.get(cell, ())) >= wanted for cell in asked),
        "cells": made,
        "grids": {name: compare(GRIDS[name], cells, changes) for name in grids},
        "checks": check_all(cells),
        "chunk_scores": score_examples(cells),
    }
    for name in LOOKS:
        path = folder / f"{name}.json"
        record[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return record


def describe(cell: Cell, records: Records) -> dict[str, Any]:
    """A cell's numbers, each with its 95% interval."""
    rows = list(records.values())
    by_task, by_depth = defaultdict(list), defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["right"])
        if row["asked_depth"] is not None:
            by_depth[row["asked_depth"]].append(row["right"])
    found: dict[str, Any] = {
        "settings": cell.settings(),
        "label": cell.label(),
        "examples": len(rows),
        "accuracy": share([row["right"] for row in rows]),
        "by_task": {task: share(right) for task, right in by_task.items()},
        "by_depth": [[depth, share(right)] for depth, right in sorted(by_depth.items())],
        "evaluations": statistics.mean([row["evaluations"] for row in rows]),
        "seconds": {
            phase: float(np.mean([row["seconds"].get(phase, 0.0) for row in rows]))
            for phase in rows[0]["seconds"]
        },
        "flops": None,
        "recall": None,
        "wrong": [
            [row["example"], row["task"], row["answer"], row["response"]]
            for row in rows
            if not row["right"]
        ][: _EXAMPLES_SHOWN // 2],
    }
    if by_depth:
        columns = [np.array([row["right"] for row in rows], float), *zones(rows)]
        found["middle_less_ends"] = statistics.bootstrap(_middle_less_ends, *columns)
    if all(row["flops"] for row in rows):
        found["flops"] = {
            phase: float(np.mean([row["flops"][phase] for row in rows]))
            for phase in rows[0]["flops"]
        }
        found["flops"]["total"] = sum(found["flops"].values())
    if cell.selection not in DENSE:
        found["recall"] = share([holds_needle(row) for row in rows])
        found["chunks"] = float(np.mean([row["n_chunks"] for row in rows]))
        found["cut"] = float(np.mean([len(row["needle"]) > 1 for row in rows]))
        found["kept"] = float(np.mean([len(row["chunks"]) for row in rows]))
    scored = [row for row in rows if cell.selection == "top-k" and row["scores"] is not None]
    if scored:
        leads = [lead(row) for row in scored]
        found["recall_at_1"] = share([x > 0 for x in leads])
        found["lead"] = statistics.mean(leads)
        margins = [x for row in scored if (x := margin(row, cell.top_k)) is not None]
        found["margin"] = statistics.mean(margins) if margins else None
    return found


def share(values: Sequence[bool]) -> list[float]:
    """[proportion, low, high, hits, n]."""
    hits = sum(map(bool, values))
    return [*statistics.wilson(hits, len(values)), hits, len(values)]


def zones(rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Which examples have their needle in the middle of the document, and which near its ends."""
    depth = np.array([row["asked_depth"] for row in rows])
    middle = (depth > 0.25) & (depth < 0.75)
    return [middle.astype(float), (~middle).astype(float)]


def _middle_less_ends(value: np.ndarray, middle: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Mean of the values in the middle less that near the ends, over the last axis."""
    with np.errstate(invalid="ignore"):
        inside = (value * middle).sum(axis=-1) / middle.sum(axis=-1)
        return inside - (value * ends).sum(axis=-1) / ends.sum(axis=-1)


def lead(record: Mapping[str, Any]) -> float:
    """How far the needle's chunk (the worse, where it is cut in two) is above all others."""
    scores = np.array(record["scores"])
    others = np.delete(scores, record["needle"])
    return float(scores[record["needle"]].min() - (others.max() if others.size else 0.0))


def margin(record: Mapping[str, Any], k: int) -> float | None:
    """How far it is above the best chunk that must stay out; positive where it is kept.

    None where so many are kept that no other chunk is in its way.
    """
    scores = np.array(record["scores"])
    others = np.sort(np.delete(scores, record["needle"]))[::-1]
    rank = k - len(record["needle"])
    if not 0 <= rank < len(others):
        return None
    return float(scores[record["needle"]].min() - others[rank])


def compare(
    grid: Any, cells: Mapping[Cell, Records], changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Every arm against its reference over the examples that both have; Holm over the grid."""
    groups, tested = [], []
    for reference, arms in grid.groups(changes):
        rows = []
        for arm in arms:
            row: dict[str, Any] = {"cell": arm.key, "label": arm.label(reference)}
            both = sorted(set(cells.get(reference, {})) & set(cells.get(arm, {})))
            if both:
                a, b = ([cells[c][i]["right"] for i in both] for c in (reference, arm))
                row |= statistics.paired(a, b)._asdict()
                rows_of_a = [cells[reference][i] for i in both]
                if rows_of_a[0]["asked_depth"] is not None:
                    change = np.array(b, float) - np.array(a, float)
                    row["middle_less_ends"] = statistics.bootstrap(
                        _middle_less_ends, change, *zones(rows_of_a)
                    )
                tested.append(row)
            rows.append(row)
        common = {name: getattr(reference, name) for name in grid.over}
        groups.append({"over": common, "reference": reference.key, "arms": rows})
    adjusted = statistics.holm([row["p"] for row in tested])
    for row, p in zip(tested, adjusted, strict=True):
        row["p_holm"] = p
    return {"question": grid.question, "groups": groups}


def score_examples(cells: Mapping[Cell, Records]) -> list[dict[str, Any]]:
    """Scores of the first examples of the longest scored cell of the default settings."""
    scored = [
        cell
        for cell, records in cells.items()
        if (cell.selection, cell.scorer) == ("top-k", "draft")
        and any(row["scores"] is not None for row in records.values())
    ]
    if not scored:
        return []
    cell = max(scored, key=lambda cell: (cell.length, cell.encoding == "joint", cell.anchors))
    names = ("example", "task", "scores", "needle", "chunks", "right")
    rows = [row for row in cells[cell].values() if row["scores"] is not None][:_EXAMPLES_SHOWN]
    return [{"cell": cell.key, **{name: row[name] for name in names}} for row in rows]
