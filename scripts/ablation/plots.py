"""Pictures of a run, from its JSON alone. matplotlib without a display.

Every function draws what its own part of the record holds and returns the figure, or None where
the record has nothing for it.
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
_DPI = 110
_COLOURS = "viridis"


def _depth_arms(record: Record) -> dict[str, list[dict[str, Any]]]:
    """Cells of the heat map by arm, shortest first; arms that have none are left out."""
    groups = (record["grids"].get("depth") or {"groups": []})["groups"]
    arms: dict[str, list[dict[str, Any]]] = {}
    names = {"dense": "plain", True: "prefilling, anchors", False: "prefilling, no anchors"}
    for group in groups:
        for key in (group["reference"], *(arm["cell"] for arm in group["arms"])):
            if (cell := record["cells"].get(key)) is not None:
                settings = cell["settings"]
                dense = settings["selection"] == "dense"
                arms.setdefault(names["dense" if dense else settings["anchors"]], []).append(cell)
    order = [name for name in names.values() if name in arms]
    return {name: sorted(arms[name], key=lambda c: c["settings"]["length"]) for name in order}


def needle_heat_map(record: Record) -> Figure | None:
    """Accuracy by length and depth, one panel a method; every field says its share."""
    arms = _depth_arms(record)
    if not arms:
        return None
    picture, axes = figure(3.6 * len(arms) + 0.8, 4.2, 1, len(arms), sharey=True)
    image = None
    for axis, (name, cells) in zip(axes[0], arms.items(), strict=True):
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
        axis.set(xlabel="tokens", title=f"{name}\n({examples} answers a field)")
        axis.title.set_fontsize(9)
    axes[0][0].set_ylabel("depth of the needle")
    picture.colorbar(image, ax=axes[0].tolist(), label="accuracy")
    return picture


def accuracy_by_depth(record: Record) -> Figure | None:
    """Accuracy against depth with and without anchors, one panel for each setting; 95% bands."""
    groups = [
        (group, [group["reference"], *(arm["cell"] for arm in group["arms"])])
        for group in (record["grids"].get("anchors") or {"groups": []})["groups"]
    ]
    drawn = [(g, [record["cells"][k] for k in keys if k in record["cells"]]) for g, keys in groups]
    drawn = [(group, cells) for group, cells in drawn if cells]
    if not drawn:
        return None
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    picture, axes = figure(3.2 * columns, 2.7 * rows + 0.4, rows, columns, sharex=True, sharey=True)
    for axis, (group, cells) in zip(axes.flat, drawn, strict=False):
        for cell in cells:
            depth = [100 * place for place, _ in cell["by_depth"]]
            value, low, high = ([estimate[i] for _, estimate in cell["by_depth"]] for i in range(3))
            name = "anchors" if cell["settings"]["anchors"] else "no anchors"
            line = axis.plot(depth, value, marker=".", label=name)[0]
            axis.fill_between(depth, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(", ".join(f"{value}" for value in group["over"].values()), fontsize=9)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("depth of the needle, %")
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].legend(fontsize=8)
    return picture


def chunk_scores(record: Record) -> Figure | None:
    """Scores against the chunk's place in the document; the needle's chunk and the kept ones."""
    rows = record["chunk_scores"]
    if not rows:
        return None
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    picture, axes = figure(3.6 * columns, 2.5 * lines, lines, columns)
    for axis, row in zip(axes.flat, rows, strict=False):
        scores, place = np.array(row["scores"]), np.arange(len(row["scores"]))
        colours = np.where(np.isin(place, row["needle"]), "tab:red", "tab:grey")
        axis.vlines(place, scores.min(), scores, color=colours, linewidth=1)
        axis.scatter(place, scores, c=colours, s=14, zorder=3)
        kept = row["chunks"]
        axis.scatter(kept, scores[kept], s=70, facecolors="none", edgecolors="tab:blue", zorder=4)
        axis.set_title(f"{row['task'].replace('_', ' ')}, example {row['example']}", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("chunk")
    for line in axes:
        line[0].set_ylabel("score, nats a token")
    picture.suptitle("red: holds the needle; circled: kept", fontsize=9)
    return picture


def attention_on_anchors(record: Record) -> Figure | None:
    """Attention of the masked response on the kept chunks' first tokens, by layer and head."""
    rows = (record.get("attention") or {"rows": []})["rows"]
    if not rows:
        return None
    picture, axes = figure(2.7 * len(rows) + 1, 4.6, 1, len(rows), sharey=True)
    grids = [np.array(row["first_tokens"]) for row in rows]
    most = max(grid.max() for grid in grids)
    for axis, row, grid in zip(axes[0], rows, grids, strict=True):
        image = axis.imshow(grid, vmin=0, vmax=most, cmap=_COLOURS, aspect="auto", origin="lower")
        anchors = "anchors" if row["settings"]["anchors"] else "no anchors"
        title = f"{row['settings']['encoding']}, {anchors}\nmean {100 * grid.mean():.2f}%"
        axis.set(xlabel="head", title=title)
        axis.title.set_fontsize(9)
    axes[0][0].set_ylabel("layer")
    picture.colorbar(image, ax=axes[0].tolist(), label="attention on the chunks' first tokens")
    return picture


