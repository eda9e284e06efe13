"""Records of a run on disk: one file of JSON lines for each cell, safe to kill at any moment.

A file's first line is its header, which says what the cell and the run's identity are; then come
lines of two kinds, {"run": ..} where a process began to write, and one record for each example. A
line that was not written to its end, which can only be the last, is cut off before anything is
added.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A file of records that cannot be what this run would write; names it, and the line."""


class CellFile:
    """A cell's records. header: what must be the same whenever the file is written."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        # As JSON gives it back.
        self.header = json.loads(json.dumps(header))

    def read(self) -> dict[int, dict[str, Any]]:
        """Records by example. Raises RecordError for another header or a broken line inside."""
        lines = _whole_lines(self.path)
        if not lines:
            return {}
        if (found := _parsed(lines[0], self.path, 1)) != self.header:
            raise RecordError(
                f"{self.path} is of another run: {_difference(found, self.header)}; "
                "give another folder"
            )
        records = {}
        for number, line in enumerate(lines[1:], start=2):
            row = _parsed(line, self.path, number)
            if "run" not in row:
                if type(row.get("example")) is not int:
                    raise RecordError(f"{self.path}, line {number}: of no example")
                records[row["example"]] = row
        return records

    def runs(self) -> list[dict[str, Any]]:
        """What the processes that wrote the file said about themselves, each once."""
        lines = _whole_lines(self.path)[1:]
        rows = [_parsed(line, self.path, number) for number, line in enumerate(lines, start=2)]
        found = [row["run"] for row in rows if "run" in row]
        return [run for i, run in enumerate(found) if run not in found[:i]]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines and has them on disk when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            # Two processes at once write lines twice, which does no harm, but whole ones.
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = sum(len(line) + 1 for line in _whole_lines(self.path))
            file.truncate(kept)
            new = [*rows] if kept else [self.header, *rows]
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in new))
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    """Lines that end with a line break: all but a last one that was cut short."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}, line {number}: {error}") from None
    if not isinstance(row, dict):
        raise RecordError(f"{path}, line {number}: not an object")
    return row


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [n for n in {**found, **wanted} if found.get(n) != wanted.get(n)]
    return ", ".join(f"{n} {found.get(n)!r} instead of {wanted.get(n)!r}" for n in names)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """The record as JSON, an entry of its parts on each line; the file is replaced as a whole."""
    parts = []
    for name, value in record.items():
        body = json.dumps(value)
        if isinstance(value, dict) and value:
            rows = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()]
            body = "{\n" + ",\n".join(rows) + "\n }"
        elif isinstance(value, list) and value:
            body = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {body}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    partial.replace(path)
