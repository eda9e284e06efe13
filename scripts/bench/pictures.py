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


def _lines(axis: Any, rows: list[Any], series: str, x: str, y: str) -> None:
    """Draws y over x, a line for each value of `series`."""
    for name in dict.fromkeys(row[series] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row[series] == name)
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    _ticks(axis, "x", (row[x] for row in rows))
    axis.grid(alpha=0.3)


def kernel(record: Record) -> Figure:
    """Draws time over the floor against K, one panel for each number of query rows."""
    plain = [
        row
        for row in record["rows"]
        if (row["batch"], row["ragged"], row["q_per_slot"]) == (1, False, True)
        and row["heads"] == row["kv_heads"]
        and row["settings"] is None
    ]
    panels = sorted({row["rows"] for row in plain})
    drawing, axes = figure(4 * len(panels), 3.6, 1, len(panels), sharey=True)
    for axis, count in zip(axes[0], panels, strict=True):
        rows = [row for row in plain if row["rows"] == count]
        _lines(axis, rows, "implementation", "slots", "times_floor")
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="chunks chosen, K", title=f"{count} query rows")
        _ticks(axis, "y", [1, 1.25, 1.5, 2, 3, 5])
    axes[0][0].set_ylabel("time / floor")
    axes[0][-1].legend(fontsize=8)
    drawing.suptitle(f"{record['device']}, H = 32, D = 128, C = 1024, bfloat16", fontsize=10)
    return drawing


def requests(record: Record) -> Figure:
    """Draws seconds of a request against the prompt's length, a line for each method."""
    counts = sorted({row["tokens"] for row in record["end_to_end"]})
    drawing, axes = figure(4.2 * len(counts), 3.6, 1, len(counts), sharey=True)
    for axis, tokens in zip(axes[0], counts, strict=True):
        rows = [row for row in record["end_to_end"] if row["tokens"] == tokens]
        _lines(axis, rows, "method", "prompt_tokens", "seconds")
        axis.set(xlabel="tokens of the prompt", title=f"{tokens} tokens of response", yscale="log")
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(fontsize=8)
    drawing.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16", fontsize=10)
    return drawing


def streaming(record: Record) -> Figure:
    """Draws seconds and the most device memory against the tokens that were streamed."""
    rows = sorted(record["memory"].values(), key=lambda row: row["tokens"])
    tokens = [row["tokens"] for row in rows]
    drawing, axes = figure(8.4, 3.4, 1, 2)
    for axis, values, label in (
        (axes[0][0], [row["seconds"] for row in rows], "seconds"),
        (axes[0][1], [row["peak_bytes"] / 1e9 for row in rows], "most device memory, GB"),
    ):
        axis.plot(tokens, values, marker="o")
        axis.set(xlabel="tokens streamed", ylabel=label, ylim=(0, 1.15 * max(values)))
        axis.grid(alpha=0.3)
    drawing.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16, top 4 kept", fontsize=10)
    return drawing