def denoising_order(record: Record) -> Figure | None:
    """In which evaluation each slot of a response was filled, with the token that it got."""
    rows = (record.get("order") or {"rows": []})["rows"]
    if not rows:
        return None
    slots = max(len(row["step"]) for row in rows)
    picture, axes = figure(0.42 * slots + 1.5, 0.75 * len(rows) + 0.9)
    axis = axes[0][0]
    grid = np.full((len(rows), slots), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row["step"])] = row["step"]
    image = axis.imshow(grid, cmap=_COLOURS, aspect="auto", vmin=1, vmax=max(2, np.nanmax(grid)))
    middle = (1 + np.nanmax(grid)) / 2
    for i, row in enumerate(rows):
        for j, (step, text) in enumerate(zip(row["step"], row["text"], strict=True)):
            shown = text.replace("\n", "↵").strip().removeprefix("<|").removesuffix("|>")
            shown = shown.replace("$", r"\$") if shown.isprintable() and shown else "·"
            axis.text(
                j, i, f"{shown[:7]}\n{step}", ha="center", va="center", fontsize=5.5,
                color="black" if step > middle else "white",
            )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["task"].replace("_", " ") for row in rows])
    axis.set(xlabel="slot of the response")
    picture.colorbar(image, ax=axis, label="filled in evaluation")
    return picture


def speed(record: Record) -> Figure | None:
    """Seconds of one answer against length, both logarithmic; the least and the most of repeats."""
    rows = (record.get("speed") or {"rows": []})["rows"]
    if not rows:
        return None
    picture, axes = figure(5.6, 4.0)
    axis = axes[0][0]
    for name in dict.fromkeys(row["method"] for row in rows):
        line = sorted((r for r in rows if r["method"] == name), key=lambda r: r["length"])
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


def one_factor(record: Record) -> Figure | None:
    """Every grid's arms less their reference, in points, with 95% intervals."""
    drawn = {
        name: rows
        for name, grid in record["grids"].items()
        if name != "tasks"
        and (rows := [(g, a) for g in grid["groups"] for a in g["arms"] if "difference" in a])
    }
    if not drawn:
        return None
    count = sum(map(len, drawn.values()))
    picture, axes = figure(7.5, 0.19 * count + 0.3 * len(drawn) + 0.8)
    axis, place, ticks = axes[0][0], 0.0, []
    for name, rows in drawn.items():
        for group, arm in rows:
            value, low, high = (100 * x for x in arm["difference"])
            clear = low > 0 or high < 0
            axis.errorbar(
                value, place, xerr=[[value - low], [high - value]], marker="o", markersize=3,
                color="tab:red" if clear else "tab:grey", linewidth=1,
            )  # fmt: skip
            over = ", ".join(str(x) for x in group["over"].values() if not isinstance(x, list))
            ticks.append((place, f"{name}: {arm['label']}" + (f"  ({over})" if over else "")))
            place += 1
        place += 0.6
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=6)
    axis.set_ylim(place, -1)
    axis.set_xlabel("accuracy less the reference's, points")
    axis.grid(axis="x", alpha=0.3)
    return picture


PICTURES: dict[str, Callable[[Record], Figure | None]] = {
    "needle_heat_map": needle_heat_map,
    "accuracy_by_depth": accuracy_by_depth,
    "chunk_scores": chunk_scores,
    "attention_on_anchors": attention_on_anchors,
    "denoising_order": denoising_order,
    "speed": speed,
    "differences": one_factor,
}


def draw_all(record: Record, folder: Path) -> list[str]:
    """Writes the pictures that the record has data for; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in PICTURES.items():
        picture = draw(record)
        if picture is not None:
            picture.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})
            made.append(name)
    return made
