"""PyTorch folders given where a converted one is wanted: converted once, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from convert.convert import convert
from pdllm_jax.compilation import cache_folder
from pdllm_jax.storage.checkpoint import MANIFEST, CheckpointError


def converted(path: str | Path, cache: Path | None = None) -> Path:
    """The converted checkpoint for `path`: itself, or its conversion, made on first use.

    The cache key covers name, size and modification time of every file of the source, so that a
    changed checkpoint is converted again. Says on stderr when it converts. Raises CheckpointError.
    """
    source = Path(path)
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder")
    if (source / MANIFEST).is_file():
        return source
    real = os.path.realpath(source)
    digest = hashlib.sha256(real.encode())
    for file in sorted(source.iterdir()):
        stat = file.stat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    folder = (cache or cache_folder()) / "converted"
    target = folder / f"{Path(real).name}-{digest.hexdigest()[:16]}"
    if not (target / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"converting {source} (kept in {target})", file=sys.stderr)
        convert(source, target)
    return target
