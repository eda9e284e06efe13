"""KV snapshots: what is restored, on which mesh, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from pdllm_jax import MaskPredictor, RopeScaling
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import choose, finish
from pdllm_jax.engine.request import SelectedRequest, request_keys
from pdllm_jax.engine.request import drop_other_chunks as without_other_chunks
from pdllm_jax.engine.request import start_decoding as begin
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.storage.fingerprint import (
    ModelIdentity,
    document_fingerprint,
    model_fields,
    model_identity,
)
from pdllm_jax.storage.snapshot import (
    SnapshotError,
    load_document,
    load_request,
    pack,
    save_document,
    save_request,
    snapshot_holds,
    unpack,
)
from tests.support import workers
from tests.support.method import sharp_model
from tests.support.workers import CHUNKS, IDENTITY, document, same

SELECT = SelectionConfig(top_k=2, masked_copies=2, encode_batch=2)
DECODE = DecodeConfig(gen_length=8, block_length=4)
PREFIX, CONTEXT = [253, 1], np.random.default_rng(0).integers(0, 250, 90)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharp_model()


@pytest.fixture
def saved(tmp_path) -> Path:
    save_document(tmp_path / "saved", IDENTITY, document(), chunking=CHUNKS)
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_document_is_restored_bit_for_bit(tmp_path, dtype):
    maker, cache = dataclasses.replace(IDENTITY, dtype=dtype), document(dtype=dtype)
    save_document(tmp_path / "s", maker, cache, chunking=CHUNKS)
    restored = load_document(tmp_path / "s", maker)
    assert same(restored.cache, cache)
    assert restored.chunking == CHUNKS
    assert snapshot_holds(tmp_path / "s") == "document"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    bare = dataclasses.replace(
        cache.without_pool(), prefix_k=None, prefix_v=None,
        prefix_ids=jnp.zeros((1, 0), jnp.int32), prefix_length=jnp.zeros(1, jnp.int32),
    )  # fmt: skip
    save_document(tmp_path / "s", maker, bare, chunking=CHUNKS, overwrite=True)
    assert same(load_document(tmp_path / "s", maker).cache, bare)


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "joint"},
        pytest.param({"encoding": "independent", "scorer": "first"}, marks=pytest.mark.slow),
        pytest.param(
            {"encoding": "independent", "scorer": "query", "reselect": "block", "keep_tokens": 9},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["joint", "independent", "reselect"],
)
def test_decoding_from_a_snapshot_gives_the_same_tokens(model, tmp_path, change):
    """Before and after the encoding, with all chunks and with the chosen ones alone."""
    selecting = dataclasses.replace(SELECT, **change)
    prompt = chunk_prompt(PREFIX, CONTEXT, np.arange(7), CHUNKS)
    maker = model_identity(model)
    chosen = choose(model, prompt, selecting, request_keys([3], 1))
    begun = begin(model, chosen, DECODE)
    forms = [chosen, without_other_chunks(chosen), begun, without_other_chunks(begun)]
    copies = [jax.tree.map(jnp.copy, form) for form in forms]
    want = finish(model, begun)[0]
    for i, form in enumerate(copies):
        save_request(tmp_path / str(i), maker, form, chunking=CHUNKS)
        assert snapshot_holds(tmp_path / str(i)) == ("selection" if i < 2 else "state")
        restored = load_request(tmp_path / str(i), maker)
        assert same(restored, form)
        if isinstance(restored, SelectedRequest):
            restored = begin(model, restored, DECODE)
        got = finish(model, restored)[0]
        assert got.tokens == want.tokens
        assert got.selection == want.selection
    if "reselect" not in change:
        size = [sum(x.nbytes for x in jax.tree.leaves(form)) for form in copies]
        assert size[1] <= size[0]
        assert copies[3].cache is None


def identity(**changes) -> ModelIdentity:
    return dataclasses.replace(IDENTITY, config=dataclasses.replace(IDENTITY.config, **changes))


def test_a_manifest_of_before_the_families_fits():
    """LLaDA's fields are what they were, so that old snapshots and keys of a store are found."""
    assert "model.family" not in model_fields(IDENTITY)
    assert model_fields(identity(family="dream"))["model.family"] == "dream"


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (dataclasses.replace(IDENTITY, weights="1" * 64), "model.weights"),
        (dataclasses.replace(IDENTITY, dtype="bfloat16"), "model.dtype"),
        (identity(rope_theta=5e5), "rope.theta"),
        (identity(rope_scaling=RopeScaling("ntk", 2.0)), "rope.scaling"),
        (identity(n_layers=3), "model.n_layers"),
        (identity(family="dream"), "model.family"),
        (identity(rms_norm_eps=1e-6), "model.rms_norm_eps"),
        (identity(weight_format="fp8"), "model.weight_format"),
    ],
)
def test_another_model_is_refused_by_name(saved, other, field):
    if field != "model.dtype":  # other weights too, which say less
        other = dataclasses.replace(other, weights="1" * 64)
    with pytest.raises(SnapshotError, match=re.escape(field)) as refused:
        load_document(saved, other)
    assert refused.value.field == field
    assert refused.value.found != refused.value.wanted


