"""Checks whether the numbers of a run fit together.

Exact checks compare identities: one example that deviates fails them (token for token: one in a
hundred). Statistical checks fail where a 99.9% interval leaves the expected value out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import statistics
from experiments.grids import Cell
from experiments.retrieval import holds_needle

CONFIDENCE, QUANTILE = 0.999, 3.29
Row = Mapping[str, Any]
Records = Mapping[int, Row]
Outcome = tuple[bool, int, str]  # whether the check holds, over how many examples, what was seen


def check_all(cells: Mapping[Cell, Records]) -> list[dict[str, Any]]:
    """Makes every check that the cells allow, as {"name", "ok", "examples", "found"}."""
    return [
        {"name": f"{name}: {cell.label()}", "ok": bool(ok), "examples": examples, "found": text}
        for cell, records in cells.items()
        if records
        for name, (ok, examples, text) in _checks(cell, records, cells)
    ]


def _checks(
    cell: Cell, records: Records, cells: Mapping[Cell, Records]
) -> Iterator[tuple[str, Outcome]]:
    yield "records are possible", possible(cell, records)
    if cell.selection in ("random", "first", "last"):
        yield "recall is K/N", chance_recall(records)
    if cell.selection == "without":
        yield "no answer without the needle", no_answer(records)
    if cell.selection != "top-k" or cell.reselect != "never" or cell.margin is not None:
        return
    yield "best scores are kept", best_kept(cell, records)
    if cell.selects_only:
        return
    oracle, everything = (cells.get(cell.selected_by(name), {}) for name in ("oracle", "all"))
    # Where a border cuts the needle, one part may be enough or not: recall cannot tell.
    if both := sorted(i for i in {*records} & {*oracle} if len(records[i]["needle"]) == 1):
        columns = ([rows[i] for i in both] for rows in (records, oracle))
        yield "accuracy is recall times the oracle's, uncut needles", recall_times_oracle(*columns)
    short = [i for i in records if i in everything and records[i]["n_chunks"] <= cell.top_k]
    if short:
        pairs = [(records[i], everything[i]) for i in short]
        yield "K = N keeps all, token for token", same_tokens(pairs)


def _none(records: Records, wrong: Callable[[Row], bool], what: str) -> Outcome:
    bad = [index for index, record in records.items() if wrong(record)]
    text = f"{len(bad)} {what}" + (f", first example {bad[0]}" if bad else "")
    return not bad, len(records), text


def possible(cell: Cell, records: Records) -> Outcome:
    """Checks that counts, times and ids of every record are in range."""
    dense, most = not cell.method.uses_chunks, cell.selection_config().slots
    least = 0 if cell.selects_only else 1

    def conditions(record: Row) -> Iterator[bool]:
        yield least <= record["evaluations"] <= len(record["tokens"])
        yield math.isfinite(record["seconds"]["total"]) and record["seconds"]["total"] > 0
        # Selecting alone may take no product.
        yield record["flops"] is None or sum(record["flops"].values()) > 0 or not least
        if dense:
            return
        n, chunks, needle = record["n_chunks"], record["chunks"], set(record["needle"])
        yield chunks == sorted(set(chunks)) and all(0 <= i < n for i in chunks)
        yield needle <= set(range(n)) and len(needle) > 0
        if cell.selection == "all":
            yield chunks == list(range(n))
        elif cell.selection == "needle":
            yield set(chunks) <= needle
        elif cell.selection in ("oracle", "without"):
            yield len(chunks) <= most
        elif cell.margin is None:
            yield len(chunks) == min(n, most)
        if cell.selection == "oracle" and len(needle) <= cell.top_k:
            yield needle <= set(chunks)
        if cell.selection == "without":
            yield not needle & set(chunks)

    return _none(records, lambda record: not all(conditions(record)), "impossible records")


def best_kept(cell: Cell, records: Records) -> Outcome:
    """Checks that the kept chunks are the best by the recorded scores, ties to the earlier one."""

    def wrong(record: Row) -> bool:
        if record["scores"] is None:
            return record["chunks"] != list(range(record["n_chunks"]))
        scores = np.array(record["scores"], float)
        scores[np.isnan(scores)] = -np.inf
        if cell.keep_first:
            scores[0] = np.inf
        best = np.argsort(-scores, stable=True)[: cell.top_k]
        return record["chunks"] != sorted(best.tolist())

    return _none(records, wrong, "other selections")


def chance_recall(records: Records) -> Outcome:
    """Compares recall with what K of N chunks hold by chance, cut needles included."""
    sizes = [(r["n_chunks"], len(r["chunks"]), len(r["needle"])) for r in records.values()]
    p = np.array(
        [math.comb(n - m, max(k - m, 0)) * (k >= m) / math.comb(n, k) for n, k, m in sizes]
    )
    hits = sum(holds_needle(record) for record in records.values())
    spread = QUANTILE * math.sqrt((p * (1 - p)).sum()) + 0.5
    ok = abs(hits - p.sum()) <= spread
    return ok, len(p), f"{hits} found, {p.sum():.1f} ± {spread:.1f} expected"


def no_answer(records: Records) -> Outcome:
    """Checks that accuracy may be below one in a hundred without the needle's chunk."""
    hits = int(sum(record["score"] for record in records.values()))
    low = statistics.wilson(hits, len(records), CONFIDENCE).low
    return low < 0.01, len(records), f"{hits} right"


def recall_times_oracle(kept: Sequence[Row], oracle: Sequence[Row]) -> Outcome:
    """Compares accuracy with recall times the oracle's accuracy, which keeps as many chunks."""
    right, best = ([record["score"] for record in rows] for rows in (kept, oracle))
    columns = right, [holds_needle(record) for record in kept], best

    def gap(a: Any, b: Any, c: Any, axis: int) -> Any:
        return a.mean(axis) - b.mean(axis) * c.mean(axis)

    _, low, high = statistics.bootstrap(gap, *columns, confidence=CONFIDENCE)
    # Where every resample agrees the interval has no width: widen it by one example.
    slack = 1 / len(kept)
    a, b, c = map(np.mean, columns)
    text = f"{a:.4f} against {b:.4f} x {c:.4f} = {b * c:.4f}, gap [{low:.4f}, {high:.4f}]"
    return low - slack <= 0 <= high + slack, len(kept), text


def same_tokens(pairs: Sequence[tuple[Row, Row]]) -> Outcome:
    """Checks that both answers have the same tokens, but for one in a hundred.

    Two processes may have compiled the same program with products whose last bits differ.
    """
    other = sum(a["tokens"] != b["tokens"] for a, b in pairs)
    return other <= len(pairs) // 100, len(pairs), f"{other} answers differ"
