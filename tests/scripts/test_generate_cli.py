"""scripts/generate.py: answers on stdout, one line and status 2 for bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import generate
import numpy as np
import pytest

from convert.__main__ import converted
from pdllm_jax import (
    Engine,
    Request,
    Tokenizer,
    load_config,
    load_model,
)

PROMPT = {"prefix": [256, 5, 6], "context": list(range(60)), "query": [9, 8, 7]}
SMALL = ["--gen-length=8", "--chunk-size=16", "--top-k=2", "--draft-length=2", "--encode-batch=2"]


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    return make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256).folder


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def run(checkpoint, call_main):
    """Runs the command line on the checkpoint -> (status, stdout, stderr)."""
    return lambda *argv, folder=checkpoint: call_main(generate.main, folder, *argv)


@pytest.fixture
def ask(run, tmp_path):
    """Runs `run` on ids; `change` replaces parts of the prompt."""

    def call(*argv, change=PROMPT, **settings) -> tuple[int, str, str]:
        content = change if isinstance(change, str) else {**PROMPT, **change}
        prompt = write(tmp_path / "prompt.json", content)
        return run("--prompt-ids", prompt, *argv, **settings)

    return call


@pytest.mark.parametrize("method", ["prefilling", "plain"])
def test_what_does_not_fit_is_refused_in_one_line(ask, method):
    status, out, err = ask("--method", method, *SMALL, "--memory-limit", "0.0001")
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert re.match(r"error: phase '\w+' needs \d+\.\d\d GB, the device gives 0\.00 GB; ", line)


def test_a_wrong_method_is_refused_in_one_line(ask):
    status, out, err = ask("--method", "dllm-cache:ratio=2", *SMALL)
    assert (status, out) == (2, "")
    assert err == "error: argument --method: ratio must lie in [0, 1], got 2\n"


@pytest.mark.parametrize(
    "method",
    [
        *("prefilling", "plain", "prefix-cache", "dual-cache"),
        pytest.param("dllm-cache:prompt_interval=3", marks=pytest.mark.slow),
    ],
)
def test_json_of_every_method(ask, method):
    status, out, err = ask("--method", method, "--json", *SMALL)
    assert status == 0, err
    result = json.loads(out)
    assert len(result["tokens"]) == len(result["confidence"]) == 8
    assert all(0 < p <= 1 for p in result["confidence"])
    assert isinstance(result["text"], str)
    assert result["evaluations"] == 8
    timings = result["timings"]
    assert set(timings) == {"draft", "score", "encode", "decode", "compile", "total"}
    assert timings.pop("total") == pytest.approx(sum(timings.values()))
    assert result["paths"]["dtype"] == "float32"
    if method == "prefilling":
        assert len(result["selection"]["chunks"]) == 2
        assert len(result["selection"]["scores"]) == 4
        assert result["paths"]["chunk_attention"] == "xla"
    else:
        assert result["selection"] is None


def test_text_in_text_out_and_a_bare_prompt(run, tmp_path):
    text = write(tmp_path / "text.txt", "a short document")
    status, out, err = run("--context-file", text, "--question", "what?", "--early-stop", *SMALL)
    assert status == 0, err
    assert "chunks kept: " in out
    bare = write(tmp_path / "bare.json", {"prompt": [1, 2, 3]})
    parts = write(tmp_path / "parts.json", {"prefix": [1], "context": [2], "query": [3]})
    early = run("--prompt-ids", bare, "--method", "plain", "--early-stop", *SMALL)
    assert early[0] == 0, early[2]
    tokens = []
    for prompt in (bare, parts):
        status, out, err = run("--prompt-ids", prompt, "--method", "plain", "--json", *SMALL)
        assert status == 0, err
        tokens.append(json.loads(out)["tokens"])
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_scorers_and_encodings(ask):
    seen = {}
    names = ("leave-one-out", "query", "confidence", "first", "last", "random", "all", "oracle")
    for score in names:
        chunks = ("--chunks", "2", "0") if score == "oracle" else ()
        settings = ("--score", score, "--encoding", "independent", "--json", *chunks, *SMALL)
        status, out, err = ask(*settings)
        assert status == 0, err
        seen[score] = json.loads(out)["selection"]
    assert seen["first"]["chunks"] == [0, 1]
    assert seen["last"]["chunks"] == [2, 3]
    assert seen["all"] == {"chunks": [0, 1, 2, 3], "scores": None}
    assert len(seen["leave-one-out"]["scores"]) == 4
    assert len(seen["confidence"]["scores"]) == 4
    assert seen["oracle"] == {"chunks": [0, 2], "scores": None}


@pytest.mark.slow
def test_choices_of_the_method_together(ask):
    settings = (
        "--encoding bridge --bridge-share 0.3 --bridge-tokens attention --positions absolute "
        "--keep-tokens 9 --max-k 3 --margin 100 --reselect block --block-length 4 --json"
    )
    status, out, err = ask(*SMALL, *settings.split())
    assert status == 0, err
    result = json.loads(out)
    assert result["paths"]["encoding"] == "bridge"
    assert len(result["selection"]["chunks"]) == 3
    assert len(result["selection"]["chunks_at_end"]) == 3
    assert result["selection"]["rescored"] == 1


@pytest.mark.parametrize("method", ["prefilling", pytest.param("plain", marks=pytest.mark.slow)])
def test_streamed_blocks_make_the_same_output(ask, method):
    settings = (*SMALL, *f"--method {method} --block-length 2 --seed 1 --temperature 1".split())
    plain, streamed = ask(*settings), ask(*settings, "--stream")
    assert (plain[0], streamed[0]) == (0, 0), streamed[2]
    assert plain[1].split("seconds:")[0] == streamed[1].split("seconds:")[0]


def test_a_pytorch_folder_is_converted_once(ask, tmp_path):
    settings = ("--method", "plain", *SMALL)
    assert "converting" in ask(*settings)[2]
    assert "converting" not in ask(*settings)[2]
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    assert load_model(converted).config == load_config(converted)


ORACLE = f"{' '.join(SMALL)} --score oracle"
BAD_FLAGS = {
    "--gen-length 8 --block-length 3": "does not divide",
    "--score oracle": "needs the ids of the chunks",
    f"{ORACLE} --chunks 9": r"\[9\] are not all inside \[0, 4\)",
    f"{ORACLE} --chunks 2147483648": "not all inside",
    f"{ORACLE} --chunks 0 1 2": "names 3 chunks, top_k is 2",
    "--score causal": "scorer 'causal' needs a model with a logit shift, got the family 'llada'",
    "--chunks 1": "for the scorer 'oracle', not for 'draft'",
    "--method plain --chunks 1": "for method 'prefilling'",
    "--gen-length 0": "gen_length must be a positive",
    "--gen-length 99999999999": "gen_length must be a positive integer below",
    "--chunk-size 99999999999": "chunk_size must be a positive integer below",
    "--guidance 1": "guidance is implemented for method 'plain'",
    "--threshold 0.5 --factor 1": "exclude each other",
    "--implementation mosaic_gpu": "implementation .mosaic_gpu.: the",
    "--encoding causal": "argument --encoding: invalid choice: 'causal'",
    "--stream --json": "not allowed with argument",
    "--seed 18446744073709551616": "seed must be an integer in .0, 2..64",
    "--memory-limit inf": "must be a number of GB, got inf",
    "--memory-limit nan": "must be a number of GB, got nan",
    "--memory-limit 0": "must be a number of GB, got 0",
    "--question q": "part of the ids",
    "--instruction x": "part of the ids",
}
BAD_PROMPTS = [
    ({"context": [3, 272]}, r"context\[1\] = 272 is outside the vocabulary"),
    ({"query": [-1]}, "outside the vocabulary"),
    ({"context": []}, "context is empty"),
    ({"query": []}, "question is empty"),
    ({"query": ["a"]}, "list of integers"),
    ({"query": [True]}, "list of integers"),
    ({"more": []}, "must hold the keys"),
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    ("[1]", "must hold a JSON object"),
]


def refused(outcome, message) -> None:
    """One line and status 2."""
    status, out, err = outcome
    lines = [line for line in err.splitlines() if not line.startswith(("converting", "loading"))]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("arguments", BAD_FLAGS)
def test_bad_flags_are_one_line_and_status_2(arguments, ask):
    refused(ask(*arguments.split()), BAD_FLAGS[arguments])


@pytest.mark.parametrize(("change", "message"), BAD_PROMPTS)
def test_bad_prompt_files_are_one_line_and_status_2(change, message, ask):
    refused(ask(change=change), message)


def test_bad_folders_and_context_files_are_one_line_and_status_2(ask, run, tmp_path):
    refused(ask(folder=tmp_path / "nowhere"), "is not a directory")
    question = ("--question", "q")
    empty, fine = write(tmp_path / "empty.txt", " \n"), write(tmp_path / "fine.txt", "text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(run("--context-file", empty, *question), "is empty")
    refused(run("--context-file", tmp_path / "no", *question), "No such file")
    refused(run("--context-file", tmp_path / "binary", *question), "not UTF-8")
    refused(run("--context-file", fine), "needs --question")
    refused(run("--context-file", fine, "--question", " "), "question is empty")


TEXT = {"context": "Anne lives at Kellynch Hall.", "question": "Where? "}


@pytest.fixture
def stdin(monkeypatch):
    """Sets standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    "method", ["prefilling", pytest.param("dual-cache", marks=pytest.mark.slow)]
)
def test_lines_of_requests_are_answered_in_order_as_each_alone(run, ask, tmp_path, stdin, method):
    few = {"prefix": [256], "context": [*range(40)], "query": [1, 2], "seed": 1, "id": "b\u2028"}
    lines = [{**PROMPT, "id": 7}, few, TEXT, {**few, "seed": 2}, {**PROMPT, "seed": 3}]
    settings = (*SMALL, f"--method={method}", "--temperature=1")
    file = write(tmp_path / "lines", "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n")
    status, out, err = run("--requests", file, "--batch-size=2", *settings)
    assert status == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer.get("id") for answer in answers] == [7, "b\u2028", None, "b\u2028", None]
    assert answers[1]["tokens"] != answers[3]["tokens"]
    for line, answer in zip(lines, answers, strict=True):
        seed = f"--seed={line.get('seed', 0)}"
        if "question" in line:
            stdin(("\ufeff" + line["context"]).encode())
            text = ("--context-file", "-", "--question", line["question"])
            alone = json.loads(run(*text, "--json", seed, *settings)[1])
        else:
            alone = json.loads(ask(seed, "--json", *settings, change=line_ids(line))[1])
        for name in ("tokens", "text", "evaluations"):
            assert answer[name] == alone[name], name
        assert answer["confidence"] == pytest.approx(alone["confidence"], rel=1e-4)
    stdin(Path(file).read_bytes())
    assert len(run("--requests", "-", *settings)[1].splitlines()) == 5


