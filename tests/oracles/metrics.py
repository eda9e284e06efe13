"""Long-context benchmarks' metrics from their definitions, by other means than the evaluator's.

Loops and dynamic programming where the evaluator uses counters, regular expressions and packages.
"""

from __future__ import annotations

import itertools
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


def lcs_places(x: Sequence[str], y: Sequence[str], on_tie: str) -> set[int]:
    """Indices in x of a longest common subsequence.

    From the end: a match is taken; else x or y is shortened, the one that keeps more; on a tie that
    which is named, "x" as by the package `rouge_score`, "y" as by `rouge`.
    """
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
            )
    i, j, places = len(x), len(y), set()
    while i and j:
        without_x, without_y = table[i - 1][j], table[i][j - 1]
        if x[i - 1] == y[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif without_x > without_y or (without_x == without_y and on_tie == "x"):
            i -= 1
        else:
            j -= 1
    return places


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
            union |= {reference[i] for i in lcs_places(reference, sentence, "y")}
    recall = len(union) / len({w for s in wanted for w in s})
    precision = len(union) / len({w for s in said for w in s})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_lsum(prediction: str, answer: str) -> float:
    """Lines are sentences; a word counts as often as both texts have it."""

    def lines(text: str) -> list[list[str]]:
        ascii_words = "".join(
            c if c in string.ascii_lowercase + "0123456789\n" else " " for c in text
        )
        return [line.split() for line in ascii_words.split("\n")]

    said, wanted = (lines(text.lower()) for text in (prediction, answer))
    left_said, left_wanted = ([w for line in text for w in line] for text in (said, wanted))
    size_said, size_wanted, hits = len(left_said), len(left_wanted), 0
    if not size_said or not size_wanted:
        return 0.0
    for reference in wanted:
        union = set().union(*(lcs_places(reference, line, "x") for line in said))
        for word in (reference[i] for i in sorted(union)):
            if word in left_said and word in left_wanted:
                left_said.remove(word)
                left_wanted.remove(word)
                hits += 1
    precision, recall = hits / size_said, hits / size_wanted
    return 2 * precision * recall / (precision + recall) if hits else 0.0


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


def last_letter(text: str, letters: str) -> str:
    """The last lone letter of the first line that has one; a digit or "_" beside it joins it."""
    for line in text.split("\n"):
        padded = f" {line} "
        lone = [
            c
            for before, c, after in zip(padded, padded[1:], padded[2:], strict=False)
            if c in letters and not any(x.isalnum() or x == "_" for x in (before, after))
        ]
        if lone:
            return lone[-1]
    return ""


def blanks_for(text: str, marks: Sequence[str]) -> str:
    """The text with a blank for each mark, and one blank for several."""
    for mark in marks:
        text = " ".join(text.split(mark))
    while text.count("  "):
        text = text.replace("  ", " ")
    return text


def behind_cue(words: str, cues: Sequence[str], spellings: Sequence[str]) -> bool | None:
    """Whether one of the spellings stands behind the first cue; None without a cue."""
    for cue in cues:
        if cue in words:
            rest = words.split(cue, 1)[1]
            return rest != "" and any(rest[1:].startswith(s) for s in spellings)
    return None


def choice(prediction: str, text: str, letter: str, rules: str) -> bool:
    """InfiniteBench's reading of a choice, step by step, by version."""
    spellings = [text, letter]
    if rules in ("e60e8dc", "last-letter"):
        prediction = prediction.strip()
    lone = last_letter(prediction, "ABCD") if rules == "last-letter" else ""
    if lone and lone in spellings:
        return True
    if prediction == "":
        return False
    if prediction[0] in ("A", "B", "C", "D"):
        return prediction[0] in spellings
    if rules != "first" and spellings.count(prediction):
        return True
    words = blanks_for(prediction, "\n\"'.,?!{}")
    cues = ("answer is:", "answer:", "answer is", "option is")
    behind = behind_cue(words, cues, spellings)
    if behind is not None:
        return behind
    runs = {"ABCD"[i:j] for i in range(4) for j in range(i + 1, 5)}
    for word in words.split():
        if word in runs:
            return word in spellings
    return False


def wrong_function(prediction: str, name: str, letter: str, rules: str) -> bool:
    """InfiniteBench's reading of code_debug, step by step, by version."""
    stripped = prediction.strip()
    start = {"first": prediction, "e60e8dc": stripped, "last-letter": ""}[rules]
    if start.startswith((letter + ".", letter + ":")):
        return True
    if rules == "last-letter" and last_letter(stripped, "ABCDEFGHIJ") == letter:
        return True
    marks = ("\n", "`", "'", '"', "-", "*", "Option", "option")
    words = blanks_for(stripped, marks)
    if rules == "last-letter" and any(words.find(s) == 0 for s in (letter, name)):
        return True
    return bool(behind_cue(words, ("answer is:", "is:", "answer:"), (letter, name)))


def speaker(prediction: str, names: Sequence[str], rules: str) -> bool:
    """InfiniteBench's reading of longdialogue_qa_eng, by version."""
    if rules == "last-letter":
        return any(prediction.upper().find(name.upper()) >= 0 for name in names)
    return names[0] in [w.upper() for w in blanks_for(prediction, "\n:\"'.,?!{}").split()]


def first_number(prediction: str, gold: float) -> bool:
    """The first run of digits, with the fraction behind it, is the gold number of its type."""
    place = next((i for i, c in enumerate(prediction) if c.isdecimal()), None)
    if place is None:
        return False
    whole = "".join(itertools.takewhile(str.isdecimal, prediction[place:]))
    rest = prediction[place + len(whole) :]
    part = "".join(itertools.takewhile(str.isdecimal, rest[1:])) if rest[:1] == "." else ""
    if isinstance(gold, int):
        return not part and int(whole) == gold
    return float(f"{whole}.{part or 0}") == gold


def last_integer(prediction: str, gold: int) -> bool:
    """The last word is the gold number in decimal digits, with or without a sign."""
    words = blanks_for(prediction, "\n.`'\":").split()
    last = words[-1] if words else ""
    digits = last[1:] if last[:1] in ("+", "-") else last
    return digits.isdecimal() and int(last) == gold


def running_values(prediction: str, gold: Sequence[int]) -> float:
    """The share of gold numbers before the first that differs, or is missing."""
    said = "".join(c if c in "0123456789" else " " for c in prediction).split()
    right = 0
    while right < min(len(said), len(gold)) and int(said[right]) == gold[right]:
        right += 1
    return right / len(gold)
