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


def refuses(message: str, benchmark: str, folder, tasks=None) -> None:
    with pytest.raises(DataError, match=message):
        load(benchmark, folder, tasks)


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


GOOD = {"input": "q", "context": "c", "answers": ["a"]}
BAD = {
    "not valid JSON": b"{",
    "must be a JSON object": "[1]",
    "can't decode": b'{"context": "\xff"}',
    "context is missing": {**GOOD, "context": None},
    "context is empty": {**GOOD, "context": " \n"},
    "context must be a string": {**GOOD, "context": 7},
    "input or question is missing": {"context": "c", "answers": ["a"]},
    "answers or answer is missing": {"input": "q", "context": "c"},
    "answers is empty": {**GOOD, "answers": []},
    "answers must hold strings": {**GOOD, "answers": [["a"]]},
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_lines_have_file_and_line_and_the_run_stops_or_goes_on(tmp_path, reason):
    folder = evals_data.longbench(tmp_path / "copy")
    path = folder / "data" / "hotpotqa.jsonl"
    evals_data.write_lines(path, [GOOD, "", BAD[reason], GOOD])
    place = re.escape(f"{path}:3: ")
    refuses(f"{place}.*{reason}", "longbench", folder, ["hotpotqa"])
    lines: list[str] = []
    malformed = Malformed("skip", lines.append)
    (task,) = load("longbench", folder, ["hotpotqa"], malformed)
    assert [example.id for example in task.examples] == ["1", "4"]
    assert malformed.count == len(lines) == 1
    assert re.match(f"{place}.*{reason}", lines[0])
    assert "\n" not in lines[0]


OPTIONS = {"id": 1, "context": "c", "input": "q", "answer": "Z", "options": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("benchmark", "task", "row", "reason"),
    [
        ("longbench", "trec", {**GOOD, "answers": ["Food"]}, "all_classes must be a list"),
        ("longbench", "passage_retrieval_en", {**GOOD, "answers": ["7"]}, "names no paragraph"),
        ("infinitebench", "code_debug", OPTIONS, "must be one of the options"),
        ("infinitebench", "code_debug", {**OPTIONS, "options": ["a"]}, "list of four"),
        ("infinitebench", "code_debug", {**OPTIONS, "answer": None}, "answer is missing"),
        ("infinitebench", "code_debug", {**OPTIONS, "answer": True}, "strings or numbers"),
        ("ruler", "vt", {"input": "something else", "outputs": ["x"]}, "not a prompt of vt"),
    ],
)
def test_malformed_lines_of_certain_tasks(tmp_path, benchmark, task, row, reason):
    folder = getattr(evals_data, benchmark)(tmp_path / "copy")
    inner = folder / "data" if benchmark == "longbench" else folder
    evals_data.write_lines(inner / f"{task}.jsonl", [row])
    refuses(reason, benchmark, folder, [task])


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
    templates = {"passkey": "{context}!{input}"}
    (task,) = load("infinitebench", folder, ["passkey"], templates=templates)
    assert task.examples[0].prompt.before == ""


@pytest.mark.parametrize("task", evals_data.RULER_PROMPTS)
def test_ruler_prompts_are_cut_where_their_template_has_the_document(tmp_path, task):
    (loaded,) = load("ruler", evals_data.ruler(tmp_path / "copy"), [task])
    for example, response in zip(loaded.examples, ("", " Answer:", " Answer:"), strict=True):
        assert example.prompt == evals_data.RULER_PROMPTS[task]
        assert example.response == response
    score = loaded.metric("It is ANNE.", loaded.examples[0])
    assert score == (1.0 if task == "qa_1" else 0.5)


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
