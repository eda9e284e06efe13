"""A folder appears complete or not at all: kills, full disks, overwriting, two runs at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert import convert, reverse
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.checkpoint import CHECKPOINT, load_model
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources

ROOT = Path(__file__).resolve().parents[2]

# Runs the command line, which sends itself a signal in the given call of a function.
STRIKE = """
import importlib, os, signal, sys
# A shell that starts the tests in the background makes every child ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from convert.__main__ import run
owner, name, call, number = sys.argv.pop(1).split(",")
module, _, kind = owner.partition(":")
place = importlib.import_module(module)
place = getattr(place, kind) if kind else place
real, calls = getattr(place, name), 0
def strike(*arguments, **options):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), int(number))
    return real(*arguments, **options)
setattr(place, name, strike)
run()
"""
TENSOR = "convert.sources:SourceTensor,read,12"
# Orbax puts its own folder in place with the first rename. With --overwrite the old folder goes
# aside with the second, and the new one comes with the third.
PARAMETERS, SWAP = "os,rename,1", "os,rename,3"
MANIFEST = "convert.convert,write_manifest,1"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sources.make(tmp_path, shards=2)
    return tmp_path / "source"


@pytest.fixture
def target(source: Path, tmp_path: Path) -> Path:
    """Where the source is converted already."""
    convert(source, tmp_path / "converted")
    return tmp_path / "converted"


def start(point: str, number: int, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STRIKE, f"{point},{int(number)}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_complete(folder: Path, source: Path) -> None:
    """The folder has the source's tensors, and nothing lies beside it."""
    load_model(folder, verify=True)
    sources.assert_converted(folder, sources.read_folder(source))
    assert not list(folder.parent.glob(".*"))


def killed(points: tuple[str, ...], source: Path, folder: Path, *flags: str) -> list[Path]:
    """Kills a conversion at each of the points, at the same time; returns the destinations."""
    targets = [folder / point / "converted" for point in points]
    running = [
        start(point, signal.SIGKILL, source, target, *flags)
        for point, target in zip(points, targets, strict=True)
    ]
    for process in running:
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    return targets


def test_killed_halfway(source: Path, tmp_path: Path) -> None:
    """SIGKILL leaves nothing that loads; the next run succeeds and removes the rest."""
    points = (TENSOR, PARAMETERS, MANIFEST)
    for point in points:
        (tmp_path / point).mkdir()
    for target in killed(points, source, tmp_path):
        (partial,) = target.parent.iterdir()
        assert partial.name == ".converted.partial"
        for folder in (target, partial, partial / "params"):
            with pytest.raises(CheckpointError):
                load_model(folder)
        convert(source, target, verify=True)
        assert_complete(target, source)


def test_killed_while_overwriting(source: Path, tmp_path: Path) -> None:
    """The old checkpoint stays complete, or returns with the next run."""
    sources.make(tmp_path / "other", seed=1)
    other = tmp_path / "other" / "source"
    for point in (TENSOR, SWAP):
        (tmp_path / point).mkdir()
        convert(source, tmp_path / point / "converted")
    for target in killed((TENSOR, SWAP), other, tmp_path, "--overwrite"):
        assert target.exists() == (TENSOR in str(target))
        # A run that may not overwrite moves the old one back and leaves it.
        with pytest.raises(CheckpointError, match="exists"):
            convert(other, target)
        sources.assert_converted(target, sources.read_folder(source))
        convert(other, target, overwrite=True)
        assert_complete(target, other)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_cleans_up(source: Path, tmp_path: Path, number: int, status: int) -> None:
    (tmp_path / "out").mkdir()
    process = start(TENSOR, number, source, tmp_path / "out" / "converted")
    _, err = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flags", [[], ["--reverse"]], ids=["convert", "reverse"])