def test_a_mismatch_is_refused_by_name(saved, tmp_path):
    with pytest.raises(SnapshotError, match="tokenizer is None where '"):
        load_document(saved, IDENTITY, tokenizer=FakeTokenizer())
    cache = document()
    ids = cache.prefix_ids, cache.prefix_length, cache.tokens, cache.lengths
    assert load_document(saved, IDENTITY, document=document_fingerprint(*ids))
    with pytest.raises(SnapshotError, match=r"document is '.*' where 'x' is wanted"):
        load_document(saved, IDENTITY, document="x")
    with pytest.raises(SnapshotError, match="holds is 'document' where"):
        load_request(saved, IDENTITY)
    with pytest.raises(SnapshotError, match=r"exists \(--overwrite"):
        save_document(saved, IDENTITY, cache, chunking=CHUNKS)
    with pytest.raises(SnapshotError, match="holds more than a snapshot: not overwritten"):
        save_document(tmp_path, IDENTITY, cache, chunking=CHUNKS, overwrite=True)
    other = dataclasses.replace(IDENTITY, dtype="bfloat16")
    with pytest.raises(SnapshotError, match=r"cache\.pool\.k.*'float32'.* where .*'bfloat16'"):
        save_document(tmp_path / "new", other, cache, chunking=CHUNKS)
    with pytest.raises(SnapshotError, match=r"is \(2, 16, 'float32'\) where \(4, 16"):
        save_document(tmp_path / "new", identity(n_kv_heads=4), cache, chunking=CHUNKS)
    with pytest.raises(SnapshotError, match="new: not a directory"):
        load_document(tmp_path / "new", IDENTITY)


class FakeTokenizer:
    bos_id, mask_id, stop_ids, digest = 1, 2, (3,), "x"


def test_the_document_fingerprint_covers_ids_and_boundaries_but_no_padding():
    prefix, tokens = np.arange(4)[None], np.arange(32).reshape(1, 2, 16)
    want = document_fingerprint(prefix, [3], tokens, [[16, 9]])
    padded = np.pad(tokens, ((0, 0), (0, 2), (0, 0)))
    wide = np.pad(prefix, ((0, 0), (0, 8)))
    assert document_fingerprint(wide, [3], padded, [[16, 9, 0, 0]]) == want
    for other in (
        (prefix, [4], tokens, [[16, 9]]),
        (prefix, [3], tokens, [[16, 10]]),
        (prefix, [3], tokens, [[15, 9]]),
        (prefix, [3], tokens + (tokens == 20), [[16, 9]]),
        (prefix + (prefix == 2), [3], tokens, [[16, 9]]),
    ):
        assert document_fingerprint(*other) != want


def test_the_model_fingerprint_tells_models_apart(model):
    """It changes with one element of any tensor."""
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
    flipped = jax.tree.map(lambda x: -x, state)  # in the highest bit alone
    swapped = jax.tree.map(lambda x: x[::-1], state)
    for other in (flipped, swapped):
        assert model_identity(nnx.merge(graph, other)).weights != want.weights


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings nested in settings."""

    limit: float
    names: tuple[str, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inner:
    values: tuple[Array, ...]
    key: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner | None
    counts: Array
    rule: Rule | Callable[[], float] | None = dataclasses.field(metadata={"static": True})


def test_dataclasses_are_saved_by_their_fields():
    tree = Outer(
        Inner((jnp.arange(3), jnp.ones((2, 2), jnp.bfloat16)), jax.random.key(5)),
        np.arange(2), Rule(0.1, ("a", "b")),
    )  # fmt: skip
    for form in (tree, dataclasses.replace(tree, inner=None, rule=None)):
        arrays, content = pack(form, "root")
        assert list(arrays) == (
            ["root.inner.values.0", "root.inner.values.1", "root.inner.key", "root.counts"]
            if form.inner
            else ["root.counts"]
        )
        restored = unpack(json.loads(json.dumps(content)), Outer, arrays, "root")
        assert same(restored, jax.tree.map(jnp.asarray, form))
        assert restored.rule == form.rule
    for code in (lambda: 0.5, IDENTITY):
        with pytest.raises(SnapshotError, match=r"root\.rule is .*: a snapshot holds arrays and"):
            pack(dataclasses.replace(tree, rule=code), "root")
    _, content = pack(tree, "root")
    for change in ({"more": None}, {"class": "Inner"}):
        with pytest.raises((TypeError, StopIteration)):
            unpack({**content, **change}, Outer, {}, "root")


@pytest.mark.parametrize("name", ["manifest.json", "arrays/cache.pool.k/.zarray", "arrays"])
def test_a_pipe_or_a_dangling_link_is_refused_at_once(name, saved):
    path = saved / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.mkfifo(path)
    with pytest.raises(SnapshotError):
        load_document(saved, IDENTITY)
    path.unlink()
    path.symlink_to(saved / "elsewhere")
    with pytest.raises(SnapshotError):
        load_document(saved, IDENTITY)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [tensorstore_spec='...']")

    monkeypatch.setattr("pdllm_jax.storage.snapshot.write_arrays", full)
    with pytest.raises(SnapshotError, match=r"s cannot be written: .*No space left on device$"):
        save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(SnapshotError, match=r"disk full: .* 0\.00 GB free"):
        save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    assert not list(tmp_path.iterdir())


def test_written_on_one_mesh_and_restored_on_another(tmp_path):
    workers.run(workers.on_meshes, tmp_path, tmp_path / "out.json")
    shapes = json.loads((tmp_path / "out.json").read_text())
    chunks = {(2, 4): 4, (8, 1): 1, (2, 1): 4, (1, 1): 8}
    assert len(shapes) == 8
    for read, shape in shapes:
        assert shape == [3, chunks[tuple(read)], 4 // read[1], 16, 16]


def test_a_large_array_has_a_file_for_each_head(tmp_path, monkeypatch):
    monkeypatch.setattr("pdllm_jax.storage.arrays.HEAD_BYTES", 1)
    save_document(tmp_path / "s", IDENTITY, document(), chunking=CHUNKS)
    files = (tmp_path / "s" / "arrays" / "cache.pool.k").glob("[0-9]*")
    assert sorted(path.name for path in files) == ["0.0.0.0.0", "0.0.1.0.0"]
    assert same(load_document(tmp_path / "s", IDENTITY).cache, document())
