"""A folder with a PyTorch checkpoint: its files, its tensors, and what contradicts what.

Read are, in this order of preference: model.safetensors.index.json with its shards, a single
model.safetensors, pytorch_model.bin.index.json with its shards, a single pytorch_model.bin. No code
from the folder is ever executed: safetensors holds no code, and PyTorch reads weights only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from convert.folders import check_links, missing, no_weights
from convert.mapping import IGNORED, Target
from convert.names import rename
from pdllm_jax.downloads import TOKENIZER_FILES, check_download
from pdllm_jax.rules import listed
from pdllm_jax.storage.checkpoint import CONFIG, DTYPES
from pdllm_jax.storage.manifest import (
    MANIFEST,
    CheckpointError,
    errors_as,
    read_json,
    reason,
)

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS, BIN_INDEX, BIN)
# The safetensors library's limit of a header; no file has more bytes than the other.
_HEADER, _LARGEST = 100_000_000, 1 << 41
# Elements that are checked and cast at a time; 2 to 4 MB, which stay in the cache.
BLOCK = 1 << 20

_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor that has not been read.

    Args:
      dtype: one of DTYPES, or the file's name of one that is not supported.
      order: sorts tensors so that files are read from front to back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    order: tuple[str, int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def load(self) -> NDArray[Any]:
        """Reads the tensor as it is stored."""
        return (_load_bin if _is_bin(self.file) else _load_safetensors)(self.file, self.name)

    def read(self, dtype: str) -> NDArray[Any]:
        """Reads the tensor in `dtype`, rounded to nearest even where that is narrower.

        Raises:
          CheckpointError: names a value that is NaN, infinite or too large for the dtype.
        """
        source = self.load().reshape(-1)
        result = source if dtype == source.dtype.name else np.empty(source.size, dtype)
        for start in range(0, source.size, BLOCK):
            part = source[start : start + BLOCK]
            self._check(part, start, "is NaN or infinite")
            if result is not source:
                with np.errstate(over="ignore"):
                    result[start : start + BLOCK] = part.astype(dtype)
                self._check(result[start : start + BLOCK], start, f"is too large for {dtype}")
        return result.reshape(self.shape)

    def _check(self, values: NDArray[Any], start: int, complaint: str) -> None:
        # An exponent of all ones is Inf or NaN.
        mask = np.array(np.inf, values.dtype).view(f"u{values.itemsize}")
        exponents = values.view(mask.dtype) & mask
        if exponents.max() == mask:
            problem = f"{complaint} (element {start + int(np.argmax(exponents == mask))})"
            raise CheckpointError(f"{self.file}: tensor {self.name!r} has a value that {problem}")


@dataclasses.dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint whose tensors have not been read.

    Args:
      tensors: by their published names.
      problems: contradictions between index and files, one line each.
      note: about the prefix of all names, where it is not the published one.
      family: whose names the tensors have, None if that is not clear.
    """

    folder: Path
    tensors: Mapping[str, SourceTensor]
    problems: tuple[str, ...]
    note: str = ""
    family: str | None = None


def open_source(folder: Path, *, follow_links: bool = False) -> Source:
    """Lists the tensors of a PyTorch checkpoint.

    Args:
      follow_links: reads files that symbolic links place outside of the folder.

    Raises:
      CheckpointError: the folder holds no weights, or a file cannot be read.
    """
    if not folder.is_dir():
        is_file = folder.is_file()
        problem = "is a file: give the folder that holds it" if is_file else "is not a directory"
        raise CheckpointError(f"{folder} {problem}")
    check_links(folder, (CONFIG, *TOKENIZER_FILES, *WEIGHT_FILES), follow_links)
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (BIN_INDEX, BIN)):
        if (folder / index).exists():
            return _open_sharded(folder, index, single, follow_links)
        if (folder / single).exists():
            return open_files(folder, [single])
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is converted already (--reverse converts it back)")
    wanted = f"{SAFETENSORS}, {BIN} or the index of either"
    raise CheckpointError(f"{folder} {no_weights(folder, wanted)}")


def _open_sharded(folder: Path, index: str, single: str, follow_links: bool) -> Source:
    where = folder / index
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{where} names no file for tensor {name!r}: {file!r}")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{where} names a file outside of the folder: {file!r}")
    files = sorted(set(weight_map.values()))
    check_links(folder, files, follow_links)
    if absent := [file for file in files if not os.path.isfile(folder / file)]:
        raise CheckpointError(f"{where} names absent files: {missing(folder, absent)}")
    if (folder / single).exists() and single not in files:
        raise CheckpointError(f"{folder} holds {single} and {index}, which does not name it")
    return open_files(folder, files, weight_map)


