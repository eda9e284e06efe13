"""Ablations without a model: statistics, checks, summary, report, pictures and FLOPs."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")
from tests.conftest import ROOT
from tests.support.ablation import Fake, answer_all, fake_record

sys.path.insert(0, str(ROOT / "scripts"))
from experiments import checks, flops, plots, report, statistics, summary, tables
from experiments.grids import Cell, all_cells
from experiments.records import write_json

from pdllm_jax import ModelConfig

# ---- statistics, against their definitions


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (7, 10), (293, 300), (1, 1)])
def test_wilson_interval_solves_its_equation(hits, n):
    """Its ends are the p with |p̂ - p| = z sqrt(p (1 - p) / n), Wilson's definition."""
    value, low, high = statistics.wilson(hits, n)
    assert value == hits / n
    assert 0 <= low <= value <= high <= 1
    for end in (low, high):
        if 0 < end < 1 and end != value:
            spread = 1.959964 * math.sqrt(end * (1 - end) / n)
            assert abs(value - end) == pytest.approx(spread, rel=1e-5)


def test_wilson_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 examples"):
        statistics.wilson(0, 0)


@pytest.mark.parametrize(("b", "a"), [(0, 0), (1, 0), (5, 0), (3, 9), (9, 3), (4, 4), (40, 61)])
def test_mcnemar_is_the_two_sided_binomial(b, a):
    """Written out: outcomes of n fair coins that are at most as likely as the one found."""
    n = a + b
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    want = sum(p for p in chances if p <= chances[b] * (1 + 1e-9))
    assert statistics.mcnemar(b, a) == pytest.approx(want)


def test_paired_counts_discordant_examples():
    a = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)
    b = np.array([1, 0, 1, 1, 1, 1, 1, 1], bool)
    pairing = statistics.paired(a, b)
    assert (pairing.b_only, pairing.a_only, pairing.examples) == (3, 1, 8)
    assert pairing.difference.value == pytest.approx(2 / 8)
    assert pairing.p == pytest.approx(statistics.mcnemar(3, 1))
    swapped = statistics.paired(b, a)
    assert swapped.difference.value == -pairing.difference.value
    with pytest.raises(ValueError, match="need the same examples"):
        statistics.paired(a, b[:-1])


def test_bootstrap_interval_is_the_normal_one_for_many_examples(rng):
    x = rng.normal(3.0, 2.0, 4000)
    value, low, high = statistics.bootstrap(np.mean, x)
    error = 1.96 * x.std() / math.sqrt(len(x))
    assert value == pytest.approx(x.mean())
    assert low == pytest.approx(value - error, abs=0.1 * error)
    assert high == pytest.approx(value + error, abs=0.1 * error)
    assert statistics.bootstrap(np.mean, x) == (value, low, high), (
        "another interval the second time"
    )
    wide = statistics.bootstrap(np.mean, x, confidence=0.999)
    assert wide.low < low < high < wide.high


def test_bootstrap_keeps_pairs_together(rng):
    """The difference of two columns that move together has a narrow interval."""
    a = rng.normal(0, 10, 500)
    b = a + 1 + rng.normal(0, 0.1, 500)

    def difference(x, y, axis):
        return y.mean(axis) - x.mean(axis)

    _, low, high = statistics.bootstrap(difference, a, b)
    assert 0.98 < low < high < 1.02


