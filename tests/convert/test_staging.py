"""The destination exists whole or not at all: kills, full disks, overwriting, two runs at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from convert import convert, reverse
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.checkpoint import CheckpointError, load_model
from tests.support import convert_sources as sources

ROOT = Path(__file__).resolve().parents[2]

# Runs the command line after replacing `{target}` so that it sends itself a signal.
STRIKE = """
import importlib, os, signal
# A shell that starts the tests in the background makes every child ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys
sys.path.insert(0, "scripts")
import convert_checkpoint
module = importlib.import_module({module!r})
place = getattr(module, {owner!r}) if {owner!r} else module
real, calls = getattr(place, {name!r}), 0
def strike(*arguments, **options):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), {signal})
    return real(*arguments, **options)
setattr(place, {name!r}, strike)
convert_checkpoint.run()
"""


class Point(NamedTuple):
    """The call of a function during which the signal comes."""

    module: str
    owner: str
    name: str
    call: int


MATERIALIZE, RENAME = ("convert.convert", "", "materialize"), ("os", "", "rename")
HALFWAY = {
    "first tensor": Point(*MATERIALIZE, 1),
    "middle": Point(*MATERIALIZE, 12),
    # Orbax puts its own folder in place with the first rename.
    "parameters": Point(*RENAME, 1),
    "manifest": Point("convert.convert", "", "_manifest", 1),
}
# With --overwrite the old folder goes aside with the second rename, the new one comes with the
# third.
BETWEEN_RENAMES = Point(*RENAME, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    settings = sources.config()
    return sources.write(tmp_path / "source", sources.tensors(settings), settings, shards=2)


def start(arguments: list[Any], point: Point, number: int) -> subprocess.Popen[str]:
    code = STRIKE.format(**point._asdict(), signal=number)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_converted(folder: Path, source: Path) -> None:
    """The folder is a checkpoint with the source's tensors, and nothing lies beside it."""
    reverse(folder, folder.with_name("check"), verify=True)
    found = sources.read_folder(folder.with_name("check"))
    expected = sources.read_folder(source)
    assert {k: sources.bits(v) for k, v in found.items()} == {
        k: sources.bits(v) for k, v in expected.items()
    }
    shutil.rmtree(folder.with_name("check"))
    assert not list(folder.parent.glob(".*"))


def test_killed_halfway(source: Path, tmp_path: Path) -> None:
    """SIGKILL leaves nothing that loads; the next run succeeds and clears up."""
    running = {}
    for name, point in HALFWAY.items():
        target = tmp_path / name.replace(" ", "-") / "converted"
        target.parent.mkdir()
        running[name] = target, start([source, target], point, signal.SIGKILL)
    for name, (target, process) in running.items():
        process.communicate()
        assert process.returncode == -signal.SIGKILL, name
        left = list(target.parent.iterdir())
        assert [path.name for path in left] == [".converted.partial"], name
        for folder in (target, left[0], left[0] / "params"):
            with pytest.raises(CheckpointError):
                load_model(folder)
        convert(source, target, verify=True)
        assert_converted(target, source)


