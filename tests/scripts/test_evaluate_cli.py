"""scripts/evaluate.py: whole runs on a tiny model, resumed ones, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdllm_jax import Tokenizer, load_config
from pdllm_jax.evaluation.prompts import SplitPrompt
from tests.conftest import ROOT
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
from experiments.benchmarks.example import Example, Task
from experiments.benchmarks.run import missing_work
from experiments.records import FORMAT, Key, RecordError, Records
from experiments.runner import run as run_all

SMALL = [
    "--chunk-size", "64", "--top-k", "2", "--encode-batch", "4", "--gen-length", "6",
    "--threshold", "0.3",
]  # fmt: skip


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


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = evaluate.main([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


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

    def __call__(self, model, prompts, *, method, decoding, **_):
        (prompt,) = prompts
        ids = [token for part in prompt for token in part]
        self.asked.append((method, self.tokenizer.backend.decode(ids, skip_special_tokens=False)))
        tokens = self.tokenizer.encode(self.says)[: decoding.gen_length]
        tokens += [self.tokenizer.eos_id] * (decoding.gen_length - len(tokens))
        chunks = [0] if method == "prefilling" else None
        return [{"tokens": tokens, "evaluations": 1, "seconds": {"total": 1.0}, "chunks": chunks}]


@pytest.fixture
def answers(folder, monkeypatch) -> Answers:
    stand_in = Answers(Tokenizer.load(folder, load_config(folder)))
    monkeypatch.setattr("experiments.benchmarks.run.answer", stand_in)
    return stand_in


def test_longbench_from_its_files_to_a_table(folder, tmp_path, capsys, answers):
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    data = evals_data.longbench(tmp_path / "copy")
    out = tmp_path / "out"
    status, table, err = run(capsys, folder, "longbench", data, "--out", out, *SMALL)
    assert status == 0, err
    assert err == "", "quiet where stderr is no terminal"
    found = records(out)
    counted = {(r["task"], r["id"], r["method"]) for r in found}
    # 3 examples of hotpotqa and of hotpotqa_e, 1 of the five others, each by three methods.
    assert len(found) == len(counted) == len(answers.asked) == 11 * 3
    asked = {r["method"]: r for r in found if (r["task"], r["id"]) == ("hotpotqa", "a1")}
    assert {r["digest"] for r in asked.values()} == {asked["plain"]["digest"]}
    text = evals_data.PROMPTS["hotpotqa"].format(
        context=evals_data.TEXT * 3, input="Where does Anne live?"
    )
    chat = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    by_method = dict.fromkeys(("plain", "dual-cache", "prefilling"), chat.format(text))
    assert by_method.items() <= set(answers.asked)
    text = "<|startoftext|>" + evals_data.PROMPTS["lcc"].format(context=evals_data.TEXT)
    assert ("plain", text) in answers.asked, "BOS, and no chat template"
    assert ("prefilling", text) in answers.asked
    summary = json.loads((out / "summary.json").read_text())
    rows = {(row["task"], row["method"]): row for row in summary["rows"]}
    assert rows["hotpotqa", "plain"]["examples"] == 3
    assert rows["hotpotqa", "plain"]["score"] == pytest.approx(100 / 3), "one of three is Anne"
    assert rows["hotpotqa_e, 4-8k", "plain"]["examples"] == 1
    assert rows["hotpotqa_e, 0-4k", "plain"]["examples"] == 2
    assert table.count("| longbench |") == len(rows) == 3 * 9
    for row in rows.values():
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
    again = run(capsys, folder, "longbench", data, "--out", out, *SMALL)
    assert again[:2] == (0, table), "what is recorded is not asked again"
    assert records(out) == found
    assert len(answers.asked) == len(found)


def test_a_run_of_every_method_on_a_real_model(folder, tmp_path, capsys):
    """The prompts fill the model's positions: the baselines lose their middle, the method none."""
    data = tmp_path / "text.txt"
    data.write_text(evals_data.TEXT * 20, encoding="utf-8")
    out = tmp_path / "out"
    status, table, err = run(
        capsys, folder, "needle", data, "--out", out, "--lengths", 600, "--depths", 2, *SMALL
    )
    assert status == 0, err
    found = records(out)
    assert len(found) == 6
    for record in found:
        tokens = record["prompt_tokens"]
        if record["method"] == "prefilling":
            assert 592 <= tokens + 6 <= 600
            assert len(record["chunks"]) == 2
            assert not record["truncated"]
        else:
            assert 511 <= tokens + 6 <= 512
            assert record["chunks"] is None
            assert record["truncated"]
        assert record["evaluations"] >= 1
    assert table.count("| needle | 600 |") == 3
    assert "| 2 |" in table


