"""Writes docs/results.md and the pictures; every number is of the run's JSON."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.grids import MEASUREMENTS, Cell
from experiments.plots import draw_all
from experiments.records import read_json, write_json, write_text
from experiments.tables import difference, interval, p_value, percent, table, verdict

Record = Mapping[str, Any]

# Checks that the page lists also where they hold.
_LISTED = ("accuracy is recall", "recall is K/N", "K = N", "no answer")
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def write_report(source: Path, results: Path, pictures: Path, add: Path | None = None) -> None:
    """Writes the page and its pictures. add: a run that is put into the record first."""
    record = read_json(source, ValueError)
    if not record.get("cells"):
        raise ValueError(f"{source} holds no cells")
    if add is not None:
        record = with_part(record, read_json(add, ValueError), str(add))
        write_json(source, record)
    drawn = draw_all(record, pictures)
    place = Path(os.path.relpath(pictures.resolve(), results.resolve().parent)).as_posix()
    write_text(results, results_page(record, drawn, place, source.name))
    print(f"{results} and {len(drawn)} pictures in {pictures}")


def with_part(record: Record, part: Record, name: str = "the run") -> dict[str, Any]:
    """Returns the record with another run beside its own, in place of older runs of its grids."""
    if not part.get("cells"):
        raise ValueError(f"{name} holds no cells")
    for key in ("model", "dtype"):
        ours, theirs = record["identity"][key], part["identity"][key]
        if ours != theirs:
            raise ValueError(f"{name} is of {key} {theirs}, the record of {ours}")
    other = [old for old in record.get("parts", ()) if not {*old["grids"]} <= {*part["grids"]}]
    return {**record, "parts": [*other, dict(part)]}


def conditions(record: Record) -> list[tuple[str, str]]:
    """Returns where and how the run was measured, as (what, value)."""
    runs, cells = record["runs"], record["cells"].values()
    counts = sorted({cell["examples"] for cell in cells})
    sizes = sorted({run.get("parameters") for run in runs} - {None})
    calls = record.get("calls") or []
    processes = max(run.get("processes", 1) for run in runs)
    missing = f"not complete: some cells have fewer than {record['wanted']} examples, or none"
    rows = [
        ("device", ", ".join(sorted({run["device"] for run in runs}))),
        ("jax", ", ".join(sorted({run["versions"]["jax"] for run in runs}))),
        ("parameters", ", ".join(f"{size / 1e6:,.0f}M" for size in sizes)),
        ("dtype", record["identity"]["dtype"]),
        ("cells", str(len(cells))),
        ("examples a cell", " to ".join(str(n) for n in sorted({counts[0], counts[-1]}))),
        ("missing", "" if record["complete"] else missing),
        ("calls", f"{len(calls)}, {sum(calls):,.0f} s in all" if calls else ""),
        ("processes", f"{processes}, so times are no benchmark" if processes > 1 else ""),
        ("notes", record.get("notes", "")),
    ]
    return [(name, value) for name, value in rows if value]


def over_text(group: Mapping[str, Any]) -> str:
    """Names the settings under which a group's question is asked."""

    def words(name: str, value: Any) -> str:
        if isinstance(value, list):
            return " and ".join(value).replace("_", " ")
        return f"{value:,} tokens" if name == "length" else str(value)

    return ", ".join(words(*item) for item in group["over"].items())


GRID_HEAD = (
    *("setting", "accuracy, %", "recall, %", "recall at 1, %", "lead, nats"),
    *("difference, points", "p", "p, Holm", "evaluations", "TFLOP", "ms"),
)


def grid_rows(record: Record, name: str) -> Iterator[Sequence[str]]:
    """Yields the rows of a grid's table: reference and arms of every group."""
    for group in record["grids"][name]["groups"]:
        over, reference = over_text(group), record["cells"].get(group["reference"])
        title = ""
        if reference:
            base = Cell.from_settings(reference["settings"])
            title = base.label(Cell.from_settings(group["over"])).replace("default", "top-k")
        yield _row(f"**{over}{': ' if over and title else ''}{title}** (reference)", reference, {})
        for arm in group["arms"]:
            yield _row(arm["label"], record["cells"].get(arm["cell"]), arm)


def _row(title: str, cell: Mapping[str, Any] | None, arm: Mapping[str, Any]) -> Sequence[str]:
    if cell is None:
        return [title, "not run", *[""] * 9]
    return [
        title,
        *(percent(cell.get(name)) for name in ("accuracy", "recall", "recall_at_1")),
        interval(cell.get("lead"), ".2f", 1),
        difference(arm),
        *(p_value(arm.get(name)) for name in ("p", "p_holm")),
        "-" if cell["accuracy"] is None else f"{cell['evaluations'][0]:.2f}",
        f"{cell['flops']['total'] / 1e12:.3f}" if cell["flops"] else "-",
        f"{1000 * cell['seconds']['total']:.1f}",
    ]


