"""Draws a run's pictures from its JSON, with matplotlib and without a display.

Every function draws its own part of the record and returns the figure, or None where the record
holds nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


def _groups(record: Record, grid: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Returns a grid's groups with the cells that were run, the reference first."""
    groups = []
    for group in (record["grids"].get(grid) or {"groups": []})["groups"]:
        keys = (group["reference"], *(arm["cell"] for arm in group["arms"]))
        if cells := [record["cells"][key] for key in keys if key in record["cells"]]:
            groups.append((group, cells))
    return groups


def _rows(record: Record, name: str) -> list[dict[str, Any]]:
    return (record.get(name) or {"rows": []})["rows"]


def _anchors(row: Record) -> str:
    return "anchors" if row["settings"]["anchors"] else "no anchors"


def _name(axis: Any, title: str, x: str = "") -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x)


def _panels(count: int, across: int, width: float, height: float, **options: Any) -> Any:
    """Returns a figure with `count` panels, at most `across` in a row, and its axes."""
    columns = min(across, count)
    rows = -(-count // columns)
    picture, axes = figure(columns * width, rows * height + 0.3, rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return picture, axes


def needle_heat_map(record: Record) -> Figure | None:
    """Draws accuracy by length and depth, a panel for each method, with the share in each field."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for _, cells in _groups(record, "depth"):
        for cell in cells:
            dense = cell["settings"]["selection"] == "dense"
            arms.setdefault("plain" if dense else f"prefilling, {_anchors(cell)}", []).append(cell)
    if not arms:
        return None
    picture, axes = figure(3.6 * len(arms) + 0.8, 4.2, 1, len(arms), sharey=True)
    names = ("plain", "prefilling, anchors", "prefilling, no anchors")
    for axis, name in zip(axes[0], [name for name in names if name in arms], strict=True):
        cells = sorted(arms[name], key=lambda c: c["settings"]["length"])
        depths = sorted({depth for cell in cells for depth, _ in cell["by_depth"]})
        grid = np.full((len(depths), len(cells)), np.nan)
        for column, cell in enumerate(cells):
            for depth, (accuracy, *_) in cell["by_depth"]:
                grid[depths.index(depth), column] = accuracy
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(cells)), [f"{c['settings']['length']:,}" for c in cells])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        examples = cells[0]["by_depth"][0][1][4]
        _name(axis, f"{name}\n({examples} answers a field)", x="tokens")
    axes[0][0].set_ylabel("depth of the needle")
    picture.colorbar(image, ax=axes[0].tolist(), label="accuracy")
    return picture


def accuracy_by_depth(record: Record) -> Figure | None:
    """Draws accuracy against depth with and without anchors, a panel for each setting."""
    groups = _groups(record, "anchors")
    if not groups:
        return None
    picture, axes = _panels(len(groups), 4, 3.2, 2.7, sharex=True, sharey=True)
    for axis, (group, cells) in zip(axes.flat, groups, strict=False):
        for cell in cells:
            depth = [100 * place for place, _ in cell["by_depth"]]
            value, low, high = ([estimate[i] for _, estimate in cell["by_depth"]] for i in range(3))
            line = axis.plot(depth, value, marker=".", label=_anchors(cell))[0]
            axis.fill_between(depth, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        _name(axis, ", ".join(f"{value}" for value in group["over"].values()))
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("depth of the needle, %")
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].legend(fontsize=8)
    return picture


def chunk_scores(record: Record) -> Figure | None:
    """Draws scores against the chunk's place; marks the needle's chunk and the kept ones."""
    rows = record["chunk_scores"]
    if not rows:
        return None
    picture, axes = _panels(len(rows), 3, 3.6, 2.5)
    for axis, row in zip(axes.flat, rows, strict=False):
        scores, place, kept = np.array(row["scores"]), np.arange(len(row["scores"])), row["chunks"]
        colours = np.where(np.isin(place, row["needle"]), "tab:red", "tab:grey")
        axis.vlines(place, scores.min(), scores, color=colours, linewidth=1)
        axis.scatter(place, scores, c=colours, s=14, zorder=3)
        axis.scatter(kept, scores[kept], s=70, facecolors="none", edgecolors="tab:blue", zorder=4)
        _name(axis, f"{row['task'].replace('_', ' ')}, example {row['example']}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("chunk")
    for line in axes:
        line[0].set_ylabel("score, nats a token")
    picture.suptitle("red: holds the needle; circled: kept", fontsize=9)
    return picture


def attention_on_anchors(record: Record) -> Figure | None:
    """Draws the masked response's attention on the kept chunks' first tokens, by layer and head."""
    rows = _rows(record, "attention")
    if not rows:
        return None
    picture, axes = figure(2.7 * len(rows) + 1, 4.6, 1, len(rows), sharey=True)
    grids = [np.array(row["first_tokens"]) for row in rows]
    most = max(grid.max() for grid in grids)
    for axis, row, grid in zip(axes[0], rows, grids, strict=True):
        image = axis.imshow(grid, vmin=0, vmax=most, aspect="auto", origin="lower")
        title = f"{row['settings']['encoding']}, {_anchors(row)}\nmean {100 * grid.mean():.2f}%"
        _name(axis, title, x="head")
    axes[0][0].set_ylabel("layer")
    picture.colorbar(image, ax=axes[0].tolist(), label="attention on the chunks' first tokens")
    return picture


def denoising_order(record: Record) -> Figure | None:
    """Draws in which evaluation each slot of a response was filled, with its token."""
    rows = _rows(record, "order")
    if not rows:
        return None
    slots = max(len(row["step"]) for row in rows)
    picture, ((axis,),) = figure(0.42 * slots + 1.5, 0.75 * len(rows) + 0.9)
    steps = [row["step"] + [np.nan] * (slots - len(row["step"])) for row in rows]
    grid = np.array(steps, float)
    last = np.nanmax(grid)
    image = axis.imshow(grid, aspect="auto", vmin=1, vmax=max(2, last))
    for i, row in enumerate(rows):
        for j, (step, text) in enumerate(zip(row["step"], row["text"], strict=True)):
            shown = text.replace("\n", "↵").strip().removeprefix("<|").removesuffix("|>")
            shown = shown.replace("$", r"\$") if shown.isprintable() and shown else "·"
            colour = "black" if step > (1 + last) / 2 else "white"
            place = {"ha": "center", "va": "center", "fontsize": 5.5}
            axis.text(j, i, f"{shown[:7]}\n{step}", color=colour, **place)
    axis.set_yticks(range(len(rows)), [row["task"].replace("_", " ") for row in rows])
    axis.set(xlabel="slot of the response")
    picture.colorbar(image, ax=axis, label="filled in evaluation")
    return picture


def speed(record: Record) -> Figure | None:
    """Draws seconds of one answer against length, with the least and the most of repeats."""
    rows = sorted(_rows(record, "speed"), key=lambda row: row["length"])
    if not rows:
        return None
    picture, ((axis,),) = figure(5.6, 4.0)
    for name in dict.fromkeys(row["method"] for row in rows):
        line = [row for row in rows if row["method"] == name]
        length, seconds = [r["length"] for r in line], np.array([r["seconds"] for r in line])
        spread = [seconds - [r["least"] for r in line], [r["most"] for r in line] - seconds]
        axis.errorbar(length, seconds, yerr=spread, marker="o", markersize=4, capsize=2, label=name)
    lengths = sorted({row["length"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds for 32 tokens")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return picture


def differences(record: Record) -> Figure | None:
    """Draws every grid's arms minus their reference, in points, with 95% intervals."""
    drawn = {
        name: rows
        for name, grid in record["grids"].items()
        if name != "tasks"
        and (rows := [(g, a) for g in grid["groups"] for a in g["arms"] if "difference" in a])
    }
    if not drawn:
        return None
    count = sum(map(len, drawn.values()))
    picture, ((axis,),) = figure(7.5, 0.19 * count + 0.3 * len(drawn) + 0.8)
    place, ticks = 0.0, []
    for name, rows in drawn.items():
        for group, arm in rows:
            value, low, high = (100 * x for x in arm["difference"])
            colour = "tab:red" if low > 0 or high < 0 else "tab:grey"
            spread = [[value - low], [high - value]]
            axis.errorbar(value, place, xerr=spread, marker="o", markersize=3, color=colour)
            over = ", ".join(str(x) for x in group["over"].values() if not isinstance(x, list))
            ticks.append((place, f"{name}: {arm['label']}" + (f"  ({over})" if over else "")))
            place += 1
        place += 0.6
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=6)
    axis.set_ylim(place, -1)
    axis.set_xlabel("accuracy minus the reference's, points")
    axis.grid(axis="x", alpha=0.3)
    return picture


PICTURES: tuple[Callable[[Record], Figure | None], ...] = (
    *(needle_heat_map, accuracy_by_depth, chunk_scores, attention_on_anchors),
    *(denoising_order, speed, differences),
)


def draw_all(record: Record, folder: Path) -> list[str]:
    """Writes the pictures that the record has data for; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for draw in PICTURES:
        if (picture := draw(record)) is not None:
            path = folder / f"{draw.__name__}.png"
            picture.savefig(path, dpi=110, metadata={"Software": None})
            names.append(draw.__name__)
    return names
