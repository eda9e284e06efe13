"""Random damage to every file of snapshots and stores: one clear line, or the same values.

`make fuzz` runs these tests with more examples.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import choose
from pdllm_jax.engine.engine import request_keys
from pdllm_jax.engine.request import start_decoding as begin
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.storage import store as module
from pdllm_jax.storage.snapshot import (
    SnapshotError,
    load_document,
    load_request,
    save_document,
    save_request,
)
from pdllm_jax.storage.store import DocumentStore
from tests.support.workers import CHUNKS, IDENTITY, PREFIX, document, same, text, tiny

STORED = SelectionConfig(top_k=2, scorer="first", encoding="independent")


def files_of(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


@dataclasses.dataclass(repr=False)
class Snapshot:
    """A snapshot, another of the same form, and what the first one holds."""

    folder: Path
    other: Path
    load: Callable[[Path], Any]
    want: Any


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> dict[str, Snapshot]:
    root = tmp_path_factory.mktemp("snapshots")
    model, result = tiny(), {}
    for seed, name in ((0, "folder"), (1, "other")):
        save_document(root / f"document {name}", IDENTITY, document(seed=seed), chunking=CHUNKS)
        prompt = chunk_prompt(PREFIX, text(seed), [5, 6, 7], CHUNKS)
        chosen = choose(model, prompt, STORED, request_keys([seed], 1))
        request = begin(model, chosen, DecodeConfig(gen_length=8, block_length=4))
        save_request(root / f"request {name}", IDENTITY, request, chunking=CHUNKS)
    for kind, load in (
        ("document", lambda folder: load_document(folder, IDENTITY).cache),
        ("request", lambda folder: load_request(folder, IDENTITY)),
    ):
        folder = root / f"{kind} folder"
        result[kind] = Snapshot(folder, root / f"{kind} other", load, load(folder))
    return result


@st.composite
def damages(draw: st.DrawFn, names: list[str]) -> tuple[str, Callable[[Path, Path], bytes]]:
    """Draws a file, and a function of it (and of the file beside it) that returns new content."""
    name = draw(st.sampled_from(names))
    how = draw(st.sampled_from(["flip", "cut", "lengthen", "overwrite", "exchange"]))
    share = draw(st.floats(0, 1, exclude_max=True))
    byte = draw(st.integers(0, 255))
    elsewhere = draw(st.sampled_from(names))

    def damaged(folder: Path, other: Path) -> bytes:
        content = bytearray((folder / name).read_bytes())
        at = int(share * len(content))
        if how == "flip":
            content[at] ^= 1 << byte % 8
        elif how == "cut":
            del content[at:]
        elif how == "lengthen":
            content += bytes([byte]) * (1 + byte)
        elif how == "overwrite":
            content[at : at + byte] = bytes(len(content[at : at + byte]))
        else:
            return ((other if byte % 2 else folder) / elsewhere).read_bytes()
        return bytes(content)

    return name, damaged


@pytest.mark.parametrize("kind", ["document", "request"])
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_snapshot_is_refused_or_unchanged(snapshots, kind, data):
    snapshot = snapshots[kind]
    name, damaged = data.draw(damages(files_of(snapshot.folder)))
    path = snapshot.folder / name
    before = path.read_bytes()
    content = damaged(snapshot.folder, snapshot.other)
    path.write_bytes(content)
    loaded, refused = None, ""
    try:
        loaded = snapshot.load(snapshot.folder)
    except SnapshotError as error:
        refused = str(error)
    finally:
        path.write_bytes(before)
    assert bool(refused) == (content != before), f"{name} was changed, and the snapshot loads"
    if refused:
        assert "\n" not in refused
        assert refused.startswith(f"snapshot {snapshot.folder}: ")
        assert name in refused or name == "manifest.json"
    else:
        assert same(loaded, snapshot.want)


@pytest.mark.parametrize("kind", ["document", "request"])
def test_a_missing_added_or_misplaced_file_is_refused(snapshots, kind, tmp_path):
    snapshot = snapshots[kind]
    copy = shutil.copytree(snapshot.folder, tmp_path / "copy")
    for name in files_of(snapshot.folder):
        (copy / name).rename(tmp_path / "away")
        with pytest.raises(SnapshotError, match=name):
            snapshot.load(copy)
        (tmp_path / "away").rename(copy / name)
    (copy / "arrays" / "more").touch()
    with pytest.raises(SnapshotError, match="arrays/more is not part"):
        snapshot.load(copy)
    shutil.rmtree(copy / "arrays")
    shutil.copytree(snapshot.other / "arrays", copy / "arrays")
    with pytest.raises(SnapshotError, match=r"arrays/.* checksum|arrays/.* bytes"):
        snapshot.load(copy)


class Encoded(NamedTuple):
    """A store with one document, the document, and a snapshot of another one."""

    store: DocumentStore
    want: Any
    other: Path

    @property
    def folder(self) -> Path:
        return self.store.folder / self.store.keys()[0]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Encoded:
    model = tiny()
    stores = [DocumentStore(tmp_path_factory.mktemp("store"), model) for _ in range(2)]
    caches = [store.encode_ids(PREFIX, text(i), chunking=CHUNKS) for i, store in enumerate(stores)]
    return Encoded(stores[0], caches[0], stores[1].folder / stores[1].keys()[0])


# Every damage makes the store write a snapshot.
@settings(max_examples=settings().max_examples // 5, deadline=None)
@given(data=st.data())
def test_a_damaged_store_gives_the_same_document(encoded, data):
    folder, encodings = encoded.folder, []
    name, damaged = data.draw(damages(files_of(folder)))
    content = damaged(folder, encoded.other)
    changed = content != (folder / name).read_bytes()
    (folder / name).write_bytes(content)

    def encode(*arguments, **options):
        encodings.append(1)
        return encoded.want

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(module, "encode_document", encode)
        cache = encoded.store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    assert same(cache, encoded.want)
    assert len(encodings) == len(caught) == changed
    assert all(str(w.message).startswith("encoded again: ") for w in caught)
    assert all(name in str(w.message) or name == "manifest.json" for w in caught)
    files = sorted(path.name for path in encoded.store.folder.iterdir())
    assert files == [f".{folder.name}.lock", folder.name]


def test_a_document_under_the_name_of_another_is_encoded_again(encoded, tmp_path):
    store = DocumentStore(tmp_path / "store", encoded.store.model)
    shutil.copytree(encoded.other, store.folder / encoded.folder.name)
    with pytest.warns(RuntimeWarning, match="encoded again: .* document is '.*' where"):
        cache = store.encode_ids(PREFIX, text(), chunking=CHUNKS)
    assert same(cache, encoded.want)
