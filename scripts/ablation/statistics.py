"""Intervals and paired tests; columns have one value per example, in the same order."""

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

    difference: mean of b less mean of a, with its bootstrap interval. b_only, a_only: examples that
    one alone has right. p: McNemar's exact test, two-sided.
    """

    examples: int
    difference: Estimate
    b_only: int
    a_only: int
    p: float


def wilson(hits: int, n: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (1927). n = 0 raises ValueError."""
    if n <= 0:
        raise ValueError(f"a proportion of {n} examples has no interval")
    low, high = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Estimate(hits / n, float(low), float(high))


def mcnemar(b_only: int, a_only: int) -> float:
    """McNemar's exact test: p that discordant pairs fall so unevenly if either side is as likely.

    Two-sided, binomial (no chi-squared approximation); 1 where there is no discordant pair.
    """
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
    """Percentile bootstrap (Efron 1979) over examples: columns are resampled together.

    statistic: of the columns' resamples, arrays [.., n] each, over their last axis. resamples:
    RESAMPLES by default. A fixed seed gives the same interval every time.
    """
    arrays = [np.asarray(column, float) for column in columns]
    n = len(arrays[0])
    if n == 0 or any(len(array) != n for array in arrays):
        raise ValueError(f"columns of {[len(array) for array in arrays]} examples")
    rng, resamples = np.random.default_rng(seed), resamples or RESAMPLES
    step = max(1, _AT_ONCE // n)
    found = []
    for start in range(0, resamples, step):
        picks = rng.integers(0, n, (min(step, resamples - start), n))
        found.append(statistic(*(array[picks] for array in arrays)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Estimate:
    """A mean with its bootstrap interval."""
    return bootstrap(lambda x: x.mean(axis=-1), values, confidence=confidence)


def paired(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> Pairing:
    """Method b against method a on the same examples; right or wrong each."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} examples: they must be the same")
    b_only, a_only = int((b & ~a).sum()), int((a & ~b).sum())
    difference = bootstrap(lambda x: x.mean(axis=-1), b.astype(float) - a)
    return Pairing(a.size, difference, b_only, a_only, mcnemar(b_only, a_only))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p values that hold for all comparisons together."""
    order = np.argsort(p_values, stable=True)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order.tolist()):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
