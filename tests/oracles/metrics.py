"""Long-context benchmarks' metrics from their definitions, by other means than the evaluator's.

Loops and dynamic programming where the evaluator uses counters, regular expressions and packages.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

FULL_WIDTH = set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """2 * shared / (both lengths), tokens paired off one by one."""
    unpaired, shared = list(answer), 0
    for token in prediction:
        if token in unpaired:
            unpaired.remove(token)
            shared += 1
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def english_words(text: str) -> list[str]:
    """Lower case; ASCII punctuation deleted; the words a, an, the dropped."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    pieces, word = [], ""
    for c in kept + "\n":
        if c.isalnum() or c == "_":
            word += c
            continue
        pieces += [" " if word in ("a", "an", "the") else word, c]
        word = ""
    return "".join(pieces).split()


def chinese(text: str) -> str:
    """Lower case without either kind of punctuation and without white space."""
    drop = FULL_WIDTH | set(string.punctuation)
    return "".join(c for c in text.lower() if c not in drop and not c.isspace())


def numbers(text: str) -> list[str]:
    """Maximal runs of decimal digits of any script."""
    runs = [""]
    for c in text:
        if c.isdecimal():
            runs[-1] += c
        elif runs[-1]:
            runs.append("")
    return [run for run in runs if run]


def lcs_words(x: Sequence[str], y: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence: of several, the one that the package `rouge` takes.

    From the end: a match is taken; else x is shortened if that alone keeps more, else y.
    """
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
            )
    i, j, words = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction: str, answer: str) -> float:
    """Summary level: sentences end with a full stop; words count once; 0 without a sentence."""

    def sentences(text: str) -> list[list[str]]:
        return [" ".join(s.split()).split(" ") for s in text.split(".") if s]

    said, wanted = sentences(prediction), sentences(answer)
    if not said or not wanted:
        return 0.0
    union: set[str] = set()
    for reference in wanted:
        for sentence in said:
            union |= lcs_words(reference, sentence)
    recall = len(union) / len({w for s in wanted for w in s})
    precision = len(union) / len({w for s in said for w in s})
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """By indices, as a `for` loop over a list that shrinks does it."""
    named = [name for name in classes if prediction.find(name) >= 0]
    i = 0
    while i < len(named):
        name = named[i]
        if answer.find(name) >= 0 and name != answer:
            del named[named.index(name)]
        i += 1
    return (named.count(answer) > 0 and 1 / len(named)) or 0.0


def code_line(prediction: str) -> str:
    """The first line without a mark of comments, empty ones at the beginning aside."""
    start = 0
    while prediction[start : start + 1] == "\n":
        start += 1
    for line in prediction[start:].split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""


def choice(prediction: str, text: str, letter: str) -> bool:
    """InfiniteBench's reading of a choice, step by step."""
    if prediction == "":
        return False
    spellings = [text, letter]
    if prediction[0] in ("A", "B", "C", "D"):
        return prediction[0] in spellings
    words = "".join(" " if c in "\n\"'.,?!{}" else c for c in prediction)
    while words.count("  "):
        words = words.replace("  ", " ")
    for cue in ("answer is:", "answer:", "answer is", "option is"):
        if cue in words:
            rest = words.split(cue, 1)[1]
            return rest != "" and any(rest[1:].startswith(s) for s in spellings)
    runs = {"ABCD"[i:j] for i in range(4) for j in range(i + 1, 5)}
    for word in words.split():
        if word in runs:
            return word in spellings
    return False


def wrong_function(prediction: str, name: str, letter: str) -> bool:
    """InfiniteBench's reading of code_debug, step by step."""
    if prediction.startswith((letter + ".", letter + ":")):
        return True
    words = prediction.strip()
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        words = " ".join(words.split(mark))
    while words.count("  "):
        words = words.replace("  ", " ")
    for cue in ("answer is:", "is:", "answer:"):
        if cue in words:
            rest = words.split(cue, 1)[1]
            return rest != "" and any(rest[1:].startswith(s) for s in (letter, name))
    return False
