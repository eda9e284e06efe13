"""A PyTorch .bin, as torch.save writes it since 1.6, read without PyTorch and without unpickling.

It is a zip archive, nothing compressed: data.pkl describes the tensors (torch_index.py), and each
storage is a file data/<key>, whose bytes are read where they lie.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.shards import (
    FLOATS,
    Read,
    SourceTensor,
    file_range,
    open_regular,
    unreadable,
)
from convert.torch_index import (
    MAX_INDEX_BYTES,
    BrokenFileError,
    Interpreter,
    Record,
    StridedTensor,
    kind_of,
    refuse,
)
from pdllm_jax.storage.checkpoint import CheckpointError

# PyTorch's reader takes these; torch.save writes 3.
_VERSIONS = [b"%d" % number for number in range(1, 11)]
_LOCAL_HEADER = 30  # bytes of a zip entry before its name
_UTF8, _NOT_PLAIN = 0x800, 0x2061  # flags of an entry
_FOLDER = 0x10  # attribute of an entry, for which PyTorch leaves memory as it finds it


def open_bin(path: Path) -> list[SourceTensor]:
    """The tensors of a PyTorch file, from front to back."""
    descriptor = open_regular(path)
    with open(descriptor, "rb", buffering=0) as file:
        try:
            content = _read(file)
        except BrokenFileError as error:
            raise CheckpointError(f"{path} is corrupt or not a file of weights: {error}") from None
        except (zipfile.BadZipFile, struct.error, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is truncated, corrupt, or in PyTorch's format from before 1.6: "
                f"{error!s:.200}"
            ) from None
    if type(content) is not dict:
        raise CheckpointError(f"{path} holds {kind_of(content)}, not a dict of tensors")
    tensors = []
    for name, value in content.items():
        if type(name) is not str or type(value) is not StridedTensor:
            raise CheckpointError(f"{path}: entry {name!r:.200} is not a tensor")
        reader: Any = unreadable
        if value.dtype in FLOATS:
            reader = functools.partial(_strided, path, value)
            if value.contiguous:
                reader = functools.partial(
                    file_range, path, value.begin, FLOATS[value.dtype], math.prod(value.shape)
                )
        tensors.append(SourceTensor(name, value.shape, value.dtype, path, value.begin, reader))
    return tensors


@contextlib.contextmanager
def _strided(path: Path, tensor: StridedTensor) -> Iterator[Read]:
    """Reads a tensor that was saved as a view, such as a transposed one; all its span at once."""
    dtype = FLOATS[tensor.dtype]
    values = np.empty(tensor.span, dtype)
    with file_range(path, tensor.begin, dtype, tensor.span) as read_span:
        read_span(0, values)
    strides = [by * dtype.itemsize for by in tensor.strides]
    flat = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False).flat

    def read(start: int, out: np.ndarray) -> None:
        out[:] = flat[start : start + out.size]

    yield read


def _read(file: io.FileIO) -> Any:
    """What data.pkl describes."""
    with zipfile.ZipFile(_Bounded(file)) as archive:
        records = _records(file, archive.infolist())

    def content(record: Record) -> bytes:
        if record.nbytes > MAX_INDEX_BYTES:
            refuse(f"an index of {record.nbytes} bytes")
        file.seek(record.begin)
        return file.read(record.nbytes)

    version = content(records["version"])
    if version.strip() not in _VERSIONS:
        refuse(f"version {version!r:.99}")
    # PyTorch would swap the bytes in memory.
    if "byteorder" in records and content(records["byteorder"]) != b"little":
        refuse("it is not little-endian")
    return Interpreter(records).run(content(records["data.pkl"]))


class _Bounded(io.RawIOBase):
    """A file that gives what an index may have at most, whatever length an archive claims."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if size > MAX_INDEX_BYTES:
            refuse(f"an index of {size} bytes")
        return self._file.read(MAX_INDEX_BYTES if size < 0 else size)


def _records(file: io.FileIO, entries: list[zipfile.ZipInfo]) -> dict[str, Record]:
    """The archive's files by their names below its one folder."""
    # An archive may stand behind other bytes: zipfile would find it, PyTorch would not.
    if not entries or min(entry.header_offset for entry in entries) != 0:
        refuse("an archive that does not begin where the file does")
    size = os.fstat(file.fileno()).st_size
    top = entries[0].filename.partition("/")[0]
    records: dict[str, Record] = {}
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if folder != top or not name or name in records:
            refuse(f"{entry.filename!r:.99}, twice or where nothing should be")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            refuse(f"{entry.filename!r:.99} is compressed")
        if entry.flag_bits & _NOT_PLAIN or entry.external_attr & _FOLDER:
            refuse(f"{entry.filename!r:.99} is encrypted, patched or a folder")
        file.seek(entry.header_offset)
        signature, length, extra = struct.unpack("<4s22xHH", file.read(_LOCAL_HEADER))
        here = file.read(length).decode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
        if signature != b"PK\3\4" or here != entry.orig_filename:
            refuse(f"{entry.filename!r:.99} is not where the list of files places it")
        # The extra field fills up to a multiple of the storages' alignment.
        begin = entry.header_offset + _LOCAL_HEADER + length + extra
        if begin + entry.file_size > size:
            refuse(f"{entry.filename!r:.99} goes on behind the end of the file")
        records[name] = Record(begin, entry.file_size)
    for name in ("data.pkl", "version"):
        if name not in records:
            refuse(f"no {name}")
    return records
