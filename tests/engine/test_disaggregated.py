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


def call(capsys, main, *argv) -> tuple[int, str, str]:
    try:
        status = main([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def process(script: str, *argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, argv)],
        env={
            **os.environ, "PYTHONPATH": str(ROOT),
            "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def test_two_processes_give_the_tokens_of_one(checkpoint, text, tmp_path, capsys):
    request = (checkpoint, "--context-file", text, "--question", "which?", *SMALL)
    status, out, err = call(capsys, generate.main, *request, "--json")
    assert status == 0, err
    want = json.loads(out)
    wrote = process("prefill.py", *request, "--out", tmp_path / "request")
    assert wrote.returncode == 0, wrote.stderr
    assert re.fullmatch(r".*request: state, 6 chunks, \d+\.\d MB, \d+\.\d s\n", wrote.stdout)
    # Later, elsewhere: where the document is not, and the model has another name.
    text.unlink()
    moved = checkpoint.rename(tmp_path / "moved")
    read = process("decode.py", moved, tmp_path / "request", "--json", "--mesh", "1x1")
    assert read.returncode == 0, read.stderr
    got = json.loads(read.stdout)
    for key in ("tokens", "text", "selection", "evaluations"):
        assert got[key] == want[key], key


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--holds", "selection"], ["--whole-pool"]], ids=" ".join)
def test_other_forms_give_the_same_tokens(checkpoint, text, tmp_path, capsys, more):
    request = (checkpoint, "--context-file", text, "--question", "which?", *FIRST)
    request += ("--encoding", "independent")
    _, out, _ = call(capsys, generate.main, *request, "--json")
    status, _, err = call(capsys, prefill.main, *request, "--out", tmp_path / "s", *more)
    assert status == 0, err
    status, got, err = call(capsys, decode.main, checkpoint, tmp_path / "s", "--json")
    assert status == 0, err
    assert json.loads(got)["tokens"] == json.loads(out)["tokens"]
    assert json.loads(got)["selection"] == json.loads(out)["selection"]


def test_a_document_is_asked_from_a_snapshot_and_from_a_store(checkpoint, text, tmp_path, capsys):
    question = ("--question", "which?", "--encoding", "independent", *FIRST, "--json")
    direct = call(capsys, generate.main, checkpoint, "--context-file", text, *question)
    assert direct[0] == 0, direct[2]
    made = call(
        capsys, prefill.main, checkpoint, "--context-file", text, "--holds", "document",
        "--out", tmp_path / "document", "--chunk-size", "32",
    )  # fmt: skip
    assert made[0] == 0, made[2]
    sources = [("--snapshot", tmp_path / "document")]
    instructed = (*sources[0], "--question", "which?", "--instruction", "Sing!")
    status, _, err = call(capsys, generate.main, checkpoint, *instructed)
    assert (status, "part of the document" in err) == (2, True)
    sources += [("--context-file", text, "--store", tmp_path / "store")] * 2
    asked = [call(capsys, generate.main, checkpoint, *source, *question) for source in sources]
    (kept,) = [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    assert len(kept.name) == 64
    for status, out, err in asked:
        assert status == 0, err
        assert json.loads(out)["tokens"] == json.loads(direct[1])["tokens"]
    named = ("--score", "oracle", "--chunks", "2", "0")
    status, out, err = call(capsys, generate.main, checkpoint, *sources[0], *question, *named)
    assert status == 0, err
    assert json.loads(out)["selection"]["chunks"] == [0, 2]


def test_what_does_not_match_is_one_line_and_status_2(
    make_checkpoint, checkpoint, text, tmp_path, capsys
):
    request = (checkpoint, "--context-file", text, "--question", "which?", *FIRST)
    snapshot = tmp_path / "s"
    status, _, err = call(capsys, prefill.main, *request, "--out", snapshot)
    assert status == 0, err

    def refused(message: str, *argv) -> None:
        status, out, err = call(capsys, *argv)
        lines = [line for line in err.splitlines() if not line.startswith("loading")]
        assert (status, out, len(lines)) == (2, "", 1), err
        assert re.search(message, lines[0]), lines[0]

    other = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=256, seed=1).folder
    convert(other, tmp_path / "other")
    refused(r"model\.weights is '", decode.main, tmp_path / "other", snapshot)
    refused(r"model\.dtype", decode.main, checkpoint, snapshot, "--dtype", "bfloat16")
    refused("64 x 1 needs 64 devices", decode.main, checkpoint, snapshot, "--mesh", "64x1")
    new = ("--out", tmp_path / "no")
    refused("DATAxTENSOR", prefill.main, *request, *new, "--mesh", "2")
    kernel = "--sums", "mosaic_gpu"
    refused("needs a mesh", prefill.main, *request, *new, *kernel)
    refused("needs a mesh", decode.main, checkpoint, snapshot, *kernel)
    settings = {"n_kv_heads": 2, "tokenizer": True, "max_sequence_length": 256}
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
    refused("version 3, only 2 can be read", decode.main, checkpoint, snapshot)
    (snapshot / "manifest.json").write_text(manifest)
    file = next((snapshot / "arrays" / "state.live.k.0").glob("0*"))
    file.write_bytes(file.read_bytes()[:-1])
    refused("state.live.k.0/.* bytes", decode.main, checkpoint, snapshot)
