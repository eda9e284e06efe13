"""Retrieval tasks made from the small model's held-out corpora (small_model)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from experiments.benchmarks.example import DataError, Example, Task
from experiments.benchmarks.metrics import METRICS, on_answers
from small_model import tasks
from small_model.corpus import Corpora, load
from small_model.tasks import Encoder

ASKED = 2  # numbers that a multi-needle question asks for
# As the small model's responses, one for each number asked for.
_MULTI_LENGTH = ASKED * tasks.RESPONSE_LENGTH
NAMES = (*tasks.TASKS, "multi_needle")


def make(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    names: Sequence[str],
    lengths: Sequence[int],
    seeds: Sequence[int],
) -> list[Task]:
    """Makes an example for each seed of each task and length, in tokens of prompt and response.

    Raises:
        DataError: the folder does not hold the corpora of this tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: give a folder that small_model/corpus.py made")
    if tokenizers.Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"{folder} was made with another tokenizer than the checkpoint's")
    texts, encode = load(folder, held_out=True), Encoder(tokenizer)
    result = []
    tokenizer.encode_special_tokens = False  # the tasks spell the chat template out
    try:
        for length in lengths:
            for name in names:
                multi, title = name == "multi_needle", f"{name}_{length}"
                call = _multi if multi else _single
                examples = tuple(call(name, length, seed, texts, encode) for seed in seeds)
                gen_length = _MULTI_LENGTH if multi else tasks.RESPONSE_LENGTH
                metric = METRICS["match_all"] if multi else on_answers(_is_right)
                result.append(Task("generated", title, gen_length, metric, examples, not multi))
    finally:
        tokenizer.encode_special_tokens = True
    return result


def _is_right(prediction: str, answers: Sequence[str]) -> bool:
    return tasks.is_right(answers[0], prediction)


def _single(name: str, length: int, seed: int, corpora: Corpora, encode: Encoder) -> Example:
    source = tasks.make_example(name, length, seed, corpora=corpora, encode=encode)
    details = {"length": length, "needles": [list(source["needle_span"])]}
    ids = source["prefix"], source["context"], source["query"]
    return Example(str(seed), (source["answer"],), ids=ids, details=details)


def _multi(name: str, length: int, seed: int, corpora: Corpora, encode: Encoder) -> Example:
    source = multi_needle(length, seed, corpora, encode)
    others = source["others"]
    spans = [source["needle_span"], *(span for _, span in others)]
    details = {"length": length, "needles": [list(span) for span in spans]}
    answers = (source["answer"], *(answer for answer, _ in others))
    ids = source["prefix"], source["context"], source["query"]
    return Example(str(seed), answers, ids=ids, details=details)


def multi_needle(length: int, seed: int, corpora: Corpora, encode: Encoder) -> tasks.Example:
    """Makes a question for ASKED magic numbers among distractors, as RULER's multi-query needles.

    The small model was trained on one question at a time.
    """
    rng = np.random.default_rng([len(tasks.TASKS), length, seed])
    keys = tasks.Keys(corpora, rng)
    named = [(keys.draw(), tasks.number(rng, 7)) for _ in range(ASKED + tasks.DISTRACTORS)]
    needles = [tasks.keyed_needle(encode, tasks.ATTRIBUTES[0], *pair) for pair in named]
    asked = sorted(rng.choice(len(named), ASKED, replace=False).tolist())
    question: list[str] = [tasks.QUERY_START + "What is the magic number for"]
    for place, i in enumerate(asked):
        question += [" and for"] if place else []
        key = named[i][0]
        question += [f" {key[0]}", "-", key[1]]
    prefix, query = encode(tasks.PREFIX), encode(*question, "?", tasks.QUERY_END)
    texts = list(corpora.texts.values())
    sizes = np.array([len(text.tokens) for text in texts], float)
    text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
    room = length - _MULTI_LENGTH - len(prefix) - len(query)
    document, spans = tasks.bury(rng, text, needles, room)
    (answer, span), *others = [(named[i][1], spans[i]) for i in asked]
    return tasks.Example(
        prefix=prefix.tolist(),
        context=document.tolist(),
        query=query.tolist(),
        answer=answer,
        needle_span=span,
        others=others,
    )