@pytest.mark.slow
def test_a_mesh_of_one_device_gives_the_same_records(folder, tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_text(evals_data.TEXT * 20, encoding="utf-8")
    for out, flags in (("plain", []), ("mesh", ["--mesh", "1x1"])):
        status, _, err = run(
            capsys, folder, "needle", data, "--out", tmp_path / out, "--lengths", 600,
            "--depths", 2, *SMALL, "--methods", "prefilling", *flags,
        )  # fmt: skip
        assert status == 0, err
    assert without_times(tmp_path / "mesh") == without_times(tmp_path / "plain")
    settings = json.loads((tmp_path / "mesh" / "settings.json").read_text())
    assert settings["mesh"] == {"data": 1, "tensor": 1}


def test_middle_truncation_of_the_baselines(folder, tmp_path, capsys, answers):
    data = evals_data.longbench(tmp_path / "copy")
    out = tmp_path / "out"
    status, _, err = run(
        capsys, folder, "longbench", data, "--out", out, "--tasks", "hotpotqa", "--limit", "1",
        "--max-length", "101", *SMALL,
    )  # fmt: skip
    assert status == 0, err
    found = {r["method"]: r for r in records(out)}
    template = len("user\n\nassistant\n\n") + 6
    for method in ("plain", "dual-cache"):
        assert found[method]["truncated"]
        assert found[method]["prompt_tokens"] == 100 + template
    assert not found["prefilling"]["truncated"]


@pytest.mark.parametrize("kind", ["infinitebench", "ruler", "needle", "generated"])
def test_every_other_benchmark(folder, tmp_path, capsys, answers, kind):
    flags = []
    if kind == "infinitebench":
        data, counted = evals_data.infinitebench(tmp_path / "copy"), 3 + 1 + 1 + 3 + 4 + 1 + 1
    elif kind == "ruler":
        data, counted = evals_data.ruler(tmp_path / "copy"), 6 * 3
    elif kind == "needle":
        data, counted = tmp_path / "text.txt", 2 * 3
        data.write_text(evals_data.TEXT * 20, encoding="utf-8")
        flags = ["--lengths", 350, 450, "--depths", 3]
    else:
        data, counted = evals_data.corpora(tmp_path / "corpora", folder / "tokenizer.json"), 3 * 2
        flags = ["--tasks", "passkey", "magic_number", "multi_needle"]
        flags += ["--lengths", 900, "--examples", 2]
    out = tmp_path / "out"
    status, table, err = run(
        capsys, folder, kind, data, "--out", out, *flags, *SMALL, "--methods", "plain", "prefilling"
    )
    assert status == 0, err
    found = records(out)
    assert len(found) == 2 * counted
    assert {r["benchmark"] for r in found} == {kind}
    assert table.count(f"| {kind} |") == len({(r["task"], r["method"]) for r in found})
    if kind == "generated":
        asked = {r["method"]: r for r in found if r["task"] == "passkey_900"}
        assert asked["prefilling"]["prompt_tokens"] == 900 - 32
        assert asked["plain"]["prompt_tokens"] == 512 - 6, "all that the model's positions hold"


def test_malformed_lines_stop_a_run_or_are_left_out(folder, tmp_path, capsys, answers):
    data = evals_data.infinitebench(tmp_path / "copy")
    path = data / "passkey.jsonl"
    path.write_bytes(path.read_bytes() + b"{broken\n")
    command = [
        folder, "infinitebench", data, "--tasks", "passkey", "--out", tmp_path / "out", *SMALL,
        "--methods", "prefilling",
    ]  # fmt: skip
    status, out, err = run(capsys, *command)
    assert status == 2
    assert out == ""
    assert err.startswith(f"error: {path}:4: not valid JSON")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    status, out, err = run(capsys, *command, "--on-malformed", "skip")
    assert status == 1
    assert out.count("| infinitebench |") == 1
    assert err.splitlines()[0].startswith(f"{path}:4: not valid JSON")
    assert err.splitlines()[1:] == ["1 malformed lines were left out"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["malformed_lines"] == 1


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    data = evals_data.infinitebench(tmp_path / "copy")
    from tests.oracles import checkpoints

    checkpoints.write_tokenizer(tmp_path, checkpoints.SPECIAL_TOKENS[:2])
    other = evals_data.corpora(tmp_path / "corpora", tmp_path / "tokenizer.json")
    for argv, message in (
        ([folder, "infinitebench", tmp_path / "none", "--out", tmp_path / "o"], "does not exist"),
        ([folder, "infinitebench", tmp_path, "--out", tmp_path / "o"], "holds no InfiniteBench"),
        (
            [folder, "infinitebench", data, "--out", tmp_path / "o", "--limit", 0],
            "must be at least 1, got 0",
        ),
        ([folder, "infinitebench", data, "--out", tmp_path / "o", "--top-k", 0], "top_k"),
        ([folder, "infinitebench", data], "--out"),
        ([tmp_path / "none", "infinitebench", data, "--out", tmp_path / "o"], "is not a directory"),
        ([folder, "needle", data, "--out", tmp_path / "o"], r"no .txt file"),
        ([folder, "generated", data, "--out", tmp_path / "o"], "tokenizer.json is missing"),
        ([folder, "generated", other, "--out", tmp_path / "o"], "another tokenizer"),
    ):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, ""), argv
        assert err.startswith("error: "), err
        assert message in err
        assert err.count("\n") == 1


def test_a_folder_has_one_run(folder, tmp_path, capsys, answers):
    data = evals_data.infinitebench(tmp_path / "copy")
    out = tmp_path / "out"
    command = [
        folder, "infinitebench", data, "--tasks", "passkey", "--out", out, *SMALL,
        "--methods", "prefilling", "--limit", "1",
    ]  # fmt: skip
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command, "--top-k", "1")
    assert status == 2
    assert "other settings (selection)" in err
    more = [*command[:-1], "3"]
    assert run(capsys, *more, "--methods", "prefilling", "dual-cache")[0] == 0
    assert len(records(out)) == 6, "more examples and methods go on with what is there"
    row = {"id": 0, "context": "other", "input": "?", "answer": "1"}
    evals_data.write_lines(data / "passkey.jsonl", [row])
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "passkey/prefilling/0 with other contents" in err


