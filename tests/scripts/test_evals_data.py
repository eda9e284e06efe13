"""Benchmarks' files: every shape of a line, bad lines, and prompts cut at the document."""

from __future__ import annotations

import json
import re
import sys

import pytest

from pdllm_jax.evaluation import prompts
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
from experiments.benchmarks import needle, published
from experiments.benchmarks.example import DataError, Malformed


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """Of bytes, with LLaDA's special tokens behind them."""
    checkpoints = pytest.importorskip("tests.oracles.checkpoints")
    checkpoints.write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path, ModelConfig.from_dict(checkpoints.tiny_config()))


def load(benchmark: str, folder, tasks=None, malformed: Malformed | None = None, **settings):
    """Loads tasks, by default such as have no malformed line."""
    malformed = malformed or Malformed("stop", pytest.fail)
    return published.load(benchmark, folder, tasks, malformed, **settings)


def refuses(message: str, benchmark: str, folder, tasks=None, **settings) -> None:
    with pytest.raises(DataError, match=message):
        load(benchmark, folder, tasks, **settings)


def test_longbench_lines_in_every_shape(tmp_path):
    pytest.importorskip("jieba")
    tasks = {t.name: t for t in load("longbench", evals_data.longbench(tmp_path / "copy"))}
    assert set(tasks) == {*evals_data.PROMPTS, "hotpotqa_e"}
    examples = tasks["hotpotqa"].examples
    assert [example.id for example in examples] == ["a1", "2", "a1#2"]
    assert [example.answers for example in examples] == [
        ("Kellynch Hall", "K"),
        ("Hall",),
        ("Anne",),
    ]
    after = "\n\nQuestion: Where does Anne live?\nAnswer:"
    assert examples[0].prompt == ("Passages.\n", evals_data.TEXT * 3, after)
    assert examples[1].prompt.after == after
    assert tasks["hotpotqa_e"].examples[1].details["length"] == 5000
    assert tasks["trec"].examples[0].details["all_classes"] == ["Food", "Sport"]
    chat = {name: task.chat for name, task in tasks.items()}
    assert chat == {name: name not in ("trec", "lcc") for name in tasks}
    assert tasks["lcc"].examples[0].prompt.after == "Next line of code:\n"
    assert tasks["gov_report"].gen_length == 8


def test_longbench_by_name_and_what_is_missing(tmp_path):
    folder = evals_data.longbench(tmp_path / "copy")
    config, lengths = folder / "config", folder / "config" / "dataset2maxlen.json"
    tasks = load("longbench", folder / "data", ["lcc", "trec"], config=config)
    assert [task.name for task in tasks] == ["lcc", "trec"]
    assert load("longbench", folder / "data", ["lcc"])[0].gen_length == 8
    refuses("no task 'nothing'", "longbench", folder, ["nothing"])
    refuses("qasper.jsonl is missing", "longbench", folder, ["qasper"])
    refuses("holds no LongBench task", "longbench", tmp_path)
    lengths.write_text("{}")
    refuses("positive number for lcc", "longbench", folder, ["lcc"])
    lengths.unlink()
    refuses(r"dataset2maxlen\.json is not in", "longbench", folder, ["lcc"])
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps({**evals_data.PROMPTS, "lcc": "no place"}), r"one \{context\}"),
    ):
        lengths.write_text(json.dumps(evals_data.LENGTHS))
        (config / "dataset2prompt.json").write_text(content)
        refuses(message, "longbench", folder, ["lcc"])


def test_infinitebench_lines_in_every_shape(tmp_path):
    folder = evals_data.infinitebench(tmp_path / "copy")
    tasks = {task.name: task for task in load("infinitebench", folder)}
    assert [x.answers for x in tasks["passkey"].examples] == [("71432",)] * 3
    assert tasks["passkey"].examples[2].prompt.context == evals_data.TEXT
    assert tasks["passkey"].examples[0].prompt.after.endswith("pass key?\n\nThe pass key is")
    assert tasks["number_string"].examples[0].answers == ("0712345678",)
    assert [x.answers for x in tasks["code_debug"].examples] == [("Mary", "B")] * 3
    answers = [x.answers for x in tasks["longbook_choice_eng"].examples]
    assert answers == [("Mary", "B")] * 3 + [("Louisa", "C")]
    assert "\nB. Mary\n" in tasks["longbook_choice_eng"].examples[0].prompt.after
    assert {name: task.gen_length for name, task in tasks.items()} == {
        "passkey": 6,
        "number_string": 12,
        "kv_retrieval": 50,
        "code_debug": 5,
        **dict.fromkeys(("longbook_choice_eng", "longbook_qa_eng", "longbook_qa_chn"), 40),
    }


