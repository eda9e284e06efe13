"""Benchmarks' files: every shape of a line, bad lines, and prompts cut at the document."""

from __future__ import annotations

import json
import re
import sys

import pytest

from pdllm_jax.evaluation import prompts
from pdllm_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
from evals import infinitebench, longbench, needle, ruler
from evals.example import DataError, Malformed, with_unique_ids


class Bytes:
    """A tokenizer of bytes, with LLaDA's special tokens behind them."""

    def __new__(cls, folder) -> Tokenizer:
        checkpoints = pytest.importorskip("tests.oracles.checkpoints")
        from pdllm_jax.network.config import ModelConfig

        checkpoints.write_tokenizer(folder)
        config = ModelConfig.from_dict(checkpoints.tiny_config())
        return Tokenizer.load(folder, config)


def stop() -> Malformed:
    return Malformed("stop", pytest.fail)


def by_name(tasks):
    return {task.name: task for task in tasks}


def test_longbench_lines_in_every_shape(tmp_path):
    pytest.importorskip("jieba")
    tasks = by_name(longbench.load(evals_data.longbench(tmp_path / "copy"), None, stop()))
    assert set(tasks) == {*evals_data.PROMPTS, "hotpotqa_e"}
    found = tasks["hotpotqa"].examples
    assert [example.id for example in found] == ["a1", "2", "a1#2"]
    assert [example.answers for example in found] == [("Kellynch Hall", "K"), ("Hall",), ("Anne",)]
    assert found[0].prompt == (
        "Passages.\n", evals_data.TEXT * 3, "\n\nQuestion: Where does Anne live?\nAnswer:"
    )  # fmt: skip
    assert found[1].prompt.after == found[0].prompt.after
    assert tasks["hotpotqa_e"].examples[1].details["length"] == 5000
    assert tasks["trec"].examples[0].details["all_classes"] == ["Food", "Sport"]
    chat = {name: task.chat for name, task in tasks.items()}
    assert chat == {name: name not in ("trec", "lcc") for name in tasks}
    assert tasks["lcc"].examples[0].prompt.after == "Next line of code:\n"
    assert tasks["gov_report"].gen_length == 8


def test_longbench_by_name_and_what_is_missing(tmp_path):
    folder = evals_data.longbench(tmp_path / "copy")
    elsewhere = folder / "config"
    only = longbench.load(folder / "data", ["lcc", "trec"], stop(), elsewhere)
    assert [task.name for task in only] == ["lcc", "trec"]
    assert longbench.load(folder / "data", ["lcc"], stop())[0].gen_length == 8
    for tasks, message in (
        (["nothing"], "no task 'nothing'"),
        (["qasper"], "qasper.jsonl is missing"),
    ):
        with pytest.raises(DataError, match=message):
            longbench.load(folder, tasks, stop())
    with pytest.raises(DataError, match="holds no LongBench task"):
        longbench.load(tmp_path, None, stop())
    (elsewhere / "dataset2maxlen.json").write_text("{}")
    with pytest.raises(DataError, match="positive number for lcc"):
        longbench.load(folder, ["lcc"], stop())
    (elsewhere / "dataset2maxlen.json").unlink()
    with pytest.raises(DataError, match=r"dataset2maxlen\.json is not in"):
        longbench.load(folder, ["lcc"], stop())


