"""Writes pages: whole files, and parts of a page between two marks."""

from __future__ import annotations

import os
from pathlib import Path


def relative(path: Path, page: Path) -> str:
    """Returns the link from a page to a path."""
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()


def replace(path: Path, text: str) -> None:
    """Writes a file and replaces the old one in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def between(text: str, begin: str, end: str, part: str, page: Path) -> str:
    """Returns `text` with `part` between two marks. ValueError unless each mark occurs once."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} does not have exactly one place between {begin!r} and {end!r}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{part}{end}{after}"
