"""Wall-clock time of phases, with compilation apart."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax

_COMPILE_EVENTS = "/jax/core/compile/"


class _Active(threading.local):
    """Of the phases that a thread is in: the spans in which it traced or compiled."""

    def __init__(self) -> None:
        self.phases: list[list[tuple[float, float]]] = []


_active = _Active()


def _record(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_COMPILE_EVENTS):
        now = time.perf_counter()
        for spans in _active.phases:
            spans.append((now - duration_secs, now))


jax.monitoring.register_event_duration_secs_listener(_record)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: tracing events nest."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Stopwatch:
    """Seconds by phase. Time spent tracing and compiling is added up under "compile" instead.

    Threads count what they compile themselves.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}
        self.compilations = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to `name`. The block must wait for its own results."""
        spans: list[tuple[float, float]] = []
        _active.phases.append(spans)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            _active.phases.pop()
            compiling = min(_covered(spans), elapsed)
            self.compilations += bool(spans)
            self.seconds["compile"] += compiling
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - compiling
