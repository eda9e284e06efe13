"""The benchmark of chunk attention, at sizes that a CPU can bear: what it writes must be right."""

from __future__ import annotations

import argparse
import json

import pytest
from bench import kernel, method
from bench.record import Timing, write

TINY = {"rows": 8, "heads": 4, "kv_heads": 2, "dim": 64, "chunk_size": 128}


@pytest.fixture
def few_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNKS", 6)
    kernel.make_pool.cache_clear()
    yield
    kernel.make_pool.cache_clear()


def test_a_record_holds_times_bytes_and_errors(few_chunks, monkeypatch, tmp_path):
    grid = [
        kernel.Case("xla", 2, **TINY),
        kernel.Case("xla", 2, **TINY, q_per_slot=False),
        kernel.Case("reference", 2, **TINY, batch=2, ragged=True),
    ]
    monkeypatch.setattr(kernel, "cases", lambda quick: grid)
    monkeypatch.setattr(kernel, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(
        kernel, "time_loop", lambda run, args, calls, repeats: Timing(8.0, 7.0, 9.0)
    )
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)
    out = tmp_path / "kernel.json"
    assert kernel.main(parser.parse_args(["--out", str(out), "--layers", "2"])) == 0
    record = json.loads(out.read_text())
    assert record["left_out"] == 0
    assert record["device"]
    assert record["versions"]["jax"]
    first, shared, ragged = record["rows"]
    bytes_of_two = 2 * 2 * 128 * 2 * 64 * 2  # K and V of two chunks, two KV heads, bfloat16
    assert first["bytes"] == shared["bytes"] == bytes_of_two
    assert 0 < ragged["bytes"] < 2 * bytes_of_two
    assert first["times_floor"] == pytest.approx(
        8e-6 / (bytes_of_two / (1e9 * 3.0 / 2.92)), abs=1e-3
    )
    assert first["of_copy_bandwidth"] == pytest.approx(bytes_of_two / 8e-6 / 1e9, abs=1e-3)
    assert all(0 < row["relative_error"] < 4e-3 for row in record["rows"])


def test_times_grow_with_the_work(few_chunks):
    def timed(case):
        ready = kernel.prepare(case, layers=2, seconds=1e-6, floor_bandwidth=1e12)
        return kernel.run_case(ready, repeats=3, floor_bandwidth=1e12)

    row = timed(kernel.Case("xla", 2, **TINY))
    assert 0 < row["us_least"] <= row["us"] <= row["us_most"]
    many = timed(kernel.Case("xla", 2, **{**TINY, "rows": 512}))
    assert many["us_least"] > row["us_least"]


def test_the_plot_is_drawn_from_a_record(tmp_path):
    pytest.importorskip("matplotlib")
    row = {
        "implementation": "xla", "slots": 4, "rows": 32, "heads": 32, "kv_heads": 32, "batch": 1,
        "ragged": False, "q_per_slot": True, "times_floor": 1.2, "settings": None,
    }  # fmt: skip
    rows = [row, {**row, "slots": 8}, {**row, "rows": 64}]
    write(tmp_path / "kernel.json", {"device": "a GPU", "rows": rows})
    kernel.plot(tmp_path / "kernel.json", tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").stat().st_size > 10_000


def test_phases_of_the_method_are_timed_and_compared(tmp_path):
    parser = argparse.ArgumentParser()
    method.add_arguments(parser)
    out = tmp_path / "method.json"
    tiny = "--tiny --chunk-size 16 --document 2 --stream 1 2 --repeats 1 --sections stream scoring"
    assert method.main(parser.parse_args([*tiny.split(), "--out", str(out)])) == 0
    record = json.loads(out.read_text())
    assert record["left_out"] == []
    seconds = {name: row["median"] for name, row in record["seconds"].items()}
    assert set(seconds) == {"draft", "encode the document", "encode and score it"}
    assert record["ratios"]["scoring over encoding"] == pytest.approx(
        seconds["encode and score it"] / seconds["encode the document"]
    )
    assert [row["tokens"] for row in record["memory"].values()] == [15, 30]
