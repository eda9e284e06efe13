"""Benchmarks' files that are malformed: every field of every file, encodings, foreign templates."""

from __future__ import annotations

import re
import sys

import pytest

from tests.conftest import ROOT
from tests.scripts.test_evals_data import load, refuses
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
from experiments.benchmarks import needle
from experiments.benchmarks.example import DataError, Malformed

GOOD = {"input": "q", "context": "c", "answers": ["a"]}
BAD = {
    "not valid JSON": b"{",
    "must be a JSON object": "[1]",
    "can't decode": b'{"context": "\xff"}',
    "context is missing": {**GOOD, "context": None},
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


HALF = "\ud800"  # half of a surrogate pair, which no tokenizer takes
MISSING = ["absent", None, float("nan")]
NO_TEXT = [7, True, ["x"], {"a": "x"}, HALF]
NO_LIST = [True, [], [["x"]], [None], [{}], {"a": 1}, "['x', 'y']", [HALF]]
NO_ID = [True, [1], {"a": 1}, HALF]
NO_LENGTH = ["long", "", -1, 1.5, True, [5], {"a": 1}]
ANSWER = [*MISSING, *NO_LIST]
BOOK = {"id": 1, "context": "c", "input": "The largest number of the list", "answer": "1"}
OPTIONS = {**BOOK, "answer": "a", "options": ["a", "b", 3, 4.5]}
RULER = {"index": 0, "input": "".join(evals_data.RULER_PROMPTS["vt"]), "outputs": ["x"]}
# (benchmark, task, a good row, what each of its fields must not be)
FIELDS = [
    (
        *("longbench", "hotpotqa_e", {**GOOD, "length": "5234.0", "_id": 7}),
        {
            "input": [*MISSING, *NO_TEXT],
            "context": [*MISSING, *NO_TEXT, " \n"],
            "answers": ANSWER,
            "length": [*MISSING, *NO_LENGTH],
            "_id": NO_ID,
        },
    ),
    (
        *("longbench", "trec", {**GOOD, "all_classes": '["a", "b"]'}),
        {"all_classes": [*MISSING, *NO_LIST, "a", 7], "length": NO_LENGTH},
    ),
    (
        *("longbench", "passage_retrieval_en", {**GOOD, "answers": "Paragraph 7"}),
        {"answers": [*ANSWER, "7", ["Paragraph 1", "7"]]},
    ),
    (
        *("infinitebench", "passkey", BOOK),
        {
            "context": [*MISSING, *NO_TEXT, ""],
            "input": [*MISSING, *NO_TEXT],
            "answer": [*ANSWER, "key", 1.5],
            "id": NO_ID,
        },
    ),
    (
        *("infinitebench", "code_debug", OPTIONS),
        {
            "options": [*MISSING, *NO_LIST, ["a"], "abcd", ["a", "b", "c", ["d"]]],
            "answer": [*ANSWER, "Z", ["a", "Z"], ["a", "A", "b"]],
        },
    ),
    (
        *("infinitebench", "longbook_choice_eng", {**OPTIONS, "answer": ["b", "B"]}),
        {"input": [*MISSING, *NO_TEXT], "options": [*MISSING, *NO_LIST], "answer": ANSWER},
    ),
    ("infinitebench", "longdialogue_qa_eng", {**BOOK, "answer": ["ANNE"]}, {"answer": ANSWER}),
    (
        *("infinitebench", "math_find", BOOK),
        {"answer": [*ANSWER, "many"], "input": [*MISSING, *NO_TEXT, "How many?"]},
    ),
    ("infinitebench", "math_calc", {**BOOK, "answer": [[1, 2]]}, {"answer": [*ANSWER, [1, "x"]]}),
    (
        *("infinitebench", "code_run", {**BOOK, "input": "What is func_1(-2)?", "answer": [-3]}),
        {"answer": [*ANSWER, "1.5"], "input": NO_TEXT},
    ),
    (
        *("ruler", "vt", {**RULER, "length": 9, "answer_prefix": " A:"}),
        {
            "input": [*MISSING, *NO_TEXT, "something else"],
            "outputs": ANSWER,
            "answer_prefix": NO_TEXT,
            "index": NO_ID,
            "length": NO_LENGTH,
        },
    ),
]


@pytest.mark.parametrize(("benchmark", "task", "row", "fields"), FIELDS, ids=[x[1] for x in FIELDS])
def test_every_wrong_field_is_named_with_its_line(tmp_path, benchmark, task, row, fields):
    path = tmp_path / f"{task}.jsonl"
    for name, content in (
        ("dataset2prompt", {**evals_data.PROMPTS, "hotpotqa": "{context}{input}"}),
        ("dataset2maxlen", evals_data.LENGTHS),
    ):
        evals_data.write_lines(tmp_path / f"{name}.json", [content])
    evals_data.write_lines(path, [row])
    (loaded,) = load(benchmark, tmp_path, [task])
    assert len(loaded.examples) == 1, "the row is good"
    for field, values in fields.items():
        for value in values:
            bad = {**row, field: value}
            if value == "absent":
                del bad[field]
            evals_data.write_lines(path, [row, "", bad, row])
            refuses(rf"^{re.escape(str(path))}:3: .*\b{field}\b", benchmark, tmp_path, [task])


# After scripts/data/template.py: meta-chat, vicuna-chat, lwm-chat, command-r-chat, chatglm-chat,
# RWKV, Phi3, meta-llama3, jamba, qwen2.5, deepseek-v3; and a template with an end alone.
FOREIGN = [
    "[INST] {} [/INST]",
    "A chat between a user and an assistant. USER: {} ASSISTANT:",
    "You are a helpful assistant. USER: {} ASSISTANT: ",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "[gMASK]sop<|user|> \n {}<|assistant|> \n ",
    "User: hi\n\nAssistant: Hi.\n\nUser: {}\n\nAssistant:",
    "<|user|>\n{}<|end|>\n<|assistant|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> {}<|eom|><|bom|><|assistant|>",
    "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n",
    "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>",
    "{}<end_of_turn>\n",
]


@pytest.mark.parametrize("template", FOREIGN)
@pytest.mark.parametrize("one_line", [False, True])
def test_ruler_prompts_in_another_model_s_chat_template_are_refused(tmp_path, template, one_line):
    for task, parts in evals_data.RULER_PROMPTS.items():
        for start in ("", " Answer: they are"):
            text = template.format("".join(parts)) + start
            text = " ".join(text.split()) if one_line else text
            row = {"input": text, "outputs": ["x"], "answer_prefix": start}
            path = evals_data.write_lines(tmp_path / f"{task}.jsonl", [row])
            message = f"{re.escape(str(path))}:1: input .* another model's chat template"
            refuses(message, "ruler", tmp_path, [task])


def test_byte_order_marks_are_dropped_and_other_encodings_named(tmp_path):
    mark = b"\xef\xbb\xbf"
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "a.txt").write_bytes(b"Anne went home.")
    (essays / "b.txt").write_bytes(mark + b"Bob stayed.")
    assert needle.read_haystack(essays) == "Anne went home.\n\nBob stayed."
    for content in ("caf\xe9".encode("latin-1"), "Anne".encode("utf-16")):
        (essays / "b.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text"):
            needle.read_haystack(essays)
    (essays / "b.txt").unlink()
    (essays / "b.txt").mkdir()
    with pytest.raises(DataError, match=r"b\.txt cannot be read: Is a directory"):
        needle.read_haystack(essays)

    folder = evals_data.longbench(tmp_path / "copy")
    names = ("data/hotpotqa.jsonl", "config/dataset2prompt.json", "config/dataset2maxlen.json")
    (plain,) = load("longbench", folder, ["hotpotqa"])
    for path in (folder / name for name in names):
        content = path.read_bytes()
        path.write_bytes(mark + content.replace(b"\n", b"\r\n" + mark, 1))
        if path.suffix == ".json":
            path.write_bytes(mark + content)
        (marked,) = load("longbench", folder, ["hotpotqa"])
        assert marked.examples == plain.examples
        path.write_bytes(content.decode().encode("utf-16"))
        refuses(re.escape(str(path)), "longbench", folder, ["hotpotqa"])
        path.write_bytes(content)
