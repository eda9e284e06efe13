"""The page of cache methods: made of records and costs alone."""

from __future__ import annotations

import dataclasses
import sys

import pytest

pytest.importorskip("tokenizers")
from tests.conftest import ROOT
from tests.support.ablation import Fake, answer_all

sys.path.insert(0, str(ROOT / "scripts"))
from experiments import summary
from experiments.cache_methods import page as rivals
from experiments.grids import GRIDS
from experiments.records import write_json

from pdllm_jax.method.caches import CACHE_METHODS


def test_the_page_of_cache_methods(tmp_path, monkeypatch):
    """From records and costs that are made up; also without either."""
    pytest.importorskip("matplotlib")
    grid = dataclasses.replace(GRIDS["methods-multi"], over={"length": [2048]})
    monkeypatch.setitem(summary.GRIDS, "methods-multi", grid)
    bench, cells = Fake(), grid.cells()
    assert len(cells) == 13
    note = {"device": "a GPU", "versions": {"jax": "1"}, "processes": 8}
    assert answer_all(bench, cells, 4, tmp_path, note=note)
    record = summary.summarise(tmp_path, ["methods-multi"], 4)
    costs = [
        {"cell": cell.key, **dict.fromkeys(("seconds", "least", "most"), 2.0 - i / 8), "bytes": 1e9}
        for i, cell in enumerate(cells[:3])
    ]
    record |= {
        "costs": {"rows": costs, "run": note},
        "command": "scripts/ablate.py run",
        "calls": [1.0],
    }
    write_json(tmp_path / "rivals.json", record)
    row = {"method": "sparse-d", "prompt_tokens": 4096, "tokens": 32, "seconds": 1.25}
    row |= {"bytes": 2e10, "evaluations_timed": 8}
    large = {"end_to_end": [row], "left_out": ["plain, 32 chunks: too large"], "device": "a GPU"}
    write_json(tmp_path / "speed.json", {**large, "versions": {"jax": "1"}, "command": "speed"})
    places = tmp_path / "rivals.md", tmp_path / "pictures"
    rivals.write_page(tmp_path / "rivals.json", *places, speed=tmp_path / "speed.json")
    page = places[0].read_text()
    assert (places[1] / f"{rivals.PICTURE}.png").exists()
    assert "### 2,048 tokens, two numbers" in page
    lines = {
        line.split(" | ")[0][2:]: line.split(" | ")
        for line in page.partition("## What the tables say")[0].splitlines()
        if " | " in line
    }
    assert lines["plain"][-4:-2] == ["2.000 [2.000, 2.000]", "1.0"]
    assert lines["dual-cache"][-3:-1] == ["1.1", "1.00"]
    assert lines["dual-cache"][-1].startswith("yes"), "none is faster, and all are as accurate"
    assert lines["mask-kv"][-4:-1] == ["-"] * 3, "not timed"
    assert lines["`sparse-d`"][1:] == ["8", "1.25", "20.0 |"]
    assert "- plain, 32 chunks: too large" in page
    call = "scripts/ablate.py run CHECKPOINT --out DIR --examples 4 --grid methods-multi"
    assert f"| seconds and GB of grid methods-multi | `{call} costs` |" in page
    del record["costs"], record["cells"][cells[-1].key], record["cells"][cells[1].key]
    write_json(tmp_path / "rivals.json", record | {"reading": ["Read with care."]})
    rivals.write_page(tmp_path / "rivals.json", *places)
    page = places[0].read_text()
    assert "| dual-cache | 100.0" in page
    assert "| 4 | 1.5 | - | 0.00 | 1.0 | yes |" in page, "by TFLOP"
    assert f"`{call} --where selection=prefix-cache`" in page
    assert "- Read with care." in page
    assert "at LLaDA-8B's shapes | `scripts/benchmark.py speed" in page
    assert {name for one in rivals.TEXTS["method"] for name in one["names"]} == {*CACHE_METHODS}
    rivals.write_page(tmp_path / "none.json", *places)
    assert "no record yet" in places[0].read_text()


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (1.0, 0.5), (0.5, 0.1)]
    assert rivals.front(points) == [True, True, False, False, True, True]
