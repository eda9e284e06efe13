"""A folder with a PyTorch checkpoint: which files, which tensors, and what contradicts what.

Read are, in this order of preference: model.safetensors.index.json with its shards, a single
model.safetensors, pytorch_model.bin.index.json with its shards, a single pytorch_model.bin. A
folder that holds both formats is read from safetensors. No code from the folder is ever run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from convert.mapping import IGNORED, Target
from convert.shards import FLOATS, SourceTensor, open_safetensors
from convert.torch_file import open_bin
from pdllm_jax.storage.checkpoint import CONFIG, MANIFEST, CheckpointError, read_json

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

# What travels along with the weights so that the result is enough by itself; never code.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened PyTorch checkpoint.

    tensors: by name, none of them read yet.
    problems: contradictions between index and shards, one line each.
    """

    folder: Path
    tensors: Mapping[str, SourceTensor]
    problems: tuple[str, ...]


def inside(folder: Path, name: str) -> Path:
    """The path of a file that must lie in `folder`; CheckpointError where it would not.

    Symbolic links may lead out of the folder in one case: Hugging Face's cache, where
    snapshots/<revision>/<file> links into the blobs/ beside snapshots/.
    """
    relative = PurePosixPath(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder} names a file outside of itself: {name!r}")
    path = folder / relative
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs the file says so
    except (OSError, ValueError) as error:
        # Too long a name, a ring of links, what no file system can spell.
        raise CheckpointError(
            f"{folder} names a file that can't be: {name!r:.99} ({error})"
        ) from None
    root = Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link that leads outside the folder")
    return path


def open_source(folder: Path) -> Source:
    """Lists the tensors of a PyTorch checkpoint; CheckpointError where a file is unreadable."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (BIN_INDEX, BIN)):
        if (folder / index).exists():
            return _open_sharded(folder, index, single)
        if (folder / single).exists():
            return _open_files(folder, [single], None)
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is a converted checkpoint already (--reverse goes back)")
    raise CheckpointError(
        f"{folder} holds no weights: no {SAFETENSORS}, {BIN} or the index of either"
    )


def _open_sharded(folder: Path, index: str, single: str) -> Source:
    weight_map = read_json(inside(folder, index)).get("weight_map")
    where = folder / index
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{where} names no file for tensor {name!r}: {file!r}")
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not inside(folder, file).exists()]
    if absent:
        raise CheckpointError(f"{where} names absent files: {', '.join(map(repr, absent))}")
    if (folder / single).exists() and single not in files:
        raise CheckpointError(f"{folder} holds {single} and {index}, which does not name it")
    return _open_files(folder, files, weight_map)


def _open_files(folder: Path, files: list[str], weight_map: Mapping[str, str] | None) -> Source:
    tensors: dict[str, SourceTensor] = {}
    holders: dict[str, list[str]] = {}
    for file in files:
        path = inside(folder, file)
        opened = open_bin(path) if file.endswith((".bin", ".pt")) else open_safetensors(path)
        for tensor in opened:
            holders.setdefault(tensor.name, []).append(file)
            tensors[tensor.name] = tensor
    problems = [
        f"duplicate {name!r} in {' and '.join(held)}"
        for name, held in holders.items()
        if len(held) > 1
    ]
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
    return Source(folder, tensors, tuple(problems))


def check_depth(source: Source, n_layers: int) -> None:
    """Refuses a config.json with more layers than there are tensors, before anything is listed."""
    if n_layers > len(source.tensors):
        raise CheckpointError(
            f"{source.folder / CONFIG} says n_layers {n_layers}, but the checkpoint holds "
            f"{len(source.tensors)} tensors"
        )


def match(source: Source, targets: Mapping[str, Target], optional: Mapping[str, Target]) -> None:
    """Compares a checkpoint with what its config demands.

    targets: tensors that must be there. optional: tensors that may be.
    Raises one CheckpointError that lists every contradiction, missing, unknown or misshaped tensor
    and every unsupported dtype.
    """
    problems = list(source.problems)
    problems += [f"missing {name!r}" for name in targets if name not in source.tensors]
    for name, tensor in source.tensors.items():
        target = targets.get(name) or optional.get(name)
        if target is None:
            if not IGNORED.fullmatch(name):
                problems.append(f"unknown {name!r} in {tensor.file.name}")
            continue
        if tensor.shape != target.shape:
            problems.append(
                f"misshaped {name!r}: {list(tensor.shape)} in {tensor.file.name}, "
                f"{list(target.shape)} by {CONFIG}"
            )
        if tensor.dtype not in FLOATS:
            problems.append(
                f"unsupported dtype of {name!r}: {tensor.dtype} in {tensor.file.name} "
                f"({', '.join(FLOATS)} are)"
            )
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise CheckpointError(f"{source.folder} has {count}: {'; '.join(problems)}")
