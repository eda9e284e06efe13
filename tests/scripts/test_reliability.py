"""The campaigns of scripts/reliability.py in short, and that they would find what they look for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from campaigns import fuzz
from campaigns import kills as killing
from campaigns.mutate import mutated_bytes, mutated_json


def campaign(tmp_path: Path, *arguments) -> dict:
    """The record of a campaign without findings."""
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "scripts" / "reliability.py", *arguments, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_broken_input_of_every_kind(tmp_path):
    torch = importlib.util.find_spec("torch")  # writes .bin files
    kinds = [kind for kind in fuzz.KINDS if torch or kind != "bin"]
    record = campaign(tmp_path, "fuzz", "--kinds", *kinds, "--count", 150, "--workers", 2)
    assert [row["kind"] for row in record["kinds"]] == kinds
    for row in record["kinds"]:
        assert sum(row["outcomes"].values()) == 150
        assert row["outcomes"]["refused"] > 30
        assert row["outcomes"]["loaded"] > 0, "an oracle that is never asked"


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("Crashes", "the worker ended: -6"),
        ("Hangs", "no end after 1 s"),
        ("Allocates", "MemoryError"),
        ("WritesOutside", "opened for writing"),
        ("RemovesOutside", "os.rmdir"),
        ("Connects", "socket.getaddrinfo"),
        ("Executes", "subprocess.Popen"),
        ("RaisesWhatIsNotDocumented", "KeyError"),
        ("LoadsAsWhatItIsNot", "lies"),
    ],
)
def test_a_fuzzer_finds(kind, found):
    """One bad case of twenty; the others go their way."""
    tally = fuzz.fuzz(f"tests.bad_kinds:{kind}", 20, workers=1, time_limit=1)
    ((number, says),) = tally.findings
    assert found in says
    assert number == 7
    assert tally.outcomes["refused"] + tally.outcomes["loaded"] == 19


def test_a_case_follows_from_its_number():
    good = json.dumps({"a": [1, {"b": "text"}], "c": None}).encode()
    for number in range(300):
        rngs = [fuzz.rng_of("kind", 3, number) for _ in range(2)]
        first, second = (mutated_bytes(rng, mutated_json(rng, good)) for rng in rngs)
        assert first == second
    assert fuzz.rng_of("kind", 3, 1).random() != fuzz.rng_of("kind", 4, 1).random()


def test_kills_find_a_careless_writer():
    tally = killing.kill("tests.bad_kinds:Careless", 4)
    assert tally.kills == 4
    assert any("half of it has the name" in x or "was changed" in x for x in tally.findings)


@pytest.mark.parametrize(
    ("kinds", "kills"),
    [
        # Snapshots and records have theirs in test_snapshot_kills.py and test_evaluate_cli.py.
        (["conversion"], 2),
        (["bin"], 2),
        pytest.param(list(killing.KINDS), 100, marks=pytest.mark.slow),
    ],
)
def test_killed_and_gone_on(tmp_path, kinds, kills):
    if "bin" in kinds:
        pytest.importorskip("torch")
    record = campaign(tmp_path, "kills", "--kinds", *kinds, "--count", kills)
    assert [row["kills"] for row in record["kinds"]] == [kills] * len(kinds)
    assert all(row["findings"] == [] for row in record["kinds"])
