"""Tells which kernels a call spends its time in, from a profile of it."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from bench.record import clock

MOST = 12  # kernels with rows of their own; one row has the sum of the others
# Streams of a GPU's plane are lines of kernels; other lines tell the same time by operation.
_PLANE, _LINE = re.compile(r"^/device:GPU:\d+$"), re.compile(r"^Stream")
_NUMBER = re.compile(r"[._]\d+$")


def kernels(call: Callable[[], Any], calls: int = 1) -> list[dict[str, Any]]:
    """Returns rows of the kernels by their time: "kernel", "count", "ms" and "share" of all.

    The last row is what the device waited for. Without a GPU there are no rows.

    Args:
      call: compiled before.
      calls: what times and counts are divided by.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds, _ = clock(call)
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [
            (event.name, event.duration_ns / 1e6)
            for plane in planes
            if _PLANE.match(plane.name)
            for line in plane.lines
            if _LINE.match(line.name)
            for event in line.events
        ]
    return table(events, 1e3 * seconds, calls)


def table(events: Iterable[tuple[str, float]], ms: float, calls: int) -> list[dict[str, Any]]:
    """Returns the rows of (kernel, milliseconds), of a call that took `ms`."""
    spent: dict[str, list[float]] = defaultdict(list)
    for name, duration in events:
        spent[_NUMBER.sub("", name)].append(duration)
    if not spent:
        return []
    ranked = sorted(spent.items(), key=lambda item: -sum(item[1]))
    others = [x for _, durations in ranked[MOST:] for x in durations]
    idle = max(0.0, ms - sum(map(sum, spent.values())))
    rows = [*ranked[:MOST], *[("others", others)] * bool(others), ("no kernel", [idle])]
    return [
        {"kernel": name[:80], "count": len(x) / calls, "ms": sum(x) / calls, "share": sum(x) / ms}
        for name, x in rows
    ]
