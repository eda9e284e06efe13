"""Retrieval tasks made on the spot from the small model's held-out corpora (small_model)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from evals.example import DataError, Example, Task
from evals.ruler import match_all
from small_model import tasks
from small_model.corpus import Corpora
from small_model.tasks import Encoder

ASKED = 2  # of a multi-needle question
# As the small model's responses, one for each needle asked for.
_MULTI_LENGTH = ASKED * tasks.RESPONSE_LENGTH
NAMES = (*tasks.TASKS, "multi_needle")


def check_tokenizer(corpora: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """DataError unless the corpora are token ids of this tokenizer."""
    path = corpora / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: the folder is not one of small_model/corpus.py")
    if tokenizers.Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"{corpora} was made with another tokenizer than the checkpoint's")


def make(
    names: Sequence[str],
    lengths: Sequence[int],
    count: int,
    *,
    corpora: Corpora,
    encode: Encoder,
    first_seed: int = 100_000,
) -> list[Task]:
    """`count` examples of each task and length; prompt and response are `length` tokens together.

    corpora: the held-out side.
    """
    made = []
    for length in lengths:
        for name in names:
            if name not in NAMES:
                raise ValueError(f"there is no generated task {name!r} ({', '.join(NAMES)})")
            examples = []
            for seed in range(first_seed, first_seed + count):
                if name == "multi_needle":
                    examples.append(_multi_needle(length, seed, corpora, encode))
                    continue
                one = tasks.make_example(name, length, seed, corpora=corpora, encode=encode)
                examples.append(
                    Example(
                        id=str(seed),
                        answers=(one["answer"],),
                        ids=(one["prefix"], one["context"], one["query"]),
                        details={"length": length, "needles": [list(one["needle_span"])]},
                    )
                )
            multi = name == "multi_needle"
            made.append(
                Task(
                    "generated", f"{name}_{length}",
                    _MULTI_LENGTH if multi else tasks.RESPONSE_LENGTH,
                    _all_named if multi else _is_right, tuple(examples), binary=not multi,
                )
            )  # fmt: skip
    return made


def _is_right(prediction: str, example: Example) -> float:
    return float(tasks.is_right(example.answers[0], prediction))


def _all_named(prediction: str, example: Example) -> float:
    return match_all(prediction, example.answers)


def _multi_needle(length: int, seed: int, corpora: Corpora, encode: Encoder) -> Example:
    """Magic numbers among distractors, `ASKED` of them asked for at once; the share found counts.

    As RULER's multi-query needles. The small model was trained on one question at a time.
    """
    rng = np.random.default_rng([len(tasks.TASKS), length, seed])
    keys = tasks.Keys(corpora, rng)
    named = [(keys.draw(), tasks.number(rng, 7)) for _ in range(ASKED + tasks.DISTRACTORS)]
    needles = [tasks.keyed_needle(encode, tasks.ATTRIBUTES[0], key, value) for key, value in named]
    asked = sorted(rng.choice(len(named), ASKED, replace=False).tolist())
    question: list[str] = [tasks.QUERY_START + "What is the magic number for"]
    for place, i in enumerate(asked):
        question += [" and for"] if place else []
        key = named[i][0]
        question += [f" {key[0]}", "-", key[1]]
    prefix = encode(tasks.PREFIX)
    query = encode(*question, "?", tasks.QUERY_END)
    texts = list(corpora.texts.values())
    sizes = np.array([len(text.tokens) for text in texts], float)
    text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
    room = length - _MULTI_LENGTH - len(prefix) - len(query)
    document = tasks.bury(rng, text, needles, room)
    return Example(
        id=str(seed),
        answers=tuple(named[i][1] for i in asked),
        ids=(prefix.tolist(), document.tokens.tolist(), query.tolist()),
        details={"length": length, "needles": [list(document.spans[i]) for i in asked]},
    )
