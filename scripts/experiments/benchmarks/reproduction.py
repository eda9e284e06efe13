"""The authors' runs on MultiFieldQA-en as rows of a table: settings, examples, results."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.example import DataError, Example, Malformed, Task, read_examples
from experiments.benchmarks.published import Kind, parse_fields, task_files
from experiments.benchmarks.run import summarise
from experiments.records import Key, Records
from experiments.statistics import bootstrap
from experiments.tables import interval, table
from pdllm_jax import ChunkConfig, ModelConfig, SelectionConfig
from pdllm_jax.method.caches import Method
from pdllm_jax.rules import ConfigError

TASK = "multifieldqa_en"
FULL = "full-recompute"  # the row whose time is the measure of the others
TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PUBLISHED = TABLES["published"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run; reproduction.toml says what the fields mean."""

    text: str
    f1: float | None = None
    method: Method = "prefilling"
    recipe: str = "paper"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Run(NamedTuple):
    """How a row is run with a model.

    name: of the first row with the same settings, under which the answers are recorded.
    scorer: what scores the chunks, in the words of the table.
    """

    name: str
    method: Method
    selection: SelectionConfig
    scorer: str


ROWS = {name: Row(**fields) for name, fields in TABLES["rows"].items()}


def plan_runs(config: ModelConfig, **changes: Any) -> dict[str, Run]:
    """Returns the run of every row.

    A scorer that the model cannot score with is replaced by "draft", masked copies of the query.

    Args:
        changes: of all rows' settings.
    """
    runs: dict[str, Run] = {}
    for name, row in ROWS.items():
        selection = getattr(SelectionConfig, row.recipe)(**changes, **row.settings)
        scorer = selection.scorer.name
        try:
            selection.scorer.check(config)
        except ConfigError:
            selection = dataclasses.replace(selection, scorer="draft")
            scorer = f"draft in the place of {scorer}"
        scorer = scorer if row.method == "prefilling" else "-"
        alike = (x.name for x in runs.values() if x[1:3] == (row.method, selection))
        runs[name] = Run(next(alike, name), row.method, selection, scorer)
    return runs


def load_task(data: Path, limit: int | None) -> Task:
    """Loads the examples, all or the first ones. Raises DataError."""
    if data.is_dir():
        inside = data / "data"
        data = task_files("longbench", inside if inside.is_dir() else data, [TASK])[TASK]
    kind = Kind(**TABLES["task"])

    def parse(raw: dict[str, Any], line: int) -> Example:
        if (name := raw.get("dataset") or TASK) != TASK:
            raise ValueError(f"dataset must be {TASK!r}, got {name!r:.40}")
        if not str(raw.get("input") or raw.get("question") or "").strip():
            raise ValueError("input or question is missing or empty")
        return parse_fields("longbench", TASK, kind, raw, line)

    examples = read_examples(data, parse, Malformed("stop", print))[:limit]
    if not examples:
        raise DataError(f"{data} holds no examples")
    return Task("longbench", TASK, kind.gen_length, kind.score, examples, chat=kind.chat)


def speedup(records: Records, task: Task, name: str) -> list[float] | None:
    """Returns full recomputation's time over the run's, with its 95% interval."""
    pairs = [
        [records.done.get(Key(task.benchmark, task.name, run, e.id)) for run in (FULL, name)]
        for e in task.examples
    ]
    if any(None in pair for pair in pairs):
        return None
    seconds = np.array([[row["seconds"]["total"] for row in pair] for pair in pairs])
    return [*bootstrap(lambda full, own, axis: full.sum(axis) / own.sum(axis), *seconds.T)]


def report(runs: Mapping[str, Run], task: Task, records: Records) -> list[dict[str, Any]]:
    """Returns the rows of the table. runs: those that are asked for, by row."""
    names = dict.fromkeys(run.name for run in runs.values())
    measured = {row["method"]: row for row in summarise([task], names, records)}
    return [
        {
            "row": name,
            "text": ROWS[name].text,
            "published_f1": ROWS[name].f1,
            "scorer": run.scorer + ("" if name == run.name else f" (the run of {run.name})"),
            "speedup": speedup(records, task, run.name),
            **measured[run.name],
        }
        for name, run in runs.items()
    ]


def markdown(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Returns the table and the notes under it."""
    speed = f"speed-up (published: {PUBLISHED['speedup']}x)"
    head = ["row", "published F1", "F1 [95%]", "seconds in all", speed, "scorer"]
    body = [
        [
            f"{row['row']}: {row['text']}",
            "-" if row["published_f1"] is None else f"{row['published_f1']:.2f}",
            interval([row["score"], *row["interval"]], ".2f", 1),
            f"{row['seconds_in_all']:,.1f}",
            interval(row["speedup"], ".2f", 1),
            row["scorer"],
        ]
        for row in rows
    ]
    return "\n".join([table(head, body), "", *(f"- {note}" for note in notes)])


def notes_on(
    rows: Sequence[Mapping[str, Any]], family: str, chunk_size: int, top_k: int, machines: int
) -> list[str]:
    """Returns what a reader must know to compare the columns.

    machines: on which the records were made, versions of the software included.
    """
    count, cut = rows[0]["examples"], max(row["truncated"] for row in rows)
    full, own, times = (PUBLISHED[k] for k in ("full_recompute_seconds", "seconds", "speedup"))
    usual = ChunkConfig().chunk_size, SelectionConfig.paper().top_k
    possible = {
        f"Published: {PUBLISHED['model']}, {PUBLISHED['examples']} examples. Full recomputation "
        f"took {full:,} s and their server {own} s: {times}x.": True,
        f"This checkpoint is of the family {family!r}: the published rows are of "
        f"{PUBLISHED['family']!r}.": family != PUBLISHED["family"],
        f"Examples here: {count}.": count != PUBLISHED["examples"],
        f"Chunks of {chunk_size} tokens, {top_k} of them kept; published: {usual[0]} and "
        f"{usual[1]}.": (chunk_size, top_k) != usual,
        f"{cut} whole prompts lost their middle, to fit the model's positions.": cut,
        f"The seconds come from {machines} different machines or versions.": machines > 1,
    }
    return [note for note, holds in possible.items() if holds]
