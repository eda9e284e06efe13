"""The conversion itself: a PyTorch folder to a folder with Orbax parameters.

Tensors are streamed: one is read and checked while those before it are written, and what is held at
a time is bounded (`stream.BUFFER_BYTES`, or the largest tensor). The result appears under its
name when it is complete, verified (if asked for) and on disk; see `pdllm_jax.staging`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from convert import stream
from convert.mapping import LM_HEAD, Target, lm_head, targets, tree
from convert.shards import FLOATS, SourceTensor
from convert.sources import (
    COMPANIONS,
    SAFETENSORS_INDEX,
    Source,
    check_depth,
    inside,
    match,
    open_source,
)
from convert.values import blocks, materialize
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.checkpoint import (
    CONFIG,
    MANIFEST,
    PARAMS,
    CheckpointError,
    Manifest,
    TensorRecord,
)
from pdllm_jax.storage.manifest import FolderKind, parse_json

CHECKPOINT = FolderKind("checkpoint", 1, CheckpointError)
OutputDtype = Literal["keep", "bfloat16", "float32"]
# (stage, bytes done since the last call, bytes in all); stages are "convert" and "verify".
Progress = Callable[[str, int, int], None]

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done.

    nbytes: of the parameters written. ignored: tensors of the source that were left out.
    """

    destination: Path
    tensors: int
    nbytes: int
    dtype: str
    ignored: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: OutputDtype = "keep",
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Converts a PyTorch LLaDA checkpoint to a folder that `pdllm_jax.load_model` reads.

    source: folder with config.json and safetensors or .bin files, bfloat16, float16 or float32.
    dtype: "keep" copies every tensor's bits; else all are cast, rounding to nearest even.
    verify: the result is read back and compared, bit by bit, before it gets its name.
    overwrite: replaces a checkpoint that stands at `destination`.

    Raises CheckpointError or ConfigError for bad input, an occupied destination or a full disk;
    nothing is left behind then.
    """
    folder, target = Path(source), Path(os.path.abspath(destination))
    if dtype not in ("keep", "bfloat16", "float32"):
        raise CheckpointError(f"dtype {dtype!r} is not one of keep, bfloat16, float32")
    check_apart(folder, target)
    staged = AtomicFolder(target, CHECKPOINT, is_checkpoint, overwrite)
    staged.check()
    opened = open_source(folder)
    config_bytes = inside(folder, CONFIG).read_bytes()
    config = ModelConfig.from_dict(parse_json(config_bytes, str(folder / CONFIG)))
    check_depth(opened, config.n_layers)
    wanted = targets(config)
    match(opened, wanted, {LM_HEAD.source: lm_head(config)})
    if config.weight_tying:
        _check_tied(opened, next(iter(wanted.values())))

    total = sum(opened.tensors[name].nbytes for name in wanted)
    report = count(progress, total)
    leaves = {
        row.path: _Leaf(
            row.path, opened.tensors[row.source], _target_dtype(opened, row, dtype), report
        )
        for row in wanted.values()
    }
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    staged.check_space(nbytes)
    with staged.write() as out:
        stream.save(out / PARAMS, tree(leaves), _Leaf)
        copy_companions(folder, out)
        (out / CONFIG).write_bytes(config_bytes)
        if verify:
            compare(out / PARAMS, {path: leaf.tensor for path, leaf in leaves.items()}, report)
        manifest = _manifest(out, leaves)
        (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    ignored = tuple(sorted(opened.tensors.keys() - wanted.keys()))
    return Report(target, len(leaves), nbytes, manifest.dtype, ignored)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor on its way to Orbax; `dtype` is a name of FLOATS."""

    path: str
    tensor: SourceTensor
    dtype: str
    done: Callable[[str, int], None]

    @property
    def order(self) -> tuple[str, int]:
        return str(self.tensor.file), self.tensor.order

    @property
    def nbytes(self) -> int:
        return self.tensor.size * FLOATS[self.dtype].itemsize

    def load(self, buffer: NDArray[np.uint8]) -> NDArray[Any]:
        array = materialize(self.tensor, self.dtype, buffer)
        self.done("convert", self.tensor.nbytes)
        return array


def compare(
    params: Path, tensors: Mapping[str, SourceTensor], done: Callable[[str, int], None]
) -> None:
    """Compares Orbax parameters with tensors cast to their dtypes, bit by bit.

    tensors: by parameter path. Raises CheckpointError that names the first difference.
    """

    def check(path: str, array: NDArray[Any]) -> None:
        tensor = tensors[path]
        if array.shape != tensor.shape:
            raise CheckpointError(f"verification failed: {path} should not be {array.shape}")
        flat = array.reshape(-1)
        for start, block in blocks(tensor):
            stored = flat[start : start + block.size]
            with np.errstate(over="ignore"):
                expected = block.astype(array.dtype)
            if not np.array_equal(stored.view(np.uint8), expected.view(np.uint8)):
                raise CheckpointError(f"verification failed: {path} differs from {tensor.file}")
        done("verify", tensor.nbytes)

    stream.restore(params, tensors, check)


def count(progress: Progress | None, total: int) -> Callable[[str, int], None]:
    """`progress` with its last argument filled in; what does nothing where there is none."""
    if progress is None:
        return lambda stage, nbytes: None
    return lambda stage, nbytes: progress(stage, nbytes, total)


def check_apart(source: Path, destination: Path) -> None:
    """Refuses to write into, over or around the source."""
    inner, outer = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if inner == outer:
        raise CheckpointError(f"{destination} is the source itself")
    if outer.is_relative_to(inner):
        raise CheckpointError(f"{destination} lies inside the source {source}")
    if inner.is_relative_to(outer):
        raise CheckpointError(f"{destination} contains the source {source}")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what `convert` or `reverse` write, and nothing else."""
    names = {entry.name for entry in folder.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    ours = {CONFIG, MANIFEST, PARAMS, SAFETENSORS_INDEX, *COMPANIONS}
    return CONFIG in names and (MANIFEST in names or bool(weights)) and names <= ours | weights


def copy_companions(source: Path, destination: Path) -> None:
    """Copies the tokenizer's files and licences, which must be files of the folder itself."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(inside(source, name), destination / name)


def _target_dtype(source: Source, row: Target, dtype: OutputDtype) -> str:
    return source.tensors[row.source].dtype if dtype == "keep" else _NAMES[dtype]


def _check_tied(source: Source, embedding: Target) -> None:
    """A tied checkpoint may carry its LM head, if that is the embedding."""
    head = source.tensors.get(LM_HEAD.source)
    if head is None:
        return
    other = source.tensors[embedding.source]
    pairs = zip(blocks(other), blocks(head), strict=True)
    if not all(
        np.array_equal(a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32))
        for (_, a), (_, b) in pairs
    ):
        raise CheckpointError(
            f"{source.folder / CONFIG} ties the LM head to the embedding, but {head.name!r} in "
            f"{head.file.name} differs from {other.name!r}"
        )


def _manifest(folder: Path, leaves: Mapping[str, _Leaf]) -> Manifest:
    names = {name: FLOATS[name].name for name in FLOATS}
    kinds = {leaf.dtype for leaf in leaves.values()}
    params = sorted(path for path in (folder / PARAMS).rglob("*") if path.is_file())
    return Manifest(
        dtype=names[kinds.pop()] if len(kinds) == 1 else "float32",
        tensors=tuple(
            TensorRecord(path, leaf.tensor.shape, names[leaf.dtype], leaf.tensor.name)
            for path, leaf in leaves.items()
        ),
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in params},
    )
