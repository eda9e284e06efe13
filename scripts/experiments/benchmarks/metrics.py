"""Metrics of LongBench, InfiniteBench, RULER and the needle grids, as published.

`METRICS` has them as functions of a prediction and its example. Those of one answer count the best
of an example's answers.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments.benchmarks.example import Example, Metric

_ENGLISH = str.maketrans("", "", string.punctuation)
# The full-width and Chinese marks that LongBench and InfiniteBench drop.
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜"
    "〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")


def english_words(text: str) -> list[str]:
    """Splits lower-case text, without ASCII punctuation and then articles, at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_ENGLISH)).split()


def chinese_characters(text: str) -> str:
    """Returns lower-case text without punctuation of both kinds and white space."""
    return "".join(text.lower().translate(_CHINESE).split())


@functools.cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports its cache on stderr
    return jieba


def chinese_words(text: str) -> list[str]:
    """Returns jieba's words, in its precise mode."""
    return list(_jieba().cut(text, cut_all=False))


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Returns F1 of two bags of tokens; 0 where they share none, or one is empty."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def english_f1(prediction: str, answer: str) -> float:
    """Returns token F1 after SQuAD's normalisation."""
    return f1(english_words(prediction), english_words(answer))


def chinese_f1(prediction: str, answer: str) -> float:
    """Returns token F1 on jieba's words, each normalised, empty ones dropped (LongBench)."""
    bags = (map(chinese_characters, chinese_words(text)) for text in (prediction, answer))
    return f1(*([word for word in bag if word] for bag in bags))


def character_f1(prediction: str, answer: str) -> float:
    """Returns F1 on normalised characters (InfiniteBench)."""
    return f1(chinese_characters(prediction), chinese_characters(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """Returns F of ROUGE-L by the package `rouge` 1.0.1; any error counts 0, as published.

    The package recurses once a word and fails at Python's limit. A new thread has an empty stack,
    so that the limit does not depend on the caller.
    """
    from rouge import Rouge

    def score() -> float:
        try:
            scores = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
            return float(scores["rouge-l"]["f"])
        except Exception:
            return 0.0

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(score).result()


def chinese_rouge_l(prediction: str, answer: str) -> float:
    """Returns `rouge_l` on jieba's words."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(answer)))


def numbers_equal(prediction: str, answer: str) -> float:
    """Returns the share of the prediction's numbers that are the answer; 0 without numbers."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def paragraph_named(prediction: str, answer: str) -> float:
    """Returns `numbers_equal` for the paragraph's number in the answer. ValueError without one."""
    match = _PARAGRAPH.search(answer)
    if match is None:
        raise ValueError(f"answer {answer!r} names no paragraph")
    return numbers_equal(prediction, match.group(1))


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


def _spaced(text: str, marks: Sequence[str]) -> str:
    """Replaces every mark by a space."""
    return functools.reduce(lambda text, mark: text.replace(mark, " "), marks, text)


def _behind(text: str, cues: Sequence[str]) -> str | None:
    """Returns the text behind the first of the cues that occurs in it."""
    cue = next((cue for cue in cues if cue in text), None)
    return None if cue is None else text.partition(cue)[2]


def first_digits(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the first run of ASCII digits is the answer."""
    match = re.search("[0-9]+", prediction)
    return match is not None and match.group() == answers[0]


def named_value(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the answer is one of the prediction's words."""
    return answers[0] in _spaced(prediction, "\n:\"'.,?!{}").split()


def choice(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the option is named; answers are its text and its letter.

    As published: a text that begins with A to D is judged by that letter alone; behind "answer is"
    and the like text or letter count; else the first word made of consecutive letters of ABCD does.
    """
    if not prediction:
        return False
    if prediction[0] in "ABCD":
        return prediction[0] in answers
    text = re.sub(" +", " ", _spaced(prediction, "\n\"'.,?!{}"))
    rest = _behind(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return bool(rest) and rest[1:].startswith(tuple(answers))
    word = next((word for word in text.split() if word in "ABCD"), None)
    return word is not None and word in answers


def wrong_function(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the function with the error is named; answers are its name and its letter.

    It must begin with "B." or "B:", or have letter or name behind "answer is:", "is:" or "answer:".
    """
    if prediction[:2] in (f"{answers[1]}.", f"{answers[1]}:"):
        return True
    text = _spaced(prediction.strip(), ("\n", "`", "'", '"', "-", "*", "Option", "option"))
    rest = _behind(re.sub(" +", " ", text), ("answer is:", "is:", "answer:"))
    return bool(rest) and rest[1:].startswith(tuple(answers))


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """Returns the share of the answers that are in the prediction, case ignored."""
    text = _clean(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_any(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether one of the answers is in the prediction, case ignored."""
    return any(answer.lower() in _clean(prediction) for answer in answers)


def _clean(prediction: str) -> str:
    """Makes line ends of control characters, in lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def best(compare: Callable[..., float], prediction: str, example: Example, **details: Any) -> float:
    """Returns the best of a comparison over the example's answers."""
    scores = (compare(prediction, answer, **details) for answer in example.answers)
    return max(scores, default=0.0)


def _classify(prediction: str, example: Example) -> float:
    return best(classification, prediction, example, classes=example.details["all_classes"])


def on_answers(judge: Callable[[str, Sequence[str]], float]) -> Metric:
    """Makes a metric of a function of (prediction, answers)."""
    return lambda prediction, example: float(judge(prediction, example.answers))


_OF_ONE: tuple[Callable[[str, str], float], ...] = (
    *(english_f1, chinese_f1, character_f1, rouge_l, chinese_rouge_l),
    *(numbers_equal, paragraph_named, code_similarity),
)
_OF_ALL = (first_digits, named_value, choice, wrong_function, match_all, match_any)
METRICS: Mapping[str, Metric] = {
    **{compare.__name__: functools.partial(best, compare) for compare in _OF_ONE},
    **{judge.__name__: on_answers(judge) for judge in _OF_ALL},
    "classification": _classify,
}
# What is imported when a metric is computed.
PACKAGES = {"chinese_f1": ["jieba"], "rouge_l": ["rouge"], "chinese_rouge_l": ["rouge", "jieba"]}
