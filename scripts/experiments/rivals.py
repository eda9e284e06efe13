"""Writes docs/rivals.md, and its picture, from the JSON of a run of the grids "methods".

The run is that of `ablate.py run --grid methods methods-multi costs`. A second record, of
`benchmark.py speed --methods`, adds times and memory at the sizes of a large model.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.pictures import figure

from experiments.grids import Cell
from experiments.records import read_json, write_json, write_text
from experiments.report import Record, conditions, over_text, with_part
from experiments.tables import difference, p_value, percent, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PICTURE = "cache_methods"
_GRIDS = "methods"  # the first part of their names
_HEAD = ("method", "accuracy, %", "difference, points", "p, Holm", "evaluations", "rows", "TFLOP")
_HEAD += ("seconds", "times faster than plain", "GB", "on the front")


def write_page(
    source: Path, page: Path, pictures: Path, add: Path | None = None, speed: Path | None = None
) -> None:
    """Writes the page and its picture.

    source: ablation.json; without one the page says what each method does. add: that of another
    run, which is put into the record first. speed: of `benchmark.py speed`.
    """
    record = read_json(source, ValueError) if source.exists() else {}
    if add is not None:
        record = with_part(record, read_json(add, ValueError), str(add))
        write_json(source, record)
    runs = [
        run
        for run in (record, *record.get("parts", ()))
        if any(name.startswith(_GRIDS) for name in run.get("grids", ()))
    ]
    if record and not runs:
        raise ValueError(f"{source} holds no grid {_GRIDS}: run ablate.py run --grid {_GRIDS}")
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = pareto(runs)
    if drawn is not None:
        drawn.savefig(pictures / f"{PICTURE}.png", dpi=110, metadata={"Software": None})
    place = Path(os.path.relpath(pictures.resolve(), page.resolve().parent)).as_posix()
    large = read_json(speed, ValueError) if speed is not None and speed.exists() else None
    made_of = [path for path, there in ((source, record), (speed, large)) if path and there]
    lines = [f"# {TEXTS['title']}", "", _origin(made_of), TEXTS["intro"]]
    lines += ["## What each method does, and what is reproduced", "", TEXTS["notes"]["methods"]]
    lines += [table(("method", "paper", "what it reuses", "reproduced"), [*_methods()]), ""]
    if runs:
        lines += ["## Accuracy and cost, small model", "", TEXTS["notes"]["small"]]
    for run in runs:
        lines += [f"`{run['command']}`", "", table(("condition", "value"), [*_conditions(run)]), ""]
    if drawn is not None:
        lines += [f"![Accuracy against the seconds of a request]({place}/{PICTURE}.png)", ""]
    for run in runs:
        for title, rows in _tables(run):
            lines += [f"### {title}", "", table(_HEAD, rows), ""]
    lines += _large(large) if large else []
    write_text(page, "\n".join([*lines, "## Limits", TEXTS["notes"]["limits"]]).rstrip() + "\n")
    print(f"{page}")


def _origin(made_of: Sequence[Path]) -> str:
    names = " and ".join(f"`{path.name}`" for path in made_of) or "no record yet"
    return f"Made by `scripts/ablate.py rivals` from {names}; do not edit."


def _methods() -> Iterator[Sequence[str]]:
    for one in TEXTS["method"]:
        names = ", ".join(f"`{name}`" for name in one["names"])
        yield f"{one['title']}: {names}", one["paper"], one["does"], one["reproduced"]


def _conditions(run: Record) -> Iterator[tuple[str, str]]:
    """Yields where the run was made; its costs come from a process of their own."""
    yield from (row for row in conditions(run) if row[0] != "processes")
    if costs := run.get("costs"):
        yield "costs", f"{costs['run']['device']}, one process"


def name_of(cell: Record) -> str:
    """Returns a cell's method as the page calls it."""
    one = Cell.from_settings(cell["settings"])
    return f"prefilling, {one.encoding}" if one.method.uses_chunks else str(one.method)


