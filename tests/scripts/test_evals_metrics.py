"""Benchmarks' metrics: against their definitions, and against the packages that are named there."""

from __future__ import annotations

import importlib.util
import random
import sys
import warnings
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.oracles import metrics as oracle

sys.path.insert(0, str(ROOT / "scripts"))
from experiments.benchmarks import metrics, published
from experiments.benchmarks.example import Example

CASES = 300
ENGLISH = (
    "the|a|an|The|answer|is|Paragraph|12|7|007|Anne|Elliot's|naïve|co-op|A.|B:|(C)|option|is:|"
    "Option|D|unanswerable|yes|3.5|x_1|the_end|theanswer|e.g.|U.S.|٣٤|²|ünder|ß|İ"
)
CHINESE = "段落|答案是|北京大学|的|第|12|，|。|！|７|我们|研究|《红楼梦》|ａｂｃ|A"
CODE = "return x|# note|    x = foo(a, b)|// c|`code`||def f(self):|x += 1"
# Beginnings of a prediction.
LEADS = ["", " ", "\n", " \r\n", "\t", "\u3000", "- ", "**", "\ufeff"]
MARKS = "...|.|?!|。。。|\n|\n\n|\t|“”|{}|\"|''|\x00|\u3000| "


def judge(metric: str, prediction: str, *answers: str) -> float:
    """What a metric gives a prediction for an example with these answers."""
    return metrics.METRICS[metric](prediction, Example("1", answers))


def some_text(rng: random.Random, words: str, longest: int = 12) -> str:
    """Words, with any of the gaps between them."""
    gaps = [" ", " ", " ", "\n", "", ". ", "\n\n", ", "]
    picked = [rng.choice(words.split("|")) for _ in range(rng.randrange(longest))]
    return "".join(word + rng.choice(gaps) for word in picked)


def pairs(seed: int, count: int = CASES) -> list[tuple[str, str]]:
    """(prediction, answer): empty, of punctuation, English, Chinese, code, related, very long."""
    rng = random.Random(seed)
    kinds = [ENGLISH, CHINESE, CODE, MARKS, f"{ENGLISH}|{MARKS}", f"{ENGLISH}|{CHINESE}"]
    cases = [("", ""), ("", "x"), ("...", "."), ("。！", "答"), ("x", ""), ("\n\n", " ")]
    while len(cases) < count:
        words = rng.choice(kinds)
        answer = some_text(rng, words)
        prediction = some_text(rng, rng.choice(kinds))
        if rng.random() < 0.5:  # shares most of the answer
            prediction = prediction[: rng.randrange(8)] + answer[rng.randrange(3) :]
        if rng.random() < 0.1:
            prediction = answer
        if rng.random() < 0.2:
            prediction = rng.choice(LEADS) + rng.choice([prediction, prediction.upper()])
        if rng.random() < 0.04:
            prediction = (prediction + "very long line ") * 60
        cases.append((prediction, answer))
    return cases


def test_english_words_and_f1():
    for prediction, answer in pairs(1):
        assert metrics.english_words(prediction) == oracle.english_words(prediction)
        want = oracle.f1(oracle.english_words(prediction), oracle.english_words(answer))
        assert metrics.english_f1(prediction, answer) == pytest.approx(want, abs=1e-12)
    assert metrics.english_f1("The cat, a dog", "cat dog!") == 1.0
    assert metrics.english_f1("cat", "cat dog") == pytest.approx(2 / 3)


def test_chinese_normalisation_and_f1():
    jieba = pytest.importorskip("jieba")
    jieba.setLogLevel(60)
    for prediction, answer in pairs(2):
        assert metrics.chinese_characters(prediction) == oracle.chinese(prediction)
        cut = [map(oracle.chinese, jieba.lcut(one)) for one in (prediction, answer)]
        want = oracle.f1(*([word for word in words if word] for words in cut))
        assert metrics.chinese_f1(prediction, answer) == pytest.approx(want, abs=1e-12)
        characters = [list(oracle.chinese(one)) for one in (prediction, answer)]
        want = max(oracle.f1(*characters), oracle.f1(characters[0], ["没", "有"]))
        got = judge("character_f1", prediction, "没有", answer)
        assert got == pytest.approx(want, abs=1e-12)


