"""Zarr's metadata of an array, taken by its word only where every byte of it is on the disk.

TensorStore allocates what .zarray asks for before it reads a file, and a request that memory can't
meet ends the process. With neither compression nor filters, and with chunks that divide the shape,
every file has the size of its chunk: then nothing beyond the bytes that lie there is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

METADATA = ".zarray"
# Of any array's metadata. A file of more is not read.
MAX_METADATA_BYTES = 1 << 20

# Zarr's names of the dtypes.
_NAMES = {
    "bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4",
    "int32": "<i4", "uint32": "<u4", "bool": "|b1",
}  # fmt: skip


def check_layout(
    metadata: bytes, files: Mapping[str, int], shape: Sequence[int], dtype: str
) -> None:
    """Compares an array's metadata with what the array is known to be, and with its files.

    metadata: the contents of .zarray, of Zarr's version 2.
    files: bytes of every other file of the array's folder, by name.
    shape, dtype: what the array must have, of size 1 at least; dtype by NumPy's name.

    ValueError says what is wrong.
    """
    try:
        raw = json.loads(metadata)
        chunks = raw["chunks"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError("it is no Zarr metadata") from None
    expected = {
        "zarr_format": 2, "shape": list(shape), "dtype": _NAMES[dtype], "order": "C",
        "compressor": None, "filters": None, "fill_value": None, "dimension_separator": ".",
    }  # fmt: skip
    for key, value in expected.items():
        if raw.get(key) != value:
            raise ValueError(f"{key} is {raw.get(key)!r:.60}, not {value!r:.60}")
    if not isinstance(chunks, list) or len(chunks) != len(shape):
        raise ValueError("its chunks have another rank")
    for size, chunk in zip(shape, chunks, strict=True):
        if type(chunk) is not int or not 0 < chunk <= size or size % chunk:
            raise ValueError(f"chunks {chunks!r:.60} do not divide {list(shape)}")
    grid = [size // chunk for size, chunk in zip(shape, chunks, strict=True)]
    nbytes = math.prod(chunks) * jnp.dtype(dtype).itemsize
    # Counted before they are listed: a grid is as large as its metadata likes.
    if len(files) != math.prod(grid) or set(files.values()) - {nbytes}:
        raise ValueError(f"{math.prod(grid)} files of {nbytes} bytes are wanted")
    if {".".join(map(str, place)) or "0" for place in np.ndindex(*grid)} != files.keys():
        raise ValueError("its files have other names")
