"""One file of tensors: safetensors or a PyTorch .bin, opened lazily and trusted in nothing.

Opening a shard reads its header alone and checks it against the file; values are read later, by
element range, into a buffer that the caller owns. Reads go through `pread` (for a .bin too, once
torch has told where its tensors lie), not through a memory map, whose pages count as resident.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pdllm_jax.checkpoint import CheckpointError, parse_json, reason

# The format's own limit (safetensors' Rust implementation refuses larger headers).
MAX_HEADER_BYTES = 100_000_000
# The product of a million sizes would take hours.
MAX_RANK = 64

FLOATS: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# Bits of every other dtype, to check a header's sizes; a tensor of one of them is refused only if
# it is one that the model needs.
_OTHER_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16,
    "U32": 32, "I32": 32, "F64": 64, "U64": 64, "I64": 64, "C64": 64,
}  # fmt: skip


# (first element, out): fills a 1-D array of the tensor's dtype.
Read = Callable[[int, NDArray[Any]], None]


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor that has not been read.

    dtype: a name of FLOATS, or what the file calls a dtype that is not supported.
    order: where it lies in its file, so that files can be read front to back.
    open: context in which its values can be read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    order: int
    open: Callable[[], AbstractContextManager[Read]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * FLOATS[self.dtype].itemsize


def open_regular(path: Path) -> int:
    """A descriptor for reading; refuses what is no file, such as a pipe that would never answer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return descriptor


def pread_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills `buffer` from `offset` on; CheckpointError where the file ends before."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} can not be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path} is truncated at byte {offset + done}")
        done += count


@contextlib.contextmanager
def file_range(path: Path, offset: int, dtype: np.dtype[Any], size: int) -> Iterator[Read]:
    """Reads elements that lie in a file from byte `offset` on."""
    descriptor = open_regular(path)

    def read(start: int, out: NDArray[Any]) -> None:
        buffer = memoryview(out.view(np.uint8))
        pread_into(descriptor, buffer, offset + start * dtype.itemsize, path)

    try:
        if hasattr(os, "posix_fadvise"):
            # Twice the read-ahead; some systems lack the call, none needs it.
            os.posix_fadvise(descriptor, offset, size * dtype.itemsize, os.POSIX_FADV_SEQUENTIAL)
        yield read
    finally:
        os.close(descriptor)


