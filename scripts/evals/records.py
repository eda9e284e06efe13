"""Results of a run, one line for each example and method, on disk as soon as they are there.

A run that was killed goes on where it was: what is recorded is not computed again. A last line that
was cut off in the middle is recognised and dropped; anything else that is not a record is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bench.record import write


class RecordError(ValueError):
    """Records that are another run's, damaged, or being written by another process; one line."""


class Key(NamedTuple):
    """What a record is of."""

    benchmark: str
    task: str
    method: str
    id: str


class Records:
    """The records of a folder, open for more; a context manager.

    dropped: bytes of a last line that was not whole.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Settings are what every record was made with; a folder has one set of them.

        Raises RecordError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "records.jsonl"
        self.done: dict[Key, dict[str, Any]] = {}
        self.dropped = 0
        self._file: BinaryIO = self.path.open("a+b")
        try:
            self._lock()
            _same_settings(folder / "settings.json", settings, started=self.path.stat().st_size > 0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecordError(f"{self.path} is being written by another run") from None

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self.dropped = len(line)
                break
            try:
                record = json.loads(line)
                key = Key(*(record[name] for name in Key._fields))
                record["digest"], float(record["score"])
                self.done[key] = record
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise RecordError(f"{self.path}:{number}: not a record of this script") from None
            whole += len(line)
        if self.dropped:
            self._file.truncate(whole)

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Writes a record through to the disk. RecordError where that has no room; it is then as
        it was before.
        """
        record = key._asdict() | record
        line, descriptor = json.dumps(record).encode() + b"\n", self._file.fileno()
        before = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise RecordError(
                f"{self.path} can not be written ({error.strerror}): what is recorded is kept, and "
                "the same command goes on from there"
            ) from None
        self.done[key] = record

    def get(self, key: Key, digest: str) -> dict[str, Any] | None:
        """The record, if there is one. RecordError if its example had other contents."""
        record = self.done.get(key)
        if record is not None and record["digest"] != digest:
            raise RecordError(
                f"{self.path} has {'/'.join(key)} with other contents: the data have changed"
            )
        return record


def _same_settings(path: Path, settings: dict[str, Any], *, started: bool) -> None:
    """Keeps the settings in a file of their own, and compares where there is one already."""
    settings = json.loads(json.dumps(settings))  # tuples are lists in the file
    if not path.exists():
        if started:
            raise RecordError(f"{path} is missing beside its records")
        write(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RecordError(f"{path} is not valid JSON") from None
    if not isinstance(before, dict):
        raise RecordError(f"{path} must hold a JSON object")
    changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
    if changed:
        raise RecordError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}): "
            "give another folder, or the same settings"
        )
