"""RULER (arXiv 2404.06654; Apache-2.0): its thirteen tasks' metrics, and examples from files.

RULER's own scripts make the files, for a tokenizer and a length: `{task}/validation.jsonl`, or
`{task}.jsonl`, with whole prompts in `input`. The document is cut out of a prompt where its
template has it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.example import (
    DataError,
    Example,
    Malformed,
    Task,
    field,
    read_jsonl,
    texts,
    with_unique_ids,
)
from pdllm_jax.evaluation.prompts import split_ruler

# Response tokens, as in RULER's data/synthetic/constants.py.
GEN_LENGTH = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
TASKS = (
    *(f"niah_single_{i}" for i in (1, 2, 3)),
    *(f"niah_multikey_{i}" for i in (1, 2, 3)),
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that are in the prediction, in whatever case."""
    text = _clean(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of the answers is in the prediction."""
    text = _clean(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def _clean(prediction: str) -> str:
    """Control characters become line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def load(folder: Path, tasks: Sequence[str] | None, malformed: Malformed) -> list[Task]:
    """All tasks that are in the folder by default."""
    wanted = [t for t in TASKS if _file(folder, t)] if tasks is None else tasks
    if not wanted:
        raise DataError(f"{folder} holds no RULER task, such as niah_single_1/validation.jsonl")
    loaded = []
    for task in wanted:
        if task not in TASKS:
            raise DataError(f"RULER has no task {task!r} ({', '.join(TASKS)})")
        path = _file(folder, task)
        if path is None:
            raise DataError(f"{folder / task / 'validation.jsonl'} is missing")
        kind = task.partition("_")[0]
        examples = read_jsonl(path, functools.partial(_parse, task), malformed)
        any_counts = kind == "qa"
        one = kind == "niah" and task not in ("niah_multivalue", "niah_multiquery")
        loaded.append(
            Task(
                "ruler", task, GEN_LENGTH[kind],
                functools.partial(_score, match_any if any_counts else match_all),
                with_unique_ids(examples), binary=any_counts or one,
            )
        )  # fmt: skip
    return loaded


def _score(metric: Any, prediction: str, example: Example) -> float:
    return float(metric(prediction, example.answers))


def _file(folder: Path, task: str) -> Path | None:
    places = (folder / task / "validation.jsonl", folder / f"{task}.jsonl")
    return next((path for path in places if path.is_file()), None)


def _parse(task: str, raw: dict[str, Any], line: int) -> Example:
    text, start = field(raw, "input"), field(raw, "answer_prefix", default="")
    if start and text.endswith(start):
        text = text[: -len(start)]
    prompt = split_ruler(task, text)
    if prompt is None or not prompt.context.strip():
        raise ValueError(f"input is not a prompt of {task}")
    answers = texts(raw, "outputs", "output")
    index = raw.get("index")
    return Example(
        id=str(line if index is None else index),
        answers=answers,
        prompt=prompt,
        response=start,
        details={"length": raw.get("length")},
    )