def test_holm():
    """Holm 1979: the smallest p times m, the next times m - 1, never falling; at most 1."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


# ---- checks


def fakes(*cells: Cell, count: int = 64) -> dict[Cell, dict[int, dict]]:
    return {cell: {i: fake_record(cell, i) for i in range(count)} for cell in cells}


def outcome(results, name: str) -> list[bool]:
    return [check["ok"] for check in results if check["name"].startswith(name)]


def test_checks_hold_for_numbers_that_fit():
    cells = [
        Cell(selection=s).canonical()
        for s in ("top-k", "random", "first", "last", "oracle", "needle", "without", "all", "dense")
    ]
    cells.append(Cell(top_k=8).canonical())
    cells += [Cell(reselect="step"), Cell(keep_first=True, top_k=8)]
    results = checks.check_all(fakes(*cells))
    assert [check for check in results if not check["ok"]] == []
    assert len(outcome(results, "records are possible")) == len(cells)
    counts = {"best scores are kept": 3, "recall is K/N": 3, "accuracy is recall times": 1}
    for name, times in {**counts, "K = N keeps all": 2, "no answer without": 1}.items():
        assert outcome(results, name) == [True] * times, name


@pytest.mark.parametrize(
    ("name", "selection", "change"),
    [
        ("records are possible", "top-k", {"evaluations": 0}),
        ("records are possible", "top-k", {"chunks": [1, 1, 2, 3]}),
        ("records are possible", "all", {"chunks": [0]}),
        ("best scores are kept", "top-k", {"chunks": [0, 1, 2, 3]}),
        ("recall is K/N", "random", {"needle": [0], "chunks": [0, 1, 2, 3]}),
        ("no answer without", "without", {"score": 1.0}),
        ("accuracy is recall times", "top-k", {"score": 1.0}),
        ("accuracy is recall times", "top-k", {"score": 0.0}),
        ("K = N keeps all", "K = N", {"tokens": [0, 0]}),
    ],
)
def test_checks_fail_for_numbers_that_do_not_fit(name, selection, change):
    wanted = Cell(top_k=8) if selection == "K = N" else Cell(selection=selection)
    base = [Cell(), Cell(selection="oracle"), Cell(selection="all"), wanted]
    cells = fakes(*(cell.canonical() for cell in base))
    assert all(outcome(checks.check_all(cells), name))
    for record in cells[wanted.canonical()].values():
        record |= change
    assert not all(outcome(checks.check_all(cells), name))


def test_cut_needles_are_left_out_of_recall_times_oracle():
    """Of a cut needle one part was kept and sufficed: no contradiction."""
    cells = fakes(Cell(), Cell(selection="oracle").canonical())
    for index, record in cells[Cell()].items():
        if index % 4 == 0:
            other = next(i for i in range(8) if i not in record["chunks"])
            record["needle"] = sorted({*record["needle"], other})
    (check,) = [c for c in checks.check_all(cells) if c["name"].startswith("accuracy is recall")]
    assert check["ok"]
    assert check["examples"] == 48


# ---- summary, report, pictures


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """A summary of made-up records of three grids, as JSON gives it back."""
    folder = tmp_path_factory.mktemp("run")
    grids = ["main", "depth", "anchors", "encoding"]
    cells = all_cells(grids)
    note = {"device": "a device", "versions": {"jax": "0"}, "processes": 1, "parameters": 4_000_000}
    assert answer_all(Fake(batch=44), cells, 88, folder, note=note)
    shares = np.linspace(0, 0.1, 6).reshape(2, 3)
    attention = [
        {"settings": Cell(anchors=a).settings(), "first_tokens": (shares * (1 + a)).tolist()}
        for a in (True, False)
    ]
    speed = [
        {"method": name, "length": n, "seconds": s * n, "least": s * n / 2, "most": s * n * 2}
        for n in (1024, 2048)
        for name, s in (("plain", 2e-3), ("prefilling", 1e-3))
    ]
    order = [{"task": "passkey", "step": [2, 1, 3], "text": ["a", " $1", "\n"]}]
    rows = {"attention": attention, "order": order, "speed": speed}
    looks = {name: {"rows": part} for name, part in rows.items()}
    for name, content in looks.items():
        content |= {"run": {"device": "cpu" if name == "order" else "a device"}, "dtype": "float16"}
        write_json(folder / f"{name}.json", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 200)
        result = {**summary.summarise(folder, grids, 88), "command": "scripts/ablate.py run"}
    return json.loads(json.dumps({**result, "calls": [10.0, 20.0]}))


def test_a_summary_has_the_records_numbers(record):
    assert record["complete"]
    assert all(check["ok"] for check in record["checks"])
    cell = record["cells"][Cell().key]
    rows = [fake_record(Cell(), i) for i in range(88)]
    assert cell["accuracy"][3:] == [sum(row["score"] for row in rows), 88]
    assert cell["recall"][0] == cell["accuracy"][0]
    assert cell["recall_at_1"][0] == pytest.approx(3 / 4)
    leads = [
        (row["scores"][row["needle"][0]] - max(np.delete(row["scores"], row["needle"])))
        for row in rows
    ]
    assert cell["lead"][0] == pytest.approx(np.mean(leads))
    kept = [summary.margin(row, 4) > 0 for row in rows]
    assert kept == [row["score"] for row in rows]
    assert cell["evaluations"][0] == pytest.approx(1.5)
    group = next(g for g in record["grids"]["main"]["groups"] if g["over"]["length"] == 4096)
    arm = next(a for a in group["arms"] if a["label"] == "random")
    other = [fake_record(Cell(selection="random"), i)["score"] for i in range(88)]
    assert arm["difference"][0] == pytest.approx(np.mean(other) - cell["accuracy"][0])
    assert arm["b_only"] == sum(b and not row["score"] for b, row in zip(other, rows, strict=True))
    assert arm["p"] <= arm["p_holm"] <= 1


def test_the_middle_of_the_document_is_compared_with_its_ends():
    rows = [{"asked_depth": d / 10, "score": d in (4, 5)} for d in range(11)]
    value = summary.middle_less_ends(rows, [row["score"] for row in rows])[0]
    assert value == pytest.approx(2 / 5)


def test_differences_are_named_by_their_interval_and_p():
    row = {"examples": 300, "p": 0.001, "p_holm": 0.01, "difference": [-0.05, -0.08, -0.02]}
    assert tables.verdict(row) == "lower"
    assert tables.difference(row) == "**-5.0 [-8.0, -2.0]**"
    assert tables.verdict({**row, "difference": [0.05, 0.02, 0.08]}) == "higher"
    for unclear in ({"p_holm": 0.2}, {"difference": [0.01, -0.01, 0.03]}):
        assert tables.verdict({**row, **unclear}) == "no difference shown"
        assert "**" not in tables.difference({**row, **unclear})
    assert tables.difference({"label": "not run"}) == "-"


def test_pictures_show_the_jsons_values(record):
    pytest.importorskip("matplotlib")
    lengths = (1024, 2048, 4096, 8192)
    figure = plots.needle_heat_map(record)
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    wanted = ({"selection": "dense"}, {}, {"anchors": False})
    for axis, change in zip(panels, wanted, strict=True):
        cells = [Cell(length=n, depths=11, **change).canonical().key for n in lengths]
        want = [[value[0] for _, value in record["cells"][key]["by_depth"]] for key in cells]
        np.testing.assert_array_equal(axis.images[0].get_array(), np.array(want).T)
    figure = plots.accuracy_by_depth(record)
    lines = figure.axes[0].get_lines()
    for line, anchors in zip(lines, (True, False), strict=True):
        cell = record["cells"][Cell(depths=11, anchors=anchors).key]
        assert line.get_ydata().tolist() == [value[0] for _, value in cell["by_depth"]]
    scores = record["chunk_scores"][0]
    kept = plots.chunk_scores(record).axes[0].collections[-1].get_offsets()
    assert kept[:, 0].tolist() == scores["chunks"]
    assert kept[:, 1].tolist() == [scores["scores"][i] for i in scores["chunks"]]
    attention = plots.attention_on_anchors(record)
    for axis, row in zip(attention.axes, record["attention"]["rows"], strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), row["first_tokens"])
    order = plots.denoising_order(record)
    assert order.axes[0].images[0].get_array().tolist() == [[2, 1, 3]]
    fast = plots.speed(record).axes[0].containers[1].lines[0]
    np.testing.assert_allclose(fast.get_ydata(), [1.024, 2.048])


def test_a_report_is_made_of_the_json_alone(record, tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "docs" / "results.md"
    results.parent.mkdir()
    source = tmp_path / "ablation.json"
    source.write_text(json.dumps(record))
    report.write_report(source, results, tmp_path / "docs" / "pictures")
    text = results.read_text()
    for name in report.TEXTS["captions"]:
        assert (tmp_path / "docs" / "pictures" / f"{name}.png").stat().st_size > 5_000
        assert f"](pictures/{name}.png)" in text
    cell = record["cells"][Cell().key]
    value, low, high = (100 * x for x in cell["accuracy"][:3])
    assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in text
    facts = {"device": "a device", "jax": "0", "parameters": "4M", "dtype": "float32"}
    facts |= {"examples a cell": "88", "calls": "2, 30 s in all"}
    for name, value in facts.items():
        assert f"\n| {name} | {value} |\n" in text
    assert "\n| order | cpu | float16 |\n" in text
    arm = next(g for g in record["grids"]["main"]["groups"] if g["over"]["length"] == 4096)["arms"]
    random = next(row for row in arm if row["label"] == "random")
    assert f"| {tables.difference(random)} |" in text
    assert text.count("**FAILS**") == 0
    failing = {**record, "checks": [{**record["checks"][0], "ok": False}]}
    assert "**FAILS**" in report.results_page(failing, [], "pictures", "x.json")


def test_another_run_stands_beside_the_record(record, tmp_path, monkeypatch):
    """Its grids have their own conditions and rows, by recall; the record's cells stay."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    note = {"device": "another device", "versions": {"jax": "1"}}
    cells = all_cells(["heads"])
    assert answer_all(Fake(batch=44), cells, 44, tmp_path, note=note)
    made = {"heads": [[1, 0], [0, 3]], "layers": 2, "recall": 0.9, "recall_of_all": 0.5}
    made |= {"head_recall": [[0.1], [0.2], [0.3]], "examples": 72, "clarity_by_layers": [0.8, 0.9]}
    made["tasks"] = ["passkey", "magic_number"]
    write_json(tmp_path / "calibrations" / "passkey+magic_number" / "retrieval_heads.json", made)
    part = {**summary.summarise(tmp_path, ["heads"], 44), "command": "scripts/ablate.py run heads"}
    assert all(check["ok"] for check in part["checks"])
    twice = report.with_part(report.with_part(record, part), part)
    assert twice == {**record, "parts": [part]}
    page = report.results_page(json.loads(json.dumps(twice)), [], "pictures", "x.json")
    assert "| device | another device |" in page
    own = page.split("## This project's claims")[1]
    rows = [line for line in own.splitlines() if line.startswith("| 4,096 tokens, scorer heads")]
    reference = part["cells"][cells[0].key]
    assert reference["accuracy"] is None
    assert len(rows) == 3
    assert (
        "\n| passkey and magic number | 2 of 3, at most 2 allowed | 1.0, 0.3 | 72 | 90.0 | 50.0 |\n"
        in own
    )
    assert f"| {tables.percent(reference['recall'])} |" in rows[0]
    assert rows[0].endswith("| 100.0 |"), "cost, of made-up records"
    assert own.split("### Do 8 bits cost accuracy?")[1].lstrip().startswith("Not measured")
    with pytest.raises(ValueError, match="is of model other, the record of fake"):
        report.with_part(record, {**part, "identity": {**part["identity"], "model": "other"}})