def _groups(run: Record) -> Iterator[tuple[str, list[tuple[Record, Record | None, Record]]]]:
    """Yields a title, and for each method its cell, its costs and its comparison with plain."""
    costs = {row["cell"]: row for row in (run.get("costs") or {"rows": []})["rows"]}
    for name, grid in run["grids"].items():
        if not name.startswith(_GRIDS):
            continue
        for group in grid["groups"]:
            arms = [{"cell": group["reference"]}, *group["arms"]]
            found = [
                (cell, costs.get(arm["cell"]), arm)
                for arm in arms
                if (cell := run["cells"].get(arm["cell"])) is not None
            ]
            if found:
                tasks = "two numbers" if "multi_needle" in found[0][0]["settings"]["tasks"] else ""
                title = over_text({"over": {"length": found[0][0]["settings"]["length"]}})
                yield f"{title}{', ' if tasks else ', four tasks'}{tasks}", found


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tells for each (seconds, accuracy) whether no other point is faster and no less accurate."""
    return [
        not any(
            (s <= seconds and a >= accuracy and (s, a) != (seconds, accuracy)) for s, a in points
        )
        for seconds, accuracy in points
    ]


def _tables(run: Record) -> Iterator[tuple[str, list[list[str]]]]:
    for title, group in _groups(run):
        timed = [(cost["seconds"], cell["accuracy"][0]) for cell, cost, _ in group if cost]
        best = dict(zip(timed, front(timed), strict=True))
        plain = group[0][1]
        rows = []
        for cell, cost, arm in group:
            flops = f"{cell['flops']['total'] / 1e12:.2f}" if cell["flops"] else "-"
            row = [name_of(cell), percent(cell["accuracy"]), difference(arm)]
            row += [p_value(arm.get("p_holm")), f"{cell['evaluations'][0]:.1f}"]
            row += ["-" if cell["rows"] is None else f"{cell['rows']:,.0f}", flops]
            if cost:
                faster = f"{plain['seconds'] / cost['seconds']:.1f}" if plain else "-"
                row += ["{seconds:.3f} [{least:.3f}, {most:.3f}]".format(**cost), faster]
                on_front = best[cost["seconds"], cell["accuracy"][0]]
                row += [f"{cost['bytes'] / 1e9:.2f}", "yes" if on_front else ""]
            else:
                row += ["-"] * 4
            rows.append(row)
        yield title, rows


def pareto(runs: Sequence[Record]) -> Figure | None:
    """Draws accuracy against the seconds of a request, a panel for each length and question."""
    groups = [
        (title, timed)
        for run in runs
        for title, group in _groups(run)
        if (timed := [(cell, cost) for cell, cost, _ in group if cost])
    ]
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    picture, axes = figure(4.2 * columns, 3.4 * lines + 0.8, lines, columns)
    names = list(dict.fromkeys(name_of(cell) for _, timed in groups for cell, _ in timed))
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, timed) in zip(axes.flat, groups, strict=False):
        points = [(cost["seconds"], cell["accuracy"][0]) for cell, cost in timed]
        for (cell, _), (x, y) in zip(timed, points, strict=True):
            index, (low, high) = names.index(name_of(cell)), cell["accuracy"][1:3]
            style = {"color": f"C{index % 10}", "marker": "osD^v"[index // 10 % 5], "markersize": 5}
            axis.errorbar(x, 100 * y, [[100 * (y - low)], [100 * (high - y)]], **style)
        line = sorted(point for point, on in zip(points, front(points), strict=True) if on)
        axis.plot(*zip(*[(x, 100 * y) for x, y in line], strict=True), color="black", linewidth=0.6)
        axis.set_title(title, fontsize=9)
        axis.set(xscale="log", xlabel="seconds of a request")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    marks = [
        axes[0][0].plot([], [], linestyle="", color=f"C{i % 10}", marker="osD^v"[i // 10 % 5])[0]
        for i in range(len(names))
    ]
    picture.legend(marks, names, loc="outside lower center", ncols=4, fontsize=8)
    return picture


def _large(record: Record) -> list[str]:
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in record["end_to_end"]:
        name = "prefilling, joint" if row["method"] == "prefilling" else row["method"]
        rows.setdefault(name, {})[row["prompt_tokens"]] = row
    lengths = sorted({length for by_length in rows.values() for length in by_length})
    fields = [("seconds", "{seconds:.2f}"), ("GB", "{gigabytes:.1f}")]
    head = ["method", *(f"{n:,}: {name}" for n in lengths for name, _ in fields)]
    head.insert(1, "evaluations timed")
    lines = []
    for name, by_length in rows.items():
        counts = sorted({row["evaluations_timed"] for row in by_length.values()})
        line = [f"`{name}`", ", ".join(map(str, counts))]
        for n in lengths:
            row = by_length.get(n)
            shown = row and {**row, "gigabytes": row.get("bytes", 0) / 1e9}
            line += [form.format(**shown) if shown else "-" for _, form in fields]
        lines.append(line)
    tokens = ", ".join(str(n) for n in sorted({row["tokens"] for row in record["end_to_end"]}))
    conditions = (
        f"{record['device']}, jax {record['versions']['jax']}, responses of {tokens} tokens."
    )
    page = ["## Cost at LLaDA-8B's shapes", "", TEXTS["notes"]["large"]]
    page += [f"`{record['command']}`: {conditions}", "", table(head, lines), ""]
    if record["left_out"]:
        page += ["Left out, with the library's reason:", ""]
        page += [f"- {reason}" for reason in record["left_out"]] + [""]
    return page
