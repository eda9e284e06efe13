"""scripts/evaluate.py: whole runs on a tiny model, resumed ones, and bad input."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdllm_jax import Tokenizer, load_config
from tests.conftest import ROOT
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
from experiments.records import FORMAT, Key, RecordError, Records

SMALL = ["--chunk-size", "64", "--top-k", "2", "--encode-batch", "4"]
SMALL += ["--gen-length", "6", "--threshold", "0.3"]
METHODS = ("plain", "dual-cache", "prefilling")
GENERATED = ("passkey", "magic_number", "multi_needle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a converted tiny checkpoint: 512 positions, a vocabulary of bytes."""
    pytest.importorskip("torch")
    from convert import convert
    from tests.oracles import checkpoints

    config = checkpoints.tiny_config(n_kv_heads=2, max_sequence_length=512)
    source = tmp_path_factory.mktemp("evaluate") / "pytorch"
    tensors = checkpoints.random_tensors(config)
    checkpoints.write_checkpoint(source, tensors, config, tokenizer=True)
    convert(source, source.parent / "orbax")
    return source.parent / "orbax"


@pytest.fixture
def run(call_main) -> Callable[..., tuple[int, str, str]]:
    return functools.partial(call_main, evaluate.main)


@pytest.fixture
def score(run, folder, tmp_path) -> Callable[..., list[dict]]:
    """Runs a benchmark with SMALL and these flags; returns its records and its table."""

    def call(kind, data, *flags, out="out") -> tuple[list[dict], str]:
        status, table, err = run(folder, kind, data, "--out", tmp_path / out, *SMALL, *flags)
        assert (status, err) == (0, ""), "quiet where stderr is no terminal"
        return records(tmp_path / out), table

    return call


@pytest.fixture
def text(tmp_path) -> Path:
    """A haystack."""
    path = tmp_path / "text.txt"
    path.write_text(evals_data.TEXT * 20, encoding="utf-8")
    return path


def records(out: Path) -> list[dict]:
    """The records, without the notes on runs."""
    rows = [json.loads(line) for line in (out / "records.jsonl").read_bytes().splitlines()]
    return [row for row in rows if "run" not in row]


def without_times(out: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out)]


class Answers:
    """Stands in for `answer`: keeps what it is given, and answers as it is told."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.asked, self.says = tokenizer, [], "Anne"

    def __call__(self, engine, requests, together):
        (request,) = requests
        ids = [*request.prefix, *request.context, *request.question]
        text = self.tokenizer.backend.decode(ids, skip_special_tokens=False)
        self.asked.append((str(engine.method), text))
        length = engine.decoding.gen_length
        tokens = self.tokenizer.encode(self.says)[:length]
        tokens += [self.tokenizer.eos_id] * (length - len(tokens))
        chunks = [0] if engine.method.uses_chunks else None
        counts = {"evaluations": 1, "rows": 40.0, "seconds": {"total": 1.0}}
        return [{"tokens": tokens, **counts, "chunks": chunks}]


@pytest.fixture
def answers(folder, monkeypatch) -> Answers:
    stand_in = Answers(Tokenizer.load(folder, load_config(folder)))
    monkeypatch.setattr("experiments.benchmarks.run.answer", stand_in)
    return stand_in


def test_longbench_from_its_files_to_a_table(tmp_path, score, answers):
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    data = evals_data.longbench(tmp_path / "copy")
    rows, table = score("longbench", data)
    counted = {(r["task"], r["id"], r["method"]) for r in rows}
    # 3 examples of hotpotqa and of hotpotqa_e, 1 of the five others, each by three methods.
    assert len(rows) == len(counted) == len(answers.asked) == 11 * 3
    asked = {r["method"]: r for r in rows if (r["task"], r["id"]) == ("hotpotqa", "a1")}
    assert {r["digest"] for r in asked.values()} == {asked["plain"]["digest"]}
    text = evals_data.PROMPTS["hotpotqa"].format(
        context=evals_data.TEXT * 3, input="Where does Anne live?"
    )
    chat = (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert {(method, chat) for method in METHODS} <= set(answers.asked)
    text = "<|startoftext|>" + evals_data.PROMPTS["lcc"].format(context=evals_data.TEXT)
    assert ("plain", text) in answers.asked, "BOS, and no chat template"
    assert ("prefilling", text) in answers.asked
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    means = {(row["task"], row["method"]): row for row in summary["rows"]}
    assert means["hotpotqa", "plain"]["examples"] == 3
    assert means["hotpotqa", "plain"]["score"] == pytest.approx(100 / 3), "one of three is Anne"
    assert means["hotpotqa_e, 4-8k", "plain"]["examples"] == 1
    assert means["hotpotqa_e, 0-4k", "plain"]["examples"] == 2
    assert table.count("| longbench |") == len(means) == 3 * 9
    for row in means.values():
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
    assert score("longbench", data) == (rows, table), "what is recorded is not asked again"
    assert len(answers.asked) == len(rows)


def test_a_run_of_every_method_on_a_real_model(text, score):
    """The prompts fill the model's positions: the baselines lose their middle, the method none."""
    rows, table = score("needle", text, "--lengths", 600, "--depths", 2)
    assert len(rows) == 6
    for record in rows:
        prefilling, tokens = record["method"] == "prefilling", record["prompt_tokens"]
        least, most = (592, 600) if prefilling else (511, 512)
        assert least <= tokens + 6 <= most
        assert (record["chunks"] and len(record["chunks"])) == (2 if prefilling else None)
        assert record["truncated"] is not prefilling
        assert record["evaluations"] >= 1
    assert table.count("| needle | 600 |") == 3
    assert "| 2 |" in table