def test_records_damaged_and_cut_off(tmp_path):
    settings = {"x": (1, 2)}
    key = Key("b", "t", "m", "1")
    with Records(tmp_path, settings) as opened:
        opened.add(key, {"digest": "d", "score": 1.0})
        opened.add(key._replace(id="2"), {"digest": "d", "score": 0.0})
        with pytest.raises(RecordError, match="being written by another run"):
            Records(tmp_path, settings)
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 2, len(whole)):  # any byte of the last line
        path.write_bytes(whole[:cut])
        with Records(tmp_path, settings) as opened:
            assert list(opened.done) == [key]
            assert opened.dropped == cut - whole.index(b"\n") - 1
            opened.add(key._replace(id="2"), {"digest": "d", "score": 0.0})
        assert path.read_bytes() == whole
    hostile = (b"{}", b"[" * 5000)
    hostile += (
        b'{"benchmark": "b", "task": "t", "method": "m", "id": {}, "digest": 1, "score": 1}',
    )
    hostile += (
        b'{"benchmark": "b", "task": "t", "method": "m", "id": "", "digest": 1, "score": 1%s}'
        % (b"0" * 400),
    )
    for line in hostile:
        path.write_bytes(line + b"\n" + whole)
        with pytest.raises(RecordError, match=r"records\.jsonl:1: not a record of format"):
            Records(tmp_path, settings)
    path.write_bytes(whole)
    with pytest.raises(RecordError, match=r"other settings \(x, y\)"):
        Records(tmp_path, {"x": 1, "y": 2})
    with (
        Records(tmp_path, settings) as opened,
        pytest.raises(RecordError, match="data have changed"),
    ):
        opened.get(key, "other")
    (tmp_path / "settings.json").write_text('{"x": [1, 2]}')
    with pytest.raises(RecordError, match=f"records of format 1, not {FORMAT}"):
        Records(tmp_path, settings)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(RecordError, match="must hold a JSON object"):
        Records(tmp_path, settings)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(RecordError, match="is missing beside its records"):
        Records(tmp_path, settings)