def test_killed_while_overwriting(source: Path, tmp_path: Path) -> None:
    """The old checkpoint stays whole, or comes back with the next run."""
    settings = sources.config()
    other = sources.write(tmp_path / "other", sources.tensors(settings, seed=1), settings)
    points = {"middle": HALFWAY["middle"], "swap": BETWEEN_RENAMES}
    running = {}
    for name, point in points.items():
        target = tmp_path / name / "converted"
        target.parent.mkdir()
        convert(source, target)
        running[name] = target, start([other, target, "--overwrite"], point, signal.SIGKILL)
    for name, (target, process) in running.items():
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert target.exists() == (name == "middle")
        if name == "middle":
            load_model(target)
        # A run that may not overwrite puts the old one back and leaves it.
        with pytest.raises(CheckpointError, match="exists"):
            convert(other, target)
        assert (target.parent / ".converted.partial").exists() == (name == "middle")
        reverse(target, target.with_name("back"), verify=True)
        expected = sources.read_folder(source)
        for tensor, value in sources.read_folder(target.with_name("back")).items():
            assert sources.bits(value) == sources.bits(expected[tensor])
        shutil.rmtree(target.with_name("back"))
        convert(other, target, overwrite=True)
        assert_converted(target, other)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_clears_up(
    source: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (tmp_path / "out").mkdir()
    process = start([source, tmp_path / "out" / "converted"], HALFWAY["middle"], number)
    _, err = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments", [["{source}", "{target}"], ["{done}", "{target}", "--reverse"]]
)
def test_full_disk(source: Path, tmp_path: Path, arguments: list[str]) -> None:
    """No file may grow beyond 4 KB, which the system reports as it does a full disk."""
    done, target = tmp_path / "done", tmp_path / "out" / "converted"
    convert(source, done)
    target.parent.mkdir()
    code = """
import resource, sys
sys.path.insert(0, "scripts")
import convert_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(convert_checkpoint.main(sys.argv[1:]))
"""
    filled = [part.format(source=source, done=done, target=target) for part in arguments]
    process = subprocess.run(
        [sys.executable, "-c", code, *filled],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: disk full while writing {target}: ")
    assert process.stderr.count("\n") == 1
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("run", [convert, reverse])
def test_disk_that_is_too_small_is_noticed_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    convert(source, tmp_path / "done")
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(AtomicFolder, "__enter__", lambda self: pytest.fail("began to write"))
    with pytest.raises(
        CheckpointError, match=r"disk full: .* has 0.06 GB free, 0.07 GB are needed"
    ):
        run(source if run is convert else tmp_path / "done", tmp_path / "converted")


@pytest.mark.parametrize("run", [convert, reverse])
def test_existing_destination(source: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    convert(source, tmp_path / "done")
    start = source if run is convert else tmp_path / "done"
    target = tmp_path / "target"
    run(start, target)
    (target / "LICENSE").write_text("")
    with pytest.raises(CheckpointError, match=r"target exists \(--overwrite replaces it\)"):
        run(start, target)
    assert (target / "LICENSE").exists()
    run(start, target, overwrite=True)
    assert not (target / "LICENSE").exists()
    assert not list(tmp_path.glob(".*"))


def test_failed_overwrite_keeps_the_old(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "converted")
    before = {path: path.stat().st_ino for path in (tmp_path / "converted").rglob("*")}
    settings = sources.config()
    values = sources.tensors(settings)
    values[f"{sources.PREFIX}wte.weight"][0, 0] = float("nan")
    bad = sources.write(tmp_path / "bad", values, settings)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(bad, tmp_path / "converted", overwrite=True)
    assert {path: path.stat().st_ino for path in (tmp_path / "converted").rglob("*")} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "file", "link", "more"])
def test_overwrite_replaces_checkpoints_only(source: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "converted"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    elif kind == "more":
        convert(source, target)
        (target / "thesis.txt").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        convert(source, tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    with pytest.raises(
        CheckpointError, match="is not a checkpoint and nothing else, so --overwrite leaves it"
    ):
        convert(source, target, overwrite=True)
    assert (target / "thesis.txt" if kind in ("folder", "more") else target).exists()


def test_second_run_for_the_same_destination_is_refused(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".converted.partial"
    partial.mkdir()
    (partial / "work").write_text("")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another run is writing"):
        convert(source, tmp_path / "converted")
    assert (partial / "work").exists()
    os.close(descriptor)
    convert(source, tmp_path / "converted")
    assert_converted(tmp_path / "converted", source)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_swap_puts_the_old_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    convert(source, tmp_path / "converted")
    inode = (tmp_path / "converted").stat().st_ino
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        if Path(old).name == ".converted.partial":
            raise error
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        convert(source, tmp_path / "converted", overwrite=True)
    assert (tmp_path / "converted").stat().st_ino == inode
    assert not list(tmp_path.glob(".*"))


def test_stale_folder_may_hold_anything(source: Path, tmp_path: Path) -> None:
    """Links in it are removed, not followed."""
    partial = tmp_path / ".converted.partial"
    (partial / "a" / "b").mkdir(parents=True)
    (partial / "c").symlink_to(source)
    (partial / "a" / "d").symlink_to(source / "config.json")
    convert(source, tmp_path / "converted")
    assert_converted(tmp_path / "converted", source)
    assert (source / "config.json").exists()


def test_partial_folder_that_is_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".converted.partial").symlink_to(source)
    with pytest.raises(CheckpointError, match=r"\.converted\.partial can not be made: "):
        convert(source, tmp_path / "converted")
    assert (source / "config.json").exists()


@pytest.mark.parametrize("there", [True, False])
def test_what_has_the_name_of_the_one_moved_aside_goes(
    source: Path, tmp_path: Path, there: bool
) -> None:
    """A pipe, which the removal of a folder would wait at; a file is not moved back either."""
    aside, target = tmp_path / ".converted.replaced", tmp_path / "converted"
    if there:
        convert(source, target)
    os.mkfifo(aside)
    convert(source, target, overwrite=there)
    assert_converted(target, source)
    assert not os.path.lexists(aside)


def test_destination_appears_only_at_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    monkeypatch.setattr(
        "pdllm_jax.storage.atomic._sync_tree", lambda folder: events.append(("sync", folder))
    )
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        events.append(("rename", Path(new)))
        assert not (tmp_path / "converted").exists()
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    convert(source, tmp_path / "converted")
    partial = tmp_path / ".converted.partial"
    assert events == [
        ("rename", partial / "params"),
        ("sync", partial),
        ("rename", tmp_path / "converted"),
    ]
