"""Benchmarks' metrics: against their definitions, and against the packages that are named there."""

from __future__ import annotations

import importlib.util
import random
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.oracles import metrics as oracle

sys.path.insert(0, str(ROOT / "scripts"))
from experiments.benchmarks import infinitebench, longbench, ruler, text
from experiments.benchmarks.example import Example

CASES = 300
ENGLISH = [
    "the",
    "a",
    "an",
    "The",
    "answer",
    "is",
    "Paragraph",
    "12",
    "7",
    "007",
    "Anne",
    "Elliot's",
    "naïve",
    "co-op",
    "A.",
    "B:",
    "(C)",
    "option",
    "is:",
    "Option",
    "D",
    "unanswerable",
    "yes",
    "3.5",
    "x_1",
    "the_end",
    "theanswer",
    "e.g.",
    "U.S.",
    "٣٤",
    "²",
    "ünder",
    "ß",
    "İ",
]
CHINESE = [
    "段落",
    "答案是",
    "北京大学",
    "的",
    "第",
    "12",
    "，",
    "。",
    "！",
    "７",
    "我们",
    "研究",
    "《红楼梦》",
    "ａｂｃ",
    "A",
]
CODE = ["return x", "# note", "    x = foo(a, b)", "// c", "`code`", "", "def f(self):", "x += 1"]
MARKS = [
    "...",
    ".",
    "?!",
    "。。。",
    "\n",
    "\n\n",
    "\t",
    "“”",
    "{}",
    '"',
    "''",
    "\x00",
    "\u3000",
    " ",
]


def some_text(rng: random.Random, words: list[str], longest: int = 12) -> str:
    """Words, with whatever stands between them."""
    gaps = [" ", " ", " ", "\n", "", ". ", "\n\n", ", "]
    picked = [rng.choice(words) for _ in range(rng.randrange(longest))]
    return "".join(word + rng.choice(gaps) for word in picked)


def pairs(seed: int, count: int = CASES) -> list[tuple[str, str]]:
    """(prediction, answer): empty, of punctuation, English, Chinese, code, related, very long."""
    rng = random.Random(seed)
    kinds = [ENGLISH, CHINESE, CODE, MARKS, ENGLISH + MARKS, ENGLISH + CHINESE]
    found = [("", ""), ("", "x"), ("...", "."), ("。！", "答"), ("x", ""), ("\n\n", " ")]
    while len(found) < count:
        words = rng.choice(kinds)
        answer = some_text(rng, words)
        prediction = some_text(rng, rng.choice(kinds))
        if rng.random() < 0.5:  # shares most of the answer
            prediction = prediction[: rng.randrange(8)] + answer[rng.randrange(3) :]
        if rng.random() < 0.1:
            prediction = answer
        if rng.random() < 0.04:
            prediction = (prediction + "very long line ") * 60
        found.append((prediction, answer))
    return found


def test_english_words_and_f1():
    for prediction, answer in pairs(1):
        assert text.english_words(prediction) == oracle.english_words(prediction)
        want = oracle.f1(oracle.english_words(prediction), oracle.english_words(answer))
        assert text.english_f1(prediction, answer) == pytest.approx(want, abs=1e-12)
    assert text.english_f1("The cat, a dog", "cat dog!") == 1.0
    assert text.english_f1("cat", "cat dog") == pytest.approx(2 / 3)


def test_chinese_normalisation_and_f1():
    jieba = pytest.importorskip("jieba")
    jieba.setLogLevel(60)
    for prediction, answer in pairs(2):
        assert text.chinese_characters(prediction) == oracle.chinese(prediction)
        bags = []
        for one in (prediction, answer):
            words = [oracle.chinese(word) for word in jieba.lcut(one)]
            bags.append([word for word in words if word])
        want = oracle.f1(*bags)
        assert longbench.chinese_f1(prediction, answer) == pytest.approx(want, abs=1e-12)
        want = oracle.f1(list(oracle.chinese(prediction)), list(oracle.chinese(answer)))
        got = infinitebench.best_chinese_f1(prediction, ["没有", answer])
        floor = oracle.f1(list(oracle.chinese(prediction)), ["没", "有"])
        assert got == pytest.approx(max(want, floor), abs=1e-12)


