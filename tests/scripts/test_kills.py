"""scripts/kills.py in short, and a careless writer that it must find."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import kills
import pytest
from experiments.records import Key, Records


class Careless(kills.Job):
    """Writes in place, line by line."""

    def work(self, turn: int) -> None:
        self.target.mkdir(exist_ok=True)
        with (self.target / "lines").open("w") as file:
            for _ in range(20):
                print(turn, file=file, flush=True)
                time.sleep(0.02)

    def read(self, folder: Path) -> Any:
        return (folder / "lines").read_text()


@pytest.mark.slow
def test_a_careless_writer_is_found(tmp_path):
    states, findings = kills.kill(Careless(tmp_path), 4)
    assert states.total() == 4
    assert any("the folder holds another result" in finding for finding in findings)


def test_a_snapshot_is_complete_or_missing(capsys):
    assert kills.main(["1", "--kinds", "snapshot"]) == 0
    assert "snapshot: 1 kills left" in capsys.readouterr().out


def test_an_evaluation_that_goes_on_has_the_same_result(tmp_path):
    """Each process that adds records notes itself first, so that two runs leave two notes."""
    keys = [Key("needle", "local", method, "0") for method in ("plain", "prefilling")]
    results = []
    for name, starts in (("undisturbed", [keys]), ("killed", [keys[:1], keys[1:]])):
        job = kills.Evaluation(tmp_path / name)
        for seconds, part in enumerate(starts):
            with Records(job.target, {}) as records:
                rows = {key: {"score": 1.0, "seconds": seconds} for key in part}
                records.add_all(rows, {"platform": "cpu"})
        (job.target / "summary.json").write_text(json.dumps({"rows": [{"score": 1.0}]}))
        results.append(job.read(job.target))
    assert results[0] == results[1]
    assert len(results[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conversion", "evaluation"])
def test_a_killed_run_goes_on(kind, capsys):
    if kind == "evaluation":
        pytest.importorskip("torch")
    assert kills.main(["20", "--kinds", kind]) == 0
    assert "0 findings" in capsys.readouterr().out
