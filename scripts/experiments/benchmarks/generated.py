"""Retrieval tasks made from the small model's held-out corpora (small_model)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from experiments.benchmarks.example import DataError, Example, Task, on_answers
from experiments.benchmarks.ruler import match_all
from small_model import tasks
from small_model.corpus import Corpora
from small_model.tasks import Encoder

ASKED = 2  # numbers that a multi-needle question asks for
# As the small model's responses, one for each number asked for.
_MULTI_LENGTH = ASKED * tasks.RESPONSE_LENGTH
NAMES = (*tasks.TASKS, "multi_needle")


def check_tokenizer(corpora: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises DataError unless the corpora are token ids of this tokenizer."""
    path = corpora / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: give a folder that small_model/corpus.py made")
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
    """Makes `count` examples of each task and length, in tokens of prompt and response.

    corpora: the held-out side.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"tasks must be of {', '.join(NAMES)}, got {', '.join(unknown)}")
    seeds = range(first_seed, first_seed + count)
    made = []
    for length in lengths:
        for name in names:
            multi = name == "multi_needle"
            examples = tuple(
                _multi_needle(length, seed, corpora, encode)
                if multi
                else _single(name, length, seed, corpora, encode)
                for seed in seeds
            )
            gen_length = _MULTI_LENGTH if multi else tasks.RESPONSE_LENGTH
            metric = on_answers(match_all if multi else _is_right)
            title = f"{name}_{length}"
            made.append(Task("generated", title, gen_length, metric, examples, not multi))
    return made


def _is_right(prediction: str, answers: Sequence[str]) -> bool:
    return tasks.is_right(answers[0], prediction)


def _single(name: str, length: int, seed: int, corpora: Corpora, encode: Encoder) -> Example:
    one = tasks.make_example(name, length, seed, corpora=corpora, encode=encode)
    return Example(
        id=str(seed),
        answers=(one["answer"],),
        ids=(one["prefix"], one["context"], one["query"]),
        details={"length": length, "needles": [list(one["needle_span"])]},
    )


def _multi_needle(length: int, seed: int, corpora: Corpora, encode: Encoder) -> Example:
    """Makes a question for ASKED magic numbers among distractors, as RULER's multi-query needles.

    The small model was trained on one question at a time.
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
    document, spans = tasks.bury(rng, text, needles, room)
    return Example(
        id=str(seed),
        answers=tuple(named[i][1] for i in asked),
        ids=(prefix.tolist(), document.tolist(), query.tolist()),
        details={"length": length, "needles": [list(spans[i]) for i in asked]},
    )
