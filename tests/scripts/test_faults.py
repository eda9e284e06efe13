"""Without disk space, device memory or a network."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pdllm_jax.cli import errors as command_line
from pdllm_jax.storage.snapshot import SnapshotError, load_document, save_document
from tests.conftest import ROOT
from tests.support import workers

sys.path.insert(0, str(ROOT / "scripts"))
from experiments.records import Key, RecordError, Records


@contextlib.contextmanager
def small_disk(nbytes: int):
    """Limits files to `nbytes`, which the system reports much as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_on_a_full_disk(tmp_path):
    """What was recorded stays, no half line is left, and the run goes on when there is room."""
    key = Key("b", "t", "m", "1")
    with Records(tmp_path, {}) as records:
        records.add(key, {"digest": "d", "score": 1.0})
        before = records.path.read_bytes()
        full = r"records\.jsonl cannot be written \(File too large\)"
        with small_disk(len(before) + 10), pytest.raises(RecordError, match=full):
            records.add(key._replace(id="2"), {"digest": "d", "score": 1.0, "text": "x" * 9000})
        assert records.path.read_bytes() == before
        assert list(records.done) == [key]
    with Records(tmp_path, {}) as records:
        assert list(records.done) == [key]
        assert records.dropped == 0
        records.add(key._replace(id="2"), {"digest": "d", "score": 0.0})
        assert len(records.done) == 2


def test_a_snapshot_on_a_full_disk(tmp_path):
    """The old snapshot stays as it was, with nothing beside it."""
    good = tmp_path / "s"
    save = functools.partial(save_document, good, workers.IDENTITY, chunking=workers.CHUNKS)
    save(workers.document())
    before = load_document(good, workers.IDENTITY).cache
    with small_disk(4096), pytest.raises(SnapshotError, match=f"{good} cannot be written"):
        save(workers.document(chunks=7), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    after = load_document(good, workers.IDENTITY).cache
    assert workers.same(before, after)


def test_out_of_device_memory_says_what_to_change(capsys):
    """With the error that JAX raises for an array of 64 TB."""
    flags = {"encode_batch", "top_k", "chunk_size", "gen_length", "dtype", "memory_limit"}
    for having in (flags, flags - {"memory_limit"}, flags - {"dtype", "top_k"}, set()):
        args = argparse.Namespace(**dict.fromkeys(having, "keep"))
        status = command_line.status(
            lambda: jnp.zeros(1 << 44).block_until_ready(), args if having else None
        )
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        says = "error: the device ran out of memory (Out of memory allocating 70368744"
        assert err.startswith(says)
        named = {flag for flag in flags if f"--{flag.replace('_', '-')}" in err}
        assert named == having
        assert err.count("\n") == 1

    def otherwise() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError):
        command_line.status(otherwise)


def test_nothing_opens_a_socket(make_checkpoint, tmp_path):
    """Convert, generate, evaluate, in a process where a connection raises."""
    source = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256).folder
    workers.run(workers.offline, source, tmp_path, tmp_path / "out.json")
    outcome = json.loads(Path(tmp_path / "out.json").read_text())
    assert outcome["statuses"] == [0, 0, 0]
    assert outcome["internet"] == []
