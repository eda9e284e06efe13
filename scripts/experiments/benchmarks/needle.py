"""Needle in a haystack: one sentence in a text of the user's, on a grid of lengths and depths.

Another language model judges the original. Here the score is the share of the expected phrases that
are in the prediction, case ignored: another measure under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks.example import DataError, Example, Task
from experiments.benchmarks.metrics import METRICS
from pdllm_jax import Tokenizer
from pdllm_jax.evaluation.prompts import SplitPrompt
from pdllm_jax.text_files import read_text
from pdllm_jax.tokenizer import INSTRUCTION

NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day."
)
QUESTION = "What is the best thing to do in San Francisco?"
EXPECTED = ("eat a sandwich", "Dolores Park")
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)]*(?=\s|$)")


def read_haystack(path: Path) -> str:
    """Reads a text file, or all .txt files of a folder in the order of their names. DataError."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .txt file")
    parts = []
    for file in files:
        try:
            parts.append(read_text(file).strip())
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise DataError(str(error)) from None
    if not any(parts):
        raise DataError(f"{path} is empty")
    return "\n\n".join(filter(None, parts))


def insert(text: str, needle: str, depth: float) -> str:
    """Puts the needle behind the last sentence that ends in the first `depth` (0 to 1) of the text.

    At the beginning where no sentence does; at the very end for depth 1.
    """
    if depth >= 1:
        return f"{text} {needle}"
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    place = max((end for end in ends if end <= round(depth * len(text))), default=0)
    return f"{text[:place]} {needle}{text[place:]}" if place else f"{needle} {text}"


def grid(
    haystack: str,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: int,
    needle: str = NEEDLE,
    question: str = QUESTION,
    expected: Sequence[str] = EXPECTED,
    *,
    gen_length: int = 32,
) -> list[Task]:
    """Makes a task for each length: prompts of at most that many tokens, response included.

    depths: their number, evenly from 0 to 1. A haystack that is too short is repeated.
    """
    if depths < 2:
        raise DataError(f"--depths must be at least 2, got {depths}")
    before, after = f"{INSTRUCTION}\n\n", f"\n\n{question}"
    around = sum(map(len, tokenizer.around(before, after)))
    fixed = around + len(tokenizer.encode(needle + " ")) + gen_length
    ids = tokenizer.encode(haystack + "\n\n")
    tasks = []
    for length in lengths:
        room = length - fixed
        if room < 1:
            raise DataError(f"a length of {length} leaves no room beside the {fixed} other tokens")
        text = tokenizer.backend.decode((ids * (room // len(ids) + 1))[:room])
        text = text.rstrip("\ufffd")  # the rest of a character that was cut
        examples = []
        for depth in (i / (depths - 1) for i in range(depths)):
            prompt = SplitPrompt(before, insert(text, needle, depth), after)
            details = {"length": length, "depth": depth}
            examples.append(Example(f"{depth:g}", tuple(expected), prompt, details=details))
        metric, binary = METRICS["match_all"], len(expected) == 1
        tasks.append(Task("needle", str(length), gen_length, metric, tuple(examples), binary))
    return tasks
