"""docs/results.md, README's part and the pictures: every number is of the run's JSON.

What is said of a comparison follows from its interval and its adjusted p alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pages import between, relative, replace

from ablation.grid import Cell
from ablation.plots import draw_all
from ablation.run import LOOKS

Record = Mapping[str, Any]
BEGIN, END = "<!-- ablation: made by scripts/ablate.py report -->", "<!-- end of ablation -->"

# Checks that are listed where they hold, too.
_TOLD = ("accuracy is recall", "recall is K/N", "K = N", "no answer")

CAPTIONS = {
    "needle_heat_map": "Accuracy by length of the document and depth of the needle",
    "accuracy_by_depth": "Accuracy against depth, with and without anchors, 95% bands",
    "chunk_scores": "Chunk scores, the needle's chunk marked",
    "attention_on_anchors": "Attention of the masked response on the first tokens of kept chunks",
    "denoising_order": "In which evaluation each slot of a response was filled",
    "speed": "Seconds of an answer against length",
    "differences": "Accuracy less the reference's, with 95% intervals",
}


def write_report(source: Path, results: Path, readme: Path, pictures: Path) -> int:
    """Writes all three. ValueError where README has no place marked for its part."""
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(record, dict) or not record.get("cells"):
        raise ValueError(f"{source} holds no cells")
    text = readme.read_text(encoding="utf-8")
    between(text, BEGIN, END, "", readme)  # before anything is written
    made = draw_all(record, pictures)
    part = readme_part(record, made, relative(pictures, readme), relative(results, readme))
    replace(results, results_page(record, made, relative(pictures, results), source.name))
    replace(readme, between(text, BEGIN, END, part, readme))
    print(f"{results}, {readme} and {len(made)} pictures in {pictures}")
    return 0


def percent(estimate: Sequence[float] | None) -> str:
    """A share with its interval, in percent."""
    if estimate is None:
        return "-"
    value, low, high = (100 * x for x in estimate[:3])
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def points(estimate: Sequence[float]) -> str:
    """A difference with its interval, in points."""
    value, low, high = (100 * x for x in estimate[:3])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def conditions(record: Record) -> str:
    """Where and how it was measured, in a paragraph."""
    devices = sorted({run["device"] for run in record["runs"]})
    versions = sorted({f"jax {run['versions']['jax']}" for run in record["runs"]})
    processes = max(run.get("processes", 1) for run in record["runs"])
    sizes = {run.get("parameters") for run in record["runs"]} - {None}
    model = "".join(f"a model of {size / 1e6:,.0f}M parameters, " for size in sorted(sizes))
    cells = record["cells"].values()
    least, most = min(c["examples"] for c in cells), max(c["examples"] for c in cells)
    counts = f"{least}" if least == most else f"{least} to {most}"
    text = (
        f"{', '.join(devices)}; {', '.join(versions)}; {model}{record['identity']['dtype']}. "
        f"{counts} examples a cell, the same ones for every setting of a length; {len(cells)} "
        "cells. Several tokens a step at confidence 0.9, where nothing else is said."
    )
    if not record["complete"]:
        text += f" **Not complete: {record['wanted']} examples a cell were asked for.**"
    if calls := record.get("calls"):
        times = "once" if len(calls) == 1 else f"{len(calls)} times"
        text += f" Called {times}, {sum(calls):,.0f} s in all, loading and compiling included."
    if processes > 1:
        text += f" {processes} processes shared the device, so that times are no benchmark."
    return f"{text} {record.get('notes', '')}".rstrip()


def grid_table(record: Record, name: str) -> list[str]:
    """One table a grid: reference and arms of every group."""
    head = (
        "| setting | accuracy, % | recall, % | recall at 1, % | lead, nats | less the reference, "
        "points | p | p, Holm | evaluations | TFLOP | ms |"
    )
    lines = [head, "|" + "---|" * 11]
    for group in record["grids"][name]["groups"]:
        over = ", ".join(_said(key, value) for key, value in group["over"].items())
        reference = record["cells"].get(group["reference"])
        base = Cell.from_settings(reference["settings"]) if reference else None
        common = Cell(**_tuples(group["over"]))
        title = base.label(common) if base else group["reference"]
        title = "top-k" if title == "default" else title
        title = f"**{over}{': ' if over else ''}{title}** (reference)"
        lines.append(_row(title, reference, None))
        lines += [
            _row(arm["label"], record["cells"].get(arm["cell"]), arm) for arm in group["arms"]
        ]
    return lines


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _said(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(str(x).replace("_", " ") for x in value)
    return f"{value:,} tokens" if name == "length" else str(value)


def _row(title: str, cell: Mapping[str, Any] | None, comparison: Mapping[str, Any] | None) -> str:
    if cell is None:
        return f"| {title} | not run |" + " |" * 9
    told = ["-", "-", "-"]
    if comparison is not None and "difference" in comparison:
        told = [points(comparison["difference"])]
        told += [p_value(comparison[name]) for name in ("p", "p_holm")]
    lead = cell.get("lead")
    flops = cell["flops"]
    columns = [
        title,
        percent(cell["accuracy"]),
        percent(cell["recall"]),
        percent(cell.get("recall_at_1")),
        "-" if lead is None else f"{lead[0]:.2f} [{lead[1]:.2f}, {lead[2]:.2f}]",
        *told,
        f"{cell['evaluations'][0]:.2f}",
        "-" if flops is None else f"{flops['total'] / 1e12:.3f}",
        f"{1000 * cell['seconds']['total']:.1f}",
    ]
    return "| " + " | ".join(columns) + " |"


def is_clear(comparison: Mapping[str, Any]) -> bool:
    """Whether an arm is shown to differ from its reference."""
    low, high = comparison["difference"][1:3]
    return (low > 0 or high < 0) and comparison["p_holm"] < 0.05


def verdict(comparison: Mapping[str, Any]) -> str:
    """What may be said of an arm against its reference."""
    said = "higher" if comparison["difference"][1] > 0 else "lower"
    if not is_clear(comparison):
        said = "no difference shown"
    return (
        f"{said}: {points(comparison['difference'])} points (McNemar p "
        f"{p_value(comparison['p'])}, Holm {p_value(comparison['p_holm'])}, "
        f"n = {comparison['examples']})"
    )


def _compared(record: Record, grids: Sequence[str], selected: Mapping[str, Any]) -> list[Any]:
    """(group, arm, its cell, the reference's) of arms with these settings, in the first grid."""
    for name in grids:
        found = []
        for group in (record["grids"].get(name) or {"groups": []})["groups"]:
            reference = record["cells"].get(group["reference"])
            for arm in group["arms"]:
                cell = record["cells"].get(arm["cell"])
                if cell is None or reference is None or "difference" not in arm:
                    continue
                if all(cell["settings"][key] == value for key, value in selected.items()):
                    found.append((group, arm, cell, reference))
        if found:
            return found
    return []


def claims(record: Record) -> list[str]:
    """What the run says about the paper's claims, sign by sign."""
    lines: list[str] = []

    def section(title: str, found: list[Any], what: str, other: str, extra: str = "") -> None:
        lines.extend([f"### {title}", ""])
        if not found:
            lines.extend(["Not measured in this run.", ""])
            return
        for group, arm, cell, reference in found:
            over = ", ".join(_said(k, v) for k, v in group["over"].items())
            over = over or f"{cell['settings']['length']:,} tokens"
            settings = cell["settings"]
            seed = f", seed {settings['seed']}" if settings["selection"] == "random" else ""
            lines.append(
                f"- {over}{seed}: {other} {percent(reference['accuracy'])}, {what} "
                f"{percent(cell['accuracy'])}; {verdict(arm)}."
            )
            if extra and "middle_less_ends" in arm:
                at = [points(c["middle_less_ends"]) for c in (reference, cell)]
                lines.append(
                    f"  Middle of the document less its ends, points: {at[0]} {other}, {at[1]} "
                    f"{what}; {extra} changes that by {points(arm['middle_less_ends'])}."
                )
        lines.append("")

    section(
        "Is sparse better than dense?",
        _compared(record, ("main", "quick"), {"selection": "dense"}),
        "dense (the whole prompt)", "top K",
    )  # fmt: skip
    section(
        "Is the selection better than chance?",
        _compared(record, ("main", "quick"), {"selection": "random"}),
        "random chunks", "top K",
    )  # fmt: skip
    section(
        "Would a perfect selection help?",
        _compared(record, ("main", "quick"), {"selection": "oracle"}),
        "the oracle", "top K",
    )  # fmt: skip
    section(
        "Do anchors help, and in the middle of the document?",
        _compared(record, ("anchors", "quick"), {"anchors": False}),
        "without anchors", "with anchors", "leaving them out",
    )  # fmt: skip
    section(
        "Independent against joint encoding?",
        _compared(record, ("encoding", "quick"), {"encoding": "independent"}),
        "independent", "joint",
    )  # fmt: skip
    lines += ["### Which other choices change accuracy?", "", *choices(record), ""]
    return lines


CHOICES = (
    "encoding", "scorer", "draft", "top-k", "chunk-size", "sparsity", "positions", "choices",
    "decoding",
)  # fmt: skip


def choices(record: Record) -> list[str]:
    """Of each grid the arms whose difference is shown, and which show none."""
    lines = []
    for name in CHOICES:
        for group in (record["grids"].get(name) or {"groups": []})["groups"]:
            arms = [arm for arm in group["arms"] if "difference" in arm]
            shown = [f"{arm['label']} {points(arm['difference'])}" for arm in arms if is_clear(arm)]
            others = [arm["label"] for arm in arms if not is_clear(arm)]
            over = ", ".join(_said(key, value) for key, value in group["over"].items())
            parts = ["; ".join(shown)] if shown else []
            if others:
                parts.append(f"no difference shown: {'; '.join(others)}")
            if parts:
                lines.append(f"- {name}{', ' if over else ''}{over}: {'. '.join(parts)}.")
    return lines or ["Not measured in this run."]


LIMITS = """\
## What these numbers do not say

- The project's small model (135M parameters) was trained to find such needles in whole documents
  (`small_model/MODEL_CARD.md`). A sign found with it need not hold for LLaDA-8B or other tasks.
- An answer is right when its first number is the value asked for: exact copying. Summaries,
  reasoning over several places and long answers are not measured.
- Where accuracy is near 100% no setting can show that it is better, only that it is not worse.
- An interval is of these examples; several grids ask several questions, and Holm's adjustment holds
  within a grid. "No difference is shown" does not mean that there is none.
- TFLOP are counted from true lengths by formula (`scripts/ablation/flops.py`); ms are a request's
  share of its batch's time, compiling apart.
"""


def results_page(record: Record, made: Sequence[str], pictures: str, source: str) -> str:
    """docs/results.md."""
    failed = [check for check in record["checks"] if not check["ok"]]
    lines = [
        "# Results of the ablation", "",
        f"Made by `scripts/ablate.py report` from `{source}` "
        f"(`{record['command']}`); do not edit.", "",
        conditions(record), "",
        "Accuracy is exact match; recall says how often all chunks were kept that hold the needle "
        "(both where a border cuts it, though one may be enough to answer); lead is the score of "
        "the needle's chunk less the best other's. Brackets are 95% intervals: Wilson's for "
        "shares, bootstrap over examples for differences and means. p is "
        "McNemar's exact test on the same examples.", "",
        "## What they say about the paper's claims", "",
        *claims(record),
        LIMITS,
    ]  # fmt: skip
    if made:
        lines += ["## Pictures", "", *measured_apart(record)]
        lines += [f"![{CAPTIONS[name]}]({pictures}/{name}.png)\n" for name in made]
    lines += ["## Tables", ""]
    for name, grid in record["grids"].items():
        lines += [f"### {name}", "", grid["question"], "", *grid_table(record, name), ""]
    lines += [
        "## Do the numbers fit together?", "",
        f"{len(record['checks']) - len(failed)} of {len(record['checks'])} checks hold "
        "(`scripts/ablation/checks.py`). Statistical ones are of 99.9% intervals.", "",
    ]  # fmt: skip
    told = [c for c in record["checks"] if not c["ok"] or c["name"].startswith(_TOLD)]
    if told:
        lines += ["| check | examples | found | |", "|---|---|---|---|"]
        lines += [
            f"| {check['name']} | {check['examples']} | {check['found']} | "
            f"{'holds' if check['ok'] else '**FAILS**'} |"
            for check in told
        ]
    return "\n".join(lines).rstrip() + "\n"


def measured_apart(record: Record) -> list[str]:
    """Where the pictures' own measurements come from, if not from where the cells do."""
    devices = {run["device"] for run in record["runs"]}
    found = []
    for name in LOOKS:
        look = record.get(name)
        if look and look["run"]["device"] not in devices:
            settings = look.get("settings") or look["rows"][0].get("settings") or {}
            at = f", {settings['length']:,} tokens" if "length" in settings else ""
            found.append(f"{name}: {look['run']['device']}, {look['dtype']}{at}")
    return [f"Measured elsewhere than the cells: {'; '.join(found)}.", ""] if found else []


def readme_part(record: Record, made: Sequence[str], pictures: str, results: str) -> str:
    """The heat map and the main comparison, with where to read on."""
    name = next((n for n in ("main", "quick") if record["grids"].get(n)), None)
    lines = [
        f"**Ablations** (`{record['command']}`; everything is in `{results}`): "
        f"{conditions(record)}", "",
    ]  # fmt: skip
    if name is not None:
        lines += ["| setting | accuracy, % | recall, % | less top K, points | TFLOP |"]
        lines += ["|" + "---|" * 5]
        for group in record["grids"][name]["groups"]:
            over = ", ".join(_said(k, v) for k, v in group["over"].items())
            reference = record["cells"].get(group["reference"])
            rows = [(f"**top K**{', ' if over else ''}{over}", reference, None)]
            rows += [(a["label"], record["cells"].get(a["cell"]), a) for a in group["arms"]]
            for title, cell, arm in rows:
                if cell is None:
                    continue
                less = points(arm["difference"]) if arm and "difference" in arm else ""
                flops = f"{cell['flops']['total'] / 1e12:.2f}" if cell["flops"] else "-"
                lines.append(
                    f"| {title} | {percent(cell['accuracy'])} | {percent(cell['recall'])} | {less} "
                    f"| {flops} |"
                )
        lines.append("")
    for picture in ("needle_heat_map", "accuracy_by_depth"):
        if picture in made:
            lines += [f"![{CAPTIONS[picture]}]({pictures}/{picture}.png)", ""]
    return "\n".join(lines)