def line_ids(line: dict) -> dict:
    return {name: line[name] for name in PROMPT}


BAD_LINES = [
    ('{"context": "a"}', r"must hold the keys context and question, \(.*got \('context',\)"),
    ({**TEXT, "more": 1}, "must hold the keys"),
    ({**TEXT, "question": " "}, "question is empty"),
    ({**TEXT, "context": [1]}, "context and question must be text"),
    ({**TEXT, "seed": "1"}, "seed must be an integer"),
    ({**TEXT, "seed": 1 << 64}, "seed"),
    ({**TEXT, "oracle": 1}, "oracle must be a list of integers"),
    ({**TEXT, "oracle": [0]}, "for the scorer 'oracle', not for 'draft'"),
    ({**TEXT, "id": 0.5}, "id must be text or"),
    ({**PROMPT, "context": [272]}, "context.0. = 272 is outside"),
    ({"prompt": [1]}, "holds a bare prompt"),
    ("{}{}", "several JSON values"),
    ("[]", "must hold a JSON object"),
    ("{", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_before_any_is_answered(run, tmp_path, line, message):
    bad = line if isinstance(line, str) else json.dumps(line)
    file = write(tmp_path / "lines", f"{json.dumps(TEXT)}\n\n{bad}\n{json.dumps(TEXT)}")
    settings = ("--requests", file, "--batch-size=2", *SMALL)
    refused(run(*settings), f"lines, line 3:? .*{message}")


def test_flags_that_requests_and_ids_do_not_take(run, ask, tmp_path):
    file = write(tmp_path / "lines", json.dumps(TEXT))
    for flags_, message in (
        ("--stream", "--stream is not for the lines"),
        ("--question=q", "--question is not for"),
        ("--check-nan", "--check-nan is not for"),
        ("--batch-size=0", "at least 1, got 0"),
        ("--stop=", "--stop must not be empty"),
        ("--memory-limit=0.0001", "line 1: phase"),
    ):
        refused(run("--requests", file, flags_, *SMALL), message)
    refused(run("--requests", write(tmp_path / "none", "\n")), "holds no requests")
    refused(ask("--system=s"), "--system is part of the ids")
    refused(ask("--no-chat-template"), "--no-chat-template is for text")
    several = f"{json.dumps(PROMPT)}\n{json.dumps(PROMPT)}"
    for content in (several, f"[{json.dumps(PROMPT)}]", "[[1], [2]]"):
        refused(ask(change=content), "--prompt-ids takes one prompt, --requests JSON lines")


@pytest.mark.parametrize("method", ["prefilling", "plain"])
def test_system_text_and_no_chat_template_are_the_engines(run, checkpoint, tmp_path, method):
    """And the prompt of a baseline is transformers' tokens of the whole message."""
    from transformers import PreTrainedTokenizerFast

    file = write(tmp_path / "text", TEXT["context"])
    question = ("--context-file", file, "--question", TEXT["question"], "--json", *SMALL)
    folder = converted(checkpoint)
    model = load_model(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(checkpoint))
    user = f"Read.\n\n{TEXT['context']}\n\n{TEXT['question']}"
    turns = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": user}]
    for given, messages in (
        ({"system": " Be brief. "}, turns),
        ({}, turns[1:]),
        ({"chat": False}, None),
    ):
        text = f"<|startoftext|>{user}\n"
        if messages is not None:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        engine = Engine(model, Tokenizer.load(folder, model.config), method=method, **given)
        engine = dataclasses.replace(engine, instruction="Read.")
        parts = engine.token_ids(Request(TEXT["context"], TEXT["question"]))
        assert np.concatenate(parts).tolist() == theirs(text, add_special_tokens=False).input_ids
        argv = [f"--system={given['system']}"] if "system" in given else []
        argv += ["--no-chat-template"] if "chat" in given else []
        ids = dict(zip(PROMPT, (part.tolist() for part in parts), strict=True))
        alone = write(tmp_path / "ids.json", ids)
        method_ = f"--method={method}"
        answer = run(*question, method_, "--instruction=Read.", *argv)
        want = run("--prompt-ids", alone, method_, "--json", *SMALL)
        assert (answer[0], want[0]) == (0, 0), answer[2] + want[2]
        assert json.loads(answer[1])["tokens"] == json.loads(want[1])["tokens"], answer[2]


def test_stop_texts_cut_the_text_and_nothing_else(ask, monkeypatch):
    monkeypatch.setattr(Tokenizer, "stop_ids", ())  # the text is long enough
    settings = ("--gen-length=32", *SMALL[1:], "--temperature=2", "--seed=1")
    complete = json.loads(ask(*settings, "--json")[1])
    text = complete["text"]
    at = next(i for i, c in enumerate(text) if c not in text[:i] and i > 1)
    cut = text[: text.index(text[at])]
    stops = [f"--stop={stop}" for stop in (text[at:], text[at], "absent")]
    stopped = json.loads(ask(*settings, "--json", *stops)[1])
    assert stopped["text"] == cut
    for name in ("tokens", "evaluations", "confidence"):
        assert stopped[name] == complete[name]
    streamed = ask(*settings, "--block-length=32", "--stream", *stops)[1]
    assert streamed.startswith(f"{cut}\nchunks kept")
