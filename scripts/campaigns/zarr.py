"""Folders of uncompressed Zarr arrays: made broken, and read by NumPy alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder, by its path within."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """The folder holds these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_strange(path: Path, what: str, bait: Path) -> None:
    """Removes the file, or makes it a link to the bait, a pipe or a folder; or adds "more"."""
    if what == "more":
        (path.parent / "more").write_bytes(b"0")
        return
    path.unlink()
    if what == "link":
        os.symlink(bait, path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()


def read(files: Mapping[str, bytes], prefix: str, shape: Sequence[int], dtype: str) -> np.ndarray:
    """The array whose files begin with `prefix`, by hand."""
    kind = numpy_dtype(dtype)
    out = np.zeros(tuple(shape), kind)
    if out.size == 0:
        return out
    chunks = json.loads(files[f"{prefix}.zarray"])["chunks"]
    for place in np.ndindex(*[n // c for n, c in zip(shape, chunks, strict=True)]):
        content = files[prefix + (".".join(map(str, place)) or "0")]
        window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks, strict=True))
        out[window] = np.frombuffer(content, kind).reshape(chunks)
    return out


def numpy_dtype(name: str) -> np.dtype:
    """bfloat16 too."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
