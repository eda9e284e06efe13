"""The document store: encode once, ask after a restart, with other processes and other files."""

from __future__ import annotations

import os
import shutil

import pytest

from pdllm_jax import ChunkConfig, MaskPredictor
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import ask_ids, generate_batch_ids, generate_ids
from pdllm_jax.storage import store as module
from pdllm_jax.storage.snapshot import SnapshotError
from pdllm_jax.storage.store import DocumentStore
from tests.support import workers
from tests.support.workers import CHUNKS, PREFIX, PROCESSES, same, text, tiny

SELECT = SelectionConfig(top_k=2, scorer="last", encoding="independent")
DECODE = DecodeConfig(gen_length=4, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return tiny()


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Grows with every document that is really encoded."""
    calls = []
    real = module.encode_document

    def count(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "encode_document", count)
    return calls


def test_encoded_once_and_asked_after_a_restart(model, tmp_path, encodings):
    first = DocumentStore(tmp_path / "store", model).encode_ids(PREFIX, text(), chunking=CHUNKS)
    restarted = DocumentStore(tmp_path / "store", tiny())  # the same weights, another object
    second = restarted.encode_ids(PREFIX, text(), chunking=CHUNKS)
    assert len(encodings) == 1
    assert same(first, second)
    answers = [
        ask_ids(model, cache, [[5, 6, 7]], selection=SELECT, decode=DECODE)[0]
        for cache in (first, second)
    ]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].selection == answers[1].selection


def test_another_text_prefix_setting_or_model_is_another_document(model, tmp_path, encodings):
    store = DocumentStore(tmp_path / "store", model)
    store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    changed = text()
    changed[-1] += 1
    store.encode_ids(PREFIX, changed, chunking=CHUNKS)
    store.encode_ids([253, 1, 3], text(), chunking=CHUNKS)
    store.encode_ids(PREFIX, text(), chunking=ChunkConfig(16, overlap=2))
    other = DocumentStore(tmp_path / "store", tiny(1))
    other.encode_ids(PREFIX, text(), chunking=CHUNKS)
    assert len(encodings) == 5
    assert len(store.keys()) == 5


def test_a_removed_document_is_encoded_again(model, tmp_path, encodings):
    store = DocumentStore(tmp_path / "store", model)
    store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    (key,) = store.keys()
    (store.folder / f".{key}.partial").mkdir()
    for _ in range(2):
        store.remove(key)
        assert [path.name for path in store.folder.iterdir()] == [f".{key}.lock"]
    assert store.keys() == []
    with pytest.raises(ValueError, match="not the key of a document"):
        store.remove("../elsewhere")
    store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    assert len(encodings) == 2


@pytest.mark.parametrize("what", ["file", "folder", "link", "pipe", "half"])
def test_another_file_under_a_documents_name_is_replaced(what, model, tmp_path):
    """Links are not followed, pipes are not waited for."""
    store, outside = DocumentStore(tmp_path / "store", model), tmp_path / "outside"
    outside.mkdir()
    (outside / "bait").touch()
    cache = store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    (key,) = store.keys()
    store.remove(key)
    place = store.folder / key
    if what == "file":
        place.touch()
    elif what == "folder":
        place.mkdir()
    elif what == "link":
        place.symlink_to(outside)
    elif what == "pipe":
        os.mkfifo(place)
    else:
        (place / "arrays").mkdir(parents=True)
        (place / "arrays" / "x").touch()
    with pytest.warns(RuntimeWarning, match="encoded again"):
        assert same(store.encode_ids(PREFIX, text(), chunking=CHUNKS), cache)
    assert sorted(path.name for path in store.folder.iterdir()) == [f".{key}.lock", key]
    assert [path.name for path in outside.iterdir()] == ["bait"]


def test_a_store_that_cannot_be_locked_is_refused(model, tmp_path):
    store = DocumentStore(tmp_path / "store", model)
    key = "0" * 64
    (store.folder / f".{key}.lock").mkdir()
    with pytest.raises(SnapshotError, match="lock cannot be locked"):
        store.remove(key)
    shutil.rmtree(store.folder)
    for call in (store.keys, lambda: store.remove(key)):
        with pytest.raises(SnapshotError, match="No such file"):
            call()


@pytest.mark.parametrize("bos_id", [-5, 10**4, 2**40])
def test_anchors_are_of_the_vocabulary(bos_id, model, tmp_path):
    store = DocumentStore(tmp_path / "store", model)
    with pytest.raises(ValueError, match=r"bos_id\[0\] = .* is outside the vocabulary"):
        store.encode_ids(PREFIX, text(), chunking=CHUNKS, bos_id=bos_id)
    with pytest.raises(ValueError, match=r"bos_id\[0\] = .* is outside the vocabulary"):
        generate_ids(model, PREFIX, text(), [1], chunking=CHUNKS, bos_id=bos_id)
    with pytest.raises(ValueError, match=r"bos_id\[0\] = .* is outside the vocabulary"):
        generate_batch_ids(model, [(PREFIX, text(), [1])], chunking=CHUNKS, bos_id=bos_id)


def test_of_two_processes_one_encodes_and_the_other_waits(tmp_path):
    barrier = PROCESSES.Barrier(2)
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
    processes = [
        PROCESSES.Process(target=workers.encode, args=(tmp_path / "store", out, "", barrier))
        for _, out in pipes
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    (first, checksum), (second, other) = sorted(pipe.recv() for pipe, _ in pipes)
    assert (first, second) == (0, 1)
    assert checksum == other > 0
