"""Files as downloads leave them: pointers, error pages, byte order marks."""

from __future__ import annotations

import codecs
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pdllm_jax.text_files import read_text

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
_POINTERS = (b"version https://git-lfs", b"version https://hawser")
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error", b'{"error"')


def check_download(path: Path, *, weights: bool = False) -> None:
    """Raises ValueError for a file that a failed download left in place of the real one.

    Args:
      weights: the file must be binary: text of any kind is refused.
    """
    with path.open("rb") as file:
        head = file.read(512)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(_POINTERS):
        advice = "run `git lfs pull` in its folder, or download it again"
        raise ValueError(f"{path} is a Git LFS pointer, not the file: {advice}")
    if start.startswith(_PAGES):
        raise ValueError(f"{path} holds a server's error page, not the file: download it again")
    if not head:
        raise ValueError(f"{path} is empty, an incomplete download: download it again")
    with contextlib.suppress(UnicodeDecodeError):
        text = " ".join(head.decode().split())
        if weights and text.isprintable():
            raise ValueError(f"{path} holds text ({text:.60}), not weights: download it again")


def read_clean(path: Path) -> bytes:
    """Returns the content of a tokenizer's file without its byte order mark.

    Raises:
      ValueError: `check_download` refuses it, or it holds text that is not UTF-8.
    """
    check_download(path)
    if path.suffix != ".model":
        read_text(path)
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a tokenizer's vocabulary; () where the folder has none.

    They are tokenizer.json, or else vocab.json and merges.txt, as Dream is published.
    """
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        files = tuple(folder / name for name in names)
        if all(path.is_file() for path in files):
            return files
    return ()


@contextlib.contextmanager
def clean_tokenizer(folder: Path) -> Iterator[Path]:
    """Yields a folder with a tokenizer's files as `read_clean` returns them.

    It is `folder` itself, or a temporary copy where a byte order mark has to go.

    Raises:
      ValueError: as `read_clean`.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    contents = {path.name: read_clean(path) for path in files}
    if all(path.stat().st_size == len(contents[path.name]) for path in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name, content in contents.items():
            (Path(copy) / name).write_bytes(content)
        yield Path(copy)
