"""Where a checkpoint's files lie: snapshots of a cache, links, unfinished downloads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pdllm_jax.rules import listed
from pdllm_jax.storage.checkpoint import CONFIG
from pdllm_jax.storage.manifest import CheckpointError
from pdllm_jax.text_files import read_text

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<kind>\.safetensors|\.bin)")


def snapshot_folder(folder: Path) -> Path:
    """Returns the folder that holds the files: `folder` or, of a Hugging Face cache, a snapshot.

    Raises:
      CheckpointError: the cache holds several snapshots, and refs/main names none of them.
    """
    root = folder.parent if folder.name == "snapshots" else folder
    if (root / CONFIG).exists():
        return folder
    if models := sorted(path.name for path in root.glob("models--*")):
        raise CheckpointError(f"{root} holds several models: give {listed(models, ' or ')} in it")
    snapshots, ref = root / "snapshots", root / "refs" / "main"
    if not snapshots.is_dir():
        return folder
    names = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    try:
        main = read_text(ref).strip() if ref.is_file() else None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if main in names or (main is None and len(names) == 1):
        return snapshots / (main or names[0])
    reason = "there is no refs/main" if main is None else f"refs/main names {main!r:.60}"
    has = f"has the snapshots {listed(names)}" if names else "is empty: download the model again"
    raise CheckpointError(f"{snapshots} {has}, and {reason}: give the path of one snapshot")


def check_links(folder: Path, names: Iterable[str], follow_links: bool) -> None:
    """Checks the files of a folder that are symbolic links.

    Links may lead within the folder and, from a snapshot, within its Hugging Face cache.

    Raises:
      CheckpointError: a link leads nowhere; or elsewhere, and `follow_links` is False.
    """
    root = Path(os.path.realpath(folder))
    inside = root.parent.parent if root.parent.name == "snapshots" else root
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        target = os.path.realpath(path)
        if not os.path.exists(target):
            problem = "which does not exist: the download is incomplete, download it again"
            raise CheckpointError(f"{path} is a link to {target}, {problem}")
        if not follow_links and not Path(target).is_relative_to(inside):
            advice = "pdllm-convert --follow-links reads it"
            raise CheckpointError(f"{path} is a link to {target}, outside of the folder: {advice}")


def unfinished(folder: Path) -> list[str]:
    """Returns the names of files that a download has not finished."""
    root = Path(os.path.realpath(folder))
    places = [root, root / ".cache" / "huggingface" / "download"]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    files = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path.name for path in files if path.suffix in _UNFINISHED)


def missing(folder: Path, files: Iterable[str]) -> str:
    """Describes absent files, and what an unfinished download left of them."""
    left = unfinished(folder)
    partial = f" (unfinished: {listed(left)})" if left else ""
    return f"{listed([repr(file) for file in files])}{partial}: download them"


def no_weights(folder: Path, wanted: str) -> str:
    """Describes what a folder holds instead of the weights that are wanted."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [found for name in names if (found := _SHARD.fullmatch(name))]
    if shards:
        stem, count, kind = (shards[0][key] for key in ("stem", "count", "kind"))
        absent = {
            f"{stem}-{i:0{len(count)}}-of-{count}{kind}" for i in range(1, min(int(count), 999) + 1)
        } - set(names)
        index = f"{stem}{kind}.index.json"
        lacks = missing(folder, [index, *sorted(absent)])
        return f"holds shards without their index: it lacks {lacks}"
    if left := unfinished(folder):
        return f"holds an incomplete download ({listed(left)}): download it again"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds quantised weights in GGUF ({listed(gguf)}), not {wanted}"
    others = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    return f"holds no weights: no {wanted}{f', but {listed(others)}' if others else ''}"
