"""Metrics of LongBench, InfiniteBench, RULER and the needle grids, as published.

`METRICS` has them as functions of a prediction and its example. Those of one answer count the best
of an example's answers.
"""

from __future__ import annotations

import difflib
import functools
import itertools
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


def _last_letter(prediction: str, letters: str) -> str | None:
    """Returns the last letter that stands alone in the first line that has one."""
    letter = rf"\b[{letters}]\b"
    match = re.search(rf"{letter}(?!.*{letter})", prediction)
    return match.group() if match else None


def choice(prediction: str, answers: Sequence[str], rules: str = "e60e8dc") -> bool:
    """Tells whether the option is named; answers are its text and its letter.

    As published: a text that begins with A to D is judged by that letter alone; one that is text or
    letter is right; behind "answer is" and the like text or letter count; else the first word made
    of consecutive letters of ABCD does. "first" neither strips nor compares the whole prediction.
    "last-letter" looks first for the letter that comes last.
    """
    if rules != "first":
        prediction = prediction.strip()
    if rules == "last-letter" and _last_letter(prediction, "A-D") in answers:
        return True
    if not prediction:
        return False
    if prediction[0] in "ABCD":
        return prediction[0] in answers
    if rules != "first" and prediction in answers:
        return True
    text = re.sub(" +", " ", _spaced(prediction, "\n\"'.,?!{}"))
    rest = _behind(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return bool(rest) and rest[1:].startswith(tuple(answers))
    word = next((word for word in text.split() if word in "ABCD"), None)
    return word is not None and word in answers


def wrong_function(prediction: str, answers: Sequence[str], rules: str = "e60e8dc") -> bool:
    """Tells whether the function with the error is named; answers are its name and its letter.

    It must begin with "B." or "B:", or have letter or name behind "answer is:", "is:" or "answer:".
    "first" does not strip before it reads the beginning. With "last-letter" the letter that comes
    last may also be right, and the text may begin with letter or name alone.
    """
    name, letter = answers
    start = prediction if rules == "first" else prediction.strip()
    if rules == "last-letter":
        if _last_letter(start, "A-J") == letter:
            return True
    elif start[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = _spaced(prediction.strip(), ("\n", "`", "'", '"', "-", "*", "Option", "option"))
    text = re.sub(" +", " ", text)
    if rules == "last-letter" and text.startswith((letter, name)):
        return True
    rest = _behind(text, ("answer is:", "is:", "answer:"))
    return bool(rest) and rest[1:].startswith((letter, name))


def speaker(prediction: str, answers: Sequence[str], rules: str = "e60e8dc") -> bool:
    """Tells whether the first name is a word of the prediction in capitals.

    "last-letter": whether one of the names is anywhere in it, case ignored.
    """
    text = prediction.upper()
    if rules == "last-letter":
        return any(answer.upper() in text for answer in answers)
    return answers[0] in _spaced(prediction, "\n:\"'.,?!{}").upper().split()


def first_number(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the first number, without its sign, is the answer; 5.0 is not the integer 5."""
    match = re.search(r"\d+\.\d+|\d+", prediction)
    if match is None:
        return False
    try:
        return int(match.group()) == int(answers[0])
    except ValueError:
        return not answers[0].isdecimal() and float(match.group()) == float(answers[0])


def last_integer(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the last word is the answer, as an integer."""
    words = _spaced(prediction, "\n.`'\":").split()
    try:
        return int(words[-1]) == int(answers[0])
    except (IndexError, ValueError):
        return False


def running_values(prediction: str, answers: Sequence[str]) -> float:
    """Returns the share of the answers before the first that is not the number in its place."""
    numbers = (number.lstrip("0") or "0" for number in re.findall("[0-9]+", prediction))
    equal = (number == str(int(x)) for number, x in zip(numbers, answers, strict=False))
    return sum(itertools.takewhile(bool, equal)) / len(answers)


def rouge_lsum(prediction: str, answer: str) -> float:
    """Returns F of ROUGE-Lsum by the package `rouge_score`: lines are sentences, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeLsum"]).score(answer, prediction)["rougeLsum"]
    return float(score.fmeasure)


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


# InfiniteBench's published rules; docs/evaluation.md has their commits. The first is the default.
RULES = ("e60e8dc", "first", "last-letter")
_OF_ONE: tuple[Callable[[str, str], float], ...] = (
    *(english_f1, chinese_f1, character_f1, rouge_l, chinese_rouge_l, rouge_lsum),
    *(numbers_equal, paragraph_named, code_similarity),
)
_OF_ALL: tuple[Callable[[str, Sequence[str]], float], ...] = (
    *(first_digits, named_value, first_number, last_integer, running_values),
    *(match_all, match_any),
)
METRICS: Mapping[str, Metric] = {
    **{compare.__name__: functools.partial(best, compare) for compare in _OF_ONE},
    **{judge.__name__: on_answers(judge) for judge in _OF_ALL},
    **{
        f"{judge.__name__}@{rules}": on_answers(functools.partial(judge, rules=rules))
        for judge in (choice, wrong_function, speaker)
        for rules in RULES
    },
    "classification": _classify,
}
# What is imported when a metric is computed.
PACKAGES = {
    "chinese_f1": ["jieba"],
    "rouge_l": ["rouge"],
    "chinese_rouge_l": ["rouge", "jieba"],
    "rouge_lsum": ["rouge_score"],
}
