"""LongBench v1 (arXiv 2308.14508; MIT): its metrics, and its examples from a local copy.

A prediction's score is the best over the answers. Prompts and response lengths come from the copy's
config/dataset2prompt.json and dataset2maxlen.json. Tasks of LongBench-E are called `{task}_e` and
share the prompts.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmarks.example import (
    DataError,
    Example,
    Malformed,
    Task,
    answers_field,
    document_field,
    read_examples,
    task_files,
    text_field,
)
from experiments.benchmarks.text import chinese_characters, english_f1, f1
from experiments.records import read_json
from pdllm_jax.evaluation.prompts import split_template

# Their predictions count up to the end of the first line.
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
# Their prompts are texts to be continued: no chat template.
CONTINUED = FIRST_LINE | {"lcc", "repobench-p"}


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Returns 1 / (number of classes named) if the answer is among them, else 0.

    A class that is only a part of the answer's name does not count. As published, the loop removes
    items of the list that it goes through, and so skips the class behind a removed one.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def numbers_equal(prediction: str, answer: str) -> float:
    """Returns the share of the prediction's numbers that are the answer; 0 without numbers."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, pattern: str) -> float:
    """Returns `numbers_equal` for the number that `pattern` finds in the answer."""
    return numbers_equal(prediction, paragraph(answer, pattern))


def paragraph(answer: str, pattern: str) -> str:
    """Returns the paragraph's number; ValueError where the answer names none."""
    match = re.search(pattern, answer)
    if match is None:
        raise ValueError(f"answer {answer!r} names no paragraph")
    return match.group(1)


def code_similarity(prediction: str, answer: str) -> float:
    """Compares the answer with the first code line: difflib's ratio in whole hundredths.

    This is fuzzywuzzy.fuzz.ratio without python-Levenshtein (which gives other ratios, as rapidfuzz
    does). A line with a back-tick, "#" or "//" anywhere counts as a comment.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def rouge_l(prediction: str, answer: str) -> float:
    """Returns F of ROUGE-L by the package `rouge` 1.0.1; any error counts 0, as published.

    The package recurses once a word and fails at Python's limit. A new thread has an empty stack,
    so that the limit does not depend on the caller.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_rouge_l, prediction, answer).result()


def _rouge_l(prediction: str, answer: str) -> float:
    scorer = _rouge()
    try:
        return float(scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:
        return 0.0


@functools.cache
def _rouge() -> Any:
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])


@functools.cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports its cache on stderr
    return jieba


def chinese_words(text: str) -> list[str]:
    """Returns jieba's words, in its precise mode."""
    return list(_jieba().cut(text, cut_all=False))


def chinese_rouge_l(prediction: str, answer: str) -> float:
    """Returns `rouge_l` on jieba's words."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(answer)))


def chinese_f1(prediction: str, answer: str) -> float:
    """Returns token F1 on jieba's words, each normalised, empty ones dropped."""
    bags = [
        [word for word in map(chinese_characters, chinese_words(text)) if word]
        for text in (prediction, answer)
    ]
    return f1(*bags)


_Compare = Callable[[str, str], float]
METRICS: dict[str, _Compare | None] = {
    "narrativeqa": english_f1,
    "qasper": english_f1,
    "multifieldqa_en": english_f1,
    "multifieldqa_zh": chinese_f1,
    "hotpotqa": english_f1,
    "2wikimqa": english_f1,
    "musique": english_f1,
    "dureader": chinese_rouge_l,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": chinese_rouge_l,
    "trec": None,  # classification, which needs the example's classes
    "triviaqa": english_f1,
    "samsum": rouge_l,
    "lsht": None,
    "passage_count": numbers_equal,
    "passage_retrieval_en": functools.partial(retrieval, pattern=r"Paragraph (\d+)"),
    "passage_retrieval_zh": functools.partial(retrieval, pattern=r"段落(\d+)"),
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}


def plain_name(task: str) -> str:
    """Returns the LongBench task that a task of LongBench-E belongs to."""
    return task.removesuffix("_e") if task not in METRICS else task


def score(task: str, prediction: str, example: Example) -> float:
    """Returns the best score over the example's answers, in [0, 1]."""
    name = plain_name(task)
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    compare = METRICS[name]
    if compare is None:
        compare = functools.partial(classification, classes=example.details["all_classes"])
    return max((compare(prediction, answer) for answer in example.answers), default=0.0)


def _check_packages(task: str) -> None:
    """Imports what the task's metric needs; DataError says how to install it."""
    compare = METRICS[plain_name(task)]
    try:
        if compare in (rouge_l, chinese_rouge_l):
            _rouge()
        if compare in (chinese_f1, chinese_rouge_l):
            _jieba()
    except ImportError as error:
        raise DataError(
            f"the metric of {task} needs the package {error.name}: pip install 'pdllm-jax[eval]'"
        ) from None


def load(
    folder: Path, tasks: Sequence[str] | None, malformed: Malformed, config: Path | None = None
) -> list[Task]:
    """Loads tasks from `{task}.jsonl` in the folder (or its data/), all that exist by default.

    config: the folder with the two JSON files; by default the data's config/, or the one beside it.
    """
    data = folder / "data" if (folder / "data").is_dir() else folder
    known = [name + suffix for name in METRICS for suffix in ("", "_e")]
    files = task_files("LongBench", data, known, tasks, lambda task: data / f"{task}.jsonl")
    prompts, lengths = (
        _config(folder, config, name) for name in ("dataset2prompt.json", "dataset2maxlen.json")
    )
    loaded = []
    for task, path in files.items():
        _check_packages(task)
        name = plain_name(task)
        template, gen_length = prompts.get(name), lengths.get(name)
        if not isinstance(template, str) or template.count("{context}") != 1:
            raise DataError(f"dataset2prompt.json needs a prompt for {name} with one {{context}}")
        if not isinstance(gen_length, int) or gen_length < 1:
            raise DataError(f"dataset2maxlen.json needs a positive number for {name}")
        examples = read_examples(path, functools.partial(_parse, name, template), malformed)
        metric = functools.partial(score, task)
        chat = name not in CONTINUED
        loaded.append(Task("longbench", task, gen_length, metric, examples, chat=chat))
    return loaded


def _config(folder: Path, config: Path | None, name: str) -> dict[str, Any]:
    places = [config] if config else [folder / "config", folder.parent / "config", folder]
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise DataError(f"{name} is not in {' or '.join(map(str, places))}: give its folder")
    return read_json(path, DataError)


def _parse(name: str, template: str, raw: dict[str, Any], line: int) -> Example:
    """Makes an example; mirrors call `input` `question`, and a template may use either name."""
    asks = "{input}" in template or "{question}" in template
    context = document_field(raw, "context")
    question = text_field(raw, "input", "question", default=None if asks else "")
    answers = answers_field(raw, "answers", "answer")
    details: dict[str, Any] = {"length": raw.get("length")}
    if METRICS[name] is None:
        classes = raw.get("all_classes")
        if not isinstance(classes, list) or not all(isinstance(x, str) for x in classes):
            raise ValueError("all_classes must be a list of strings")
        details["all_classes"] = classes
    if name.startswith("passage_retrieval"):
        pattern = METRICS[name].keywords["pattern"]  # type: ignore[union-attr]
        for answer in answers:
            paragraph(answer, pattern)
    fields = {**raw, "context": context, "input": question, "question": question}
    return Example(
        id=str(raw.get("_id") or line),
        answers=answers,
        prompt=split_template(template, fields),
        details=details,
    )