def claim_rows(record: Record, claim: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each compared arm of the claim's grids, or of the quick one."""
    grids = [record["grids"][name] for name in claim["grids"] if name in record["grids"]]
    wanted = claim.get("settings", {})  # none: every arm
    if not grids and wanted:
        grids = [grid for name, grid in record["grids"].items() if name == "quick"]
    rows = []
    for group in (group for grid in grids for group in grid["groups"]):
        for arm in group["arms"]:
            reference, cell = (record["cells"].get(k) for k in (group["reference"], arm["cell"]))
            if not cell or not reference or "difference" not in arm:
                continue
            settings = cell["settings"]
            if any(settings[key] != value for key, value in wanted.items()):
                continue
            seed = f", seed {settings['seed']}" if settings["selection"] == "random" else ""
            title = over_text(group) or f"{settings['length']:,} tokens"
            row = [title + (seed if wanted else f", {arm['label']}")]
            row += [percent(x["accuracy"] or x["recall"]) for x in (reference, cell)]
            row += [difference(arm), p_value(arm["p_holm"]), str(arm["examples"]), verdict(arm)]
            if cell["accuracy"] is None:
                names = "recall_uncut", "recall_at_1"
                row += [percent(x.get(name)) for name in names for x in (reference, cell)]
                row += [f"{100 * cell['flops']['total'] / reference['flops']['total']:.1f}"]
            if "middle_less_ends" in arm:
                row += [interval(x.get("middle_less_ends")) for x in (reference, cell, arm)]
            rows.append(row)
    return rows


HEAD = ("setting", "reference, %", "arm, %", "difference, points", "p, Holm", "n", "shown")
DEPTH = ("middle less ends: reference", "arm", "change")
CHOICE = ("uncut needles: reference, %", "arm, %", "recall at 1: reference, %", "arm, %")
CHOICE += ("TFLOP, % of the reference",)


CALIBRATED = ("heads calibrated on", "layers that run", "heads (layer.head)", "examples")
CALIBRATED += ("needle's chunk first, by heads of other examples, %", "by all heads, %")


def calibration_rows(record: Record) -> Iterator[Sequence[str]]:
    """Yields a row for each calibration of a run."""
    for made in record.get("calibrations", {}).values():
        heads = ", ".join(f"{layer}.{head}" for layer, head in made["heads"])
        allowed, layers = len(made["clarity_by_layers"]), len(made["head_recall"])
        run = f"{made['layers']} of {layers}"
        run += "" if allowed == layers else f", at most {allowed} allowed"
        shares = (f"{100 * made[name]:.1f}" for name in ("recall", "recall_of_all"))
        names = " and ".join(made["tasks"]).replace("_", " ")
        yield (names, run, heads, str(made["examples"]), *shares)


def claims(record: Record, kind: str) -> Iterator[str]:
    """Yields what the runs say about the claims of a kind, a table for each question."""
    for claim in TEXTS[kind]:
        yield from (f"### {claim['question']}", "")
        runs = (record, *record.get("parts", ()))
        if rows := [row for run in runs for row in claim_rows(run, claim)]:
            head = (*HEAD, *(CHOICE if claim.get("selects") else DEPTH))[: len(rows[0])]
            yield from (f"{claim['compared']}:", "", table(head, rows), "")
            heads = [row for run in runs if claim.get("selects") for row in calibration_rows(run)]
            yield from (table(CALIBRATED, heads), "") if heads else ()
        else:
            yield from ("Not measured in this run.", "")


def measured_elsewhere(record: Record) -> list[tuple[str, str, str]]:
    """Returns the measurements that another device made: (name, device, dtype)."""
    devices = {run["device"] for run in record["runs"]}
    parts = {name: record[name] for name in MEASUREMENTS if record.get(name)}
    return [
        (name, part["run"]["device"], part["dtype"])
        for name, part in parts.items()
        if part["run"]["device"] not in devices
    ]


def results_page(record: Record, drawn: Sequence[str], pictures: str, source: str) -> str:
    """Returns docs/results.md."""
    origin = f"Made by `scripts/ablate.py report` from `{source}`; do not edit."
    lines = ["# Results of the ablation", "", f"{origin} The run was `{record['command']}`.", ""]
    parts, names = record.get("parts", ()), ("condition", "value")
    lines += [table(names, conditions(record)), ""]
    for part in parts:
        run = f"Of another run, `{part['command']}`: {', '.join(part['grids'])}."
        lines += [run, "", table(names, conditions(part)), ""]
    lines += [TEXTS["notes"], "## The paper's claims", "", *claims(record, "claims")]
    lines += ["## This project's claims", "", *claims(record, "own"), TEXTS["limits"]]
    if drawn:
        lines += ["## Pictures", ""]
        if elsewhere := measured_elsewhere(record):
            lines += [table(("measured on another device", "device", "dtype"), elsewhere), ""]
        lines += [f"![{TEXTS['captions'][name]}]({pictures}/{name}.png)\n" for name in drawn]
    lines += ["## Tables", ""]
    for run in (record, *parts):
        for name, grid in run["grids"].items():
            rows = [*grid_rows(run, name)]
            lines += [f"### {name}", "", grid["question"], "", table(GRID_HEAD, rows), ""]
    checks = [check for run in (record, *parts) for check in run["checks"]]
    passed = f"{sum(check['ok'] for check in checks)} of {len(checks)} checks hold"
    lines += ["## Do the numbers fit together?", "", f"{passed} (`scripts/experiments/checks.py`)."]
    rows = [
        (c["name"], str(c["examples"]), c["found"], "holds" if c["ok"] else "**FAILS**")
        for c in checks
        if not c["ok"] or c["name"].startswith(_LISTED)
    ]
    lines += ["", table(("check", "examples", "found", "result"), rows)] if rows else []
    return "\n".join(lines).rstrip() + "\n"
