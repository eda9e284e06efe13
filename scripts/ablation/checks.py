"""Whether the numbers of a run fit together. Every check says what it compared and over how many.

Exact ones are of identities, and one deviating example fails them (token for token: one in a
hundred). Statistical ones fail where a
99.9% interval leaves the expected value out, so that chance fails about one in a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ablation import statistics
from ablation.grid import DENSE, Cell

CONFIDENCE = 0.999
Records = Mapping[int, Mapping[str, Any]]


def check_all(cells: Mapping[Cell, Records]) -> list[dict[str, Any]]:
    """Every check that the cells allow, as {"name", "ok", "examples", "found"}."""
    found = []
    for cell, records in cells.items():
        if not records:
            continue
        found.append(_check(f"records are possible: {cell.label()}", possible(cell, records)))
        if cell.selection == "top-k" and cell.reselect == "never" and cell.margin is None:
            found.append(_check(f"best scores are kept: {cell.label()}", best_kept(cell, records)))
        if cell.selection in ("random", "first", "last"):
            found.append(_check(f"recall is K/N: {cell.label()}", chance_recall(records)))
        if cell.selection == "without":
            found.append(_check(f"no answer without the needle: {cell.label()}", blind(records)))
        steady = cell.reselect == "never" and cell.margin is None
        if cell.selection != "top-k" or not steady:
            continue
        oracle, everything = (cells.get(cell.selected_by(name), {}) for name in ("oracle", "all"))
        # Of a needle that a border cuts, one part may be enough or not: recall cannot say.
        both = sorted(i for i in set(records) & set(oracle) if len(records[i]["needle"]) == 1)
        if both:
            columns = ([rows[i] for i in both] for rows in (records, oracle))
            title = f"accuracy is recall times the oracle's, uncut needles: {cell.label()}"
            found.append(_check(title, recall_times_oracle(*columns)))
        whole = [i for i in records if i in everything and records[i]["n_chunks"] <= cell.top_k]
        if whole:
            pairs = [(records[i], everything[i]) for i in whole]
            title = f"K = N keeps all, token for token: {cell.label()}"
            found.append(_check(title, same_tokens(pairs)))
    return found


def _check(name: str, outcome: tuple[bool, int, str]) -> dict[str, Any]:
    ok, examples, text = outcome
    return {"name": name, "ok": bool(ok), "examples": examples, "found": text}


def _count(
    records: Records, wrong: Callable[[Mapping[str, Any]], bool], what: str
) -> tuple[bool, int, str]:
    bad = [index for index, record in records.items() if wrong(record)]
    text = f"{len(bad)} {what}" + (f", first example {bad[0]}" if bad else "")
    return not bad, len(records), text


def possible(cell: Cell, records: Records) -> tuple[bool, int, str]:
    """Counts, times and ids that can be, of every record."""
    kept_most = cell.selecting().slots if cell.selection not in DENSE else 0

    def wrong(record: Mapping[str, Any]) -> bool:
        fine = 1 <= record["evaluations"] <= len(record["tokens"])
        fine &= math.isfinite(record["seconds"]["total"]) and record["seconds"]["total"] > 0
        fine &= record["flops"] is None or sum(record["flops"].values()) > 0
        if cell.selection in DENSE:
            return not fine
        n, chunks, needle = record["n_chunks"], record["chunks"], set(record["needle"])
        fine &= chunks == sorted(set(chunks)) and all(0 <= i < n for i in chunks)
        fine &= needle <= set(range(n)) and len(needle) > 0
        if cell.selection == "all":
            fine &= chunks == list(range(n))
        elif cell.selection == "needle":
            fine &= set(chunks) <= needle
        elif cell.selection in ("oracle", "without"):
            fine &= len(chunks) <= kept_most
        elif cell.margin is None:
            fine &= len(chunks) == min(n, kept_most)
        if cell.selection == "oracle" and len(needle) <= cell.top_k:
            fine &= needle <= set(chunks)
        if cell.selection == "without":
            fine &= not needle & set(chunks)
        return not fine

    return _count(records, wrong, "impossible records")


def best_kept(cell: Cell, records: Records) -> tuple[bool, int, str]:
    """The kept chunks are the best by the recorded scores, ties to the earlier one."""

    def wrong(record: Mapping[str, Any]) -> bool:
        if record["scores"] is None:
            return record["chunks"] != list(range(record["n_chunks"]))
        scores = np.array(record["scores"], float)
        scores[np.isnan(scores)] = -np.inf
        if cell.keep_first:
            scores[0] = np.inf
        best = np.argsort(-scores, stable=True)[: cell.top_k]
        return record["chunks"] != sorted(best.tolist())

    return _count(records, wrong, "other selections")


def chance_recall(records: Records) -> tuple[bool, int, str]:
    """Recall against what K of N chunks hold by chance, needles that are cut in two counted."""
    chances = []
    for record in records.values():
        n, k, m = record["n_chunks"], len(record["chunks"]), len(record["needle"])
        chances.append(math.comb(n - m, k - m) / math.comb(n, k) if k >= m else 0.0)
    hits = sum(holds_needle(record) for record in records.values())
    p = np.array(chances)
    spread = 3.29 * math.sqrt((p * (1 - p)).sum()) + 0.5
    ok = abs(hits - p.sum()) <= spread
    return ok, len(p), f"{hits} found, {p.sum():.1f} ± {spread:.1f} expected"


def blind(records: Records) -> tuple[bool, int, str]:
    """Accuracy without the needle's chunk is below one in a hundred, within its interval."""
    hits = sum(record["right"] for record in records.values())
    low = statistics.wilson(hits, len(records), CONFIDENCE).low
    return low < 0.01, len(records), f"{hits} right"


def recall_times_oracle(
    kept: Sequence[Mapping[str, Any]], oracle: Sequence[Mapping[str, Any]]
) -> tuple[bool, int, str]:
    """Accuracy of top K less recall times the oracle's, which keeps as many and the needle's."""
    right, found, known = (
        np.array(column, float)
        for column in (
            [record["right"] for record in kept],
            [holds_needle(record) for record in kept],
            [record["right"] for record in oracle],
        )
    )

    def gap(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return a.mean(axis=-1) - b.mean(axis=-1) * c.mean(axis=-1)

    found_gap = statistics.bootstrap(gap, right, found, known, confidence=CONFIDENCE)
    # Where every resample agrees the interval has no width: an example's worth is given to it.
    slack = 1 / len(right)
    ok = found_gap.low - slack <= 0 <= found_gap.high + slack
    return ok, len(right), (
        f"{right.mean():.4f} against {found.mean():.4f} x {known.mean():.4f} = "
        f"{found.mean() * known.mean():.4f}, gap [{found_gap.low:.4f}, {found_gap.high:.4f}]"
    )  # fmt: skip


def same_tokens(pairs: Sequence[tuple[Any, Any]]) -> tuple[bool, int, str]:
    """Both answers have the same tokens, but for one in a hundred.

    One program gives both the same, but two processes may have compiled it with products whose last
    bits differ.
    """
    other = sum(a["tokens"] != b["tokens"] for a, b in pairs)
    return other <= len(pairs) // 100, len(pairs), f"{other} answers differ"


def holds_needle(record: Mapping[str, Any]) -> bool:
    """All chunks that are needed to read the needle are kept."""
    return set(record["needle"]) <= set(record["chunks"])
