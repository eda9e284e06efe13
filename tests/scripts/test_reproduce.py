"""scripts/reproduce.py: the authors' rows end to end on tiny and small models, and bad input."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import ROOT
from tests.oracles.dream_tokenizer import write_dream_tokenizer
from tests.support import evals_data

sys.path.insert(0, str(ROOT / "scripts"))
import reproduce
from experiments.benchmarks.reproduction import FULL, PUBLISHED, ROWS


@pytest.fixture
def run(capsys):
    """Runs a command line: exit status, stdout, stderr."""

    def call(*argv):
        try:
            status = reproduce.main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

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
    assert scorers == ["causal", "chunk-draft", "the run of reference", "-"]
    assert PUBLISHED["model"] in table
    assert "is of the family" not in table
    assert "2 examples here." in table
    assert summary["conditions"][0]["versions"]["jax"]
    assert len(summary["settings"]["checkpoint"]) == 64
    assert summary["settings"]["decoding"]["first_slot_alone"]
    assert summary["command"].startswith("scripts/reproduce.py ")