def test_infinitebench_prompts_by_version_and_of_the_user(tmp_path):
    """src/prompt.py at 220fd2e ("first") and since c27d624."""
    folder = evals_data.infinitebench(tmp_path)

    def before(**settings) -> str:
        (task,) = load("infinitebench", folder, ["passkey"], **settings)
        return task.examples[0].prompt.before

    start = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    )
    newest = f"{start}it. I will quiz you about the important information.\n\n"
    assert before() == before(rules="last-letter") == newest
    oldest = f"{start}them. I will quiz you about the important information there.\n\n"
    assert before(rules="first") == oldest
    assert before(rules="first", templates={"passkey": "{context}!{input}"}) == ""
    for template, message in (
        (5, "the prompt of passkey must be text with one {context}"),
        ("no place", "must be text with one {context}"),
        ("{context}{input.x}", ":1: the template cannot be filled in"),
    ):
        refuses(message, "infinitebench", folder, ["passkey"], templates={"passkey": template})
    wrong = {"passkeys": "{context}"}
    refuses("no task 'passkeys'", "infinitebench", folder, ["passkey"], templates=wrong)


def test_infinitebench_prompts_that_take_a_part_of_the_question(tmp_path):
    find = {"context": "[1, 7]", "input": "The second largest number of the list is: ", "answer": 7}
    run = {"context": "def ...", "input": "What is func_3(-8)? Answer.", "answer": [-1]}
    calc = {"context": "1 + 3", "input": "", "answer": [[1, 4]]}
    for task, row in {"math_find": find, "code_run": run, "math_calc": calc}.items():
        evals_data.write_lines(tmp_path / f"{task}.jsonl", [row])
    tasks = {task.name: task for task in load("infinitebench", tmp_path)}
    assert set(tasks) == {"math_find", "code_run"}, "30,000 response tokens only by name"
    prompt = tasks["math_find"].examples[0].prompt
    assert prompt.before == "What is the second largest number in the following list?\n\n"
    assert prompt.after == f"\n\n{find['input']}"
    prompt = tasks["code_run"].examples[0].prompt
    assert prompt.before.startswith("There is a function called func_3 in ")
    assert prompt.after.endswith("value of func_3(-8). The value of func_3(-8) is")
    (task,) = load("infinitebench", tmp_path, ["math_calc"])
    assert task.examples[0].answers == ("1", "4")


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_ruler_prompts_are_cut_where_their_template_has_the_document(tmp_path, task):
    (loaded,) = load("ruler", evals_data.ruler(tmp_path / "copy"), [task])
    for example, response in zip(loaded.examples, ("", " Answer:", " Answer:"), strict=True):
        assert example.prompt == evals_data.RULER_PROMPTS[task]
        assert example.response == response
    score = loaded.metric("It is ANNE.", loaded.examples[0])
    assert score == (1.0 if task == "qa_1" else 0.5)
    niah = task.startswith("niah")
    start = " The special magic number is" if niah else " Answer: of the list, they are: "
    row = {"input": "".join(evals_data.RULER_PROMPTS[task]) + start, "outputs": ["x"]}
    evals_data.write_lines(tmp_path / f"{task}.jsonl", [row])
    (loaded,) = load("ruler", tmp_path, [task])
    assert loaded.examples[0].prompt == evals_data.RULER_PROMPTS[task]
    assert loaded.examples[0].response == start, "as RULER's first version wrote it"


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_ruler_prompts_on_one_line_are_cut_at_the_same_places(tmp_path, task):
    """As --remove_newline_tab writes them: one blank for any white space."""
    parts = [" ".join(part.split()) for part in evals_data.RULER_PROMPTS[task]]
    evals_data.write_lines(
        tmp_path / f"{task}.jsonl", [{"input": " ".join(parts), "outputs": ["x"]}]
    )
    (loaded,) = load("ruler", tmp_path, [task])
    (example,) = loaded.examples
    assert "".join(example.prompt) == " ".join(parts)
    assert [part.strip() for part in example.prompt] == parts


def test_all_thirteen_ruler_tasks_have_a_length_and_a_rule():
    lengths = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    kinds = published.KINDS["ruler"]
    assert len(kinds) == 13
    for task, kind in kinds.items():
        assert kind.gen_length == lengths[task.partition("_")[0]]
    assert prompts.split_ruler("other", "text") is None
    assert prompts.split_ruler("niah_single_1", "no such text") is None


