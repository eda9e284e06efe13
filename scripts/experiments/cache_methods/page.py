"""Writes docs/rivals.md, and its picture, from the JSON of a run of the grids "methods".

The run is that of `ablate.py run --grid methods methods-multi costs`. A second record, of
`benchmark.py speed --methods`, adds times and memory at the sizes of a large model. What the
records lack is named on the page with the command that measures it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.pictures import figure

from experiments.grids import MULTI, Cell
from experiments.records import read_json, write_json, write_text
from experiments.report import Record, conditions, over_text, with_part
from experiments.tables import difference, p_value, percent, table, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PICTURE = "cache_methods"
_GRIDS = ("methods", "rules")  # the first part of their names
_HEAD = ("method", "accuracy, %", "difference, points", "p, Holm", "answers that are plain's")
_HEAD += ("evaluations", "rows", "TFLOP")
_TIMED = ("seconds", "times faster than plain", "GB", "on the front")
_COUNTED = ("times fewer TFLOP than plain", "on the front")  # of a run without times
# A method's cell, its row of costs, and its comparison with plain's; cell: None if it was not run.
Arm = tuple[Record | None, Record | None, Record]


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
        grids = " or ".join(_GRIDS)
        raise ValueError(f"{source} holds no grid {grids}: run ablate.py run --grid methods")
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
    lines += ["### Compared with the authors' code", "", TEXTS["notes"]["compared"]]
    compared = [(one["what"], one["answers"], one["notes"]) for one in TEXTS["compared"]]
    lines += [table(("code", "equal answers", "settings"), compared), ""]
    if runs:
        lines += ["## Accuracy and cost, small model", "", TEXTS["notes"]["small"]]
    for run in runs:
        lines += [f"`{run['command']}`", "", table(("condition", "value"), [*_conditions(run)]), ""]
    if drawn is not None:
        lines += [f"![Accuracy against the cost of a request]({place}/{PICTURE}.png)", ""]
    for run in runs:
        head = (*_HEAD, *(_TIMED if _is_timed(run) else _COUNTED))
        for title, rows in _tables(run):
            lines += [f"### {title}", "", table(head, rows), ""]
    lines += _large(large) if large else []
    lines += _claim(record, runs) if runs else []
    if missing := [*_missing(runs, large)]:
        lines += ["## Not measured yet", "", table(("what", "command"), missing), ""]
    lines += ["## Limits", "", TEXTS["notes"]["limits"]]
    write_text(page, "\n".join(lines).rstrip() + "\n")
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
    name = f"prefilling, {one.encoding}" if one.method.uses_chunks else str(one.method)
    rule = one.unmask or (f"threshold {one.threshold}" if one.threshold is not None else None)
    return f"{name}, {rule}" if rule else name


def _is_timed(run: Record) -> bool:
    return bool((run.get("costs") or {}).get("rows"))


def _groups(run: Record) -> Iterator[tuple[str, str, list[Arm]]]:
    """Yields grid, title and methods for each group of which anything was run."""
    costs = {row["cell"]: row for row in (run.get("costs") or {"rows": []})["rows"]}
    for name, grid in run["grids"].items():
        if not name.startswith(_GRIDS):
            continue
        for group in grid["groups"]:
            compared = [{"cell": group["reference"]}, *group["arms"]]
            arms = [(run["cells"].get(x["cell"]), costs.get(x["cell"]), x) for x in compared]
            if settings := next((cell["settings"] for cell, _, _ in arms if cell), None):
                title = over_text({"over": {"length": settings["length"]}})
                tasks = "two numbers" if MULTI in settings["tasks"] else "one number"
                yield name, f"{title}, {tasks}" + ", rules" * name.startswith("rules"), arms


def _points(run: Record, arms: Sequence[Arm]) -> dict[str, tuple[float, float]]:
    """Returns (cost, accuracy) by cell: seconds, or TFLOP of a run without times."""
    timed, points = _is_timed(run), {}
    for cell, cost, arm in arms:
        if cell is None or not (cost if timed else cell["flops"]):
            continue
        spent = cost["seconds"] if timed else cell["flops"]["total"] / 1e12
        points[arm["cell"]] = spent, cell["accuracy"][0]
    return points


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tells for each (cost, accuracy) whether no other point is cheaper and no less accurate."""
    return [
        not any((c <= cost and a >= accuracy and (c, a) != (cost, accuracy)) for c, a in points)
        for cost, accuracy in points
    ]


