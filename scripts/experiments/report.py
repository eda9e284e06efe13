"""Writes docs/results.md and the pictures; every number is of the run's JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record import relative, replace

from experiments.grids import Cell
from experiments.plots import draw_all
from experiments.records import read_json
from experiments.summary import MEASUREMENTS

Record = Mapping[str, Any]
Arm = tuple[Mapping[str, Any], Mapping[str, Any]]  # an arm's comparison, and its group

# Checks that the page lists also where they hold.
_LISTED = ("accuracy is recall", "recall is K/N", "K = N", "no answer")

CAPTIONS = {
    "needle_heat_map": "Accuracy by length of the document and depth of the needle",
    "accuracy_by_depth": "Accuracy against depth, with and without anchors, 95% bands",
    "chunk_scores": "Chunk scores, the needle's chunk marked",
    "attention_on_anchors": "Attention of the masked response on the first tokens of kept chunks",
    "denoising_order": "In which evaluation each slot of a response was filled",
    "speed": "Seconds of an answer against length",
    "differences": "Difference of accuracy from the reference, with 95% intervals",
}

# Questions about the paper's claims: title, grid, settings of the arm, and what is compared.
CLAIMS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("Is sparse better than dense?", "main", {"selection": "dense"}, "dense against top K"),
    ("Is the selection better than chance?", "main", {"selection": "random"},
     "random chunks against top K"),
    ("Would a perfect selection help?", "main", {"selection": "oracle"}, "oracle against top K"),
    ("Do anchors help?", "anchors", {"anchors": False}, "no anchors against anchors"),
    ("Independent or joint encoding?", "encoding", {"encoding": "independent"},
     "independent against joint"),
)  # fmt: skip

NOTES = """\
Accuracy: exact match of the response's first number. Recall: how often all chunks were kept that
hold the needle (both, where a border cuts it). Lead: score of the needle's chunk minus the best
other score. Difference: accuracy minus the reference's, on the same examples; **bold** where its
interval excludes 0 and Holm's p is below 0.05. Brackets: 95% intervals, Wilson's for shares,
bootstrap over examples for differences and means. p: McNemar's exact test; Holm's is adjusted over
the grid. TFLOP: counted by formula from true lengths (`scripts/experiments/flops.py`). ms: a
request's share of its batch's time, without compiling.
"""

LIMITS = """\
## Limits

- The model is the project's small one (135M parameters), trained to find such needles in whole
  documents (`small_model/MODEL_CARD.md`). Its results need not hold for LLaDA-8B or other tasks.
- Exact copying is measured. Summaries, reasoning over several places and long answers are not.
- Near 100% accuracy a setting can be shown to be worse, but not to be better.
- Where no difference is shown, there may still be one.
"""


def write_report(source: Path, results: Path, pictures: Path) -> int:
    """Writes the page and its pictures."""
    record = read_json(source, ValueError)
    if not record.get("cells"):
        raise ValueError(f"{source} holds no cells")
    drawn = draw_all(record, pictures)
    replace(results, results_page(record, drawn, relative(pictures, results), source.name))
    print(f"{results} and {len(drawn)} pictures in {pictures}")
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table's lines, with an empty line behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def percent(estimate: Sequence[float] | None) -> str:
    """Formats a share with its interval, in percent."""
    if estimate is None:
        return "-"
    value, low, high = (100 * x for x in estimate[:3])
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def points(estimate: Sequence[float] | None) -> str:
    """Formats a difference with its interval, in points."""
    if estimate is None:
        return "-"
    value, low, high = (100 * x for x in estimate[:3])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_clear(arm: Mapping[str, Any]) -> bool:
    """Tells whether an arm is shown to differ from its reference."""
    low, high = arm["difference"][1:3]
    return (low > 0 or high < 0) and arm["p_holm"] < 0.05


def difference(arm: Mapping[str, Any] | None) -> str:
    """Formats an arm's difference, in bold where it is clear."""
    if arm is None or "difference" not in arm:
        return "-"
    text = points(arm["difference"])
    return f"**{text}**" if is_clear(arm) else text


def verdict(arm: Mapping[str, Any]) -> str:
    """Says what an arm's comparison shows."""
    if not is_clear(arm):
        return "no difference shown"
    return "higher" if arm["difference"][1] > 0 else "lower"


def conditions(record: Record) -> list[tuple[str, str]]:
    """Returns where and how the run was measured, as (what, value)."""
    runs, cells = record["runs"], record["cells"].values()
    counts = sorted({cell["examples"] for cell in cells})
    sizes = sorted({run.get("parameters") for run in runs} - {None})
    calls = record.get("calls") or []
    processes = max(run.get("processes", 1) for run in runs)
    rows = [
        ("device", ", ".join(sorted({run["device"] for run in runs}))),
        ("jax", ", ".join(sorted({run["versions"]["jax"] for run in runs}))),
        ("parameters", ", ".join(f"{size / 1e6:,.0f}M" for size in sizes)),
        ("dtype", record["identity"]["dtype"]),
        ("cells", str(len(cells))),
        ("examples a cell", " to ".join(str(n) for n in sorted({counts[0], counts[-1]}))),
        ("missing", "" if record["complete"] else f"not complete, {record['wanted']} wanted"),
        ("calls", f"{len(calls)}, {sum(calls):,.0f} s in all" if calls else ""),
        ("processes", f"{processes}, so times are no benchmark" if processes > 1 else ""),
        ("notes", record.get("notes", "")),
    ]
    return [(name, value) for name, value in rows if value]