@pytest.mark.slow
def test_a_mesh_of_one_device_gives_the_same_records(text, tmp_path, score):
    flags = ("--lengths", 600, "--depths", 2, "--methods", "prefilling")
    score("needle", text, *flags, out="plain")
    score("needle", text, *flags, "--mesh", "1x1", out="mesh")
    assert without_times(tmp_path / "mesh") == without_times(tmp_path / "plain")
    settings = json.loads((tmp_path / "mesh" / "settings.json").read_text())
    assert settings["mesh"] == {"data": 1, "tensor": 1}


def test_middle_truncation_of_the_baselines(tmp_path, score, answers):
    data = evals_data.longbench(tmp_path / "copy")
    flags = ("--tasks", "hotpotqa", "--limit", "1", "--max-length", "101")
    rows = {r["method"]: r for r in score("longbench", data, *flags)[0]}
    template = len("user\n\nassistant\n\n") + 6
    for method in ("plain", "dual-cache"):
        assert rows[method]["truncated"]
        assert rows[method]["prompt_tokens"] == 100 + template
    assert not rows["prefilling"]["truncated"]


@pytest.mark.parametrize(
    ("kind", "count", "flags"),
    [
        ("infinitebench", 3 + 1 + 1 + 3 + 4 + 1 + 1, []),
        ("ruler", 6 * 3, []),
        ("needle", 2 * 3, ["--lengths", 350, 450, "--depths", 3]),
        ("generated", 3 * 2, ["--examples", 2, "--lengths", 900, "--tasks", *GENERATED]),
    ],
)
def test_every_other_benchmark(folder, tmp_path, text, score, answers, kind, count, flags):
    if kind == "needle":
        data = text
    elif kind == "generated":
        data = evals_data.corpora(tmp_path / "corpora", folder / "tokenizer.json")
    else:
        data = getattr(evals_data, kind)(tmp_path / "copy")
    rows, table = score(kind, data, *flags, "--methods", "plain", "prefilling")
    assert len(rows) == 2 * count
    assert {r["benchmark"] for r in rows} == {kind}
    assert table.count(f"| {kind} |") == len({(r["task"], r["method"]) for r in rows})
    if kind == "generated":
        asked = {r["method"]: r for r in rows if r["task"] == "passkey_900"}
        assert asked["prefilling"]["prompt_tokens"] == 900 - 32
        assert asked["plain"]["prompt_tokens"] == 512 - 6, "all that the model's positions hold"


def test_malformed_lines_stop_a_run_or_are_left_out(folder, tmp_path, run, answers):
    data, out = evals_data.infinitebench(tmp_path / "copy"), tmp_path / "out"
    path = data / "passkey.jsonl"
    path.write_bytes(path.read_bytes() + b"{broken\n")
    command = [folder, "infinitebench", data, "--out", out, *SMALL, "--methods", "prefilling"]
    command += ["--tasks", "passkey"]
    status, table, err = run(*command)
    assert (status, table) == (2, "")
    assert err.startswith(f"error: {path}:4: not valid JSON")
    assert err.count("\n") == 1
    assert not out.exists()
    status, table, err = run(*command, "--on-malformed", "skip")
    assert status == 1
    assert table.count("| infinitebench |") == 1
    assert err.splitlines()[0].startswith(f"{path}:4: not valid JSON")
    assert err.splitlines()[1:] == ["1 malformed lines were left out"]
    assert json.loads((out / "summary.json").read_text())["malformed_lines"] == 1


def test_bad_input_is_one_line(folder, tmp_path, run):
    data, out = evals_data.infinitebench(tmp_path / "copy"), ["--out", tmp_path / "o"]
    from tests.oracles import checkpoints

    checkpoints.write_tokenizer(tmp_path, checkpoints.SPECIAL_TOKENS[:2])
    other = evals_data.corpora(tmp_path / "corpora", tmp_path / "tokenizer.json")
    for argv, message in (
        ([folder, "infinitebench", tmp_path / "none", *out], "does not exist"),
        ([folder, "infinitebench", tmp_path, *out], "holds no InfiniteBench"),
        ([folder, "infinitebench", data, *out, "--limit", 0], "must be at least 1, got 0"),
        ([folder, "infinitebench", data, *out, "--top-k", 0], "top_k"),
        ([folder, "infinitebench", data], "--out"),
        ([tmp_path / "none", "infinitebench", data, *out], "is not a directory"),
        ([folder, "needle", data, *out], r"no .txt file"),
        ([folder, "generated", data, *out], "tokenizer.json is missing"),
        ([folder, "generated", other, *out], "another tokenizer"),
    ):
        status, table, err = run(*argv)
        assert (status, table) == (2, ""), argv
        assert err.startswith("error: "), err
        assert message in err
        assert err.count("\n") == 1


