"""The manifest of a folder: its kind, format version, settings, and the checksum of every file.

    FOLDER/manifest.json   {"kind": "checkpoint", "version": 2, "settings": {...},
                            "files": {"config.json": [bytes, crc32], ...},
                            "digest": "sha256 of the fields above"}

Checkpoints and snapshots share this format. The manifest is written last and read first. Its digest
covers its own content, so that a changed byte is noticed in any file of the folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pdllm_jax.downloads import check_download
from pdllm_jax.rules import listed
from pdllm_jax.text_files import read_text

MANIFEST = "manifest.json"
# Stays in a processor's cache.
_READ_BYTES = 256 << 10


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read or written; the message names the file or the tensor."""


@contextlib.contextmanager
def errors_as(kind: type[ValueError], problem: str) -> Iterator[None]:
    """Raises every error as one of the kind: Orbax, TensorStore and PyTorch raise many classes."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{problem}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, without TensorStore's dump of its settings."""
    line = next(iter(str(error).splitlines()), "") or repr(error)
    return line.partition(" [tensorstore_spec=")[0]


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
    advice: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Args:
      settings: JSON object; its fields belong to the kind.
      files: [bytes, CRC-32 as of zlib] of every file but manifest.json, by path in the folder.
    """

    folder: Path
    kind: FolderKind
    settings: Mapping[str, Any]
    files: Mapping[str, list[int]]

    def check(self, largest: float = math.inf) -> None:
        """Compares the size of every file, and the checksums of files of at most `largest` bytes.

        Ignores files beside the manifest that it does not list.

        Raises:
          kind.error: names the first file that is missing, has changed or is not part of a folder.
        """
        with errors_as(self.kind.error, f"{self.kind.name} {self.folder}"):
            for name, (nbytes, _) in self.files.items():
                path = self.folder / name
                if not path.is_file():
                    raise ValueError(f"{name} is missing")
                if (size := path.stat().st_size) != nbytes:
                    raise ValueError(f"{name} has {size} bytes, {nbytes} were written")
            for name in _files(self.folder):
                if "/" in name and name not in self.files:
                    raise ValueError(f"{name} is not part of the {self.kind.name}")
            small = [name for name, (nbytes, _) in self.files.items() if nbytes <= largest]
            for name, record in _records(self.folder, small).items():
                if record != self.files[name]:
                    raise ValueError(f"{name} has changed: its checksum differs")


def write_manifest(folder: Path, kind: FolderKind, settings: Mapping[str, Any]) -> None:
    """Writes manifest.json, which covers everything that the folder holds by then."""
    files = _records(folder, [name for name in _files(folder) if name != MANIFEST])
    content = {"kind": kind.name, "version": kind.version, "settings": settings, "files": files}
    (folder / MANIFEST).write_bytes(_encode(content))


def read_manifest(folder: Path, kind: FolderKind) -> Manifest:
    """Reads manifest.json and checks its digest; looks at no other file.

    Raises:
      kind.error: folder or manifest do not exist, are of another kind or version, or the manifest
        has changed since it was written.
    """
    path = folder / MANIFEST
    with errors_as(kind.error, f"{kind.name} {folder}"):
        if not folder.is_dir():
            raise ValueError("not a directory")
        if not path.is_file():
            raise ValueError(f"{MANIFEST} is missing; {kind.advice}")
        raw = read_json(path)
        if (stated := (raw.get("kind"), raw.get("version"))) != (kind.name, kind.version):
            form = "{!r:.60} of format version {!r:.60}, only a {!r} of version {} can be read; {}"
            problem = form.format(*stated, kind.name, kind.version, kind.advice)
            raise ValueError(f"{MANIFEST} is of a {problem}")
        raw.pop("digest", None)
        # Byte for byte: a changed byte is refused wherever it stands.
        if _encode(raw) != path.read_bytes():
            raise ValueError(f"{MANIFEST} has changed since it was written")
        return Manifest(folder, kind, raw["settings"], raw["files"])


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object without repeated keys.

    Raises:
      CheckpointError: the file does not exist, is not a regular file or holds something else.
    """
    if not path.is_file():  # a pipe would never answer
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(name for name, _ in pairs)
        if repeated := [repr(name) for name, count in counts.items() if count > 1]:
            raise CheckpointError(f"{path} repeats the key {listed(repeated)}")
        return dict(pairs)

    try:
        check_download(path)
        text = read_text(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None
    with errors_as(CheckpointError, f"{path} is not valid JSON"):
        result = json.loads(text, object_pairs_hook=unique)
    if not isinstance(result, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return result


def _encode(content: Mapping[str, Any]) -> bytes:
    """Returns the text of manifest.json, the same bytes for the same content."""
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**content, "digest": digest}, indent=1, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[str]:
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _records(folder: Path, names: list[str]) -> dict[str, list[int]]:
    with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(lambda x: _record(folder / x), names), strict=True))


def _record(path: Path) -> list[int]:
    checksum, nbytes, buffer = 0, 0, memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            nbytes += count
    return [nbytes, checksum]
