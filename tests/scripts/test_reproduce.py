"""scripts/reproduce.py: the authors' rows end to end on tiny and small models, and bad input."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from pdllm_jax import ModelConfig
from tests.conftest import ROOT
from tests.oracles.dream_tokenizer import write_dream_tokenizer
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
import reproduce
from experiments.benchmarks.reproduction import FULL, PUBLISHED, ROWS
from experiments.benchmarks.run import Asker


@pytest.fixture
def run(capsys):
    """Runs a command line: exit status, stdout, stderr without the note of a conversion."""

    def call(*argv):
        try:
            status = reproduce.main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, "".join(x for x in err.splitlines(True) if "converting " not in x)

    return call


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_every_row_on_a_tiny_dream(make_checkpoint, tmp_path, run, monkeypatch):
    """Stopped after the first example, it goes on with the second; rows that are alike run once."""
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    model = make_checkpoint(family="dream", max_position_embeddings=2048).folder
    write_dream_tokenizer(model)
    data = evals_data.multifieldqa(tmp_path / "copy", characters=300, examples=2)
    out = tmp_path / "out"
    command = [model, data, "--out", out, "--chunk-size", 128, "--top-k", 2]
    assert run(*command, "--rows", "reference", "--limit", 1)[0] == 0
    first = (out / "records.jsonl").read_bytes()
    status, table, err = run(*command)
    assert (status, err) == (0, "")
    assert (out / "records.jsonl").read_bytes().startswith(first)
    assert table == (out / "table.md").read_text()
    summary = summary_of(out)
    rows = {row["row"]: row for row in summary["rows"]}
    assert list(rows) == list(ROWS)
    runs = {row["method"] for row in rows.values()}
    assert runs == {*ROWS} - {"aligned-positions", "end-to-end"}
    assert len((out / "records.jsonl").read_bytes().splitlines()) == 2 + 2 * len(runs)
    for name, row in rows.items():
        assert f"| {name}: " in table
        assert row["examples"] == 2
        assert row["published_f1"] == ROWS[name].f1
        low, high = row["interval"]
        assert low <= row["score"] <= high
        assert row["seconds_in_all"] > 0
        value, low, high = row["speedup"]
        full = rows[FULL]["seconds_in_all"]
        assert value == pytest.approx(full / row["seconds_in_all"], rel=1e-6)
        assert low <= value <= high
    scorers = [rows[name]["scorer"] for name in ("reference", "retained", "end-to-end", FULL)]
    assert scorers == ["causal", "chunk-draft", "causal (the run of reference)", "-"]
    assert PUBLISHED["model"] in table
    assert "is of the family" not in table
    assert "Examples here: 2." in table
    assert summary["conditions"][0]["versions"]["jax"]
    assert len(summary["settings"]["checkpoint"]) == 64
    assert summary["settings"]["decoding"]["first_slot_alone"]
    assert summary["command"].startswith("scripts/reproduce.py ")


@pytest.mark.slow
def test_the_small_model(tmp_path, run):
    """A model of LLaDA's family finds a number; `make reproduce-quick`, after `make quickstart`."""
    import quickstart

    data = evals_data.multifieldqa(tmp_path / "copy", characters=700, examples=1)
    flags = ["--chunk-size", 64, "--top-k", 2, "--dtype", "float32"]
    flags += ["--rows", "reference", "retained", FULL]
    status, table, err = run(quickstart.checkpoint(), data, "--out", tmp_path / "out", *flags)
    assert status == 0, err
    assert "| draft in the place of causal |" in table
    assert "| draft in the place of chunk-draft (the run of reference) |" in table
    assert "family 'llada': the published rows are of 'dream'" in table
    summary = summary_of(tmp_path / "out")
    assert [row["examples"] for row in summary["rows"]] == [1, 1, 1]
    assert max(row["score"] for row in summary["rows"]) > 0
    assert not summary["settings"]["decoding"]["first_slot_alone"]
    records = (tmp_path / "out" / "records.jsonl").read_text().splitlines()[1:]
    for record in map(json.loads, records):
        assert "700" in record["response"]
        if record["method"] == "reference":
            assert len(record["chunks"]) == 2


GOOD = {"input": "Who?", "context": "Anne lives at Kellynch.", "answers": ["Anne"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "data.jsonl:2: not valid JSON"),
        (b"\xff", "data.jsonl:2: 'utf-8' codec can't decode"),
        ([GOOD], "data.jsonl:2: must be a JSON object, is list"),
        ({**GOOD, "context": None}, "data.jsonl:2: context is missing"),
        ({**GOOD, "context": " "}, "data.jsonl:2: context is empty"),
        ({**GOOD, "input": ""}, "data.jsonl:2: input or question is missing or empty"),
        ({"passage": "Anne", "label": 1}, "data.jsonl:2: input or question is missing or empty"),
        ({**GOOD, "answers": []}, "data.jsonl:2: answers is empty"),
        ({k: GOOD[k] for k in ("input", "context")}, "data.jsonl:2: answers or answer is missing"),
        ({**GOOD, "dataset": "hotpotqa"}, "dataset must be 'multifieldqa_en', got 'hotpotqa'"),
    ],
)
def test_data_of_another_shape_is_one_line(tmp_path, run, line, message):
    """Found before the checkpoint is looked at, which does not exist."""
    data = evals_data.write_lines(tmp_path / "data.jsonl", [GOOD, line])
    status, out, err = run(tmp_path / "none", data, "--out", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(make_checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    data = evals_data.write_lines(tmp_path / "data.jsonl", [GOOD])
    empty = evals_data.write_lines(tmp_path / "empty.jsonl", [""])
    model, out = make_checkpoint(family="dream").folder, ["--out", tmp_path / "out"]
    for argv, message in (
        ([model, tmp_path / "none"], "none cannot be read"),
        ([model, tmp_path], "multifieldqa_en.jsonl is missing"),
        ([model, empty], "empty.jsonl holds no examples"),
        ([model, data, "--limit", 0], "--limit must be at least 1, got 0"),
        ([model, data, "--top-k", 0], "top_k must be"),
        ([model, data, "--chunk-size", 1], "chunk_size 1 leaves no new token"),
        ([model, data, "--rows", "best"], "invalid choice: 'best'"),
        ([tmp_path / "none", data], "is not a directory"),
        ([model, data], "tokenizer.json is missing"),
    ):
        status, stdout, err = run(*argv, *out)
        assert (status, stdout, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize(("model", "alone"), [("dream-7b", True), ("llada-8b", False)])
def test_every_benchmark_decodes_by_fast_dllm_of_the_family(model, alone, threshold):
    model, tokenizer = (
        SimpleNamespace(config=ModelConfig.preset(model)),
        SimpleNamespace(stop_ids=()),
    )
    ask = Asker(SimpleNamespace(model=model, tokenizer=tokenizer), threshold=threshold)
    decoding = ask.decoding(SimpleNamespace(gen_length=48))
    assert (decoding.first_slot_alone, decoding.recompute) == (alone, "block")
    assert (decoding.gen_length, decoding.block_length) == (48, 24)
    assert decoding.threshold == threshold
