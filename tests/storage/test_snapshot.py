"""KV snapshots: what comes back, on whatever mesh, and what is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax import MaskPredictor, ModelConfig, RopeScaling
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import choose, finish
from pdllm_jax.engine.request import drop_other_chunks as without_other_chunks
from pdllm_jax.engine.request import request_keys
from pdllm_jax.engine.request import start_decoding as begin
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.storage.checkpoint_arrays import _aligned
from pdllm_jax.storage.fingerprint import model_identity
from pdllm_jax.storage.snapshot import (
    load_document,
    load_request,
    save_document,
    save_request,
    snapshot_holds,
)
from pdllm_jax.storage.snapshot_arrays import read_arrays
from pdllm_jax.storage.snapshot_format import ArrayRecord, SnapshotError, read_manifest
from pdllm_jax.storage.snapshot_tree import check_shapes
from tests.support import workers
from tests.support.method import sharp_model
from tests.support.workers import CHUNKS, IDENTITY, document

SELECT = SelectionConfig(top_k=2, masked_copies=2, encode_batch=2)
DECODE = DecodeConfig(gen_length=8, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharp_model()


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_document(tmp_path / "saved", IDENTITY, document(), chunking=CHUNKS)
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_document_comes_back_bit_for_bit(tmp_path, dtype):
    identity = dataclasses.replace(IDENTITY, dtype=dtype)
    cache = document(dtype=dtype)
    save_document(tmp_path / "s", identity, cache, chunking=CHUNKS)
    found = load_document(tmp_path / "s", identity)
    assert_same(found.cache, cache)
    assert found.chunking == CHUNKS
    assert snapshot_holds(tmp_path / "s") == "document"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    bare = dataclasses.replace(cache.without_pool(), prefix_k=None, prefix_v=None)
    bare = dataclasses.replace(
        bare, prefix_ids=jnp.zeros((0,), jnp.int32), prefix_length=jnp.int32(0)
    )
    save_document(tmp_path / "s", identity, bare, chunking=CHUNKS, overwrite=True)
    assert_same(load_document(tmp_path / "s", identity).cache, bare)


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "joint"},
        {"encoding": "independent", "scorer": "first"},
        pytest.param(
            {"encoding": "independent", "scorer": "query", "reselect": "block", "keep_tokens": 9},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["joint", "independent", "reselect"],
)
def test_decoding_goes_on_from_a_snapshot_token_for_token(model, tmp_path, change):
    """Before and behind the encoding, with all chunks and with the chosen ones alone."""
    selecting = dataclasses.replace(SELECT, **change)
    rng = np.random.default_rng(0)
    prompt = chunk_prompt([253, 1], rng.integers(0, 250, 90), rng.integers(0, 250, 7), CHUNKS)
    identity = model_identity(model)
    chosen = choose(model, prompt, selecting, request_keys([3], 1))
    begun = begin(model, chosen, DECODE)
    forms = [chosen, without_other_chunks(chosen), begun, without_other_chunks(begun)]
    copies = [jax.tree.map(jnp.copy, form) for form in forms]
    want = finish(model, begun)[0]
    for i, form in enumerate(copies):
        save_request(tmp_path / str(i), identity, form, chunking=CHUNKS)
        assert snapshot_holds(tmp_path / str(i)) == ("selection" if i < 2 else "state")
        found = load_request(tmp_path / str(i), identity)
        assert_same(found, form)
        if found.state is None:
            found = begin(model, found, DECODE)
        got = finish(model, found)[0]
        assert got.tokens == want.tokens
        assert got.selection == want.selection
    if "reselect" not in change:
        size = [sum(x.nbytes for x in jax.tree.leaves(form)) for form in copies]
        assert size[1] <= size[0]
        assert copies[3].cache is None


def test_what_does_not_match_is_refused_by_name(saved, tmp_path):
    config = IDENTITY.config
    for identity, field in (
        (dataclasses.replace(IDENTITY, weights="1" * 64), "model.weights"),
        (dataclasses.replace(IDENTITY, dtype="bfloat16"), "model.dtype"),
        (dataclasses.replace(config, rope_theta=5e5), "rope.theta"),
        (dataclasses.replace(config, rope_scaling=RopeScaling("ntk", 2.0)), "rope.scaling"),
        (dataclasses.replace(config, n_layers=3), "model.n_layers"),
        (dataclasses.replace(config, rms_norm_eps=1e-6), "model.rms_norm_eps"),
    ):
        other = identity
        if isinstance(identity, ModelConfig):
            other = dataclasses.replace(IDENTITY, config=identity)
        with pytest.raises(SnapshotError, match=field.replace(".", r"\.")) as refused:
            load_document(saved, other)
        assert refused.value.field == field
        assert refused.value.found != refused.value.wanted
    with pytest.raises(SnapshotError, match="tokenizer is None where '") as refused:
        load_document(saved, IDENTITY, tokenizer=FakeTokenizer())
    with pytest.raises(SnapshotError, match="holds is 'document' where"):
        load_request(saved, IDENTITY)
    with pytest.raises(SnapshotError, match=r"exists \(--overwrite"):
        save_document(saved, IDENTITY, document(), chunking=CHUNKS)
    with pytest.raises(SnapshotError, match="not a snapshot and nothing else, so"):
        save_document(tmp_path, IDENTITY, document(), chunking=CHUNKS, overwrite=True)
    other = dataclasses.replace(IDENTITY, dtype="bfloat16")
    with pytest.raises(SnapshotError, match="float32' where 'bfloat16' is wanted"):
        save_document(tmp_path / "new", other, document(), chunking=CHUNKS)
    with pytest.raises(SnapshotError, match="folder does not exist"):
        load_document(tmp_path / "new", IDENTITY)


class FakeTokenizer:
    bos_id, mask_id, eos_id, chat, digest = 1, 2, 3, None, "x"


def test_the_fingerprint_tells_models_apart(model):
    """One element of any tensor is enough; where the weights lie is not."""
    want = model_identity(model)
    graph, state = nnx.split(model)
    assert model_identity(nnx.merge(graph, jax.tree.map(jnp.copy, state))) == want
    leaves, tree = jax.tree.flatten(state)
    for i in range(0, len(leaves), 5):
        flat = leaves[i].reshape(-1)
        for j in (0, flat.size - 1):
            changed = flat.at[j].set(jnp.nextafter(flat[j], jnp.inf)).reshape(leaves[i].shape)
            other = jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1 :]])
            assert model_identity(nnx.merge(graph, other)).weights != want.weights
    flipped = jax.tree.map(lambda x: -x, state)  # all in the highest bit
    swapped = jax.tree.map(lambda x: x[::-1], state)
    for other in (flipped, swapped):
        assert model_identity(nnx.merge(graph, other)).weights != want.weights


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_every_file_damaged_in_every_way(saved, tmp_path):
    """Cut short, emptied, lengthened, a byte changed anywhere, missing: each names the file."""
    copy = tmp_path / "copy"
    names = files_of(saved)
    assert len(names) > 10
    rng = np.random.default_rng(0)
    for name in names:
        content = (saved / name).read_bytes()
        flips = [0, len(content) - 1, *rng.integers(0, len(content), 2)]
        changes = [content[:-1], b"", content + b"\0", None]
        for at in flips:
            changed = bytearray(content)
            changed[at] ^= 1 << int(rng.integers(8))
            changes.append(bytes(changed))
        shutil.copytree(saved, copy)
        for change in changes:
            (copy / name).unlink()
            if change is not None:
                (copy / name).write_bytes(change)
            with pytest.raises(SnapshotError) as refused:
                load_document(copy, IDENTITY)
            expected = "snapshot.json" if name == "snapshot.json" else name
            assert expected in str(refused.value) or name == "snapshot.json"
            (copy / name).write_bytes(content)
        load_document(copy, IDENTITY)
        shutil.rmtree(copy)


def test_files_exchanged_and_added(saved):
    for a, b in (("cache.pool.k", "cache.pool.v"), ("cache.prefix_k", "cache.prefix_v")):
        x, y = (next((saved / "arrays" / name).glob("0*")) for name in (a, b))
        first, second = x.read_bytes(), y.read_bytes()
        x.write_bytes(second)
        y.write_bytes(first)
        with pytest.raises(SnapshotError, match="checksum"):
            load_document(saved, IDENTITY)
        x.write_bytes(first)
        y.write_bytes(second)
    (saved / "arrays" / "more").write_text("x")
    with pytest.raises(SnapshotError, match="arrays/more is not part"):
        load_document(saved, IDENTITY)


def rewrite(folder: Path, change) -> None:
    """Changes the manifest as somebody would who knows how it is made."""
    raw = json.loads((folder / "snapshot.json").read_text())
    raw.pop("digest")
    change(raw)
    for name in raw["files"] if isinstance(raw["files"], dict) else ():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            raw["files"][name] = [len(data), zlib.crc32(data)]
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    raw["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "snapshot.json").write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n")


K = "cache.pool.k"
HOSTILE = {
    "version": (lambda m: m.update(version=2), r"version is 2 where 1 is wanted"),
    "version true": (lambda m: m.update(version=True), "version is True where 1"),
    "format": (lambda m: m.update(format="x"), "format is 'x'"),
    "holds": (lambda m: m.update(holds="all"), "malformed"),
    "holds another": (lambda m: m.update(holds="state"), "where 'document' is wanted"),
    "huge shape": (lambda m: m["arrays"].update({K: [[2, 10**12, 2, 16, 16], "float32"]}), "bytes"),
    "other shape": (lambda m: m["arrays"].update({K: [[2, 600, 2, 16, 16], "float32"]}), "elsewhe"),
    "huge rank": (lambda m: m["arrays"].update({K: [[1] * 99, "float32"]}), "malformed"),
    "negative": (lambda m: m["arrays"].update({K: [[2, -6, 2, 16, 16], "float32"]}), "not a size"),
    "size of a bool": (lambda m: m["arrays"].update({K: [[True], "float32"]}), "not a size"),
    "float size": (lambda m: m["arrays"].update({K: [[2.0], "float32"]}), "not a size"),
    "object dtype": (lambda m: m["arrays"].update({K: [[2], "object"]}), "malformed"),
    "other dtype": (lambda m: m["arrays"].update({K: [[2, 6, 2, 16, 16], "float16"]}), "dtype is"),
    "no array": (lambda m: m["arrays"].pop("cache.tokens"), "cache.tokens is missing"),
    "another array": (lambda m: m["arrays"].update(x=[[1], "int32"]), "x is no array of such"),
    "arrays a list": (lambda m: m.update(arrays=[]), "malformed"),
    "files a list": (lambda m: m.update(files=[]), "malformed"),
    "traversal": (lambda m: m["files"].update({"arrays/../../x": [1, 1]}), "malformed"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": [1, 1]}), "malformed"),
    "outside": (lambda m: m["files"].update({"config.json": [1, 1]}), "malformed"),
    "size of a file": (lambda m: m["files"].update({"arrays/x": [-1, 1]}), "not a size"),
    "no layout": (lambda m: m["files"].pop(f"arrays/{K}/.zarray"), "not part of the snapshot"),
    "chunking": (lambda m: m["chunking"].update(chunk_size=0), "malformed"),
    "other chunking": (lambda m: m["chunking"].update(chunk_size=32), "elsewhere"),
    "anchors": (lambda m: m["chunking"].update(anchors=False), "chunking.anchors"),
    "anchors text": (lambda m: m["chunking"].update(anchors="yes"), "malformed"),
    "settings": (lambda m: m.update(selecting={"__class__": "os.system"}), "malformed"),
    "flags": (lambda m: m["flags"].update(streamed="no"), "flags is"),
    "more flags": (lambda m: m["flags"].update(code="x"), "flags is"),
    "rope": (lambda m: m["rope"].update(theta="1e4"), "rope.theta is '1e4'"),
    "rope int": (lambda m: m["rope"].update(theta=10000), "rope.theta is 10000 where 10000.0"),
    "model": (lambda m: m["model"].pop("d_model"), "model.d_model is None where 64"),
    "nan": (lambda m: m["rope"].update(theta=float("nan")), "NaN is no JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name, saved):
    change, message = HOSTILE[name]
    rewrite(saved, change)
    with pytest.raises(SnapshotError, match=message):
        load_document(saved, IDENTITY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "does not hold"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"format": 1, "format": 2}', "repeats the key"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"version": 1' + b"0" * 10_000 + b"}", "not valid JSON"),
        (b" " * ((16 << 20) + 1), "larger than"),
        (b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "not valid JSON"),
    ],
)
def test_manifests_that_are_none(content, message, saved):
    (saved / "snapshot.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=message):
        load_document(saved, IDENTITY)


ZARR = {
    "compressor": {"id": "zlib", "level": 9},
    "filters": [{"id": "pickle"}],
    "shape": [2, 6, 2, 16, 1 << 40],
    "chunks": [2, 6, 2, 16, 1 << 40],
    "dtype": "|O",
    "order": "F",
    "zarr_format": 3,
    "fill_value": 0,
    "dimension_separator": "/",
}


@pytest.mark.parametrize("key", ZARR)
def test_hostile_array_metadata(key, saved):
    """With checksums that fit: it is not only chance that is met."""
    path = saved / "arrays" / K / ".zarray"
    raw = {**json.loads(path.read_text()), key: ZARR[key]}
    path.write_text(json.dumps(raw))
    rewrite(saved, lambda manifest: None)
    with pytest.raises(SnapshotError, match=r"\.zarray does not describe cache\.pool\.k"):
        load_document(saved, IDENTITY)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"chunks": {}}', "[" * 100_000])
def test_array_metadata_that_is_none(text, saved):
    (saved / "arrays" / K / ".zarray").write_text(text)
    rewrite(saved, lambda manifest: None)
    with pytest.raises(SnapshotError, match=r"\.zarray"):
        load_document(saved, IDENTITY)


@pytest.mark.parametrize("name", ["snapshot.json", f"arrays/{K}/.zarray", "arrays", f"arrays/{K}"])
def test_links_and_pipes_are_refused(name, saved, tmp_path):
    """A link is not followed, not even to the very same contents; a pipe is not waited for."""
    path, away = saved / name, tmp_path / "away"
    path.rename(away)
    path.symlink_to(away)
    with pytest.raises(SnapshotError):
        load_document(saved, IDENTITY)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SnapshotError):
        load_document(saved, IDENTITY)


def test_indices_out_of_range_are_refused(model, tmp_path):
    """A kernel would follow them into memory that is none of the pool's."""
    rng = np.random.default_rng(0)
    prompt = chunk_prompt([253, 1], rng.integers(0, 250, 90), rng.integers(0, 250, 7), CHUNKS)
    first = dataclasses.replace(SELECT, scorer="first", encoding="independent")
    chosen = choose(model, prompt, first, request_keys([0], 1))
    begun = begin(model, chosen, DECODE)
    good = without_other_chunks(begun)

    def in_state(**change):
        return dataclasses.replace(good, state=dataclasses.replace(good.state, **change))

    for bad, field in (
        (in_state(chunk_ids=good.state.chunk_ids + 1), "state.chunk_ids holds 2"),
        (in_state(chunk_ids=good.state.chunk_ids - 2), "state.chunk_ids holds -2"),
        (in_state(block=good.state.block - 1), "state.block holds -1"),
        (in_state(tokens=good.state.tokens + 1000), "state.tokens holds"),
        (dataclasses.replace(good, query=good.query - 300), "query holds -"),
        (dataclasses.replace(good, query_length=jnp.int32(999)), "query_length holds 999"),
    ):
        save_request(tmp_path / "s", IDENTITY, bad, chunking=CHUNKS, overwrite=True)
        with pytest.raises(SnapshotError, match=field):
            load_request(tmp_path / "s", IDENTITY)
    save_request(tmp_path / "s", IDENTITY, good, chunking=CHUNKS, overwrite=True)
    manifest = read_manifest(tmp_path / "s")
    wide = {name: ArrayRecord((1, 4), "uint32") for name in ("keys", "state.keys")}
    manifest = dataclasses.replace(manifest, arrays={**manifest.arrays, **wide})
    with pytest.raises(SnapshotError, match="keys have 2 words"):
        check_shapes(tmp_path / "s", manifest, IDENTITY.config)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [tensorstore_spec='...']")

    monkeypatch.setattr("pdllm_jax.storage.snapshot_arrays.write_arrays", full)
    with pytest.raises(SnapshotError, match="disk full while writing"):
        save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(SnapshotError, match=r"disk full: .* 0\.00 GB free"):
        save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    assert not list(tmp_path.iterdir())