def test_rouge_l_is_the_package_s():
    package = pytest.importorskip("rouge").Rouge()  # with all its metrics, as LongBench makes it
    for prediction, answer in pairs(3):
        try:
            want = package.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except Exception:
            want = 0.0
        got = longbench.rouge_l(prediction, answer)
        assert got == want
        assert got == pytest.approx(oracle.rouge_l(prediction, answer), abs=1e-12)


def test_rouge_l_on_words_of_jieba():
    rouge, jieba = pytest.importorskip("rouge"), pytest.importorskip("jieba")
    for prediction, answer in pairs(4, 200):
        cut = [" ".join(jieba.cut(one, cut_all=False)) for one in (prediction, answer)]
        try:
            want = rouge.Rouge().get_scores([cut[0]], [cut[1]], avg=True)["rouge-l"]["f"]
        except Exception:
            want = 0.0
        assert longbench.chinese_rouge_l(prediction, answer) == want


def test_rouge_l_of_a_sentence_too_long_for_the_package_counts_nothing_whoever_calls():
    pytest.importorskip("rouge")
    long = " ".join(f"w{i}" for i in range(1100))
    short = " ".join(f"w{i}" for i in range(0, 900, 2))

    def deep(levels: int) -> float:
        return deep(levels - 1) if levels else longbench.rouge_l(short, short)

    assert longbench.rouge_l(long, long) == 0.0
    assert deep(600) == pytest.approx(1.0, abs=1e-6)


def test_code_similarity_is_fuzzywuzzy_s_without_levenshtein():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if importlib.util.find_spec("Levenshtein") is not None:
        pytest.skip("python-Levenshtein is installed: fuzzywuzzy then has another ratio")
    for prediction, answer in pairs(5):
        line = oracle.code_line(prediction)
        assert longbench.code_similarity(prediction, answer) == fuzz.ratio(line, answer) / 100
    assert longbench.code_similarity("# all\n// of\n`it`", "x") == 0.0
    assert longbench.code_similarity("\n\nx = 1\ny", "x = 1") == 1.0
    assert longbench.code_similarity("", "") == 1.0


def test_classification_count_and_retrieval():
    rng = random.Random(6)
    names = ["Food", "Food and drink", "drink", "Sport", "number", "Other number", "体育", ""]
    for prediction, _ in pairs(6):
        said = prediction + rng.choice(names) + rng.choice([" ", ""]) + rng.choice(names)
        classes = rng.sample(names[:-1], rng.randrange(2, 7))
        answer = rng.choice(classes)
        want = oracle.classification(said, answer, classes)
        assert longbench.classification(said, answer, classes) == want
        gold = rng.choice(["12", "7", "3"])
        found = oracle.numbers(prediction)
        share = found.count(gold) / len(found) if found else 0.0
        assert longbench.numbers_equal(prediction, gold) == share
        for task, wording in (("en", f"Paragraph {gold}"), ("zh", f"段落{gold}")):
            metric = longbench.METRICS[f"passage_retrieval_{task}"]
            assert metric(prediction, wording) == share
    with pytest.raises(ValueError, match="names no paragraph"):
        longbench.METRICS["passage_retrieval_en"]("7", "7")
    # The class behind a dropped one is not looked at, as published.
    classes = ["Food", "drink", "Food and drink"]
    assert longbench.classification("Food and drink", "Food and drink", classes) == 0.5


@pytest.mark.parametrize("task", sorted(longbench.FIRST_LINE))
def test_first_line_is_scored_and_the_best_answer_counts(task):
    pytest.importorskip("rouge")
    answers = ("wrong", "right words")
    example = Example("1", answers, details={"all_classes": ["wrong", "right words"]})
    score = partial(longbench.score, task, example=example)
    assert score("\n\nright words\nwrong and more") == pytest.approx(1.0, abs=1e-6)
    assert score("nothing\nright words") == 0.0
    assert longbench.score("hotpotqa", "nothing\nright words", example) == pytest.approx(0.8)
    assert longbench.score("hotpotqa_e", "right words", example) == 1.0


