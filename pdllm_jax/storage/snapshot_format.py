"""The manifest of a KV snapshot: what it says, how it is written, and what it must match.

    FOLDER/snapshot.json   the manifest, written last
    FOLDER/arrays/         Orbax checkpoint of a flat dict of arrays, uncompressed Zarr

Nothing that is read here is trusted: sizes are bounded before anything is read or allocated, and no
name, type or setting from a file decides more than a comparison. docs/snapshots.md has the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import jax.numpy as jnp

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.network.config import ConfigError
from pdllm_jax.storage.checkpoint import CheckpointError, parse_json
from pdllm_jax.storage.fingerprint import ModelIdentity

MANIFEST = "snapshot.json"
ARRAYS = "arrays"
FORMAT = "pdllm-jax KV snapshot"
VERSION = 2
# A document of a million tokens at LLaDA-8B's shapes has some 10^4 files, of 100 bytes each here.
MAX_MANIFEST_BYTES = 16 << 20
DTYPES = ("bfloat16", "float16", "float32", "int32", "uint32", "bool")
# Beyond any document; keeps products of sizes small.
_MAX_SIZE = 1 << 40

# Settings that are functions of the caller's and never part of a snapshot.
CODE = ("unmask",)

Holds = Literal["document", "selection", "state"]


class SnapshotError(ValueError):
    """A snapshot that is damaged, is not the one that is wanted, or can't be written.

    field: what is wrong, as "rope.theta" or a file's name; found, wanted: where two values were
    compared; None otherwise.
    """

    def __init__(
        self, message: str, *, field: str = "", found: Any = None, wanted: Any = None
    ) -> None:
        super().__init__(message)
        self.field, self.found, self.wanted = field, found, wanted


def refusal(
    folder: Path, field: str, message: str = "", *, found: Any = None, wanted: Any = None
) -> SnapshotError:
    """The error that names the snapshot and the field, and both values where there are two."""
    says = message or f"is {_brief(found)} where {_brief(wanted)} is wanted"
    return SnapshotError(
        f"snapshot {folder}: {field} {says}", field=field, found=found, wanted=wanted
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """An array of a snapshot: shape, and dtype as one of DTYPES."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file under arrays/: its bytes, and their CRC-32 (that of zlib)."""

    nbytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a snapshot holds, and what it was made by and for.

    model: `ModelIdentity` as JSON, without what `rope` says.
    rope: base, scaling and head size: what the keys are rotated by.
    tokenizer: `tokenizer_fingerprint`; None where the ids came from elsewhere.
    document: `document_fingerprint`; None where the cache is not part of the snapshot.
    selecting, decode: of a prepared request; None for a document.
    flags: static fields of the pytrees.
    arrays: by name; those of size 0 have no files. files: by path relative to the folder.
    """

    holds: Holds
    model: Mapping[str, Any]
    rope: Mapping[str, Any]
    tokenizer: str | None
    document: str | None
    chunking: ChunkConfig
    selecting: SelectionConfig | None
    decode: DecodeConfig | None
    flags: Mapping[str, Any]
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """Canonical: the same manifest is the same bytes."""
        content = _content(self)
        text = json.dumps({**content, "digest": _digest(content)}, indent=1, sort_keys=True)
        return (text + "\n").encode()


def model_fields(identity: ModelIdentity) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Manifest.model` and `Manifest.rope` of a model."""
    config = dataclasses.asdict(identity.config)
    rope = {
        "theta": config.pop("rope_theta"),
        "scaling": config.pop("rope_scaling"),
        "head_dim": identity.config.head_dim,
    }
    return {**config, "dtype": identity.dtype, "weights": identity.weights}, rope


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a snapshot, whole and of this version; its files are not looked at.

    Raises SnapshotError.
    """
    if not folder.is_dir():
        raise refusal(folder, "folder", "does not exist, or is none")
    content = read_file(folder, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        raw = parse_json(content, MANIFEST)
    except CheckpointError as error:
        raise refusal(folder, MANIFEST, f"is unreadable: {error}") from None
    for field, wanted in (("format", FORMAT), ("version", VERSION)):
        found = raw.get(field)
        if type(found) is not type(wanted) or found != wanted:
            raise refusal(folder, field, found=found, wanted=wanted)
    try:
        manifest = _parse(raw)
    except (ConfigError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise refusal(folder, MANIFEST, f"is malformed: {_brief(error)}") from None
    # Byte for byte: what was altered is refused wherever it was altered, if only a space.
    if manifest.to_json() != content:
        raise refusal(folder, MANIFEST, "was altered: its digest is another")
    return manifest


def check_matches(
    folder: Path, manifest: Manifest, identity: ModelIdentity, tokenizer: str | None
) -> None:
    """Refuses, by name, a snapshot of another model, dtype, RoPE setting or tokenizer.

    tokenizer: fingerprint of the one at hand; None compares nothing.
    """
    model, rope = model_fields(identity)
    for kind, found, wanted in (("rope", manifest.rope, rope), ("model", manifest.model, model)):
        for name in sorted(found.keys() | wanted.keys(), key=lambda name: name == "weights"):
            if name not in found or name not in wanted or not _same(found[name], wanted[name]):
                raise refusal(
                    folder, f"{kind}.{name}", found=found.get(name), wanted=wanted.get(name)
                )
    if tokenizer is not None and manifest.tokenizer != tokenizer:
        raise refusal(folder, "tokenizer", found=manifest.tokenizer, wanted=tokenizer)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file that the manifest lists is there in full length, and nothing else is.

    Links, pipes and devices are refused. Contents are not read.
    """
    found: dict[str, int] = {}

    def walk(path: Path, within: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{within}{entry.name}"
                mode = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(mode.st_mode) and name.count("/") < 2:
                    walk(Path(entry.path), f"{name}/")
                elif not stat.S_ISREG(mode.st_mode):
                    raise refusal(folder, name, "is no regular file")
                elif name not in manifest.files:
                    raise refusal(folder, name, "is not part of the snapshot")
                else:
                    found[name] = mode.st_size

    arrays = folder / ARRAYS
    if arrays.is_symlink() or not arrays.is_dir():
        raise refusal(folder, ARRAYS, "is missing, or no folder")
    walk(arrays, f"{ARRAYS}/")
    for name, record in manifest.files.items():
        if name not in found:
            raise refusal(folder, name, "is missing")
        if found[name] != record.nbytes:
            raise refusal(
                folder, name, f"has {found[name]} bytes where {record.nbytes} were written"
            )


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """A regular file of the folder, of at most `limit` bytes; links are not followed."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise refusal(folder, name, f"can not be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refusal(folder, name, "is no regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise refusal(folder, name, f"is larger than {limit} bytes")
    return content


def _same(found: Any, wanted: Any) -> bool:
    """Equal as JSON, types included: true is not 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def settings(value: Any) -> dict[str, Any] | None:
    """The fields of a config, as a manifest has them: without those that hold functions."""
    if value is None:
        return None
    return value.to_flat() if hasattr(value, "to_flat") else dataclasses.asdict(value)


def _content(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "holds": manifest.holds,
        "model": dict(manifest.model),
        "rope": dict(manifest.rope),
        "tokenizer": manifest.tokenizer,
        "document": manifest.document,
        "chunking": settings(manifest.chunking),
        "selecting": settings(manifest.selecting),
        "decode": settings(manifest.decode),
        "flags": dict(manifest.flags),
        "arrays": {k: [list(v.shape), v.dtype] for k, v in manifest.arrays.items()},
        "files": {k: [v.nbytes, v.crc32] for k, v in manifest.files.items()},
    }


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(raw: Mapping[str, Any]) -> Manifest:
    if raw["holds"] not in get_args(Holds):
        raise ValueError(f"holds {raw['holds']!r}")
    for name in ("model", "rope", "flags", "arrays", "files"):
        if not isinstance(raw[name], dict):
            raise ValueError(f"{name} is no object")
    for name in ("tokenizer", "document"):
        if raw[name] is not None and not isinstance(raw[name], str):
            raise ValueError(f"{name} is no string")
    chunking = _settings(ChunkConfig, raw["chunking"])
    if chunking is None:
        raise ValueError("chunking is missing")
    return Manifest(
        holds=raw["holds"],
        model=raw["model"],
        rope=raw["rope"],
        tokenizer=raw["tokenizer"],
        document=raw["document"],
        chunking=chunking,
        selecting=_settings(SelectionConfig, raw["selecting"]),
        decode=_settings(DecodeConfig, raw["decode"]),
        flags=raw["flags"],
        arrays={name: _array(entry) for name, entry in raw["arrays"].items()},
        files={_relative(name): _file(entry) for name, entry in raw["files"].items()},
    )


def _settings(kind: Any, raw: Any) -> Any:
    """Settings as their class validates them; a field more or less is refused."""
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.keys() - inspect.signature(kind).parameters.keys():
        raise ValueError(f"{kind.__name__} has other fields")
    for field in dataclasses.fields(kind):
        if field.type == "bool" and not isinstance(raw.get(field.name), bool):
            raise ValueError(f"{field.name} must be true or false")
    made = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    if raw.keys() != (settings(made) or {}).keys():
        raise ValueError(f"{kind.__name__} has other fields")
    return made


def _array(entry: Any) -> ArrayRecord:
    shape, dtype = entry
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"shape {_brief(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {_brief(dtype)}")
    record = ArrayRecord(tuple(_size(n) for n in shape), dtype)
    if record.nbytes > _MAX_SIZE:
        raise ValueError(f"an array of {record.nbytes} bytes")
    return record


def _file(entry: Any) -> FileRecord:
    nbytes, crc32 = entry
    if _size(crc32) >= 1 << 32:
        raise ValueError(f"checksum {crc32}")
    return FileRecord(_size(nbytes), crc32)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError(f"{_brief(value)} is not a size")
    return value


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    inside = path.parts[:1] == (ARRAYS,) and ".." not in path.parts and str(path) == name
    if not inside or not 2 <= len(path.parts) <= 3 or "\0" in name:
        raise ValueError(f"{_brief(name)} is not a file of {ARRAYS}/")
    return name
