"""95% intervals of mean scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from evaluate_small import wilson


def bootstrap(scores: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the resamples are the same every time."""
    values = np.asarray(scores, float)
    rng = np.random.default_rng(0)
    # A few at a time: a benchmark has up to thousands of examples.
    means = [
        values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1)
        for _ in range(-(-resamples // 100))
    ]
    low, high = np.quantile(np.concatenate(means)[:resamples], (0.025, 0.975))
    return float(low), float(high)


def interval(scores: Sequence[float], binary: bool) -> tuple[float, float]:
    """Wilson's for scores that are 0 or 1, else by bootstrap. At least one score."""
    if binary:
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores)
