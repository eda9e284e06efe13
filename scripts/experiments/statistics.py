"""Intervals and paired tests. Columns have one value for each example, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # drawn indices held in memory


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


class Pairing(NamedTuple):
    """The same examples under two methods, b against a.

    difference: mean of b minus mean of a, with its bootstrap interval. b_only, a_only: examples
    that only one of them answers right. p: McNemar's exact test, two-sided.
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
    statistic: Callable[..., np.ndarray],
    *columns: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Returns a statistic with its percentile bootstrap interval (Efron 1979) over examples.

    Args:
        statistic: reduces the last axis of the columns' resamples, arrays [.., n].
        columns: [n] each; an example's values are resampled together.
        resamples: RESAMPLES by default.
    """
    arrays = [np.asarray(column, float) for column in columns]
    n = len(arrays[0])
    if n == 0 or any(len(array) != n for array in arrays):
        raise ValueError(f"columns must have equal lengths, got {[len(a) for a in arrays]}")
    rng, resamples = np.random.default_rng(seed), resamples or RESAMPLES
    step = max(1, _AT_ONCE // n)
    resampled = []
    for start in range(0, resamples, step):
        picks = rng.integers(0, n, (min(step, resamples - start), n))
        resampled.append(statistic(*(array[picks] for array in arrays)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(resampled), [tail, 100 - tail])
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Estimate:
    """Returns a mean with its bootstrap interval."""
    return bootstrap(lambda x: x.mean(axis=-1), values, confidence=confidence)


def paired(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> Pairing:
    """Compares method b with method a, each right or wrong on the same examples."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"both methods need the same examples, got {a.size} and {b.size}")
    b_only, a_only = int((b & ~a).sum()), int((a & ~b).sum())
    difference = bootstrap(lambda x: x.mean(axis=-1), b.astype(float) - a)
    return Pairing(a.size, difference, b_only, a_only, mcnemar(b_only, a_only))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values by Holm's step-down method (1979), for all comparisons together."""
    order = np.argsort(p_values, stable=True)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order.tolist()):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
