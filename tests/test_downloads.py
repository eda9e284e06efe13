"""Tokenizers and documents as downloads and editors leave them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdllm_jax import Tokenizer, load_config
from pdllm_jax.cli.commands import Command
from pdllm_jax.cli.flags import read_prompt_ids
from pdllm_jax.tokenizer import TokenizerError

MARK = b"\xef\xbb\xbf"
# A file, the way it is damaged, what the message says.
DAMAGED: list[tuple[str, bytes, str]] = [
    ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("tokenizer.json", b"<!DOCTYPE html><html>", "holds a server's error page"),
    ("tokenizer_config.json", b"", "is empty, an incomplete download"),
    ("tokenizer_config.json", "{}".encode("utf-16"), "is not UTF-8 text: byte 0"),
]


@pytest.mark.parametrize(("name", "content", "expected"), DAMAGED)
def test_tokenizer_files_of_failed_downloads(
    make_checkpoint: Callable[..., Any], name: str, content: bytes, expected: str
) -> None:
    folder = make_checkpoint(tokenizer=True).folder
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder, load_config(folder))
    assert f"{name} {expected}" in str(caught.value)


def test_a_tokenizer_with_byte_order_marks(make_checkpoint: Callable[..., Any]) -> None:
    folder = make_checkpoint(tokenizer=True).folder
    clean = Tokenizer.load(folder, load_config(folder))
    for path in folder.glob("*.json"):
        path.write_bytes(MARK + path.read_bytes())
    marked = Tokenizer.load(folder, load_config(folder))
    assert marked.encode("Sir Walter") == clean.encode("Sir Walter")
    assert (marked.digest, marked.template) == (clean.digest, clean.template)


def request(path: Path) -> Any:
    """The request of `--context-file PATH --question x`."""
    names = {"context_file": path, "question": "x", "instruction": None, "prompt_ids": None}
    args = argparse.Namespace(**names, chunks=None, seed=0, stream=False)
    return Command(args, lambda folder: folder).request()


def test_the_byte_order_mark_of_a_document(tmp_path: Path) -> None:
    """The mark of Windows' editors is not text."""
    path = tmp_path / "document.txt"
    path.write_bytes(MARK + "Anne lives at Kellynch Hall.\n阅读\n".encode())
    assert request(path).context == "Anne lives at Kellynch Hall.\n阅读\n"
    path.write_bytes(MARK)
    with pytest.raises(ValueError, match=r"document\.txt is empty"):
        request(path)
    path.write_bytes("Café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"document\.txt is not UTF-8 text: byte 3"):
        request(path)


def test_the_byte_order_mark_of_a_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.json"
    path.write_bytes(MARK + b'{"prefix": [1], "context": [2], "query": [3]}')
    assert read_prompt_ids(path, parts=True) == ([1], [2], [3])
