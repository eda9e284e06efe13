"""The benchmarks at sizes that a CPU can run: the figures that they write."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import jax
import numpy as np
import pytest
from bench import (
    ahead,
    cold,
    compare,
    compiled,
    disk,
    kernel,
    memory,
    method,
    profiling,
    record,
    report,
    run,
    speed,
)
from flax import nnx

from convert import convert
from pdllm_jax import MaskPredictor, ModelConfig, compilation, load_model
from pdllm_jax.network.families import FAMILIES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {"rows": 8, "heads": 4, "kv_heads": 2, "dim": 64, "chunk_size": 128}


def parsed(*words: object) -> argparse.Namespace:
    return benchmark.parse([*map(str, words)])[1]


def test_kernel_records_times_bytes_and_errors(monkeypatch, tmp_path):
    grid = [
        kernel.Case("xla", 2, **TINY),
        kernel.Case("xla", 2, **TINY, q_per_slot=False),
        kernel.Case("reference", 2, **TINY, batch=2, ragged=True),
    ]
    monkeypatch.setattr(kernel, "CHUNKS", 6)
    kernel.make_pool.cache_clear()
    monkeypatch.setattr(kernel, "cases", lambda quick: grid)
    monkeypatch.setattr(kernel, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(kernel, "time_loop", lambda *_: (8.0, 7.0, 9.0))
    out = tmp_path / "kernel.json"
    kernel.main(parsed("kernel", "--out", out, "--layers", 2))
    kernel.make_pool.cache_clear()
    result = json.loads(out.read_text())
    assert result["left_out"] == 0
    assert result["device"]
    assert result["versions"]["jax"]
    first, shared, ragged = result["rows"]
    bytes_of_two = 2 * 2 * 128 * 2 * 64 * 2  # K and V of two chunks, two KV heads, bfloat16
    assert first["bytes"] == shared["bytes"] == bytes_of_two
    assert 0 < ragged["bytes"] < 2 * bytes_of_two
    assert first["times_floor"] == pytest.approx(
        8e-6 / (bytes_of_two / (1e9 * 3.0 / 2.92)), abs=1e-3
    )
    assert first["of_copy_bandwidth"] == pytest.approx(bytes_of_two / 8e-6 / 1e9, abs=1e-3)
    assert all(0 < row["relative_error"] < 4e-3 for row in result["rows"])


def test_time_loop_subtracts_the_start_of_a_loop(monkeypatch):
    """The clock advances by 5 s where a loop of 4 calls starts, and by 2 s for each call."""
    now, spent = [0.0], []
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])

    def loop(x):
        now[0] += 8.0 if spent else 100.0  # the first one compiles
        spent.append(now[0])
        return x

    def wait(x):
        now[0] += 5.0
        return x

    monkeypatch.setattr(record.jax, "block_until_ready", wait)
    assert record.time_loop(loop, (0,), 4, 3) == (2e6, 2e6, 2e6)
    assert len(spent) == 1 + 3 * 4


def test_report_makes_the_committed_pages(tmp_path):
    pytest.importorskip("matplotlib")
    pages = tmp_path / "page.md", tmp_path / "README.md"
    for page in pages:
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    args = parsed("report", "--page", pages[0], "--readme", pages[1], "--pictures", tmp_path)
    report.main(args)
    rows = json.loads((args.records / "end_to_end.json").read_text())["end_to_end"]
    for page, committed in zip(pages, (report.PAGE, record.ROOT / "README.md"), strict=True):
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        for row in (row for row in rows if row["method"] == "prefilling"):
            assert f"| {row['prompt_tokens']:,} | {row['tokens']} | {row['seconds']:.2f} [" in text
        part, wanted = (
            t.split(report.BEGIN)[1].split(report.END)[0] for t in (text, committed.read_text())
        )
        plain = [[x for x in t.splitlines() if not x.startswith("![")] for t in (part, wanted)]
        assert plain[0] == plain[1], "run scripts/benchmark.py report"
    for name in report.PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    pages[1].write_text("no marks")
    with pytest.raises(ValueError, match="exactly one place"):
        report.main(args)


@pytest.mark.slow
def test_method_times_phases_and_compares_them(tmp_path):
    out = tmp_path / "method.json"
    words = "--tiny --chunk-size 16 --document 2 --stream 1 2 --repeats 1 --sections stream ask"
    method.main(parsed("method", *words.split(), "--out", out))
    result = json.loads(out.read_text())
    assert result["left_out"] == []
    seconds = {name: row["median"] for name, row in result["seconds"].items()}
    assert result["ratios"]["scoring over encoding"] == pytest.approx(
        seconds["encode and score it"] / seconds["encode the document"]
    )
    second = seconds["draft"] + seconds["score another question"]
    assert result["ratios"]["second over first question, independent"] == pytest.approx(
        second / (seconds["draft"] + seconds["encode and score it"])
    )
    assert [row["tokens"] for row in result["memory"].values()] == [15, 30]


def test_speed_records_the_step_beside_its_floor(tmp_path):
    out = tmp_path / "speed.json"
    words = "--tiny --chunk-size 16 --cached 2 --documents 2 --repeats 1 --sections step prefill"
    words += " --weights full fp8 --scorers random"
    speed.main(parsed("speed", *words.split(), "--out", out))
    result = json.loads(out.read_text())
    full, fp8 = result["step"]
    assert full["times_floor"] == pytest.approx(full["ms"] / full["ms_floor"])
    assert fp8["ms_floor"] < full["ms_floor"]
    times = compare.times(result)
    assert times["step, 32 cached"] == pytest.approx(full["ms"] / 1e3)
    assert {"step, 32 cached, fp8", "score 2 chunks, random, fp8"} < times.keys()
    assert "step, 32 cached, from Python" in times


def test_requests_compile_nothing_that_was_compiled_ahead(monkeypatch, caplog):
    words = "speed --tiny --chunk-size 16 --requests 4x32 --scorers first"
    monkeypatch.setattr(speed.Run, "say", lambda *_: None)
    running = speed.Run(parsed(*words.split()))
    case, requests = speed.cases(running)[0], speed.Requests(running)
    programs = ahead.Programs()
    programs.find([functools.partial(requests.answer, case)] * 2)
    assert len(programs) == 4  # draft, pass, encoding, decoding
    named = [f"Compiling jit({name})" for name in ("prefill", "init_denoise", "denoise")]
    jax.config.update("jax_log_compiles", True)  # in all threads
    try:
        programs.compile()
        assert all(name in caplog.text for name in named)
        caplog.clear()
        requests.answer(case)
        assert not any(name in caplog.text for name in named)
    finally:
        jax.config.update("jax_log_compiles", False)


def test_requests_are_compared_in_one_precision_and_with_16_bits():
    times = {("full", "prefilling"): 2, ("full", "plain"): 8}
    times |= {("fp8", "prefilling"): 1, ("fp8", "plain"): 5}
    shared = {"prompt_tokens": 32, "tokens": 8, "phases": {}}
    rows = [
        {**shared, "weights": weights, "method": method, "seconds": seconds}
        for (weights, method), seconds in times.items()
    ]
    full, fp8 = report.ROWS["requests"]({"end_to_end": rows})
    assert (full["weights"], full["plain x"], full["16-bit plain x"]) == ("bf16", 4, 4)
    assert (fp8["weights"], fp8["plain x"], fp8["16-bit plain x"]) == ("fp8", 5, 8)


def test_kernels_are_ranked_by_time():
    events = [(f"gemm_{i}", 1.0) for i in range(3)] + [("copy.1", 2.0)]
    rows = profiling.table(events, 10.0, 2)
    assert [row["kernel"] for row in rows] == ["gemm", "copy", "no kernel"]
    assert [(row["count"], row["ms"]) for row in rows] == [(1.5, 1.5), (0.5, 1.0), (0.5, 2.5)]


def test_memory_plans_and_compiles_a_setting():
    args = parsed("memory", "--tiny", "--chunk-size", 16)
    selecting = memory.SelectionConfig(scorer="first", encoding="independent", top_k=1)
    decode = memory.DecodeConfig(gen_length=4, block_length=4, steps=1)
    setting = memory.Setting(2, select=selecting, decode=decode)
    row = memory.Measured(args, setting).compile()
    assert set(row["compiled_phases"]) == {"score", "encode", "decode"} < set(row["planned_phases"])
    phases = row["compiled_phases"].values()
    assert row["compiled"] == max(sum(parts.values()) for parts in phases)
    assert row["planned"] == max(row["planned_phases"].values())


def test_imports_leave_the_device_to_the_processes_that_measure():
    code = (
        "from bench import cold, compiled, disk, kernel, memory, method, offload, report, speed;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_made_checkpoint_converts_and_loads(tmp_path, monkeypatch, family):
    config = dataclasses.replace(ModelConfig.tiny(), family=family)
    monkeypatch.setattr(disk, "SHARD_BYTES", 60_000)
    source, folder = tmp_path / "source", tmp_path / "converted"
    total = disk.make_checkpoint(source, config)
    assert len(list(source.glob("*.safetensors"))) > 3
    convert(source, folder)
    row, model = disk.one(argparse.Namespace(checkpoint=folder)), load_model(folder)
    assert row["bytes"] == total == sum(x.nbytes for x in jax.tree.leaves(model))
    assert model.config == config
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(model))
    disk.evict(folder)
    disk.read(folder)
    assert disk.size(source) > total
    assert len(disk.digests(source)) == len(jax.tree.leaves(model))


def test_time_to_the_first_token_is_the_sum_of_phases(monkeypatch):
    args = parsed("cold", "--tiny", "--tokens", 40, "--chunk-size", 16)
    args.one = str(time.time())
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)
    row = cold.one(args)
    assert set(row["seconds"]) == {"start", "load", "compile", "first block"}
    assert all(value >= 0 for value in row["seconds"].values())
    assert row["to first tokens"] == pytest.approx(sum(row["seconds"].values()))


def test_cheap_weights_have_the_spread_of_random_weights():
    model = run.cheap_model(ModelConfig.tiny(), np.float32)
    drawn = MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(drawn), strict=True):
        assert ours.shape == theirs.shape
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)
    config = dataclasses.replace(ModelConfig.tiny(), weight_format="int8")
    ours, full = (x.blocks[1].down_proj for x in (run.cheap_model(config), model))
    step = np.asarray(ours.scale[...])[:, None]
    assert (abs(ours.operand.restore(np.float32) - full.weight[...]) <= step).all()


def test_reports_of_the_compiler_are_parsed():
    told = (
        "ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    slow = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized\n"
    rows = compiled.parse(f"=== one\n{told}\n=== 5\n=== two\n{slow}{told}{told}=== 7\n")
    attend = {"kernel": "attend", "registers": 168, "spilled_bytes": 16}
    assert [row["kernels"] for row in rows] == [[attend], [attend, attend]]
    assert [row["temporary_bytes"] for row in rows] == [5, 7]
    assert [len(row["warnings"]) for row in rows] == [0, 1]
    with pytest.raises(ValueError, match="nothing of 'one'"):
        compiled.parse("=== one\n=== 5\n")