def test_full_disk(source: Path, target: Path, tmp_path: Path, flags: list[str]) -> None:
    """No file may grow beyond 4 KB, which the system reports as it does a full disk."""
    result = tmp_path / "out" / "converted"
    result.parent.mkdir()
    code = """
import resource, sys
from convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, target if flags else source, result, *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith(f"error: {result} cannot be written: ")
    assert "File too large" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not list(result.parent.iterdir())


@pytest.mark.parametrize("run", [convert, reverse])
def test_disk_that_is_too_small_is_noticed_first(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    usage = shutil.disk_usage(target)._replace(free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("began to write"))
    with pytest.raises(CheckpointError, match=r"has 0.06 GB free, 0.07 GB are needed"):
        run(source if run is convert else target, target.with_name("result"))


@pytest.mark.parametrize("run", [convert, reverse])
def test_existing_destination(
    source: Path, target: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    origin, result = source if run is convert else target, tmp_path / "result"
    run(origin, result)
    (result / "LICENSE").write_text("")
    with pytest.raises(CheckpointError, match=r"result exists \(--overwrite replaces it\)"):
        run(origin, result)
    assert (result / "LICENSE").exists()
    run(origin, result, overwrite=True)
    assert not (result / "LICENSE").exists()
    assert not list(tmp_path.glob(".*"))


def test_failed_overwrite_keeps_the_old(target: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_ino for path in target.rglob("*")}
    settings = sources.config()
    values = sources.tensors(settings)
    values[f"{sources.PREFIX}wte.weight"][0, 0] = float("nan")
    bad = sources.write(tmp_path / "bad", values, settings)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(bad, target, overwrite=True)
    assert {path: path.stat().st_ino for path in target.rglob("*")} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "file", "link", "extra file"])
def test_overwrite_replaces_checkpoints_only(
    source: Path, target: Path, tmp_path: Path, kind: str
) -> None:
    result = tmp_path / "result"
    if kind == "file":
        result.write_text("years of work")
    elif kind == "link":
        result.symlink_to(target)
    else:
        result.mkdir() if kind == "folder" else target.rename(result)
        (result / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds more than a checkpoint: not overwritten"):
        convert(source, result, overwrite=True)
    assert result.exists()
    assert kind in ("file", "link") or (result / "thesis.txt").exists()


def test_second_run_for_the_same_destination_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    folder = AtomicFolder(target, CHECKPOINT, lambda folder: True, overwrite=True)
    with folder.write() as partial:
        (partial / "work").write_text("")
        with pytest.raises(CheckpointError, match="another run is writing"):
            convert(source, target)
        assert (partial / "work").exists()
    assert [path.name for path in target.iterdir()] == ["work"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_swap_moves_the_old_back(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    inode = target.stat().st_ino
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        if Path(old).name == ".converted.partial":
            raise error
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        convert(source, target, overwrite=True)
    assert target.stat().st_ino == inode
    assert not list(target.parent.glob(".*"))


def test_stale_folder_may_hold_anything(source: Path, tmp_path: Path) -> None:
    """Links in it are removed, not followed; so is a pipe under the old folder's name."""
    partial = tmp_path / ".converted.partial"
    (partial / "a" / "b").mkdir(parents=True)
    (partial / "c").symlink_to(source)
    (partial / "a" / "d").symlink_to(source / "config.json")
    os.mkfifo(tmp_path / ".converted.replaced")
    convert(source, tmp_path / "converted")
    assert_complete(tmp_path / "converted", source)
    assert (source / "config.json").exists()


def test_partial_folder_that_is_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".converted.partial").symlink_to(source)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*\.converted\.partial"):
        convert(source, tmp_path / "converted")
    assert (source / "config.json").exists()


def test_folder_is_flushed_before_it_appears(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    sync = "pdllm_jax.storage.atomic._sync_tree"
    monkeypatch.setattr(sync, lambda folder: events.append(("sync", folder)))
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        events.append(("rename", Path(new)))
        assert not (tmp_path / "converted").exists()
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    convert(source, tmp_path / "converted")
    partial = tmp_path / ".converted.partial"
    expected = [("rename", partial / "params"), ("sync", partial)]
    assert events == [*expected, ("rename", tmp_path / "converted")]