def test_longbench_metrics_are_lm_eval_s():
    """lm-eval has a copy of LongBench's, of an older version in its handling of code."""
    for package in ("jieba", "rouge", "fuzzywuzzy", "lm_eval"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install lm_eval fuzzywuzzy rouge jieba")
    theirs = module(package_folder("lm_eval") / "tasks" / "longbench" / "metrics.py")
    for prediction, answer in pairs(7, 200):
        for ours, name in (
            (text.english_f1, "qa_f1_score"),
            (longbench.chinese_f1, "qa_f1_zh_score"),
            (longbench.rouge_l, "rouge_score"),
            (longbench.chinese_rouge_l, "rouge_zh_score"),
            (longbench.numbers_equal, "count_score"),
        ):
            want = getattr(theirs, name)(prediction, answer)
            assert ours(prediction, answer) == pytest.approx(want, abs=1e-12), name
        classes = ["the", "Anne", "yes", "答案是", answer or "x"]
        want = theirs.classification_score(prediction, classes[-1], all_classes=classes)
        assert longbench.classification(prediction, classes[-1], classes) == want
        want = theirs.retrieval_score(prediction, "Paragraph 12")
        assert longbench.METRICS["passage_retrieval_en"](prediction, "Paragraph 12") == want


def test_infinitebench_retrieval_metrics():
    rng = random.Random(8)
    for prediction, answer in pairs(8):
        gold = rng.choice(["12", "7", "007", "34"])
        digits = "".join(c if c in "0123456789" else " " for c in prediction).split()
        assert infinitebench.first_digits(prediction, [gold]) == (digits[:1] == [gold])
        value = rng.choice(["Anne", "x_1", "12", "co-op", "北京大学"])
        words = "".join(" " if c in "\n:\"'.,?!{}" else c for c in prediction).split()
        assert infinitebench.named_value(prediction, [value]) == (value in words)
        want = max(oracle.f1(*map(oracle.english_words, (prediction, x))) for x in (answer, "the"))
        assert infinitebench.best_f1(prediction, [answer, "the"]) == pytest.approx(want, abs=1e-12)
    assert infinitebench.first_digits("key: 71432. 5", ["71432"])
    assert not infinitebench.first_digits("7143", ["71432"])


def test_infinitebench_choices():
    rng = random.Random(9)
    cues = [
        "answer is:",
        "answer:",
        "answer is",
        "option is",
        "is:",
        "The ",
        "",
        "Do ",
        "I think ",
        "\n",
    ]
    said = [
        "A",
        "B",
        "C",
        "D",
        "AB",
        "CD",
        "AC",
        "A.",
        "B:",
        "Anne",
        "foo_bar",
        "Option B",
        "*C*",
        "",
    ]
    seen = set()
    for prediction, _ in pairs(10):
        filler = prediction if rng.random() < 0.3 else ""
        words = f"{filler}{rng.choice(cues)}{rng.choice([' ', '', '  '])}{rng.choice(said)}"
        words += rng.choice(["", " ", ".", " or D"])
        name, letter = rng.choice(["Anne", "foo_bar", "B", "北京"]), rng.choice("ABCD")
        got = infinitebench.choice(words, (name, letter))
        assert got == oracle.choice(words, name, letter), (words, name, letter)
        found = infinitebench.wrong_function(words, (name, letter))
        assert found == oracle.wrong_function(words, name, letter), (words, name, letter)
        seen |= {("choice", got), ("debug", found)}
    assert len(seen) == 4
    for right in ("B", "B. Anne", "the answer is: B", "answer is Anne", "option is B", "(x) B"):
        assert infinitebench.choice(right, ("Anne", "B")), right
    for wrong in ("", "A or B", "the answer is:", "answer: the B", "Bs", "b"):
        assert not infinitebench.choice(wrong, ("Anne", "C")), wrong


def test_ruler_and_needle_metrics():
    rng = random.Random(11)
    for prediction, _ in pairs(11):
        answers = rng.sample(["anne", "12", "CO-OP", "北京大学", "x_1\n", "unanswerable"], 3)
        kept = "".join("\n" if ord(c) < 32 else c for c in prediction.strip()).strip().lower()
        hits = [answer.lower() in kept for answer in answers]
        assert ruler.match_all(prediction, answers) == pytest.approx(sum(hits) / 3)
        assert ruler.match_any(prediction, answers) == float(any(hits))


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def module(path: Path):
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(loaded)
    return loaded