def test_a_folder_has_one_run(folder, tmp_path, run, score, answers):
    data = evals_data.infinitebench(tmp_path / "copy")
    flags = ["--tasks", "passkey", "--methods", "prefilling"]
    command = [folder, "infinitebench", data, "--out", tmp_path / "out", *SMALL, *flags]
    assert run(*command, "--limit", 1)[0] == 0
    status, _, err = run(*command, "--top-k", 1)
    assert status == 2
    assert "other settings (selection)" in err
    status, _, err = run(*command, "--rules", "first")
    assert status == 2
    assert "other settings (rules)" in err
    rows, _ = score("infinitebench", data, *flags, "dual-cache", "--limit", 3)
    assert len(rows) == 6, "more examples and methods go on with what is there"
    row = {"id": 0, "context": "other", "input": "?", "answer": "1"}
    evals_data.write_lines(data / "passkey.jsonl", [row])
    status, _, err = run(*command, "--limit", 1)
    assert status == 2
    assert "passkey/prefilling/0 with other contents" in err


def test_records_damaged_and_cut_off(tmp_path):
    settings, key, row = {"x": (1, 2)}, Key("b", "t", "m", "1"), {"digest": "d", "score": 1.0}
    with Records(tmp_path, settings) as opened:
        opened.add(key, row)
        opened.add(key._replace(id="2"), row)
        with pytest.raises(RecordError, match="being written by another run"):
            Records(tmp_path, settings)
    path = tmp_path / "records.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(first + 1, len(content)):  # any byte of the last line
        path.write_bytes(content[:cut])
        with Records(tmp_path, settings) as opened:
            assert list(opened.done) == [key]
            assert opened.dropped == cut - first
            opened.add(key._replace(id="2"), row)
        assert path.read_bytes() == content
    line = b'{"benchmark": "b", "task": "t", "method": "m", "id": %s, "digest": 1, "score": 1%s}'
    for bad in (b"{}", b"[" * 5000, line % (b"{}", b""), line % (b'""', b"0" * 400)):
        path.write_bytes(bad + b"\n" + content)
        with pytest.raises(RecordError, match=r"records\.jsonl:1: not a record of format"):
            Records(tmp_path, settings)
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"other settings \(x, y\)"):
        Records(tmp_path, {"x": 1, "y": 2})
    with (
        Records(tmp_path, settings) as opened,
        pytest.raises(RecordError, match="data have changed"),
    ):
        opened.get(key, "other")
    for text, message in (
        ('{"x": [1, 2]}', f"records of format 1, not {FORMAT}"),
        ("[]", "must hold a JSON object"),
    ):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(RecordError, match=message):
            Records(tmp_path, settings)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(RecordError, match="is missing beside its records"):
        Records(tmp_path, settings)


def wait_for_lines(child: subprocess.Popen, path: Path, least: int) -> None:
    """Waits for `least` records, five minutes at most."""
    began = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < least:
        assert child.poll() is None, "ended before it could be killed"
        assert time.monotonic() - began < 300
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(folder, tmp_path):
    """The whole of it on a real model, killed while it computes, a line half written."""
    data = evals_data.infinitebench(tmp_path / "copy")
    row = {"context": evals_data.TEXT * 3}
    rows = [{"id": i, "input": f"{i}?", "answer": i, **row} for i in range(12)]
    evals_data.write_lines(data / "passkey.jsonl", rows)
    cut, through = tmp_path / "cut", tmp_path / "through"
    script = [sys.executable, ROOT / "scripts" / "evaluate.py", folder, "infinitebench", data]
    flags = ["--tasks", "passkey", *SMALL, "--methods", "dual-cache", "prefilling"]
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
    # The first is killed as soon as it has three records.
    first = subprocess.Popen([*script, "--out", cut, *flags], **options)
    path = cut / "records.jsonl"
    wait_for_lines(first, path, 3)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    assert 3 <= kept.count(b"\n") < 24
    path.write_bytes(kept[:-1] if kept.endswith(b"\n") else kept)
    options |= {"stderr": subprocess.PIPE, "text": True, "check": True}
    done = subprocess.run([*script, "--out", cut, *flags], **options)
    assert "the last line was cut off" in done.stderr
    assert path.read_bytes().startswith(kept[: kept[:-1].rindex(b"\n") + 1])
    done = subprocess.run([*script, "--out", through, *flags], **options)
    assert done.stderr == ""
    assert without_times(cut) == without_times(through)
    assert len(records(cut)) == 24
