"""LongBench v1, InfiniteBench and RULER: their examples from a local copy, as tasks.toml says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.example import (
    DataError,
    Example,
    Malformed,
    Task,
    answers_field,
    read_examples,
    text_field,
)
from experiments.benchmarks.metrics import METRICS, PACKAGES, paragraph_named
from experiments.records import read_json
from pdllm_jax.evaluation.prompts import split_ruler, split_template

NAMES = {"longbench": "LongBench", "infinitebench": "InfiniteBench", "ruler": "RULER"}
LETTERS = "ABCD"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a task is asked and scored; tasks.toml says what the fields mean."""

    metric: str
    gen_length: int = 0
    template: str = ""
    binary: bool = False
    chat: bool = True
    first_line: bool = False

    def score(self, prediction: str, example: Example) -> float:
        """Returns a prediction's score, in [0, 1]."""
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return METRICS[self.metric](prediction, example)


_TABLE = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))
KINDS: Mapping[str, Mapping[str, Kind]] = {
    benchmark: {
        name + suffix: Kind(**fields)
        for name, fields in _TABLE[benchmark].items()
        for suffix in (("", "_e") if benchmark == "longbench" else ("",))
    }
    for benchmark in NAMES
}


def load(
    benchmark: str,
    folder: Path,
    tasks: Sequence[str] | None,
    malformed: Malformed,
    *,
    config: Path | None = None,
    templates: Mapping[str, str] | None = None,
) -> list[Task]:
    """Loads tasks from `{task}.jsonl` in the folder, all that exist by default.

    LongBench's files may be in the folder's data/, and RULER's may be `{task}/validation.jsonl`.

    Args:
        config: LongBench's folder of dataset2prompt.json and dataset2maxlen.json; by default the
            data's config/, or the one beside it.
        templates: prompts to be used instead, by task of InfiniteBench.

    Raises:
        DataError: a task is unknown, a file is missing or malformed, or a package is missing.
    """
    data = folder / "data" if benchmark == "longbench" and (folder / "data").is_dir() else folder
    files = task_files(benchmark, data, tasks)
    changes = {task: {"template": text} for task, text in (templates or {}).items()}
    if benchmark == "longbench":
        changes = longbench_prompts(folder, config, files)
    parse = parse_ruler if benchmark == "ruler" else parse_fields
    loaded = []
    for task, path in files.items():
        kind = dataclasses.replace(KINDS[benchmark][task], **changes.get(task, {}))
        for package in PACKAGES.get(kind.metric, ()):
            if importlib.util.find_spec(package) is None:
                install = f"needs the package {package}: pip install 'pdllm-jax[eval]'"
                raise DataError(f"the metric of {task} {install}")
        examples = read_examples(path, functools.partial(parse, benchmark, task, kind), malformed)
        settings = {"binary": kind.binary, "chat": kind.chat}
        loaded.append(Task(benchmark, task, kind.gen_length, kind.score, examples, **settings))
    return loaded


def task_files(benchmark: str, folder: Path, tasks: Sequence[str] | None) -> dict[str, Path]:
    """Returns the files of the wanted tasks, by default of all that exist. Raises DataError."""

    def place(task: str) -> Path:
        nested, flat = folder / task / "validation.jsonl", folder / f"{task}.jsonl"
        return nested if benchmark == "ruler" and not flat.is_file() else flat

    names = list(KINDS[benchmark])
    tasks = [task for task in names if place(task).is_file()] if tasks is None else tasks
    if not tasks:
        first = place(names[0]).relative_to(folder)
        raise DataError(f"{folder} holds no {NAMES[benchmark]} task, such as {first}")
    for task in tasks:
        if task not in names:
            raise DataError(f"{NAMES[benchmark]} has no task {task!r} ({', '.join(names)})")
        if not place(task).is_file():
            raise DataError(f"{place(task)} is missing")
    return {task: place(task) for task in tasks}


def longbench_prompts(
    folder: Path, config: Path | None, tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns template and gen_length of each task. Raises DataError."""
    places = [config] if config else [folder / "config", folder.parent / "config", folder]
    contents = []
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is None:
            raise DataError(f"{name} is not in {' or '.join(map(str, places))}: give its folder")
        contents.append(read_json(path, DataError))
    result = {}
    for task in tasks:
        name = task.removesuffix("_e")
        template, length = (content.get(name) for content in contents)
        if not isinstance(template, str) or template.count("{context}") != 1:
            raise DataError(f"dataset2prompt.json needs a prompt for {name} with one {{context}}")
        if not isinstance(length, int) or length < 1:
            raise DataError(f"dataset2maxlen.json needs a positive number for {name}")
        result[task] = {"template": template, "gen_length": length}
    return result


def parse_fields(benchmark: str, task: str, kind: Kind, raw: dict[str, Any], line: int) -> Example:
    """Makes an example of LongBench or InfiniteBench.

    Mirrors call `input` `question` and `context` `content`; a template may use either name.
    """
    longbench = benchmark == "longbench"
    asks = "{input}" in kind.template or "{question}" in kind.template
    context = text_field(raw, *(["context"] if longbench else ["context", "content"]))
    if not context.strip():
        raise ValueError("context is empty")
    question = text_field(raw, "input", "question", default=None if asks else "")
    answers = answers_field(raw, *(["answers", "answer"] if longbench else ["answer"]))
    details = {"length": raw.get("length")} if longbench else {}
    fields = {**raw, "context": context, "input": question, "question": question}
    if kind.metric == "classification":
        details["all_classes"] = classes = raw.get("all_classes")
        if not isinstance(classes, list) or not all(isinstance(x, str) for x in classes):
            raise ValueError("all_classes must be a list of strings")
    if kind.metric == "paragraph_named":
        for answer in answers:
            paragraph_named("", answer)
    if kind.metric in ("choice", "wrong_function"):
        options = raw.get("options")
        if not isinstance(options, list) or len(options) != len(LETTERS):
            raise ValueError("options must be a list of four")
        options = [str(option) for option in options]
        fields |= {f"OPTION_{letter}": x for letter, x in zip(LETTERS, options, strict=True)}
        answers = option_named(answers, options)
    name = raw.get("_id" if longbench else "id")
    name = str(line if name in (None, "") else name)
    return Example(name, answers, split_template(kind.template, fields), details=details)


def option_named(answers: Sequence[str], options: Sequence[str]) -> tuple[str, str]:
    """Returns (text, letter) of an answer given as the text, the letter, or both."""
    if len(answers) == 2 and answers[1] in tuple(LETTERS):
        return answers[0], answers[1]
    if len(answers) == 1 and answers[0] in options:
        return answers[0], LETTERS[options.index(answers[0])]
    if len(answers) == 1 and answers[0] in tuple(LETTERS):
        return options[LETTERS.index(answers[0])], answers[0]
    raise ValueError(f"answer must be one of the options, got {list(answers)}")


def parse_ruler(benchmark: str, task: str, kind: Kind, raw: dict[str, Any], line: int) -> Example:
    """Makes an example of RULER's whole prompt, cut where its template has the document."""
    text, start = text_field(raw, "input"), text_field(raw, "answer_prefix", default="")
    prompt = split_ruler(task, text.removesuffix(start))
    if prompt is None or not prompt.context.strip():
        raise ValueError(f"input is not a prompt of {task}")
    index, answers = raw.get("index"), answers_field(raw, "outputs", "output")
    details = {"length": raw.get("length")}
    name = str(line if index is None else index)
    return Example(name, answers, prompt, response=start, details=details)
