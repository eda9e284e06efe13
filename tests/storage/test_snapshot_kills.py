"""kill -9 at every stage of writing and while decoding; `make kills` does it at random moments."""

from __future__ import annotations

import random
import signal
import time

import pytest

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import choose, finish
from pdllm_jax.engine.request import drop_other_chunks as without_other_chunks
from pdllm_jax.engine.request import request_keys
from pdllm_jax.engine.request import start_decoding as begin
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.storage.snapshot import SnapshotError, load_document, load_request, save_request
from pdllm_jax.storage.store import DocumentStore
from tests.support import workers
from tests.support.workers import CHUNKS, PREFIX, PROCESSES, same

# The call at which a writer kills itself.
POINTS = {
    "renaming": "os.rename#2",
    "encoding": "pdllm_jax.storage.store.encode_document",
    "arrays": "pdllm_jax.storage.snapshot.write_arrays",
    "manifest": "pdllm_jax.storage.snapshot.write_manifest",
    "checksums": "pdllm_jax.storage.manifest._record#3",
    "flushing": "pdllm_jax.storage.atomic._sync#4",
}


def start(worker, *arguments):
    """The process, and the end of a pipe that it sends to."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=worker, args=(arguments[0], sender, *arguments[1:]))
    process.start()
    sender.close()
    return process, receiver


@pytest.fixture(scope="module")
def model():
    return workers.tiny()


@pytest.mark.parametrize(
    "points", [["renaming"], pytest.param([*POINTS], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_killed_while_writing(model, tmp_path, points):
    """The next run for the same document succeeds and leaves nothing else behind."""
    reference = DocumentStore(tmp_path / "reference", model)
    want = reference.encode_ids(PREFIX, workers.text(), chunking=CHUNKS)
    running = {name: start(workers.encode, tmp_path / name, POINTS[name])[0] for name in points}
    for name, process in running.items():
        process.join(240)
        assert process.exitcode == -signal.SIGKILL, name
        store = DocumentStore(tmp_path / name, model)
        assert store.keys() == [], name
        for partial in store.folder.glob(".*.partial"):
            if not (partial / "manifest.json").exists():
                with pytest.raises(SnapshotError):
                    load_document(partial, store.identity)
        assert same(store.encode_ids(PREFIX, workers.text(), chunking=CHUNKS), want)
        assert [p.name for p in store.folder.iterdir() if p.is_dir()] == store.keys()


@pytest.mark.slow
def test_killed_while_decoding(model, tmp_path):
    """The snapshot stays as it was; the next process decodes the tokens of an undisturbed run."""
    draw = random.Random(0)
    prompt = chunk_prompt(PREFIX, workers.text(), [5, 6, 7], CHUNKS)
    selecting = SelectionConfig(top_k=2, scorer="last", encoding="independent")
    decode = DecodeConfig(gen_length=16, block_length=4)
    begun = begin(model, choose(model, prompt, selecting, request_keys([0], 1)), decode)
    save_request(tmp_path / "s", model, without_other_chunks(begun), chunking=CHUNKS)
    want = finish(model, load_request(tmp_path / "s", model))[0].tokens
    process, pipe = start(workers.decode, tmp_path / "s")
    assert pipe.recv() == "decode"
    begin_time = time.monotonic()
    assert pipe.recv() == want
    longest = time.monotonic() - begin_time
    process.join()
    for i in range(20):
        process, pipe = start(workers.decode, tmp_path / "s")
        if i % 4:
            pipe.recv()
        time.sleep(draw.uniform(0, longest))
        process.kill()
        process.join()
        assert finish(model, load_request(tmp_path / "s", model))[0].tokens == want
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
