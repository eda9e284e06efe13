"""InfiniteBench (arXiv 2402.13718; MIT): its main tasks' metrics, and examples from a local copy.

Prompts and response lengths follow its runs of open models (src/prompt.py, the "yarn-mistral" set,
and src/eval_utils.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.example import (
    Example,
    Malformed,
    Task,
    answers_field,
    document_field,
    on_answers,
    read_examples,
    task_files,
    text_field,
)
from experiments.benchmarks.text import chinese_characters, english_f1, f1
from pdllm_jax.evaluation.prompts import split_template

_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}"
LETTERS = "ABCD"


def _spaced(text: str, marks: Sequence[str]) -> str:
    """Replaces every mark by a space."""
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def first_digits(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the first run of ASCII digits is the answer."""
    match = re.search("[0-9]+", prediction)
    return match is not None and match.group() == answers[0]


def named_value(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the answer is one of the prediction's words."""
    words = _spaced(prediction, ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")).split()
    return answers[0] in words


def choice(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the option is named; answers are its text and its letter.

    As published: a text that begins with A to D is judged by that letter alone; behind "answer is"
    and the like text or letter count; else the first word made of consecutive letters of ABCD does.
    """
    if not prediction:
        return False
    if prediction[0] in LETTERS:
        return prediction[0] in answers
    text = re.sub(" +", " ", _spaced(prediction, ("\n", '"', "'", ".", ",", "?", "!", "{", "}")))
    for cue in ("answer is:", "answer:", "answer is", "option is"):
        place = text.find(cue)
        if place >= 0:
            return text[place + len(cue) + 1 :].startswith(tuple(answers)) and (
                len(text) > place + len(cue)
            )
    word = next((word for word in text.split() if word in LETTERS), None)
    return word is not None and word in answers


def wrong_function(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the function with the error is named; answers are its name and its letter.

    It must begin with "B." or "B:", or have letter or name behind "answer is:", "is:" or "answer:".
    """
    name, letter = answers
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = _spaced(prediction.strip(), ("\n", "`", "'", '"', "-", "*", "Option", "option"))
    text = re.sub(" +", " ", text)
    for cue in ("answer is:", "is:", "answer:"):
        place = text.find(cue)
        if place >= 0:
            rest = text[place + len(cue) + 1 :]
            return len(text) > place + len(cue) and rest.startswith((letter, name))
    return False


def best_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns token F1, the best over the answers."""
    return max(english_f1(prediction, answer) for answer in answers)


def best_chinese_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns F1 on normalised characters (LongBench's is on jieba's words)."""
    characters = chinese_characters(prediction)
    return max(f1(characters, chinese_characters(answer)) for answer in answers)


class Kind(NamedTuple):
    """A task's response tokens, prompt and metric; binary: 0 or 1; options: of A to D."""

    gen_length: int
    template: str
    metric: Callable[[str, Sequence[str]], float]
    binary: bool = True
    options: bool = False


KINDS: Mapping[str, Kind] = {
    "passkey": Kind(
        6,
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n\n{context}\n\n{input}\n\n"
        "The pass key is",
        first_digits,
    ),
    "number_string": Kind(
        12,
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz "
        "you about the important information there.\n\n{context}\n\n{input}\n\n"
        "The sequence of digits is",
        first_digits,
    ),
    "kv_retrieval": Kind(
        50,
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "{context}\n\n{input}",
        named_value,
    ),
    "code_debug": Kind(
        5,
        "Following is a Python code where exactly one of the functions/methods has a deliberate "
        "error that makes it crash.\n\n{context}\n\nOptions:\n" + _OPTIONS + "\n\n"
        "The correct option is:",
        wrong_function,
        options=True,
    ),
    "longbook_choice_eng": Kind(
        40,
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n"
        + _OPTIONS
        + "\n\nThe letter of the correct answer is",
        choice,
        options=True,
    ),
    "longbook_qa_eng": Kind(
        40,
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {question}\nAnswer:",
        best_f1,
        binary=False,
    ),
    "longbook_qa_chn": Kind(
        40,
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{question}\n答案：",
        best_chinese_f1,
        binary=False,
    ),
}


def load(
    folder: Path,
    tasks: Sequence[str] | None,
    malformed: Malformed,
    templates: Mapping[str, str] | None = None,
) -> list[Task]:
    """Loads tasks from `{task}.jsonl` in the folder, all that exist by default.

    templates: prompts to be used instead, by task.
    """
    files = task_files("InfiniteBench", folder, KINDS, tasks, lambda task: folder / f"{task}.jsonl")
    loaded = []
    for task, path in files.items():
        kind = KINDS[task]
        template = (templates or {}).get(task, kind.template)
        examples = read_examples(path, functools.partial(_parse, kind, template), malformed)
        metric = on_answers(kind.metric)
        loaded.append(Task("infinitebench", task, kind.gen_length, metric, examples, kind.binary))
    return loaded


def _parse(kind: Kind, template: str, raw: dict[str, Any], line: int) -> Example:
    """Makes an example; mirrors call `context` `content` and `input` `question`."""
    context = document_field(raw, "context", "content")
    question = text_field(raw, "input", "question")
    answers = answers_field(raw, "answer")
    fields = {**raw, "context": context, "input": question, "question": question}
    if kind.options:
        options = raw.get("options")
        if not isinstance(options, list) or len(options) != 4:
            raise ValueError("options must be a list of four")
        options = [str(option) for option in options]
        fields |= {f"OPTION_{letter}": x for letter, x in zip(LETTERS, options, strict=True)}
        answers = _option(answers, options)
    name = raw.get("id")
    return Example(
        id=str(line if name is None else name),
        answers=answers,
        prompt=split_template(template, fields),
    )


def _option(answers: Sequence[str], options: Sequence[str]) -> tuple[str, str]:
    """Returns (text, letter) of an answer given as the text, the letter, or both."""
    if len(answers) == 2 and answers[1] in tuple(LETTERS):
        return answers[0], answers[1]
    if len(answers) == 1 and answers[0] in options:
        return answers[0], LETTERS[options.index(answers[0])]
    if len(answers) == 1 and answers[0] in tuple(LETTERS):
        return options[LETTERS.index(answers[0])], answers[0]
    raise ValueError(f"answer must be one of the options, got {list(answers)}")
