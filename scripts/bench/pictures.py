"""Pictures of benchmarks, from their JSON alone. matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any):
    """A figure with no window behind it, and its axes, always an array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False, **options)


def _ticks(axis: Any, which: str, values: list[float]) -> None:
    """A logarithmic axis with these values written out."""
    axis.set(**{f"{which}scale": "log"})
    getattr(axis, f"set_{which}ticks")(values, [f"{value:,g}" for value in values])
    axis.minorticks_off()


def kernel(record: Record) -> Figure:
    """Time over the floor against K, one panel for each number of query rows."""
    plain = [
        row
        for row in record["rows"]
        if row["batch"] == 1
        and row["heads"] == row["kv_heads"]
        and not row["ragged"]
        and row["q_per_slot"]
        and row["settings"] is None
    ]
    panels = sorted({row["rows"] for row in plain})
    made, axes = figure(4 * len(panels), 3.6, 1, len(panels), sharey=True)
    for axis, rows in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(row["implementation"] for row in plain):
            line = [r for r in plain if r["rows"] == rows and r["implementation"] == name]
            if line:
                over = [r["times_floor"] for r in line]
                axis.plot([r["slots"] for r in line], over, marker="o", label=name)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="chunks chosen, K", title=f"{rows} query rows")
        _ticks(axis, "x", sorted({r["slots"] for r in plain}))
        _ticks(axis, "y", [1, 1.25, 1.5, 2, 3, 5])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time / floor")
    axes[0][-1].legend(fontsize=8)
    made.suptitle(f"{record['device']}, H = 32, D = 128, C = 1024, bfloat16", fontsize=10)
    return made


def requests(record: Record) -> Figure:
    """Seconds of a request against the prompt's length, a line for each method."""
    rows = record["end_to_end"]
    counts = sorted({row["tokens"] for row in rows})
    made, axes = figure(4.2 * len(counts), 3.6, 1, len(counts), sharey=True)
    for axis, tokens in zip(axes[0], counts, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            line = sorted(
                (row["prompt_tokens"], row["seconds"])
                for row in rows
                if (row["method"], row["tokens"]) == (method, tokens)
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=method)
        axis.set(xlabel="tokens of the prompt", title=f"{tokens} tokens of response", yscale="log")
        _ticks(axis, "x", sorted({row["prompt_tokens"] for row in rows}))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(fontsize=8)
    made.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16", fontsize=10)
    return made


def streaming(record: Record) -> Figure:
    """Seconds and the most device memory against the tokens that were streamed."""
    rows = sorted(record["memory"].values(), key=lambda row: row["tokens"])
    tokens = [row["tokens"] for row in rows]
    made, axes = figure(8.4, 3.4, 1, 2)
    for axis, values, label in (
        (axes[0][0], [row["seconds"] for row in rows], "seconds"),
        (axes[0][1], [row["peak_bytes"] / 1e9 for row in rows], "most device memory, GB"),
    ):
        axis.plot(tokens, values, marker="o")
        axis.set(xlabel="tokens streamed", ylabel=label, ylim=(0, 1.15 * max(values)))
        axis.grid(alpha=0.3)
    made.suptitle(f"{record['device']}, LLaDA-8B shapes, bfloat16, top 4 kept", fontsize=10)
    return made
