"""One file of tensors, opened lazily and trusted in nothing; here safetensors, in torch_file .bin.

Opening a shard reads its header alone and checks it against the file; values are read later, by
element range, into a buffer that the caller owns. Reads go through `pread`, not through a memory
map, whose pages count as resident.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pdllm_jax.storage.manifest import CheckpointError, parse_json

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
    reader: Callable[[], AbstractContextManager[Read]] = unreadable
    if dtype in FLOATS:
        reader = functools.partial(file_range, path, data + begin, FLOATS[dtype], math.prod(shape))
    return SourceTensor(name, tuple(shape), dtype, path, data + begin, reader), data + end


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def unreadable() -> AbstractContextManager[Read]:
    raise AssertionError("tensors of unsupported dtypes are refused before they are read")
