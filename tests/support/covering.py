"""Covering arrays: a few rows in which every t values of different factors come together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering_array(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    *,
    strength: int = 2,
    seed: int = 0,
    candidates: int = 30,
) -> list[Row]:
    """Returns rows that hold every allowed combination of `strength` values, greedily.

    Args:
      factors: the values of each factor.
      allowed: whether values may be given together; called with some or all factors of a row. A
        combination that it allows must fit into a row.
      candidates: random rows of which each step takes the one with most new combinations.
    """
    rng, rows = random.Random(seed), list[Row]()
    left = dict.fromkeys(
        combination
        for names in itertools.combinations(factors, strength)
        for combination in itertools.product(*[[(n, v) for v in factors[n]] for n in names])
        if allowed(dict(combination))
    )

    def completed(start: Row) -> Row:
        row = dict(start)
        for name in rng.sample([n for n in factors if n not in row], len(factors) - len(row)):
            row[name] = rng.choice([v for v in factors[name] if allowed({**row, name: v})])
        return {name: row[name] for name in factors}

    def new(row: Row) -> list[tuple[tuple[str, Any], ...]]:
        return [c for c in itertools.combinations(row.items(), strength) if c in left]

    while left:
        starts = rng.sample(list(left), min(candidates, len(left)))
        best = max((completed(dict(start)) for start in starts), key=lambda row: len(new(row)))
        for combination in new(best):
            del left[combination]
        rows.append(best)
    return rows