def test_the_needle_lies_behind_a_sentence_s_end_at_its_depth(tokenizer, tmp_path):
    text = "One is here. Two, e.g. 3.5 more! Three? Four is long and ends."
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        result = needle.insert(text, "NEEDLE.", depth)
        before, after = result.split("NEEDLE.")
        assert result.replace(" NEEDLE.", "").replace("NEEDLE. ", "") == text
        assert before == "" or before.rstrip()[-1] in ".!?"
        assert len(before) <= depth * len(text) + 1
        rest = text[len(before.rstrip()) : round(depth * len(text))]
        assert not re.search(r"[.!?] ", rest), "a later sentence ends before this depth"
        assert after == "" or depth < 1
    (tmp_path / "essays").mkdir()
    for name in ("b", "a"):
        (tmp_path / "essays" / f"{name}.txt").write_text(f"{name} text. " * 30, encoding="utf-8")
    haystack = needle.read_haystack(tmp_path / "essays")
    assert haystack.startswith("a text")
    for task in needle.grid(haystack, tokenizer, [600, 2000], 3):
        assert [example.details["depth"] for example in task.examples] == [0, 0.5, 1]
        for example in task.examples:
            request = prompts.split_request(tokenizer, example.prompt)
            parts = (request.prefix, request.context, request.question)
            total = sum(map(len, parts)) + task.gen_length
            assert int(task.name) - 8 <= total <= int(task.name)
            assert needle.NEEDLE in example.prompt.context
    with pytest.raises(DataError, match="leaves no room"):
        needle.grid(haystack, tokenizer, [100], 2)
    with pytest.raises(DataError, match=r"no \.txt file"):
        needle.read_haystack(tmp_path)


def test_templates_are_cut_at_the_document():
    split = prompts.split_template(
        "{a}{{x}}\n{context}\n{b}", {"a": 1, "b": "{c}", "context": "{t}"}
    )
    assert split == ("1{x}\n", "{t}", "\n{c}")
    for template, message in (
        ("{a}", "0 places"),
        ("{context}{context}", "2 places"),
        ("{context}{zz}", "'zz'"),
        ("{context}{", "cannot be filled in"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.split_template(template, {"a": 1, "context": "t"})


DOCUMENT = "\n\n".join(f"Paragraph {i} of the document, which is long enough." for i in range(30))


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        (
            f"Read this.\n\n{DOCUMENT}\n\nQuestion: who?\n\nAnswer:",
            "Read this.\n\n",
            # 64 characters are more than the question: the paragraph before it comes along.
            "\n\nParagraph 29 of the document, which is long enough.\n\nQuestion: who?\n\nAnswer:",
        ),
        (
            f"{'x' * 1001}\n\n{DOCUMENT}\n\n{'Which of the people lives by the sea? ' * 2}",
            "",
            f"\n\n{'Which of the people lives by the sea? ' * 2}",
        ),
        ("line one\n" + "word " * 300 + "\n" + "q " * 40, "line one\n", "\n" + "q " * 40),
        ("head\n" + "y" * 5000, "head\n", "y" * 2000),
    ],
)
def test_prompts_of_unknown_templates_are_cut_by_rule(prompt, before, after):
    split = prompts.split_by_rule(prompt)
    assert split is not None
    assert "".join(split) == prompt
    assert split.before == before
    assert split.after == after


def test_prompts_without_a_document_are_not_cut():
    for prompt in ("", "one line", "a\n\nb", "question\nanswer:", "z" * 2000):
        assert prompts.split_by_rule(prompt) is None, prompt


def test_dense_prompts_drop_their_middle_before_the_chat_template(tokenizer, tmp_path):
    text = "0123456789abcdefghij"
    uncut, cut = prompts.dense_prompt(tokenizer, text, 20)
    assert not cut
    ids, cut = prompts.dense_prompt(tokenizer, text, 7)
    assert cut
    kept = tokenizer.encode("012hij")
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    start, end, end_of_turn = map(tokenizer.backend.token_to_id, names)
    role = [start, *tokenizer.encode("user"), end, *tokenizer.encode("\n\n")]
    tail = [end_of_turn, start, *tokenizer.encode("assistant"), end, *tokenizer.encode("\n\n")]
    assert ids == [tokenizer.bos_id, *role, *kept, *tail]
    assert uncut == [tokenizer.bos_id, *role, *tokenizer.encode(text), *tail]
    plain, _ = prompts.dense_prompt(tokenizer, text, 20, chat=False, response="!")
    assert plain == [tokenizer.bos_id, *tokenizer.encode(text + "!")]
    assert prompts.truncate_middle(range(9), 4) == [0, 1, 7, 8]
    assert prompts.truncate_middle(range(9), 9) == list(range(9))
    with pytest.raises(ValueError, match="at least 2"):
        prompts.truncate_middle(range(9), 1)
    split = prompts.SplitPrompt("ab", "DOC", "cd")
    request = prompts.split_request(tokenizer, split, response=" So")
    assert request.context == tokenizer.encode("DOC")
    joined = [*request.prefix, *request.context, *request.question]
    assert joined == prompts.dense_prompt(tokenizer, "abDOCcd", 99, response=" So")[0]


def test_special_tokens_count_as_such_in_templates_alone(tokenizer, tmp_path):
    text = "<|startoftext|>a<|eot_id|>"
    end_of_turn = tokenizer.backend.token_to_id("<|eot_id|>")
    ids = [tokenizer.bos_id, *tokenizer.encode("a"), end_of_turn]
    assert tokenizer.encode_marked(text) == ids
    assert len(tokenizer.encode(text)) == len(text)
