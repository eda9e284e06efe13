"""A benchmark's examples, and reading them from jsonl files that may have bad lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pdllm_jax.evaluation.prompts import SplitPrompt

OnMalformed = Literal["stop", "skip"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with what its answer is compared to.

    id: unique in its task.
    prompt: text in three parts; or ids: token ids of prefix, context and query (generated tasks).
    response: how the response begins, as part of the prompt (RULER's answer_prefix).
    answers: what counts as right; what several of them mean is the metric's business.
    details: whatever else the metric or the report needs (all_classes, length, depth).
    """

    id: str
    answers: tuple[str, ...]
    prompt: SplitPrompt | None = None
    ids: tuple[list[int], list[int], list[int]] | None = None
    response: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """Tells examples apart, however they are called."""
        what = [self.prompt, self.ids, self.response, self.answers, self.details]
        return hashlib.sha256(json.dumps(what).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# (prediction, example) -> score in [0, 1].
Metric = Callable[[str, Example], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples that are asked and scored alike.

    gen_length: response tokens. binary: every score is 0 or 1. chat: the prompt is a user's turn
    in the chat template; False for prompts that are texts to be continued.
    """

    benchmark: str
    name: str
    gen_length: int
    metric: Metric
    examples: tuple[Example, ...]
    binary: bool = False
    chat: bool = True


class DataError(ValueError):
    """A benchmark's files are missing or are not what they should be; one line."""


class Malformed:
    """What happens to bad lines: "stop" raises DataError, "skip" reports each and goes on.

    count: lines that were skipped.
    """

    def __init__(self, then: OnMalformed, report: Callable[[str], None]) -> None:
        self.then, self.report, self.count = then, report, 0

    def __call__(self, path: Path, line: int, reason: object) -> None:
        message = f"{path}:{line}: {' '.join(str(reason).split())}"
        if self.then == "stop":
            raise DataError(message)
        self.count += 1
        self.report(message)


def read_jsonl(
    path: Path, parse: Callable[[dict[str, Any], int], T], malformed: Malformed
) -> list[T]:
    """What `parse(object, line number)` makes of every line; blank lines are none.

    A line is malformed that is not UTF-8, not a JSON object, or of which `parse` raises ValueError.
    Lines are numbered from 1. Raises DataError where the file cannot be read.
    """
    found = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if not text:
                        continue
                    found.append(parse(_object(text), number))
                except ValueError as error:  # JSON and UTF-8 errors are such
                    malformed(path, number, error)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return found


def _object(text: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"must be a JSON object, is {type(raw).__name__}")
    return raw


def field(raw: dict[str, Any], *names: str, default: str | None = None) -> str:
    """The text under the first of these names that is there. ValueError: none is, or no text."""
    for name in names:
        value = raw.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string, is {type(value).__name__}")
            return value
    if default is None:
        raise ValueError(f"{' or '.join(names)} is missing")
    return default


def texts(raw: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Answers under the first of these names: texts or numbers, one or a list of at least one."""
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        for one in values:
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise ValueError(f"{name} must hold strings or numbers, got {type(one).__name__}")
        if not values:
            raise ValueError(f"{name} is empty")
        return tuple(str(one) for one in values)
    raise ValueError(f"{' or '.join(names)} is missing")


def with_unique_ids(examples: Iterable[Example]) -> tuple[Example, ...]:
    """Examples as they are, but for ids that an earlier one has: those get a number behind."""
    seen: dict[str, int] = {}
    found = []
    for example in examples:
        times = seen.get(example.id, 0)
        seen[example.id] = times + 1
        name = example.id if times == 0 else f"{example.id}#{times + 1}"
        found.append(dataclasses.replace(example, id=name))
    return tuple(found)
