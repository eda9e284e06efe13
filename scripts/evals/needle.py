"""Needle in a haystack: one sentence in a text of the user's, on a grid of lengths and depths.

The original is judged by another language model. Here the score is the share of the expected
phrases that are in the prediction, in whatever case: another measure under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from evals.example import DataError, Example, Task
from evals.ruler import match_all
from pdllm_jax import Tokenizer
from pdllm_jax.evaluation.prompts import SplitPrompt
from pdllm_jax.tokenizer import INSTRUCTION

NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day."
)
QUESTION = "What is the best thing to do in San Francisco?"
EXPECTED = ("eat a sandwich", "Dolores Park")
_BEFORE, _AFTER = f"{INSTRUCTION}\n\n", "\n\n{question}"
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)]*(?=\s|$)")


def read_haystack(path: Path) -> str:
    """A text file, or all .txt files of a folder in the order of their names. DataError."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .txt file")
    try:
        parts = [file.read_text(encoding="utf-8").strip() for file in files]
    except UnicodeDecodeError:
        raise DataError(f"{path} holds a file that is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise DataError(f"{path} is empty")
    return text


def insert(text: str, needle: str, depth: float) -> str:
    """The needle behind the last sentence that ends in the first `depth` (0 to 1) of the text.

    At the beginning where none does; at the very end for depth 1.
    """
    if depth >= 1:
        return f"{text} {needle}"
    limit = round(depth * len(text))
    place = 0
    for found in _SENTENCE_END.finditer(text):
        if found.end() > limit:
            break
        place = found.end()
    if place == 0:
        return f"{needle} {text}"
    return f"{text[:place]} {needle}{text[place:]}"


def grid(
    haystack: str,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    needle: str = NEEDLE,
    question: str = QUESTION,
    expected: Sequence[str] = EXPECTED,
    gen_length: int = 32,
) -> list[Task]:
    """A task for each length: prompts of that many tokens at most, response included.

    The haystack is repeated where it is too short.
    """
    fixed = [_BEFORE, needle + " ", _AFTER.format(question=question)]
    prefix, query = tokenizer.around(fixed[0], fixed[2])
    taken = len(prefix) + len(query) + len(tokenizer.encode(fixed[1])) + gen_length
    ids = tokenizer.encode(haystack + "\n\n")
    tasks = []
    for length in lengths:
        room = length - taken
        if room < 1:
            raise DataError(f"a length of {length} leaves no room beside the {taken} others")
        text = tokenizer.backend.decode((ids * (room // len(ids) + 1))[:room])
        text = text.rstrip("\ufffd")  # a character that was cut through
        examples = []
        for depth in depths:
            context = insert(text, needle, depth)
            examples.append(
                Example(
                    id=f"{depth:g}",
                    answers=tuple(expected),
                    prompt=SplitPrompt(fixed[0], context, fixed[2]),
                    details={"length": length, "depth": depth},
                )
            )
        tasks.append(
            Task(
                "needle", str(length), gen_length, _score, tuple(examples),
                binary=len(expected) == 1,
            )
        )  # fmt: skip
    return tasks


def _score(prediction: str, example: Example) -> float:
    return match_all(prediction, example.answers)