def test_what_was_not_run_is_said(record):
    """A run that was cut short: no number, no claim."""
    dropped = {
        key: cell
        for key, cell in record["cells"].items()
        if cell["settings"]["encoding"] == "joint" and cell["settings"]["selection"] != "random"
    }
    short = {**record, "cells": dropped, "complete": False}
    page = report.results_page(short, [], "pictures", "x.json")
    assert "not run" in page
    assert "not complete" in page
    after = page.split("### Independent or joint encoding?")[1]
    assert after.lstrip().startswith("Not measured in this run.")


def test_a_summary_on_disk_is_the_same_with_an_entry_a_line(record, tmp_path):
    write_json(tmp_path / "a.json", record)
    assert json.loads((tmp_path / "a.json").read_text()) == record
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert sum(line.lstrip().startswith(f'"{Cell().key}"') for line in lines) == 1


def test_dense_flops_are_those_of_full_forwards():
    """Two evaluations of plain LLaDA at LLaDA-8B's shapes, by hand: 8.0e9 weights, 2 FLOP each."""
    sizes = flops.Sizes(prefix=16, query=16, response=32, context=4032)
    phases = flops.answer_flops(
        ModelConfig.llada_8b(), Cell(selection="dense"), sizes, 2, rows=2 * 4096
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    want = 2 * (4096 * 2 * weights + 32 * 4 * 4096 * 4096**2 + 32 * 2 * 4096 * 126464)
    assert sum(phases.values()) == pytest.approx(want)
    assert flops.answer_flops(ModelConfig.llada_8b(), Cell(reselect="step"), sizes, 2) is None