def package_rouge_l(prediction: str, answer: str) -> float:
    """The package's score, with all its metrics as LongBench makes it; 0 where it fails."""
    package = pytest.importorskip("rouge").Rouge()
    try:
        return package.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except Exception:
        return 0.0


def test_rouge_l_is_the_package_s():
    for prediction, answer in pairs(3):
        got = metrics.rouge_l(prediction, answer)
        assert got == package_rouge_l(prediction, answer)
        assert got == pytest.approx(oracle.rouge_l(prediction, answer), abs=1e-12)


def test_rouge_l_on_words_of_jieba():
    jieba = pytest.importorskip("jieba")
    for prediction, answer in pairs(4, 200):
        cut = [" ".join(jieba.cut(one, cut_all=False)) for one in (prediction, answer)]
        assert metrics.chinese_rouge_l(prediction, answer) == package_rouge_l(*cut)


def test_rouge_l_of_a_sentence_too_long_for_the_package_counts_nothing_whoever_calls():
    pytest.importorskip("rouge")
    long = " ".join(f"w{i}" for i in range(1100))
    short = " ".join(f"w{i}" for i in range(0, 900, 2))

    def deep(levels: int) -> float:
        return deep(levels - 1) if levels else metrics.rouge_l(short, short)

    assert metrics.rouge_l(long, long) == 0.0
    assert deep(600) == pytest.approx(1.0, abs=1e-6)


def test_code_similarity_is_fuzzywuzzy_s_without_levenshtein():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if importlib.util.find_spec("Levenshtein") is not None:
        pytest.skip("python-Levenshtein is installed: fuzzywuzzy then has another ratio")
    for prediction, answer in pairs(5):
        line = oracle.code_line(prediction)
        assert metrics.code_similarity(prediction, answer) == fuzz.ratio(line, answer) / 100
    assert metrics.code_similarity("# all\n// of\n`it`", "x") == 0.0
    assert metrics.code_similarity("\n\nx = 1\ny", "x = 1") == 1.0
    assert metrics.code_similarity("", "") == 1.0


def test_classification_count_and_retrieval():
    rng = random.Random(6)
    names = ["Food", "Food and drink", "drink", "Sport", "number", "Other number", "体育", ""]
    for prediction, _ in pairs(6):
        said = prediction + rng.choice(names) + rng.choice([" ", ""]) + rng.choice(names)
        classes = rng.sample(names[:-1], rng.randrange(2, 7))
        answer = rng.choice(classes)
        want = oracle.classification(said, answer, classes)
        assert metrics.classification(said, answer, classes) == want
        gold = rng.choice(["12", "7", "3"])
        numbers = oracle.numbers(prediction)
        share = numbers.count(gold) / len(numbers) if numbers else 0.0
        assert metrics.numbers_equal(prediction, gold) == share
        for wording in (f"Paragraph {gold}", f"段落{gold}"):
            assert metrics.paragraph_named(prediction, wording) == share
    with pytest.raises(ValueError, match="names no paragraph"):
        metrics.paragraph_named("7", "7")
    # The class behind a dropped one is not looked at, as published.
    classes = ["Food", "drink", "Food and drink"]
    assert metrics.classification("Food and drink", "Food and drink", classes) == 0.5


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht"])
def test_first_line_is_scored_and_the_best_answer_counts(task):
    pytest.importorskip("rouge")
    answers = ("wrong", "right words")
    example = Example("1", answers, details={"all_classes": ["wrong", "right words"]})
    kinds = published.KINDS["longbench"]
    assert {name for name, kind in kinds.items() if kind.first_line} == {
        f"{name}{end}" for name in ("trec", "triviaqa", "samsum", "lsht") for end in ("", "_e")
    }
    score = kinds[task].score
    assert score("\n\nright words\nwrong and more", example) == pytest.approx(1.0, abs=1e-6)
    assert score("nothing\nright words", example) == 0.0
    score = kinds["hotpotqa"].score
    assert score("nothing\nright words", example) == pytest.approx(0.8)
    assert kinds["hotpotqa_e"].score("right words", example) == 1.0


