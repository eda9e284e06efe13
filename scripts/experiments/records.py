"""Records of an experiment: one folder, one JSON line for each answer, safe to kill.

settings.json holds the format and what all records have in common. records.jsonl holds a line for
each answer, and a line {"run": ..} where a process began to write. Processes that share a run write
records-0.jsonl, records-1.jsonl and so on. A line that was cut off at the end of a file is dropped
when the file is opened again; any other bad line is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pdllm_jax.text_files import read_text

FORMAT = 2


class RecordError(ValueError):
    """Records of another run, damaged records, or records that another process is writing."""


class Key(NamedTuple):
    """What a record answers. method: a method's name, or the key of an ablation's cell."""

    benchmark: str
    task: str
    method: str
    id: str


class Records(contextlib.AbstractContextManager["Records"]):
    """The records of a folder, open for more; a context manager.

    done: records by key, of all files of the folder.
    runs: what the processes that wrote them noted, each once.
    dropped: bytes of a last line that was cut off.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str = "records") -> None:
        """Opens the folder for these settings, which all its records share.

        Args:
            name: stem of the file that this process writes; only one process may hold it.

        Raises:
            RecordError: the folder holds another run's records, or damaged ones.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self.path.open("a+b"))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RecordError(f"{self.path} is being written by another run") from None
            check_settings(folder, settings)
            content = self.path.read_bytes()
            end = content.rfind(b"\n") + 1
            self._file.truncate(end)
            self.dropped = len(content) - end
            self.done, self.runs = read_folder(folder)
            stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: Key, digest: str | None = None) -> dict[str, Any] | None:
        """Returns the key's record, or None. RecordError if its example had another digest."""
        record = self.done.get(key)
        if record is not None and digest is not None and record.get("digest") != digest:
            raise RecordError(
                f"{self.path} has {'/'.join(key)} with other contents: the data have changed"
            )
        return record

    def add(self, key: Key, record: Mapping[str, Any]) -> None:
        """Writes one record through to the disk."""
        self.add_all({key: record})

    def add_all(self, rows: Mapping[Key, Mapping[str, Any]], run: Any = None) -> None:
        """Writes records through to the disk, after a note on the run where one is given.

        Raises:
            RecordError: the disk has no room. The file is then as it was before.
        """
        full = {key: {**key._asdict(), **record} for key, record in rows.items()}
        lines = [*([{"run": run}] if run is not None else []), *full.values()]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise RecordError(
                f"{self.path} cannot be written ({error.strerror}): what is recorded is kept, and "
                "the same command goes on from there"
            ) from None
        self.done.update(full)


def read_folder(folder: Path) -> tuple[dict[Key, dict[str, Any]], list[dict[str, Any]]]:
    """Returns the records of all files by key, and the notes on runs, each once."""
    done: dict[Key, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for path in sorted(folder.glob("records*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                if "run" in row:
                    runs += [row["run"]] if row["run"] not in runs else []
                    continue
                float(row["score"])
                done[Key(*(row[name] for name in Key._fields))] = row
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise RecordError(f"{path}:{number}: not a record of format {FORMAT}") from None
    return done, runs


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings.json, or compares with the one that exists. Raises RecordError."""
    settings = {"format": FORMAT, **json.loads(json.dumps(settings))}  # tuples become lists
    path = folder / "settings.json"
    if not path.exists() and not (folder / "cells").is_dir():  # format 1 has a folder of cells
        if any(file.stat().st_size for file in folder.glob("records*.jsonl")):
            raise RecordError(f"{path} is missing beside its records")
        write_json(path, settings)
        return
    existing = read_json(path) if path.exists() else {}
    version = existing.get("format", 1)
    changed = sorted(k for k in {*existing, *settings} if existing.get(k) != settings.get(k))
    if version != FORMAT:
        problem = f"records of format {version}, not {FORMAT}: give another folder"
    elif changed:
        changes = ", ".join(changed)
        problem = (
            f"a run with other settings ({changes}): give another folder, or the same settings"
        )
    else:
        return
    raise RecordError(f"{folder} holds {problem}")


def count_lines(folder: Path) -> int:
    """Returns the number of records in the folder, by their lines alone."""
    lines = (path.read_bytes() for path in folder.glob("records*.jsonl"))
    return sum(text.count(b'{"benchmark"') for text in lines)


def read_json(path: Path, error: type[ValueError] = RecordError) -> dict[str, Any]:
    """Returns a file's JSON object; raises `error` with one line for anything else."""
    try:
        text = read_text(path)
    except ValueError as reason:
        raise error(str(reason)) from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object")
    return content


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, one entry of its parts on a line; replaces the file as a whole."""
    parts = []
    for name, value in record.items():
        body = json.dumps(value)
        if isinstance(value, dict) and value:
            rows = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()]
            body = "{\n" + ",\n".join(rows) + "\n }"
        elif isinstance(value, list) and value:
            body = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {body}")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, and replaces an older one in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
