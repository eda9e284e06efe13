"""kill -9 of a worker, wherever it comes: no half snapshot that loads, and a restart goes on.

A few kills here; a hundred at random:

    python -m pytest tests/storage/test_snapshot_kills.py -m slow
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import choose, finish
from pdllm_jax.engine.request import drop_other_chunks as without_other_chunks
from pdllm_jax.engine.request import request_keys
from pdllm_jax.engine.request import start_decoding as begin
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.storage.fingerprint import model_identity
from pdllm_jax.storage.snapshot import SnapshotError, load_document, load_request, save_request
from pdllm_jax.storage.store import DocumentStore
from tests.support import workers
from tests.support.workers import CHUNKS, PREFIX, PROCESSES

# Where a writer kills itself: at its first file, between files, with everything written but the
# manifest, with the manifest written, with everything flushed.
POINTS = {
    "encoding": "pdllm_jax.storage.store.encode_document",
    "arrays": "pdllm_jax.storage.snapshot_arrays.write_arrays",
    "checksums": "pdllm_jax.storage.snapshot_arrays._file_record#3",
    "flushing": "pdllm_jax.storage.atomic._sync#4",
    "renaming": "os.rename#2",
    "flushing the store": "pdllm_jax.storage.atomic._sync",
}


class Worker:
    """A process that says what it is about to do."""

    def __init__(self, target, *arguments):
        self.phases, theirs = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=target, args=(arguments[0], theirs, *arguments[1:]))
        self.process.start()
        # By its descriptor: its number may be another process's once it has ended.
        self.handle = os.pidfd_open(self.process.pid)
        theirs.close()

    def says(self, timeout: float = 240):
        """What it says next; None where it has ended."""
        try:
            return self.phases.recv() if self.phases.poll(timeout) else pytest.fail("hangs")
        except EOFError:
            return None

    def until(self, phase: str):
        while (said := self.says()) not in (phase, None):
            pass
        return said

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def ended(self) -> int:
        self.process.join(240)
        os.close(self.handle)
        return self.process.exitcode


@pytest.fixture(scope="module")
def model():
    return workers.tiny()


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The document, encoded without any trouble."""
    folder = tmp_path_factory.mktemp("reference") / "store"
    return DocumentStore(folder, model).encode_ids(PREFIX, workers.text(), chunking=CHUNKS)


def assert_nothing_half_loads(folder: Path, identity) -> None:
    """Of all folders that look like snapshots, those under a document's name load; no others."""
    for path in folder.iterdir() if folder.exists() else ():
        if not path.is_dir():
            continue
        if path.name.startswith("."):
            if not (path / "snapshot.json").exists():
                with pytest.raises(SnapshotError):
                    load_document(path, identity)
        else:
            load_document(path, identity)


def assert_goes_on(folder: Path, model, reference) -> None:
    cache = DocumentStore(folder, model).encode_ids(PREFIX, workers.text(), chunking=CHUNKS)
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert not left[0].startswith(".")


def test_killed_at_every_stage_of_writing(model, reference, tmp_path):
    running = {
        name: Worker(workers.encode, tmp_path / str(i), point)
        for i, (name, point) in enumerate(POINTS.items())
    }
    for i, (name, worker) in enumerate(running.items()):
        assert worker.ended() == -signal.SIGKILL, name
        folder = tmp_path / str(i)
        assert not [p for p in folder.iterdir() if not p.name.startswith(".")], name
        assert_nothing_half_loads(folder, model_identity(model))
        assert_goes_on(folder, model, reference)


def kill_at_random(folder: Path, phase: str, longest: float, draw: random.Random) -> None:
    worker = Worker(workers.encode, folder)
    if worker.until(phase):
        time.sleep(draw.uniform(0, longest))
        worker.kill()
    worker.ended()


def durations(folder: Path) -> dict[str, float]:
    """Of a worker's phases, measured once."""
    worker, seconds = Worker(workers.encode, folder), {}
    said, start = worker.until("encode"), time.monotonic()
    while said in ("encode", "save"):
        after, now = worker.says(), time.monotonic()
        seconds[said], start, said = now - start, now, after
    worker.ended()
    return seconds


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_while_encoding_and_writing(model, reference, tmp_path, kills):
    draw, identity = random.Random(kills), model_identity(model)
    longest = durations(tmp_path / "measured")
    for i in range(kills):
        # One folder for all: what is left by one is found by the next.
        phase = "encode" if i % 4 == 3 else "save"
        kill_at_random(tmp_path / "store", phase, longest[phase], draw)
        assert_nothing_half_loads(tmp_path / "store", identity)
        if i % 10 == 9:
            assert_goes_on(tmp_path / "store", model, reference)
            store = DocumentStore(tmp_path / "store", model)
            store.remove(store.keys()[0])
    assert_goes_on(tmp_path / "store", model, reference)


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_decoding(model, tmp_path, kills):
    """The snapshot is as it was; whoever decodes it next gets the tokens of an undisturbed run."""
    draw = random.Random(kills)
    prompt = chunk_prompt(PREFIX, workers.text(), [5, 6, 7], CHUNKS)
    selecting = SelectionConfig(top_k=2, scorer="last", encoding="independent")
    decode = DecodeConfig(gen_length=16, block_length=4)
    begun = begin(model, choose(model, prompt, selecting, request_keys([0], 1)), decode)
    save_request(tmp_path / "s", model, without_other_chunks(begun), chunking=CHUNKS)
    want = finish(model, load_request(tmp_path / "s", model))[0].tokens
    undisturbed = Worker(workers.decode, tmp_path / "s")
    undisturbed.until("decode")
    start = time.monotonic()
    assert undisturbed.says() == want
    longest = time.monotonic() - start
    for i in range(kills):
        worker = Worker(workers.decode, tmp_path / "s")
        if worker.until("load" if i % 4 == 3 else "decode"):
            time.sleep(draw.uniform(0, longest))
            worker.kill()
        worker.ended()
        assert finish(model, load_request(tmp_path / "s", model))[0].tokens == want
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