def test_longbench_metrics_are_lm_eval_s():
    """lm-eval has a copy of LongBench's, of an older version in its handling of code."""
    for package in ("jieba", "rouge", "fuzzywuzzy", "lm_eval"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install lm_eval fuzzywuzzy rouge jieba")
    theirs = package_file("lm_eval", "tasks", "longbench", "metrics.py")
    for prediction, answer in pairs(7, 200):
        for ours, name in (
            (metrics.english_f1, "qa_f1_score"),
            (metrics.chinese_f1, "qa_f1_zh_score"),
            (metrics.rouge_l, "rouge_score"),
            (metrics.chinese_rouge_l, "rouge_zh_score"),
            (metrics.numbers_equal, "count_score"),
        ):
            want = getattr(theirs, name)(prediction, answer)
            assert ours(prediction, answer) == pytest.approx(want, abs=1e-12), name
        classes = ["the", "Anne", "yes", "答案是", answer or "x"]
        want = theirs.classification_score(prediction, classes[-1], all_classes=classes)
        assert metrics.classification(prediction, classes[-1], classes) == want
        want = theirs.retrieval_score(prediction, "Paragraph 12")
        assert metrics.paragraph_named(prediction, "Paragraph 12") == want


def test_infinitebench_retrieval_metrics():
    rng = random.Random(8)
    for prediction, answer in pairs(8):
        gold = rng.choice(["12", "7", "007", "34"])
        digits = "".join(c if c in "0123456789" else " " for c in prediction).split()
        assert judge("first_digits", prediction, gold) == (digits[:1] == [gold])
        value = rng.choice(["Anne", "x_1", "12", "co-op", "北京大学"])
        words = "".join(" " if c in "\n:\"'.,?!{}" else c for c in prediction).split()
        assert judge("named_value", prediction, value) == (value in words)
        want = max(oracle.f1(*map(oracle.english_words, (prediction, x))) for x in (answer, "the"))
        assert judge("english_f1", prediction, answer, "the") == pytest.approx(want, abs=1e-12)
    assert judge("first_digits", "key: 71432. 5", "71432")
    assert not judge("first_digits", "7143", "71432")


# Predictions made of a beginning, a cue, an option and an end: in other words, other case, other
# scripts, with marks around.
CUES = "answer is:|answer:|answer is|option is|is:|The correct option is:|Do |I think ||A: |x\n"
CHOSEN = (
    "A|B|C|D|E|AB|CD|AC|BCD|A.|B:|B.|(C)|D)|b|Ｂ|В|Bob|ABLE|x_B|B2|Anne|anne|foo_bar|北京|"
    "Option B|*C*|`foo_bar`|'D'|"
)
TAILS = ["", " ", ".", "\n", " or D", "\nA.", " because a B"]
MADE = [
    f"{lead}{cue}{gap}{option}{tail}"
    for lead in LEADS
    for cue in CUES.split("|")
    for gap in ("", " ")
    for option in CHOSEN.split("|")
    for tail in TAILS
]
ANSWERS = [(name, letter) for name in ("Anne", "foo_bar", "B", "北京") for letter in "ABCD"]


@pytest.mark.parametrize("rules", metrics.RULES)
def test_infinitebench_choices(rules):
    rng, seen = random.Random(9), set()
    assert len(MADE) == 41_580, "docs/evaluation.md has the number of pairs"
    for prediction in MADE:
        pair = rng.choice(ANSWERS)
        for name in ("choice", "wrong_function"):
            got = judge(f"{name}@{rules}", prediction, *pair)
            assert got == getattr(oracle, name)(prediction, *pair, rules), (name, prediction, pair)
            seen.add((name, got))
    assert len(seen) == 4
    for right in ("B", "B. Anne", "the answer is: B", "answer is Anne", "option is B", "(x) B"):
        assert judge(f"choice@{rules}", right, "Anne", "B"), right
    for wrong in ("", "A or B", "the answer is:", "answer: the B", "Bs", "b"):
        assert not judge(f"choice@{rules}", wrong, "Anne", "C"), wrong


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "right"),
    [
        ("wrong_function", " B. merge_rows", ("merge_rows", "B"), {"e60e8dc", "last-letter"}),
        ("wrong_function", " B: merge_rows", ("merge_rows", "B"), {"e60e8dc", "last-letter"}),
        ("wrong_function", "\nB. f\nIt divides by 0", ("f", "B"), {"e60e8dc", "last-letter"}),
        ("wrong_function", " A. other", ("merge_rows", "B"), set()),
        ("wrong_function", "merge_rows", ("merge_rows", "B"), {"last-letter"}),
        ("choice", " C", ("Anne", "C"), set(metrics.RULES)),
        ("choice", "\nC, or the answer is A", ("Anne", "C"), {"e60e8dc", "last-letter"}),
        ("choice", " the inn ", ("the inn", "C"), {"e60e8dc", "last-letter"}),
        ("choice", " Anne ", ("Anne", "C"), set()),
        ("choice", "A or C", ("Anne", "C"), {"last-letter"}),
        ("speaker", "Anne.", ("ANNE",), set(metrics.RULES)),
        ("speaker", "Anne Elliot", ("ANNE ELLIOT", "ANNE"), {"last-letter"}),
    ],
)
def test_infinitebench_rules_that_differ(metric, prediction, answers, right):
    """What upstream's commits 220fd2e, e60e8dc and its later rule of the last letter say."""
    got = {rules for rules in metrics.RULES if judge(f"{metric}@{rules}", prediction, *answers)}
    assert got == right


