"""The benchmark of chunk attention, at sizes that a CPU can bear: what it writes must be right."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from bench import checkpoint, cold, compiled, kernel, load, memory, method, record, report, weights
from bench.record import Timing
from flax import nnx

from pdllm_jax import MaskPredictor, ModelConfig, compilation, load_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
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


def test_what_it_costs_to_start_a_loop_is_taken_off(monkeypatch):
    """A clock that goes on by 5 s where a loop of 4 calls is started and by 2 s for each call."""
    now = [0.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    spent: list[float] = []

    def run(x):
        now[0] += 8.0 if spent else 100.0  # the first one warms up
        spent.append(now[0])
        return x

    def wait(x):
        now[0] += 5.0
        return x

    monkeypatch.setattr(record.jax, "block_until_ready", wait)
    assert record.time_loop(run, (0,), 4, 3) == (2e6, 2e6, 2e6)
    assert len(spent) == 1 + 3 * 4


def test_the_report_is_made_of_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    args = parser.parse_args(
        ["--page", str(tmp_path / "page.md"), "--readme", str(readme), "--pictures", str(tmp_path)]
    )
    assert report.main(args) == 0
    page = (tmp_path / "page.md").read_text()
    kept = json.loads((args.records / "end_to_end.json").read_text())
    ours = [row for row in kept["end_to_end"] if row["method"] == "prefilling"]
    for row in ours:
        assert f"| {row['prompt_tokens']:,} | {row['tokens']} | {row['seconds']:.2f} [" in page

    def words(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("![")]

    assert words(page) == words(report.PAGE.read_text()), "run scripts/benchmark.py report"
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for name in report.PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    readme.write_text("no place")
    with pytest.raises(ValueError, match="exactly one place"):
        report.main(args)


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


def parsed(module, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(argv)


def test_memory_settings_are_planned_and_compiled():
    """A setting's plan, and what the compiler says of the programs, phase by phase."""
    args = parsed(memory, "--tiny", "--chunk-size", "16")
    setting = memory.Setting(
        2, select=memory.SelectionConfig(scorer="first", encoding="independent", top_k=1),
        decode=memory.DecodeConfig(gen_length=4, block_length=4, steps=1),
    )  # fmt: skip
    row = memory.compile_only(args, setting)
    assert set(row["compiled_phases"]) == {"score", "encode", "decode"} < set(row["planned_phases"])
    phases = row["compiled_phases"].values()
    assert row["compiled"] == max(sum(parts.values()) for parts in phases)
    assert row["planned"] == max(row["planned_phases"].values())
    assert all(
        setting.plan(memory.ModelConfig.llada_8b(), 1024, attention="cudnn").peak > 16e9
        for setting in memory.SETTINGS.values()
    )
    assert len(memory.SETTINGS) >= 8


def test_the_commands_leave_the_device_to_the_processes_that_measure():
    code = (
        "from bench import cold, compiled, kernel, load, memory, method, offload, report, speed;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS)


def test_a_checkpoint_that_is_made_loads_at_a_speed(tmp_path, monkeypatch):
    small = ModelConfig.tiny()
    raw = {
        **checkpoint.config_json(2), "d_model": 64, "n_heads": 4, "n_kv_heads": 2,
        "mlp_hidden_size": 96, "vocab_size": 256, "embedding_size": 256, "mask_token_id": 255,
        "eos_token_id": 254, "pad_token_id": 254, "bos_token_id": 253,
    }  # fmt: skip
    monkeypatch.setattr(checkpoint, "config_json", lambda layers: raw)
    folder = tmp_path / "checkpoint"
    checkpoint.make(folder, 2)
    row = load.load_one(folder)
    kept = load_model(folder)
    assert row["bytes"] == sum(x.nbytes for x in jax.tree.leaves(kept))
    assert kept.config == dataclasses.replace(small, rope_theta=5e5, max_sequence_length=4096)
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(kept))
    checkpoint.evict(folder)
    seconds, nbytes = checkpoint.read(folder, np.ones(1000, np.uint8))
    assert nbytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert seconds > 0


def test_time_to_the_first_token_is_split_into_phases(monkeypatch):
    args = parsed(
        cold, "--model", "tiny", "--tokens", "40", "--chunk-size", "16", "--one", str(time.time())
    )
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)
    row = cold.one(args)
    assert set(row["seconds"]) == {"start", "load", "compile", "first block"}
    assert all(value >= 0 for value in row["seconds"].values())
    assert row["to first tokens"] == pytest.approx(sum(row["seconds"].values()))
    assert row["asked again"] < row["to first tokens"]


def test_cheap_weights_have_the_spread_of_random_ones():
    model = weights.cheap_model(ModelConfig.tiny(), np.float32)
    drawn = MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(drawn), strict=True):
        assert ours.shape == theirs.shape
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)


def test_what_the_compiler_says_is_read():
    told = (
        "ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'\n"
        "ptxas info    : Function properties for attend_mosaic_gpu_kernel\n"
        "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    slow = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized\n"
    rows = compiled.parse(f"=== one\n{told}\n=== 5\n=== two\n{slow}{told}{told}=== 7\n")
    kernel = {"kernel": "attend", "registers": 168, "spilled_bytes": 16}
    assert [row["kernels"] for row in rows] == [[kernel], [kernel, kernel]]
    assert [row["temporary_bytes"] for row in rows] == [5, 7]
    assert [len(row["warnings"]) for row in rows] == [0, 1]
    with pytest.raises(ValueError, match="nothing of 'one'"):
        compiled.parse("=== one\n=== 5\n")
