"""Tensor values: read in blocks, cast, and refused where they are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.shards import FLOATS, SourceTensor
from pdllm_jax.storage.checkpoint import CheckpointError

# Elements; 2 to 4 MB, so that a block is still in the cache when it is checked and cast.
BLOCK = 1 << 20

# An exponent of all ones is Inf or NaN.
_EXPONENT: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}


def first_not_finite(values: NDArray[Any], dtype: str) -> int | None:
    """Index of the first Inf or NaN of a 1-D array whose dtype has that name in FLOATS."""
    unsigned, mask = _EXPONENT[dtype]
    if values.size == 0:
        return None
    exponents = values.view(unsigned) & unsigned(mask)
    return int(np.argmax(exponents == mask)) if exponents.max() == mask else None


def blocks(tensor: SourceTensor) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first element, values) of consecutive blocks; the array is reused by the next one."""
    buffer = np.empty(min(BLOCK, tensor.size), FLOATS[tensor.dtype])
    with tensor.open() as read:
        for start in range(0, tensor.size, BLOCK):
            block = buffer[: min(BLOCK, tensor.size - start)]
            read(start, block)
            yield start, block


def materialize(
    tensor: SourceTensor, dtype: str, buffer: NDArray[np.uint8] | None = None
) -> NDArray[Any]:
    """The whole tensor in `dtype` (a name of FLOATS), rounded to nearest even where it is narrower.

    buffer: memory for it, of exactly its bytes.
    Raises CheckpointError, with tensor, file and element, for NaN, Inf, or a value that the dtype
    can't hold.
    """
    kind = FLOATS[dtype]
    out = np.empty(tensor.size, kind) if buffer is None else buffer.view(kind)
    if tensor.dtype == dtype:
        with tensor.open() as read:
            for start in range(0, tensor.size, BLOCK):
                block = out[start : start + BLOCK]
                read(start, block)
                _check(tensor, start, block, dtype, "is NaN or infinite")
    else:
        for start, source in blocks(tensor):
            _check(tensor, start, source, tensor.dtype, "is NaN or infinite")
            block = out[start : start + BLOCK]
            with np.errstate(over="ignore"):
                block[:] = source.astype(block.dtype)
            _check(tensor, start, block, dtype, f"is too large for {out.dtype.name}")
    return out.reshape(tensor.shape)


def _check(
    tensor: SourceTensor, start: int, values: NDArray[Any], dtype: str, complaint: str
) -> None:
    at = first_not_finite(values, dtype)
    if at is not None:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has a value that {complaint} (element "
            f"{start + at})"
        )