def test_infinitebench_numbers_and_names():
    rng, seen, count = random.Random(12), set(), 0
    said = "5|5.0|5.5|05|-5|+5|٥|5.|.5|1_0|five|3 5|0|12, 5|[1, 4, 8]|1 4 9|`5`|5:|x5|1e5|5.50"
    for lead in LEADS:
        for text in said.split("|"):
            for tail in (*TAILS, " 7", "ANNE", " Anne:", "\nMary Anne"):
                prediction, count = lead + text + tail, count + 1
                for gold in (5, 5.0, 5.5, 0, -5, 10):
                    got = judge("first_number", prediction, str(gold))
                    assert got == oracle.first_number(prediction, gold), (prediction, gold)
                    seen.add(("number", got))
                for gold in (5, 0, -5, 7):
                    got = judge("last_integer", prediction, str(gold))
                    want = oracle.last_integer(prediction, gold)
                    assert got == want or "1_0" in text, (prediction, gold)
                    seen.add(("integer", got))
                values = rng.choice([[5], [1, 4, 8], [5, 7], [12, 5, -5], [5, 5]])
                got = judge("running_values", prediction, *map(str, values))
                assert got == oracle.running_values(prediction, values)
                seen.add(("values", got > 0))
                for rules in metrics.RULES:
                    names = rng.choice([("ANNE",), ("Anne",), ("MARY ANNE", "ANNE")])
                    got = judge(f"speaker@{rules}", prediction, *names)
                    assert got == oracle.speaker(prediction, names, rules), (prediction, names)
                    seen.add(("speaker", got))
    assert len(seen) == 8
    assert count == 2_079, "docs/evaluation.md has the number of pairs"


def test_rouge_lsum_is_the_package_s():
    pytest.importorskip("rouge_score", reason="pip install 'pdllm-jax[eval]'")
    for prediction, answer in pairs(13):
        want = oracle.rouge_lsum(prediction, answer)
        assert metrics.rouge_lsum(prediction, answer) == pytest.approx(want, abs=1e-12)
    assert metrics.rouge_lsum("The sea.\nA hall", "a hall\nthe sea") == 1.0


def test_ruler_and_needle_metrics():
    rng = random.Random(11)
    for prediction, _ in pairs(11):
        answers = rng.sample(["anne", "12", "CO-OP", "北京大学", "x_1\n", "unanswerable"], 3)
        kept = "".join("\n" if ord(c) < 32 else c for c in prediction.strip()).strip().lower()
        hits = [answer.lower() in kept for answer in answers]
        assert judge("match_all", prediction, *answers) == pytest.approx(sum(hits) / 3)
        assert judge("match_any", prediction, *answers) == float(any(hits))


def package_file(package: str, *parts: str):
    """A module from a file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts)
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(loaded)
    return loaded
