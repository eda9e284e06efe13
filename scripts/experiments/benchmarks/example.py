"""A benchmark's examples, and how to read them from JSON lines that may be malformed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pdllm_jax.evaluation.prompts import SplitPrompt

OnMalformed = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with what its answer is compared to.

    id: unique in its task.
    prompt: text in three parts; or ids: token ids of prefix, context and query (generated tasks).
    response: how the response begins, as part of the prompt (RULER's answer_prefix).
    answers: right answers; the metric says what several of them mean.
    details: what the metric or the report needs besides (all_classes, length, depth).
    """

    id: str
    answers: tuple[str, ...]
    prompt: SplitPrompt | None = None
    ids: tuple[list[int], list[int], list[int]] | None = None
    response: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """Returns a digest of all but the id."""
        content = [self.prompt, self.ids, self.response, self.answers, self.details]
        return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


Metric = Callable[[str, Example], float]  # (prediction, example) -> score in [0, 1]


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
    """A benchmark's files are missing or malformed; one line."""


class Malformed:
    """Handles malformed lines: "stop" raises DataError, "skip" reports each and goes on.

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


def read_examples(
    path: Path, parse: Callable[[dict[str, Any], int], Example], malformed: Malformed
) -> tuple[Example, ...]:
    """Returns what `parse(object, line number)` makes of every line that is not blank.

    A line is malformed that is not UTF-8, not a JSON object, or of which `parse` raises ValueError.
    Lines are numbered from 1. Ids that repeat get a number. Raises DataError where the file cannot
    be read.
    """
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig").strip()
            if not text:
                continue
            example = parse(_object(text), number)
        except ValueError as error:  # also errors of JSON and UTF-8
            malformed(path, number, error)
            continue
        seen[example.id] += 1
        times = seen[example.id]
        name = example.id if times == 1 else f"{example.id}#{times}"
        examples.append(dataclasses.replace(example, id=name))
    return tuple(examples)


def _object(text: str) -> dict[str, Any]:
    try:
        # Tables written as JSON have NaN where a field is missing.
        raw = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"must be a JSON object, is {type(raw).__name__}")
    return raw


def _field(raw: Mapping[str, Any], names: Sequence[str], default: Any = None) -> tuple[str, Any]:
    """Returns name and value of the first name that is present. ValueError: none, no default."""
    name = next((name for name in names if raw.get(name) is not None), names[0])
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{' or '.join(names)} is missing")
    return name, value


def _is_text_or_number(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair") from None
    return text


def text_field(raw: Mapping[str, Any], *names: str, default: str | None = None) -> str:
    """Returns the text under the first name that is present. ValueError: missing, or not text."""
    name, value = _field(raw, names, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, is {type(value).__name__}")
    return _encodable(name, value)


def list_field(
    raw: Mapping[str, Any], *names: str, single: bool = True
) -> tuple[str, tuple[str, ...]]:
    """Returns the first name that is present, and the texts or numbers of its list as texts.

    single: one text or number is also allowed.

    Mirrors made through CSV write a list as text. It is read if it is JSON.

    Raises:
        ValueError: missing, empty, nested, or a list as text that is not JSON.
    """
    name, value = _field(raw, names)
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is a list written as text that is not JSON") from None
    if not (single or isinstance(value, list)):
        raise ValueError(f"{name} must be a list, is {type(value).__name__}")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{name} is empty")
    for item in values:
        if not _is_text_or_number(item):
            raise ValueError(f"{name} must hold strings or numbers, got {type(item).__name__}")
    return name, tuple(_encodable(name, str(item)) for item in values)


def length_field(raw: Mapping[str, Any], *, needed: bool = False) -> int | None:
    """Returns `length`, a whole number or its digits as text. ValueError: another value."""
    value = raw.get("length")
    if value is None and not needed:
        return None
    if value is None:
        raise ValueError("length is missing")
    match = re.fullmatch(r"\s*(\d+)(\.0*)?\s*", str(value)) if _is_text_or_number(value) else None
    if match is None:
        raise ValueError(f"length must be a whole number, got {str(value)[:40]!r}")
    return int(match.group(1))


def id_field(raw: Mapping[str, Any], name: str, line: int) -> str:
    """Returns the id, a text or number, by default the line's number. ValueError: another type."""
    value = raw.get(name)
    if value in (None, ""):
        return str(line)
    if not _is_text_or_number(value):
        raise ValueError(f"{name} must be a string or a number, is {type(value).__name__}")
    return _encodable(name, str(value))
