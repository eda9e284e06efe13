"""Prefill in one process, decode in another: the tokens of one process, or a refusal by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert import convert
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import decode
import generate
import prefill

TEXT = "A document of several sentences. " * 5
SMALL = [
    "--gen-length", "8", "--chunk-size", "32", "--top-k", "2", "--score", "query",
    "--masked-copies", "1", "--encode-batch", "2", "--seed", "3", "--temperature", "0.7",
]  # fmt: skip
FIRST = [*SMALL[:6], "--score", "first"]


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path) -> Path:
    source = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256).folder
    convert(source, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def call(call_main):
    """Returns the output of a command line that ends with a status: stderr where it is not 0."""

    def call(main, *argv, status: int = 0) -> str:
        ended, out, err = call_main(main, *argv)
        assert ended == status, err
        assert status == 0 or not out
        return err if status else out

    return call


def process(script: str, *argv) -> str:
    settings = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_give_the_tokens_of_one(checkpoint, text, tmp_path, call):
    request = (checkpoint, "--context-file", text, "--question", "which?", *SMALL)
    want = json.loads(call(generate.main, *request, "--json"))
    wrote = process("prefill.py", *request, "--out", tmp_path / "request")
    assert re.fullmatch(r".*request: state, 6 chunks, \d+\.\d MB, \d+\.\d s\n", wrote)
    # Later, elsewhere: where the document is not, and the model has another name.
    text.unlink()
    moved = checkpoint.rename(tmp_path / "moved")
    read = process("decode.py", moved, tmp_path / "request", "--json", "--mesh", "1x1")
    got = json.loads(read)
    for key in ("tokens", "text", "selection", "evaluations"):
        assert got[key] == want[key], key


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--holds", "selection"], ["--whole-pool"]], ids=" ".join)
def test_other_forms_give_the_same_tokens(checkpoint, text, tmp_path, call, more):
    request = (checkpoint, "--context-file", text, "--question", "which?", *FIRST)
    request += ("--encoding", "independent")
    want = json.loads(call(generate.main, *request, "--json"))
    call(prefill.main, *request, "--out", tmp_path / "s", *more)
    got = json.loads(call(decode.main, checkpoint, tmp_path / "s", "--json"))
    assert (got["tokens"], got["selection"]) == (want["tokens"], want["selection"])


def test_a_document_is_asked_from_a_snapshot_and_from_a_store(checkpoint, text, tmp_path, call):
    document = ("--context-file", text)
    question = ("--question", "which?", "--encoding", "independent", *FIRST, "--json")
    direct = json.loads(call(generate.main, checkpoint, *document, *question))
    saved = ("--holds", "document", "--out", tmp_path / "document", "--chunk-size", "32")
    call(prefill.main, checkpoint, *document, *saved)
    snapshot = ("--snapshot", tmp_path / "document")
    instructed = (*snapshot, "--question", "which?", "--instruction", "Sing!")
    refused = call(generate.main, checkpoint, *instructed, status=2)
    assert "part of the document" in refused
    stored = (*document, "--store", tmp_path / "store")
    for source in (snapshot, stored, stored):
        asked = json.loads(call(generate.main, checkpoint, *source, *question))
        assert asked["tokens"] == direct["tokens"]
    (kept,) = [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    assert len(kept.name) == 64
    named = ("--score", "oracle", "--chunks", "2", "0")
    out = call(generate.main, checkpoint, *snapshot, *question, *named)
    assert json.loads(out)["selection"]["chunks"] == [0, 2]


def test_what_does_not_match_is_one_line_and_status_2(
    make_checkpoint, checkpoint, text, tmp_path, call
):
    request = (checkpoint, "--context-file", text, "--question", "which?", *FIRST)
    snapshot = tmp_path / "s"
    call(prefill.main, *request, "--out", snapshot)

    def refused(message: str, *argv) -> None:
        err = call(*argv, status=2)
        (line,) = [line for line in err.splitlines() if not line.startswith("loading")]
        assert re.search(message, line), line

    settings = {"n_kv_heads": 2, "tokenizer": True, "max_sequence_length": 256}
    convert(make_checkpoint(**settings, seed=1).folder, tmp_path / "other")
    refused(r"model\.weights is '", decode.main, tmp_path / "other", snapshot)
    refused(r"model\.dtype", decode.main, checkpoint, snapshot, "--dtype", "bfloat16")
    refused("64 x 1 needs 64 devices", decode.main, checkpoint, snapshot, "--mesh", "64x1")
    new = ("--out", tmp_path / "no")
    refused("DATAxTENSOR", prefill.main, *request, *new, "--mesh", "2")
    kernel = "--sums", "mosaic_gpu"
    refused("needs a mesh", prefill.main, *request, *new, *kernel)
    refused("needs a mesh", decode.main, checkpoint, snapshot, *kernel)
    convert(make_checkpoint(**settings, rope_theta=20_000.0).folder, tmp_path / "stretched")
    refused(r"rope\.theta is", decode.main, tmp_path / "stretched", snapshot)
    source = make_checkpoint(**settings).folder
    with (source / "tokenizer.json").open("a") as file:
        file.write("\n")
    convert(source, tmp_path / "reworded")
    refused("tokenizer is", decode.main, tmp_path / "reworded", snapshot)
    refused("holds a state", generate.main, checkpoint, "--snapshot", snapshot, "--question", "q")
    refused("s exists", prefill.main, tmp_path / "no model", *request[1:], "--out", snapshot)
    document = (*request[:3], *new, "--holds", "document")
    refused("document takes none", prefill.main, *document, "--question", "which?")
    little = ("--memory-limit", "0.0001")
    refused("phase 'encode document' needs", prefill.main, *document, *little)
    refused("phase '.*' needs", prefill.main, *request, *new, *little)
    refused("phase '.*' needs", prefill.main, *request, *new, *little, "--holds", "selection")
    refused("nothing: not a directory", decode.main, checkpoint, tmp_path / "nothing")
    store = ("--store", tmp_path / "store", *little)
    refused("phase 'encode document' needs", generate.main, *request, *store)
    manifest = (snapshot / "manifest.json").read_text()
    (snapshot / "manifest.json").write_text(manifest.replace('"version": 2', '"version": 3'))
    refused("version 3, only a .* of version 2", decode.main, checkpoint, snapshot)
    (snapshot / "manifest.json").write_text(manifest)
    file = next((snapshot / "arrays" / "state.live.k.0").glob("0*"))
    file.write_bytes(file.read_bytes()[:-1])
    refused("state.live.k.0/.* bytes", decode.main, checkpoint, snapshot)
