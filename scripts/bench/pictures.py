"""Draws the pictures of benchmarks from their JSON. matplotlib without a display."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any):
    """Returns a figure without a window, and its axes, always an array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False, **options)


def _ticks(axis: Any, which: str, values: Iterable[float]) -> None:
    """Makes an axis logarithmic, with these values written out."""
    values = sorted(set(values))
    axis.set(**{f"{which}scale": "log"})
    getattr(axis, f"set_{which}ticks")(values, [f"{value:,g}" for value in values])
    axis.minorticks_off()


def _panels(
    record: Record, rows: list[Any], width: float, panel: str, line: str, x: str, y: str
) -> tuple[Figure, Any]:
    """Draws y over x: a panel for each value of `panel`, in it a line for each value of `line`."""
    values = sorted({row[panel] for row in rows})
    drawing, axes = figure(width * len(values), 3.6, 1, len(values), sharey=True)
    for axis, value in zip(axes[0], values, strict=True):
        shown = [row for row in rows if row[panel] == value]
        for name in dict.fromkeys(row[line] for row in shown):
            points = sorted((row[x], row[y]) for row in shown if row[line] == name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        _ticks(axis, "x", (row[x] for row in shown))
        axis.grid(alpha=0.3)
        axis.set_title(value)
    return drawing, axes[0]


def kernel(record: Record) -> Figure:
    """Draws time over the floor against K, one panel for each number of query rows."""
    rows = [
        row
        for row in record["rows"]
        if (row["batch"], row["ragged"], row["q_per_slot"]) == (1, False, True)
        and (row["heads"], row["settings"]) == (row["kv_heads"], None)
    ]
    drawing, axes = _panels(record, rows, 4, "rows", "implementation", "slots", "times_floor")
    for axis in axes:
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="chunks chosen, K", title=f"{axis.get_title()} query rows")
        _ticks(axis, "y", [1, 1.25, 1.5, 2, 3, 5])
    axes[0].set_ylabel("time / floor")
    axes[-1].legend(fontsize=8)
    drawing.suptitle(f"{record['device']}, H = 32, D = 128, C = 1024, bfloat16", fontsize=10)
    return drawing


def requests(record: Record) -> Figure:
    """Draws seconds of a request against the prompt's length, a line for each method."""
    rows = record["end_to_end"]
    drawing, axes = _panels(record, rows, 4.2, "tokens", "method", "prompt_tokens", "seconds")
    for axis in axes:
        title = f"{axis.get_title()} tokens of response"
        axis.set(xlabel="tokens of the prompt", title=title, yscale="log")
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    drawing.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16", fontsize=10)
    return drawing


def streaming(record: Record) -> Figure:
    """Draws seconds and the most device memory against the tokens that were streamed."""
    rows = sorted(record["memory"].values(), key=lambda row: row["tokens"])
    drawing, axes = figure(8.4, 3.4, 1, 2)
    seconds, memory = ([row[key] for row in rows] for key in ("seconds", "peak_bytes"))
    labels = {"seconds": seconds, "most device memory, GB": [size / 1e9 for size in memory]}
    for axis, (label, values) in zip(axes[0], labels.items(), strict=True):
        axis.plot([row["tokens"] for row in rows], values, marker="o")
        axis.set(xlabel="tokens streamed", ylabel=label, ylim=(0, 1.15 * max(values)))
        axis.grid(alpha=0.3)
    drawing.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16, top 4 kept", fontsize=10)
    return drawing