def open_files(
    folder: Path, files: list[str], weight_map: Mapping[str, str] | None = None
) -> Source:
    """Lists the tensors of some files of a folder, and compares them with their index."""
    tensors: dict[str, SourceTensor] = {}
    holders: dict[str, list[str]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():  # a pipe would never answer
            raise CheckpointError(f"{path} is not a regular file")
        _check_file(path)
        rows = _list_bin(path) if _is_bin(path) else _list_safetensors(path)
        for position, (name, (shape, dtype)) in enumerate(rows.items()):
            tensors[name] = SourceTensor(name, tuple(shape), dtype, path, (file, position))
            holders.setdefault(name, []).append(file)
    problems = [f"duplicate {k!r} in {' and '.join(v)}" for k, v in holders.items() if len(v) > 1]
    if weight_map is not None:
        problems += [
            f"{name!r} is not in {file}, where the index places it"
            for name, file in weight_map.items()
            if file not in holders.get(name, [])
        ]
        problems += [
            f"{name!r} is in {held[0]} but not in the index"
            for name, held in holders.items()
            if name not in weight_map and not IGNORED.fullmatch(name)
        ]
    names, note, problem, family = rename(tensors)
    problems[:0] = [problem] if problem else []
    renamed: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        if names[name] in renamed:
            problems.append(f"{renamed[names[name]].name!r} and {name!r} are the same tensor")
        renamed[names[name]] = tensor
    return Source(folder, renamed, tuple(problems), note, family)


def _check_file(path: Path) -> None:
    """Raises CheckpointError for a file that is no file of weights, or not all of it."""
    try:
        check_download(path, weights=True)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None
    if path.with_name(f"{path.name}.aria2").exists():  # aria2 gives a file its size at once
        raise CheckpointError(f"{path} is an incomplete download of aria2: finish it")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{path} holds quantised weights in GGUF: only PyTorch's convert")


def _is_bin(path: Path) -> bool:
    return path.suffix in (".bin", ".pt")


def _list_safetensors(path: Path) -> dict[str, tuple[Sequence[int], str]]:
    try:
        with safe_open(path, "numpy") as file:
            rows = [(name, file.get_slice(name)) for name in file.offset_keys()]
            forms = {name: (row.get_shape(), row.get_dtype()) for name, row in rows}
    except Exception as error:
        problem = _short(path) or f"is truncated or corrupt: {reason(error)}: download it again"
        raise CheckpointError(f"{path} {problem}") from error
    return {k: (shape, _SAFETENSORS_DTYPES.get(x, x)) for k, (shape, x) in forms.items()}


def _short(path: Path) -> str:
    """Describes a file that is shorter than its header says; returns "" for another problem."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            wanted = 8 + length
            if length > _HEADER:
                return ""
            if wanted <= size:
                rows = json.loads(file.read(length))
                rows.pop("__metadata__", None)
                wanted += max(row["data_offsets"][1] for row in rows.values())
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        return ""
    if not size < wanted < _LARGEST:
        return ""
    return f"is an incomplete download: {size} of {wanted} bytes: download it again"


def _load_safetensors(path: Path, name: str) -> NDArray[Any]:
    # Opened for every tensor: the pages of a file that stays mapped count as resident memory.
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)


def _list_bin(path: Path) -> dict[str, tuple[Sequence[int], str]]:
    problem = f"{path} is an incomplete download, corrupt, or in PyTorch's format from before 1.6"
    with errors_as(CheckpointError, problem), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # PyTorch does not compare the checksums
    if damaged is not None:
        raise CheckpointError(f"{path} is corrupt: the checksum of {damaged!r} differs")
    content = _torch_load(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not hasattr(value, "untyped_storage"):
            raise CheckpointError(f"{path}: entry {name!r:.200} is not a tensor")
    return {k: (x.shape, str(x.dtype).removeprefix("torch.")) for k, x in content.items()}


def _load_bin(path: Path, name: str) -> NDArray[Any]:
    import torch

    tensor = _torch_load(path)[name].detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _torch_load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        problem = "needs PyTorch to be read: pip install 'pdllm-jax[torch]'"
        raise CheckpointError(f"{path} {problem}") from None
    with errors_as(CheckpointError, f"{path} does not hold plain weights"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def match(source: Source, required: Mapping[str, Target], allowed: Mapping[str, Target]) -> None:
    """Compares a checkpoint with the tensors that its config.json requires and allows.

    Raises:
      CheckpointError: lists every contradiction, every missing, unknown or misshaped tensor and
        every unsupported dtype.
    """
    absent = {"missing": [name for name in required if name not in source.tensors]}
    absent |= {"unknown": [name for name in source.tensors if name not in allowed]}
    problems, grouped = list(source.problems), set()
    for what, names in absent.items():
        biases = [name for name in names if name.endswith(".bias")]
        if len(biases) > 1:  # one line for all layers
            other = "needs them" if what == "missing" else "does not have them"
            of = f"{CONFIG} is of a family that {other}"
            problems.append(f"{what} {len(biases)} biases, such as {biases[0]!r}: {of}")
            grouped |= {*biases}
    problems += [f"missing {name!r}" for name in absent["missing"] if name not in grouped]
    for name, tensor in source.tensors.items():
        target = allowed.get(name)
        if target is None:
            if name not in grouped and not IGNORED.fullmatch(name):
                problems.append(f"unknown {name!r} in {tensor.file.name}")
            continue
        if tensor.shape != target.shape:
            shapes = f"{list(tensor.shape)} in {tensor.file.name}, {list(target.shape)} by {CONFIG}"
            problems.append(f"misshaped {name!r}: {shapes}")
        if tensor.dtype not in DTYPES:
            dtypes = f"{tensor.dtype} in {tensor.file.name} ({', '.join(DTYPES)} are)"
            problems.append(f"unsupported dtype of {name!r}: {dtypes}")
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise CheckpointError(f"{source.folder} has {count}: {listed(problems, '; ')}")