def test_written_on_one_mesh_and_restored_on_another(tmp_path):
    workers.run(workers.on_meshes, tmp_path, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    chunks = {(2, 4): 4, (8, 1): 1, (2, 1): 4, (1, 1): 8}
    assert len(found) == 8
    for read, shape in found:
        assert shape == [3, chunks[tuple(read)], 4 // read[1], 16, 16]


def test_a_large_array_is_cut_by_layer_and_head(tmp_path, monkeypatch):
    monkeypatch.setattr("pdllm_jax.storage.snapshot_arrays.SMALL_ARRAY_BYTES", 1)
    monkeypatch.setattr("pdllm_jax.storage.snapshot_arrays.SMALL_CHUNK_BYTES", 1)
    save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    files = [name for name in files_of(tmp_path / "s") if name.startswith(f"arrays/{K}/0")]
    files += [name for name in files_of(tmp_path / "s") if name.startswith(f"arrays/{K}/1")]
    assert sorted(name.rpartition("/")[2] for name in files) == [
        f"{layer}.0.{head}.0.0" for layer in (0, 1) for head in (0, 1)
    ]
    manifest = read_manifest(tmp_path / "s")
    default = jax.device_put(0).sharding
    arrays = read_arrays(tmp_path / "s", manifest, lambda name: default)
    np.testing.assert_array_equal(arrays[K], document().pool.k)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (2, 1 << 20)], ids=str)
def test_what_is_read_becomes_the_array_without_a_copy(shape):
    memory = _aligned(shape, np.dtype("bfloat16"))
    memory[...] = 1
    array = jax.device_put(memory, jax.devices("cpu")[0])
    assert (array.shape, array.dtype) == (shape, jnp.bfloat16)
    assert bool((array == 1).all())
    assert array.unsafe_buffer_pointer() == memory.ctypes.data