def over_text(group: Mapping[str, Any]) -> str:
    """Names the settings under which a group's question is asked."""
    return ", ".join(
        " and ".join(str(x).replace("_", " ") for x in value)
        if isinstance(value, list)
        else (f"{value:,} tokens" if name == "length" else str(value))
        for name, value in group["over"].items()
    )


def grid_table(record: Record, name: str) -> list[str]:
    """Returns a grid's table: reference and arms of every group."""
    head = (
        "setting", "accuracy, %", "recall, %", "recall at 1, %", "lead, nats",
        "difference, points", "p", "p, Holm", "evaluations", "TFLOP", "ms",
    )  # fmt: skip
    rows = []
    for group in record["grids"][name]["groups"]:
        over, reference = over_text(group), record["cells"].get(group["reference"])
        title = group["reference"]
        if reference:
            base = Cell.from_settings(reference["settings"])
            title = base.label(Cell.from_settings(group["over"])).replace("default", "top-k")
        rows.append(_row(f"**{over}{': ' if over else ''}{title}** (reference)", reference, None))
        rows += [_row(arm["label"], record["cells"].get(arm["cell"]), arm) for arm in group["arms"]]
    return table(head, rows)


def _row(
    title: str, cell: Mapping[str, Any] | None, arm: Mapping[str, Any] | None
) -> Sequence[str]:
    if cell is None:
        return [title, "not run", *[""] * 9]
    lead, flops, compared = cell.get("lead"), cell["flops"], arm is not None and "p_holm" in arm
    return [
        title,
        percent(cell["accuracy"]),
        percent(cell["recall"]),
        percent(cell.get("recall_at_1")),
        f"{lead[0]:.2f} [{lead[1]:.2f}, {lead[2]:.2f}]" if lead else "-",
        difference(arm),
        *([p_value(arm["p"]), p_value(arm["p_holm"])] if arm and compared else ["-", "-"]),
        f"{cell['evaluations'][0]:.2f}",
        f"{flops['total'] / 1e12:.3f}" if flops else "-",
        f"{1000 * cell['seconds']['total']:.1f}",
    ]


def _arms(record: Record, grid: str, settings: Mapping[str, Any]) -> Iterator[Arm]:
    """Yields the compared arms with these settings, of the grid or of the quick one."""
    name = next((n for n in (grid, "quick") if record["grids"].get(n)), None)
    for group in record["grids"][name]["groups"] if name else ():
        for arm in group["arms"]:
            cell = record["cells"].get(arm["cell"])
            reference = record["cells"].get(group["reference"])
            if not cell or not reference or "difference" not in arm:
                continue
            if all(cell["settings"][key] == value for key, value in settings.items()):
                yield arm, group


def claims(record: Record) -> list[str]:
    """Returns what the run says about the paper's claims, a table for each question."""
    head = ("setting", "reference, %", "arm, %", "difference, points", "p, Holm", "n", "shown")
    place = ("middle less ends: reference", "arm", "change")
    lines: list[str] = []
    for title, grid, settings, compared in CLAIMS:
        arms = list(_arms(record, grid, settings))
        lines += [f"### {title}", ""]
        if not arms:
            lines += ["Not measured in this run.", ""]
            continue
        by_place = any("middle_less_ends" in arm for arm, _ in arms)
        rows = []
        for arm, group in arms:
            reference, cell = (record["cells"][k] for k in (group["reference"], arm["cell"]))
            seed = cell["settings"]["seed"] if cell["settings"]["selection"] == "random" else None
            length = f"{cell['settings']['length']:,} tokens"
            row = [
                f"{over_text(group) or length}{'' if seed is None else f', seed {seed}'}",
                percent(reference["accuracy"]), percent(cell["accuracy"]), difference(arm),
                p_value(arm["p_holm"]), str(arm["examples"]), verdict(arm),
            ]  # fmt: skip
            if by_place:
                row += [points(x.get("middle_less_ends")) for x in (reference, cell, arm)]
            rows.append(row)
        lines += [f"{compared}:", "", *table((*head, *(place if by_place else ())), rows)]
    return lines


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
    lines = [
        "# Results of the ablation", "",
        f"Made by `scripts/ablate.py report` from `{source}`; do not edit. The run was "
        f"`{record['command']}`.", "",
        *table(("condition", "value"), conditions(record)),
        NOTES, "## The paper's claims", "", *claims(record), LIMITS,
    ]  # fmt: skip
    if drawn:
        lines += ["## Pictures", ""]
        if elsewhere := measured_elsewhere(record):
            lines += table(("measured on another device", "device", "dtype"), elsewhere)
        lines += [f"![{CAPTIONS[name]}]({pictures}/{name}.png)\n" for name in drawn]
    lines += ["## Tables", ""]
    for name, grid in record["grids"].items():
        lines += [f"### {name}", "", grid["question"], "", *grid_table(record, name)]
    checks = record["checks"]
    passed = sum(check["ok"] for check in checks)
    lines += [
        "## Do the numbers fit together?", "",
        f"{passed} of {len(checks)} checks hold (`scripts/experiments/checks.py`).", "",
    ]  # fmt: skip
    rows = [
        (c["name"], str(c["examples"]), c["found"], "holds" if c["ok"] else "**FAILS**")
        for c in checks
        if not c["ok"] or c["name"].startswith(_LISTED)
    ]
    lines += table(("check", "examples", "found", "result"), rows) if rows else []
    return "\n".join(lines).rstrip() + "\n"
