"""Ablations without a model: grids, records, runs in one process and in several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types

import pytest

pytest.importorskip("tokenizers")
from tests.conftest import ROOT
from tests.support.ablation import Fake, answer_all

sys.path.insert(0, str(ROOT / "scripts"))
from experiments import runner
from experiments.grids import GRIDS, Cell, all_cells
from experiments.records import RecordError, Records, count_lines, read_folder
from experiments.retrieval import missing_work, records_of, share_cells

# ---- grids


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_is_one_that_can_be_run_and_comes_back_from_json(name):
    grid = GRIDS[name]
    for reference, arms in grid.groups():
        assert arms
        assert reference not in arms
        for cell in (reference, *arms):
            assert cell == cell.canonical()
            assert Cell.from_settings(json.loads(json.dumps(cell.settings()))) == cell
            # Compared over the same examples.
            for name in ("length", "tasks", "depths"):
                assert getattr(cell, name) == getattr(reference, name)
    assert len({cell.key for cell in grid.cells()}) == len(grid.cells())


def test_the_grids_vary_what_the_project_claims_to_compare():
    cells = {cell for grid in GRIDS.values() for cell in grid.cells()}
    counts = {
        "selection": 9,
        "anchors": 2,
        "length": 4,
        "top_k": 5,
        "chunk_size": 4,
        "encoding": 4,
        "scorer": 6,
        "draft_length": 4,
        "keep_tokens": 4,
        "seed": 3,
        "masked_copies": 5,
        "positions": 3,
        "weight_format": 3,
        "kv_format": 2,
    }
    for field, least in counts.items():
        assert len({getattr(cell, field) for cell in cells}) >= least, field


def test_what_a_selection_does_not_read_makes_no_other_cell():
    one = Cell(selection="random", scorer="query", draft_length=8, seed=3).canonical()
    assert one == Cell(selection="random", seed=3).canonical()
    assert one != Cell(selection="random").canonical()
    dense = Cell(selection="dense", chunk_size=64, top_k=9, anchors=False, seed=4).canonical()
    assert dense == Cell(selection="dense").canonical()
    assert Cell(selection="all", top_k=1).canonical() == Cell(selection="all").canonical()
    assert Cell(anchors=False).canonical().anchors is False
    assert Cell(scorer="query", draft_length=9).canonical() == Cell(scorer="query").canonical()


def test_recorded_cells_keep_their_keys():
    cells = json.loads((ROOT / "benchmarks" / "ablation.json").read_text())["cells"]
    assert {key: Cell.from_settings(x["settings"]).key for key, x in cells.items()} == {
        key: key for key in cells
    }
    assert Cell(selects_only=True).key != Cell().key != Cell(weight_format="fp8").key


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"selection must be of .*, got best"):
        Cell(selection="best")
    with pytest.raises(ValueError, match="encoding"):
        Cell(encoding="both")
    with pytest.raises(ValueError, match="tasks"):
        Cell(tasks=("sums",))
    with pytest.raises(ValueError, match="selects_only is not for 'dense'"):
        Cell(selection="dense", selects_only=True)


def test_changes_give_way_to_what_a_grid_varies():
    cells = GRIDS["top-k"].cells({"length": 1024, "top_k": 3})
    assert {cell.length for cell in cells} == {1024}
    assert sorted(cell.top_k for cell in cells) == [1, 2, 3, 8, 16]


def test_labels_name_the_difference():
    assert Cell().label() == "default"
    assert Cell(anchors=False, masked_copies=None).label() == "no anchors, leave-one-out"
    assert Cell(top_k=2).label(Cell(top_k=1)) == "K = 2"
    assert Cell(selection="dense").label(Cell(top_k=1)) == "dense"


# ---- records and resuming


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    """SIGKILL in the middle, a half-written last line: it ends like a run without a break."""
    cells, run = [Cell(), Cell(selection="random")], tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from experiments.grids import Cell;"
        " from tests.support.ablation import Fake, answer_all\n"
        "answer_all(Fake(die_at=6), [Cell(), Cell(selection='random')], 8, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    died = subprocess.run([sys.executable, "-c", script, run], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    path = run / "records.jsonl"
    content = path.read_bytes()
    assert content.count(b"\n") == count_lines(run) == 6
    path.write_bytes(content[:-9])  # as if killed while writing
    for count, answered in (
        (8, [5, 6, 7, *range(8)]),
        (8, []),
        (9, [8, 8]),  # more examples are asked for later
    ):
        fake = Fake()
        assert answer_all(fake, cells, count, run)
        assert fake.answered == answered
    assert answer_all(Fake(), cells, 9, tmp_path / "through")
    done = [read_folder(tmp_path / name)[0] for name in ("run", "through")]
    assert done[0] == done[1]
    assert [len(records_of(cell, done[0], 9)) for cell in cells] == [9, 9]


def test_processes_share_the_cells_by_what_is_compiled():
    cells = all_cells(list(GRIDS))
    shares = share_cells(cells, 4)
    assert sorted(cell.key for share in shares for cell in share) == sorted(c.key for c in cells)
    for a, b in ((0, 1), (0, 2), (1, 3)):
        assert not {c.programs() for c in shares[a]} & {c.programs() for c in shares[b]}
    assert max(map(len, shares)) < 2 * min(map(len, shares))
    random = [Cell(selection="random", seed=seed) for seed in range(3)]
    assert len({cell.programs() for cell in random}) == 1
    assert len({Cell(selection=s).programs() for s in ("oracle", "needle", "without")}) == 1
    assert Cell().programs() != Cell(anchors=False).programs()


def test_processes_write_files_of_one_run(tmp_path):
    """Each process has its own file; all are read, and only one process may hold a file."""
    fake = Fake()
    for index, cell in enumerate((Cell(), Cell(top_k=2))):
        with Records(tmp_path, fake.identity, f"records-{index}") as records:
            work = missing_work(fake, [cell], 4, records)
            assert runner.run(work, records, total=4, note={"process": index}, show=False)
            with pytest.raises(RecordError, match="being written by another run"):
                Records(tmp_path, fake.identity, f"records-{index}")
    assert count_lines(tmp_path) == 8
    assert answer_all(fake, [Cell(), Cell(top_k=2)], 4, tmp_path)
    assert len(fake.answered) == 8, "nothing is asked twice"
    with Records(tmp_path, fake.identity) as records:
        assert records.runs == [{"process": 0}, {"process": 1}]


def test_the_time_limit_stops_between_batches(tmp_path, monkeypatch):
    fake = Fake()
    assert not answer_all(fake, [Cell()], 8, tmp_path, deadline=0.0)
    with monkeypatch.context() as patch:
        dead = types.SimpleNamespace(is_alive=lambda: False)
        patch.setattr(runner.multiprocessing, "parent_process", lambda: dead)
        assert not answer_all(fake, [Cell()], 8, tmp_path), "its parent was killed"
    assert fake.answered == []
    assert answer_all(fake, [Cell()], 8, tmp_path)
    assert count_lines(tmp_path) == 8


def test_folders_of_another_run_or_format_are_refused(tmp_path):
    assert answer_all(Fake(), [Cell()], 3, tmp_path)
    other = Fake()
    other.identity["model"] = "other"
    with pytest.raises(RecordError, match=r"other settings \(model\)"):
        answer_all(other, [Cell()], 3, tmp_path)
    (tmp_path / "old" / "cells").mkdir(parents=True)
    with pytest.raises(RecordError, match="holds records of format 1, not 2: give another folder"):
        answer_all(Fake(), [Cell()], 3, tmp_path / "old")