BAD = {
    "not valid JSON": b"{",
    "must be a JSON object": "[1]",
    "can't decode": b'{"context": "\xff"}',
    "context is missing": {"input": "q", "answers": ["a"]},
    "context is empty": {"input": "q", "context": " \n", "answers": ["a"]},
    "context must be a string": {"input": "q", "context": 7, "answers": ["a"]},
    "input or question is missing": {"context": "c", "answers": ["a"]},
    "answers or answer is missing": {"input": "q", "context": "c"},
    "answers is empty": {"input": "q", "context": "c", "answers": []},
    "answers must hold strings": {"input": "q", "context": "c", "answers": [["a"]]},
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_lines_have_file_and_line_and_the_run_stops_or_goes_on(tmp_path, reason):
    folder = evals_data.longbench(tmp_path / "copy")
    path = folder / "data" / "hotpotqa.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    good = {"input": "q", "context": "c", "answers": ["a"]}
    evals_data.write_lines(path, [good, "", BAD[reason], good])
    place = re.escape(f"{path}:3: ")
    with pytest.raises(DataError, match=f"{place}.*{reason}"):
        longbench.load(folder, ["hotpotqa"], stop())
    lines: list[str] = []
    going = Malformed("skip", lines.append)
    (task,) = longbench.load(folder, ["hotpotqa"], going)
    assert [example.id for example in task.examples] == ["1", "4"]
    assert going.count == len(lines) == 1
    assert re.match(f"{place}.*{reason}", lines[0])
    assert "\n" not in lines[0]


def test_malformed_lines_of_certain_tasks(tmp_path):
    folder = evals_data.longbench(tmp_path / "copy")
    base = {"input": "q", "context": "c"}
    for task, row, reason in (
        ("trec", {**base, "answers": ["Food"]}, "all_classes must be a list"),
        ("passage_retrieval_en", {**base, "answers": ["7"]}, "names no paragraph"),
    ):
        evals_data.write_lines(folder / "data" / f"{task}.jsonl", [row])
        with pytest.raises(DataError, match=reason):
            longbench.load(folder, [task], stop())
    folder = evals_data.infinitebench(tmp_path / "infinite")
    row = {"id": 1, "context": "c", "input": "q", "answer": "Z", "options": ["a", "b", "c", "d"]}
    for change, reason in (
        ({}, "is none of the options"),
        ({"options": ["a"]}, "list of four"),
        ({"answer": None}, "answer is missing"),
        ({"answer": True}, "strings or numbers"),
    ):
        evals_data.write_lines(folder / "code_debug.jsonl", [{**row, **change}])
        with pytest.raises(DataError, match=reason):
            infinitebench.load(folder, ["code_debug"], stop())
    evals_data.write_lines(tmp_path / "vt.jsonl", [{"input": "something else", "outputs": ["x"]}])
    with pytest.raises(DataError, match="not a prompt of vt"):
        ruler.load(tmp_path, ["vt"], stop())


def test_infinitebench_lines_in_every_shape(tmp_path):
    tasks = by_name(infinitebench.load(evals_data.infinitebench(tmp_path / "copy"), None, stop()))
    assert set(tasks) == set(infinitebench.KINDS)
    assert [x.answers for x in tasks["passkey"].examples] == [("71432",)] * 3
    assert tasks["passkey"].examples[2].prompt.context == evals_data.TEXT
    assert tasks["passkey"].examples[0].prompt.after.endswith("pass key?\n\nThe pass key is")
    assert tasks["number_string"].examples[0].answers == ("0712345678",)
    assert [x.answers for x in tasks["code_debug"].examples] == [("Mary", "B")] * 3
    answers = [x.answers for x in tasks["longbook_choice_eng"].examples]
    assert answers == [("Mary", "B")] * 3 + [("Louisa", "C")]
    assert "\nB. Mary\n" in tasks["longbook_choice_eng"].examples[0].prompt.after
    lengths = {name: task.gen_length for name, task in tasks.items()}
    assert lengths == {
        "passkey": 6, "number_string": 12, "kv_retrieval": 50, "code_debug": 5,
        "longbook_choice_eng": 40, "longbook_qa_eng": 40, "longbook_qa_chn": 40,
    }  # fmt: skip
    own = infinitebench.load(
        tmp_path / "copy", ["passkey"], stop(), {"passkey": "{context}!{input}"}
    )
    assert own[0].examples[0].prompt.before == ""


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_ruler_prompts_are_cut_where_their_template_has_the_document(tmp_path, task):
    (loaded,) = ruler.load(evals_data.ruler(tmp_path / "copy"), [task], stop())
    for example, response in zip(loaded.examples, ("", " Answer:", " Answer:"), strict=True):
        assert example.prompt == evals_data.RULER_PROMPTS[task]
        assert example.response == response
    score = loaded.metric("It is ANNE.", loaded.examples[0])
    assert score == (1.0 if task == "qa_1" else 0.5)


def test_all_thirteen_ruler_tasks_have_a_length_and_a_rule():
    assert len(ruler.TASKS) == 13
    lengths = {ruler.GEN_LENGTH[task.partition("_")[0]] for task in ruler.TASKS}
    assert lengths == {128, 30, 120, 50, 32}
    assert prompts.split_ruler("other", "text") is None
    assert prompts.split_ruler("niah_single_1", "no such text") is None


def test_the_needle_lies_behind_a_sentence_s_end_at_its_depth(tmp_path):
    tokenizer = Bytes(tmp_path)
    text = "One is here. Two, e.g. 3.5 more! Three? Four is long and ends."
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        place_chunks = needle.insert(text, "NEEDLE.", depth)
        before, after = place_chunks.split("NEEDLE.")
        assert place_chunks.replace(" NEEDLE.", "").replace("NEEDLE. ", "") == text
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
    for task in needle.grid(haystack, tokenizer, [600, 2000], [0, 0.5, 1]):
        assert [example.details["depth"] for example in task.examples] == [0, 0.5, 1]
        for example in task.examples:
            request = prompts.split_request(tokenizer, example.prompt)
            total = (
                sum(map(len, (request.prefix, request.context, request.question))) + task.gen_length
            )
            assert int(task.name) - 8 <= total <= int(task.name)
            assert needle.NEEDLE in example.prompt.context
    with pytest.raises(DataError, match="leaves no room"):
        needle.grid(haystack, tokenizer, [100], [0])
    with pytest.raises(DataError, match=r"no \.txt file"):
        needle.read_haystack(tmp_path)


def test_ids_that_occur_twice_get_a_number():
    from evals.example import Example

    found = with_unique_ids([Example(name, ("x",)) for name in ("a", "b", "a", "a")])
    assert [example.id for example in found] == ["a", "b", "a#2", "a#3"]


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
    assert prompts.split_at_context("a DOC b", "DOC") == ("a ", "DOC", " b")
    assert prompts.split_at_context("DOC DOC", "DOC") is None
    assert prompts.split_at_context("a b", "DOC") is None
    assert prompts.split_at_context("a b", "") is None


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


def test_dense_prompts_drop_their_middle_before_the_chat_template(tmp_path):
    tokenizer = Bytes(tmp_path)
    text = "0123456789abcdefghij"
    whole, cut = prompts.dense_prompt(tokenizer, text, 20)
    assert not cut
    ids, cut = prompts.dense_prompt(tokenizer, text, 7)
    assert cut
    kept = tokenizer.encode("012hij")
    start, end, end_of_turn = tokenizer.chat
    role = [start, *tokenizer.encode("user"), end, *tokenizer.encode("\n\n")]
    tail = [end_of_turn, start, *tokenizer.encode("assistant"), end, *tokenizer.encode("\n\n")]
    assert ids == [tokenizer.bos_id, *role, *kept, *tail]
    assert whole == [tokenizer.bos_id, *role, *tokenizer.encode(text), *tail]
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


def test_special_tokens_count_as_such_in_templates_alone(tmp_path):
    tokenizer = Bytes(tmp_path)
    text = "<|startoftext|>a<|eot_id|>"
    marked = prompts.encode_marked(tokenizer, text)
    assert marked == [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.chat[2]]
    assert len(tokenizer.encode(text)) == len(text)


def test_a_template_with_another_file_s_json(tmp_path):
    folder = evals_data.longbench(tmp_path / "copy")
    for content, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        (folder / "config" / "dataset2prompt.json").write_text(content)
        with pytest.raises(DataError, match=message):
            longbench.load(folder, ["lcc"], stop())
    broken = {**evals_data.PROMPTS, "lcc": "no place"}
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"one \{context\}"):
        longbench.load(folder, ["lcc"], stop())
