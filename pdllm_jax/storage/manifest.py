"""The manifest of a folder: its kind, format version, settings, and the checksum of every file.

    FOLDER/manifest.json   {"kind": "checkpoint", "version": 2, "settings": {...},
                            "files": {"config.json": [bytes, crc32], ...},
                            "digest": "sha256 of the fields above"}

Checkpoints and snapshots share this format. The manifest is written last and read first. Its digest
covers its own content, so that a changed byte is noticed in any file of the folder.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
# Stays in a processor's cache.
_READ_BYTES = 256 << 10
_WORKERS = max(4, os.cpu_count() or 1)
_BUFFERS = threading.local()


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read or written; the message names the file or the tensor."""


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes.

    Args:
      name: in manifests and messages, such as "checkpoint".
      version: of the folder's format; no other is read.
      error: class of every error about such a folder.
      advice: what to do about a folder without a manifest or of another version.
    """

    name: str
    version: int
    error: type[ValueError]
    advice: str = ""

    def refusal(self, folder: Path, problem: str) -> ValueError:
        """Returns the error for a folder, in one line."""
        return self.error(f"{self.name} {folder}: {' '.join(problem.split())}")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 (as of zlib) of a file."""

    nbytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Args:
      settings: JSON object; its fields belong to the kind.
      files: every file of the folder except manifest.json, by path relative to the folder.
    """

    folder: Path
    kind: FolderKind
    settings: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def check_sizes(self) -> None:
        """Checks that every file has its size, and that no subfolder holds another file.

        Reads no contents. Ignores files beside the manifest that it does not list.

        Raises:
          kind.error: names the first file that differs.
        """
        for name, record in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise self.kind.refusal(self.folder, f"{name} is missing")
            if (nbytes := path.stat().st_size) != record.nbytes:
                problem = f"{name} has {nbytes} bytes, {record.nbytes} were written"
                raise self.kind.refusal(self.folder, problem)
        for name in _files(self.folder):
            if "/" in name and name not in self.files:
                raise self.kind.refusal(self.folder, f"{name} is not part of the {self.kind.name}")

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares the checksums of the named files, by default of all.

        Raises:
          kind.error: names the first file that differs.
        """
        names = list(self.files if names is None else names)
        for name, record in zip(names, _records(self.folder, names), strict=True):
            if record != self.files[name]:
                raise self.kind.refusal(self.folder, f"{name} has changed: its checksum differs")


def write_manifest(folder: Path, kind: FolderKind, settings: Mapping[str, Any]) -> None:
    """Writes manifest.json, which covers everything that the folder holds by then."""
    names = [name for name in _files(folder) if name != MANIFEST]
    files = {
        name: dataclasses.astuple(record)
        for name, record in zip(names, _records(folder, names), strict=True)
    }
    content = {
        "kind": kind.name,
        "version": kind.version,
        "settings": dict(settings),
        "files": files,
    }
    (folder / MANIFEST).write_bytes(_encode(content))


def read_manifest(folder: Path, kind: FolderKind) -> Manifest:
    """Reads manifest.json and checks its digest; looks at no other file.

    Raises:
      kind.error: folder or manifest do not exist, are of another kind or version, or the manifest
        has changed since it was written.
    """
    advice = f"; {kind.advice}" if kind.advice else ""
    if not folder.is_dir():
        raise kind.refusal(folder, "not a directory")
    if not (folder / MANIFEST).is_file():
        raise kind.refusal(folder, f"{MANIFEST} is missing{advice}")
    content = (folder / MANIFEST).read_bytes()
    try:
        raw = parse_json(content, MANIFEST)
    except CheckpointError as error:
        raise kind.refusal(folder, str(error)) from None
    name, version = raw.get("kind"), raw.get("version")
    if name != kind.name:
        raise kind.refusal(folder, f"{MANIFEST} has kind {name!r:.60}, not {kind.name!r}")
    if version != kind.version:
        problem = f"format version {version!r:.60}, only {kind.version} can be read{advice}"
        raise kind.refusal(folder, problem)
    raw.pop("digest", None)
    # Byte for byte: a changed byte is refused wherever it stands.
    if _encode(raw) != content:
        raise kind.refusal(folder, f"{MANIFEST} has changed since it was written")
    files = {name: FileRecord(*record) for name, record in raw["files"].items()}
    return Manifest(folder, kind, raw["settings"], files)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      CheckpointError: the file does not exist, is not a regular file or holds something else.
    """
    if not path.is_file():  # a pipe would never answer
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {problem}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object without repeated keys.

    Raises:
      CheckpointError: the content is something else; the message begins with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            repeated = [repr(name) for name, count in counts.items() if count > 1]
            raise CheckpointError(f"{where} repeats the key {', '.join(repeated)}")
        return dict(pairs)

    try:
        result = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{where} does not hold a JSON object")
    return result


def _encode(content: Mapping[str, Any]) -> bytes:
    """Returns the text of manifest.json, the same bytes for the same content."""
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**content, "digest": digest}, indent=1, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[str]:
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _records(folder: Path, names: Iterable[str]) -> list[FileRecord]:
    with ThreadPoolExecutor(_WORKERS) as threads:
        return list(threads.map(lambda name: _record(folder / name), names))


def _record(path: Path) -> FileRecord:
    checksum, nbytes = 0, 0
    buffer = memoryview(_BUFFERS.__dict__.setdefault("buffer", bytearray(_READ_BYTES)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            nbytes += count
    return FileRecord(nbytes, checksum)
