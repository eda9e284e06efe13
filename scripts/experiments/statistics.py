"""Intervals and paired tests. Columns have one value for each example, in the same order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # drawn indices held in memory
Column = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


class Pairing(NamedTuple):
    """The same examples under two methods, b against a.

    difference: mean of b minus mean of a, with its bootstrap interval. b_only, a_only: examples
    that only one of them answers right, or scores higher. p: McNemar's exact test, two-sided; of
    scores that are shares it is the sign test.
    """

    examples: int
    difference: Estimate
    b_only: int
    a_only: int
    p: float


def wilson(hits: int, n: int, confidence: float = 0.95) -> Estimate:
    """Returns a proportion with Wilson's score interval (1927). Raises ValueError for n < 1."""
    if n <= 0:
        raise ValueError(f"a proportion needs at least 1 example, got {n} examples")
    low, high = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Estimate(hits / n, float(low), float(high))


def mcnemar(b_only: int, a_only: int) -> float:
    """Returns the two-sided p of McNemar's exact (binomial) test; 1 without discordant pairs."""
    if b_only + a_only == 0:
        return 1.0
    return float(stats.binomtest(b_only, b_only + a_only, 0.5).pvalue)


def bootstrap(
    statistic: Callable[..., np.ndarray], *columns: Column, confidence: float = 0.95
) -> Estimate:
    """Returns a statistic with its percentile bootstrap interval (Efron 1979) over examples.

    Args:
        statistic: `statistic(*columns, axis=axis)` reduces that axis.
        columns: [n] each; an example's values are resampled together.
    """
    arrays = [np.asarray(column, float) for column in columns]
    value = float(statistic(*arrays, axis=-1))
    if len(arrays[0]) == 1:
        return Estimate(value, value, value)
    draws: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": max(1, _AT_ONCE // len(arrays[0]))}
    draws["random_state"] = np.random.default_rng(0)
    options = {"method": "percentile", "confidence_level": confidence, "paired": True}
    with warnings.catch_warnings():  # of an interval that is NaN
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(arrays, statistic, **draws, **options).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def paired(a: Column, b: Column) -> Pairing:
    """Compares method b with method a by their scores, 0 to 1, of the same examples."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"both methods need the same examples, got {a.size} and {b.size}")
    b_only, a_only = int((b > a).sum()), int((a > b).sum())
    difference = bootstrap(np.mean, b - a)
    return Pairing(a.size, difference, b_only, a_only, mcnemar(b_only, a_only))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values by Holm's step-down method (1979), for all comparisons together."""
    order = np.argsort(p_values, stable=True)
    scaled = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()