def open_safetensors(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, after a full check of its header."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no safetensors header")
        prefix = bytearray(8)
        pread_into(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is corrupt: it claims a header of {length} bytes")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: a header of {length} bytes in a file of {size}"
            )
        header = bytearray(length)
        pread_into(descriptor, memoryview(header), 8, path)
    finally:
        os.close(descriptor)
    entries = parse_json(bytes(header), f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise CheckpointError(f"{path} is corrupt: its __metadata__ is no map of strings")
    tensors = [_safetensors_entry(path, name, entry, 8 + length) for name, entry in entries.items()]

    # The data must be covered from end to end, without overlap or hole.
    position = 8 + length
    for tensor, end in sorted(tensors, key=lambda item: (item[0].order, item[1])):
        if tensor.order != position:
            raise CheckpointError(
                f"{path} is corrupt: tensor {tensor.name!r} begins at byte {tensor.order}, the one "
                f"before it ends at {position}"
            )
        position = end
    if position > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes of {position}")
    if position < size:
        raise CheckpointError(f"{path} is corrupt: {size - position} bytes belong to no tensor")
    return [tensor for tensor, _ in tensors]


def _safetensors_entry(path: Path, name: str, entry: Any, data: int) -> tuple[SourceTensor, int]:
    """The tensor and the byte of the file at which it ends."""

    def corrupt(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is corrupt: tensor {name!r} {what}")

    if not isinstance(entry, dict):
        raise corrupt("has no description")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(map(_is_size, shape))):
        raise corrupt(f"has the shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise corrupt(f"has the offsets {offsets!r}")
    if isinstance(dtype, str) and dtype in FLOATS:
        bits = 8 * FLOATS[dtype].itemsize
    elif isinstance(dtype, str) and dtype in _OTHER_BITS:
        bits = _OTHER_BITS[dtype]
    else:
        raise corrupt(f"has the unknown dtype {dtype!r}")
    begin, end = offsets
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise corrupt(f"claims {dtype}{shape}, but {end - begin} bytes")
    reader: Callable[[], AbstractContextManager[Read]] = _unreadable
    if dtype in FLOATS:
        reader = functools.partial(file_range, path, data + begin, FLOATS[dtype], math.prod(shape))
    return SourceTensor(name, tuple(shape), dtype, path, data + begin, reader), data + end


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def open_bin(path: Path) -> list[SourceTensor]:
    """The tensors of a PyTorch file, through PyTorch's restricted unpickler and a memory map."""
    os.close(open_regular(path))
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: reading PyTorch .bin files needs torch, which is not installed"
        ) from None
    # Before 2.6, weights_only could be circumvented (CVE-2025-32434).
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise CheckpointError(
            f"{path}: reading it safely needs torch 2.6 or later, not {torch.__version__}"
        )
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # What torch raises depends on what is broken: RuntimeError, UnpicklingError, KeyError, ...
        raise CheckpointError(
            f"{path} is corrupt or not a file of weights: {reason(error)[:200]}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    maps = _mapped_ranges(path)
    tensors = []
    for order, (name, value) in enumerate(content.items()):
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor")
        dtype = names.get(value.dtype, str(value.dtype))
        reader: Callable[[], AbstractContextManager[Read]] = _unreadable
        if dtype in FLOATS:
            reader = _bin_reader(path, value.detach(), FLOATS[dtype], maps)
        tensors.append(SourceTensor(name, tuple(value.shape), dtype, path, order, reader))
    return tensors


def _check_zip(path: Path) -> None:
    """Refuses archives that would unpack to more than they are, and pickles without end.

    Big-endian files are refused too: torch would swap the bytes in memory, and it is the file's
    bytes that are read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path} is corrupt: {entry.filename!r} is compressed")
                if entry.filename.endswith(".pkl") and entry.file_size > MAX_HEADER_BYTES:
                    raise CheckpointError(f"{path} is corrupt: an index of {entry.file_size} bytes")
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise CheckpointError(f"{path} is not little-endian")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is truncated, corrupt, or in PyTorch's format from before 1.6: {error}"
        ) from None


def _unreadable() -> AbstractContextManager[Read]:
    raise AssertionError("tensors of unsupported dtypes are refused before they are read")


def _bin_reader(
    path: Path, tensor: Any, dtype: np.dtype[Any], maps: list[tuple[int, int, int]]
) -> Callable[[], AbstractContextManager[Read]]:
    """Reads the tensor's bytes from the file itself where they can be located there."""
    import torch

    if tensor.is_contiguous():
        offset = _file_offset(tensor.data_ptr(), tensor.numel() * dtype.itemsize, maps)
        if offset is not None:
            return functools.partial(file_range, path, offset, dtype, tensor.numel())

    @contextlib.contextmanager
    def in_memory() -> Iterator[Read]:
        flat = tensor.contiguous().reshape(-1)
        raw = flat.view(torch.int16) if dtype.itemsize == 2 else flat
        values = raw.numpy().view(dtype)

        def read(start: int, out: NDArray[Any]) -> None:
            out[:] = values[start : start + out.size]

        yield read

    return in_memory


def _mapped_ranges(path: Path) -> list[tuple[int, int, int]]:
    """(first address, end address, file offset) of this process's maps of a file; Linux only."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    ranges = []
    inode, real = str(path.stat().st_ino), os.path.realpath(path)
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] == inode and fields[5] == real:
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((begin, end, int(fields[2], 16)))
    return ranges


def _file_offset(address: int, nbytes: int, maps: list[tuple[int, int, int]]) -> int | None:
    for begin, end, offset in maps:
        if begin <= address and address + nbytes <= end:
            return address - begin + offset
    return None