def _tables(run: Record) -> Iterator[tuple[str, list[list[str]]]]:
    for _, title, arms in _groups(run):
        points = _points(run, arms)
        best = dict(zip(points, front([*points.values()]), strict=True))
        plain, rows = points.get(arms[0][2]["cell"]), []
        for cell, cost, arm in arms:
            if cell is None:
                blank = [""] * (len(_HEAD) - 2 + len(_TIMED if _is_timed(run) else _COUNTED))
                rows.append([_selection(arm), "not measured", *blank])
                continue
            flops = f"{cell['flops']['total'] / 1e12:.2f}" if cell["flops"] else "-"
            row = [name_of(cell), percent(cell["accuracy"]), difference(arm)]
            same = arm.get("same_tokens")
            row += [p_value(arm.get("p_holm")), "-" if same is None else f"{same}"]
            row += [f"{cell['evaluations'][0]:.1f}"]
            row += ["-" if cell["rows"] is None else f"{cell['rows']:,.0f}", flops]
            point, on_front = points.get(arm["cell"]), "yes" if best.get(arm["cell"]) else ""
            times = f"{plain[0] / point[0]:.1f}" if plain and point else "-"
            if not _is_timed(run):
                row += [times, on_front]
            elif cost:
                row += ["{seconds:.3f} [{least:.3f}, {most:.3f}]".format(**cost), times]
                row += [f"{cost['bytes'] / 1e9:.2f}", on_front]
            else:
                row += ["-"] * 4
            rows.append(row)
        yield title, rows


def _selection(arm: Record) -> str:
    """Returns the selection of a cell that was not run, by its key."""
    return arm["cell"].rsplit("-", 2)[0]


def _claim(record: Record, runs: Sequence[Record]) -> list[str]:
    """Sums up each method's tests against plain generation, and quotes the record's reading."""
    tests: dict[str, list[tuple[Record, float | None]]] = {}
    for grid, _, arms in (group for run in runs for group in _groups(run)):
        plain = arms[0][0]
        for cell, _, arm in arms[1:]:
            if grid == "rules" or not cell or not plain or "p_holm" not in arm:
                continue
            flops = plain["flops"] and cell["flops"]
            fewer = plain["flops"]["total"] / flops["total"] if flops else None
            tests.setdefault(name_of(cell), []).append((arm, fewer))
    rows = []
    for name, found in tests.items():
        verdicts = [verdict(arm) for arm, _ in found]
        points = [100 * arm["difference"][0] for arm, _ in found]
        times = [fewer for _, fewer in found if fewer]
        row = [name, str(len(found)), *(str(verdicts.count(word)) for word in ("lower", "higher"))]
        row += [f"{min(points):+.1f} to {max(points):+.1f}"]
        rows.append([*row, f"{min(times):.1f} to {max(times):.1f}" if times else "-"])
    head = ("method", "tests against plain", "lower", "higher", "differences, points")
    head += ("times fewer TFLOP than plain",)
    page = ["## What the tables say about the paper's claim", "", TEXTS["notes"]["claim"]]
    page += [table(head, rows), ""]
    return [*page, *(f"- {text}" for text in record.get("reading", ())), ""]


def _missing(runs: Sequence[Record], large: Record | None) -> Iterator[tuple[str, str]]:
    """Yields what the records lack, with the command that measures it."""
    for run in runs:
        call = f"scripts/ablate.py run CHECKPOINT --out DIR --examples {run['wanted']} --grid"
        cells: dict[tuple[str, str], list[str]] = {}
        for grid, title, arms in _groups(run):
            for cell, _, arm in arms:
                if cell is None:
                    cells.setdefault((grid, _selection(arm)), []).append(title)
        for (grid, name), titles in cells.items():
            yield f"`{name}`: {'; '.join(titles)}", f"`{call} {grid} --where selection={name}`"
        untimed = {g: None for g, _, arms in _groups(run) for c, cost, _ in arms if c and not cost}
        for grid in untimed:
            yield f"seconds and GB of grid {grid}", f"`{call} {grid} costs`"
    if large is None:
        names = (name for one in TEXTS["method"] for name in one["names"] if name != "prefilling")
        command = f"{TEXTS['notes']['large_command']} --methods {' '.join(names)}"
        yield "seconds and GB at LLaDA-8B's shapes", f"`{command}`"


def pareto(runs: Sequence[Record]) -> Figure | None:
    """Draws accuracy against a request's cost, a panel for each length and question."""
    groups = [
        (title, _is_timed(run), points, {x["cell"]: cell for cell, _, x in arms})
        for run in runs
        for _, title, arms in _groups(run)
        if (points := _points(run, arms))
    ]
    if not groups:
        return None
    from matplotlib.ticker import LogLocator

    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    picture, axes = figure(4.2 * columns, 3.4 * lines + 0.8, lines, columns)
    names = list(dict.fromkeys(name_of(cells[key]) for _, _, at, cells in groups for key in at))
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, timed, at, cells) in zip(axes.flat, groups, strict=False):
        for key, (x, y) in at.items():
            index, (low, high) = names.index(name_of(cells[key])), cells[key]["accuracy"][1:3]
            style = {"color": f"C{index % 10}", "marker": "osD^v"[index // 10 % 5], "markersize": 5}
            axis.errorbar(x, 100 * y, [[100 * (y - low)], [100 * (high - y)]], **style)
        points = [*at.values()]
        line = sorted(point for point, on in zip(points, front(points), strict=True) if on)
        axis.plot(*zip(*[(x, 100 * y) for x, y in line], strict=True), color="black", linewidth=0.6)
        axis.set_title(title, fontsize=9)
        axis.set(xscale="log", xlabel="seconds of a request" if timed else "TFLOP of a request")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axis.xaxis.set_minor_formatter("")
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
