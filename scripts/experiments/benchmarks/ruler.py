"""RULER (arXiv 2404.06654; Apache-2.0): its thirteen tasks' metrics, and examples from files.

RULER's own scripts make the files, for a tokenizer and a length: `{task}/validation.jsonl`, or
`{task}.jsonl`, with complete prompts in `input`. The document is cut out of a prompt where its
template has it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.example import (
    Example,
    Malformed,
    Task,
    answers_field,
    on_answers,
    read_examples,
    task_files,
    text_field,
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
    """Returns the share of the answers that are in the prediction, case ignored."""
    text = _clean(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_any(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if one of the answers is in the prediction, else 0."""
    text = _clean(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def _clean(prediction: str) -> str:
    """Makes line ends of control characters."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def load(folder: Path, tasks: Sequence[str] | None, malformed: Malformed) -> list[Task]:
    """Loads tasks of the folder, all that exist by default."""

    def place(task: str) -> Path:
        flat = folder / f"{task}.jsonl"
        return flat if flat.is_file() else folder / task / "validation.jsonl"

    loaded = []
    for task, path in task_files("RULER", folder, TASKS, tasks, place).items():
        kind = task.partition("_")[0]
        metric = on_answers(match_any if kind == "qa" else match_all)
        several = task in ("niah_multivalue", "niah_multiquery")
        binary = kind == "qa" or (kind == "niah" and not several)
        examples = read_examples(path, functools.partial(_parse, task), malformed)
        loaded.append(Task("ruler", task, GEN_LENGTH[kind], metric, examples, binary))
    return loaded


def _parse(task: str, raw: dict[str, Any], line: int) -> Example:
    text, start = text_field(raw, "input"), text_field(raw, "answer_prefix", default="")
    prompt = split_ruler(task, text.removesuffix(start))
    if prompt is None or not prompt.context.strip():
        raise ValueError(f"input is not a prompt of {task}")
    index = raw.get("index")
    return Example(
        id=str(line if index is None else index),
        answers=answers_field(raw, "outputs", "output"),
        prompt=prompt,
        response=start,
        details={"length": raw.get("length")},
    )