DRIVER = """
import sys, time
from tests.scripts.test_evaluate_cli import slow_run
slow_run(sys.argv[1], float(sys.argv[2]))
"""


def slow_run(out: str, pause: float) -> None:
    """A run of 20 examples whose answers take their time."""
    examples = tuple(Example(str(i), (str(i),), SplitPrompt("", "c", "?")) for i in range(20))
    task = Task("b", "t", 4, lambda said, example: float(said in example.answers), examples)

    def ask(task, example, method):
        time.sleep(pause)
        score, digest = task.metric("7", example), example.digest()
        return [{"score": score, "digest": digest, "long": method + example.id * 2000}]

    with Records(Path(out), {}) as opened:
        work = missing_work(ask, [task], ["plain", "prefilling"], opened)
        run_all(work, opened, total=40, show=False)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed twice with SIGKILL: in the end there are the records of a run that was not."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    cut, through = tmp_path / "cut", tmp_path / "through"
    path, kept = cut / "records.jsonl", b""
    for least in (3, 9):
        child = subprocess.Popen([sys.executable, "-c", DRIVER, cut, "0.03"], env=environment)
        wait_for_lines(child, path, least)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert path.read_bytes().startswith(kept), "what was recorded stays"
        kept = path.read_bytes()
        assert least <= kept.count(b"\n") < 40
        path.write_bytes(kept + kept[:100])  # as if killed while it wrote
    slow_run(str(cut), 0)
    slow_run(str(through), 0)
    assert path.read_bytes() == (through / "records.jsonl").read_bytes()
    assert path.read_bytes().count(b"\n") == 40


def wait_for_lines(child: subprocess.Popen, path: Path, least: int) -> None:
    """Until there are so many records, a minute at most."""
    began = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < least:
        assert child.poll() is None, "ended before it could be killed"
        assert time.monotonic() - began < 300
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(folder, tmp_path):
    """The whole of it on a real model, killed while it computes, a line half written."""
    data = evals_data.infinitebench(tmp_path / "copy")
    rows = [
        {"id": i, "context": evals_data.TEXT * 3, "input": f"{i}?", "answer": i} for i in range(12)
    ]
    evals_data.write_lines(data / "passkey.jsonl", rows)
    cut, through = tmp_path / "cut", tmp_path / "through"

    def command(out: Path) -> list[str]:
        return [
            sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(folder), "infinitebench",
            str(data), "--tasks", "passkey", "--out", str(out), *SMALL,
            "--methods", "dual-cache", "prefilling",
        ]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The first is killed as soon as it has three records.
    first = subprocess.Popen(command(cut), env=environment, stdout=subprocess.DEVNULL)
    path = cut / "records.jsonl"
    wait_for_lines(first, path, 3)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    assert 3 <= kept.count(b"\n") < 24
    path.write_bytes(kept[:-1] if kept.endswith(b"\n") else kept)
    done = subprocess.run(command(cut), env=environment, capture_output=True, text=True, check=True)
    assert "the last line was cut off" in done.stderr
    assert path.read_bytes().startswith(kept[: kept[:-1].rindex(b"\n") + 1])
    done_whole = subprocess.run(
        command(through), env=environment, capture_output=True, text=True, check=True
    )
    assert done_whole.stderr == ""
    assert without_times(cut) == without_times(through)
    assert len(records(cut)) == 24
