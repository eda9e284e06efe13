"""LongBench v1, InfiniteBench and RULER: their examples from a local copy, as tasks.toml says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.example import (
    DataError,
    Example,
    Malformed,
    Task,
    id_field,
    length_field,
    list_field,
    read_examples,
    text_field,
)
from experiments.benchmarks.metrics import METRICS, PACKAGES, RULES, paragraph_named
from experiments.records import read_json
from pdllm_jax.evaluation.prompts import split_ruler, split_template

NAMES = {"longbench": "LongBench", "infinitebench": "InfiniteBench", "ruler": "RULER"}
LETTERS = "ABCD"
# What answers must be for these metrics, as a check that raises ValueError.
_CHECKS: Mapping[str, tuple[Callable[[str], object], str]] = {
    "paragraph_named": (functools.partial(paragraph_named, ""), "name a paragraph"),
    "first_digits": (re.compile("[0-9]+").fullmatch, "be digits"),
    "first_number": (float, "be a number"),
    "last_integer": (int, "be a whole number"),
    "running_values": (int, "be whole numbers"),
}
# How RULER's templates begin, and marks of chat templates behind them.
_RULER_STARTS = (
    *("A special magic ", "Some special magic ", "Memorize and track the chain"),
    *("Below is a numbered list ", "Read the following coded text "),
    "Answer the question based on the given documents.",
)
# In files of RULER's first version answer_prefix is the end of the input.
_ANSWER_START = re.compile(r" (?:Answer:|The special magic )[^\n]*$")
_CHAT_MARK = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>|<\w+_of_turn>|\[/INST\]|</s>|\bASSISTANT:|\bAssistant:"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a task is asked and scored; tasks.toml says what the fields mean."""

    metric: str
    gen_length: int = 0
    template: str = ""
    binary: bool = False
    chat: bool = True
    first_line: bool = False
    by_name: bool = False

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
    rules: str = RULES[0],
) -> list[Task]:
    """Loads tasks from `{task}.jsonl` in the folder, all that exist by default.

    LongBench's files may be in the folder's data/, and RULER's may be `{task}/validation.jsonl`.

    Args:
        config: LongBench's folder of dataset2prompt.json and dataset2maxlen.json; by default the
            data's config/, or the one beside it.
        templates: prompts to be used instead, by task of InfiniteBench.
        rules: of metrics.RULES, InfiniteBench's prompts and metrics.

    Raises:
        DataError: a task is unknown, a file is missing or malformed, or a package is missing.
    """
    data = folder / "data" if benchmark == "longbench" and (folder / "data").is_dir() else folder
    files = task_files(benchmark, data, tasks)
    changes: dict[str, dict[str, Any]] = {**_TABLE.get(f"{benchmark}@{rules}", {})}
    if benchmark == "longbench":
        changes = longbench_prompts(folder, config, files)
    for task, text in (templates or {}).items():
        if task not in KINDS[benchmark]:
            raise DataError(f"templates: {NAMES[benchmark]} has no task {task!r}")
        if not isinstance(text, str) or text.count("{context}") != 1:
            raise DataError(f"templates: the prompt of {task} must be text with one {{context}}")
        changes[task] = {**changes.get(task, {}), "template": text}
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
    if tasks is None:
        tasks = [task for task in names if place(task).is_file()]
        tasks = [task for task in tasks if not KINDS[benchmark][task].by_name]
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
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise DataError(f"dataset2maxlen.json needs a positive number for {name}")
        result[task] = {"template": template, "gen_length": length}
    return result


def parse_fields(benchmark: str, task: str, kind: Kind, raw: dict[str, Any], line: int) -> Example:
    """Makes an example of LongBench or InfiniteBench.

    Mirrors call `input` `question` and `context` `content`; a template may use either name.
    """
    longbench, metric = benchmark == "longbench", kind.metric.partition("@")[0]
    asks = any(f"{{{name}}}" in kind.template for name in ("input", "question", "prefix"))
    context = text_field(raw, *(["context"] if longbench else ["context", "content"]))
    if not context.strip():
        raise ValueError("context is empty")
    question = text_field(raw, "input", "question", default=None if asks else "")
    if metric == "running_values" and isinstance(answer := raw.get("answer"), list):
        raw = {**raw, "answer": answer[0] if len(answer) == 1 else answer}
    name, answers = list_field(raw, *(["answers", "answer"] if longbench else ["answer"]))
    details: dict[str, Any] = {}
    if longbench:
        details["length"] = length_field(raw, needed=task.endswith("_e"))
    fields = {key: value for key, value in raw.items() if isinstance(value, str | int | float)}
    fields |= derived_fields(kind.template, question)
    fields |= {"context": context, "input": question, "question": question}
    if metric == "classification":
        _, classes = list_field(raw, "all_classes", single=False)
        details["all_classes"] = list(classes)
    check, wanted = _CHECKS.get(metric, (str, ""))
    for answer in answers:
        try:
            valid = check(answer) is not None
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{name} must {wanted}, got {answer[:40]!r}")
    if metric in ("choice", "wrong_function"):
        _, options = list_field(raw, "options", single=False)
        if len(options) != len(LETTERS):
            raise ValueError(f"options must be a list of four, got {len(options)}")
        fields |= {f"OPTION_{letter}": x for letter, x in zip(LETTERS, options, strict=True)}
        answers = option_named(answers, options)
    name = id_field(raw, "_id" if longbench else "id", line)
    return Example(name, answers, split_template(kind.template, fields), details=details)


def derived_fields(template: str, question: str) -> dict[str, str]:
    """Returns what InfiniteBench's templates take out of the question. ValueError: not in it."""
    fields = {}
    call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", question)
    if "{func_call}" in template and call is not None:
        fields = {"func": call.group(1), "func_call": call.group()}
    if "{prefix}" in template:
        target = re.search("The .+(?= of)", question)
        if target is None:
            raise ValueError("input does not name the number that is looked for: The .. of")
        fields["prefix"] = f"What is {target.group().lower()} in the following list?"
    return fields


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
    if not start and (match := _ANSWER_START.search(prompt.after)) is not None:
        start = match.group()
        prompt = prompt._replace(after=prompt.after.removesuffix(start))
    mark = _CHAT_MARK.search(prompt.after)
    if mark is not None or not prompt.before.lstrip().startswith(_RULER_STARTS):
        text = f"ends with {mark.group()!r}" if mark else f"begins with {prompt.before[:40]!r}"
        raise ValueError(
            f"input {text}: another model's chat template; make the file with "
            "--model_template_type base"
        )
    _, answers = list_field(raw, "outputs", "output")
    details = {"length": length_field(raw)}
    name = id_field(raw, "index", line)
    return Example(name, answers, prompt, response=start, details=details)
