"""Folders that appear complete or not at all.

A folder is written as .NAME.partial beside its destination, and renamed when every byte is on disk.
A killed run leaves .NAME.partial behind, and .NAME.replaced if it was killed during the swap; the
next run for the same destination repairs both. A lock on .NAME.partial keeps a second run out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdllm_jax.storage.manifest import FolderKind, errors_as

# Beyond the arrays: JSON, directory blocks, the tokenizer.
_SPARE_BYTES = 64 << 20
# Enough for a disk's queue; file systems flush in groups.
_SYNC_THREADS = 16


@dataclasses.dataclass(frozen=True)
class AtomicFolder:
    """A folder to make. Its methods raise `kind.error`.

    Args:
      destination: absolute path; its parent exists.
      replaceable: says by the names in a folder whether it may be replaced; it guards other
        people's files.
      overwrite: replaces an existing folder.
    """

    destination: Path
    kind: FolderKind
    replaceable: Callable[[set[str]], bool]
    overwrite: bool = False

    def check(self) -> None:
        """Refuses a destination that cannot be written, before any work is done."""
        target = self.destination
        if not target.parent.is_dir():
            raise self.kind.error(f"{target.parent}: not a directory, cannot hold {target.name}")
        if not os.path.lexists(target):
            return
        if not self.overwrite:
            raise self.kind.error(f"{target} exists (--overwrite replaces it)")
        is_folder = target.is_dir() and not target.is_symlink()
        if not is_folder or not self.replaceable(set(os.listdir(target))):
            raise self.kind.error(f"{target} holds more than a {self.kind.name}: not overwritten")

    @contextlib.contextmanager
    def write(self, nbytes: int = 0) -> Iterator[Path]:
        """Yields the folder to write `nbytes` into, and puts it in place when the context ends.

        Where the context ends by an error, what was written goes and the old folder stays.
        """
        self.check()
        target = self.destination
        free, needed = shutil.disk_usage(target.parent).free, nbytes + _SPARE_BYTES
        if free < needed:
            sizes = f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed"
            raise self.kind.error(f"disk full: {target.parent} has {sizes}")
        partial, old = (target.with_name(f".{target.name}.{x}") for x in ("partial", "replaced"))
        with errors_as(self.kind.error, f"{target} cannot be written"), contextlib.ExitStack() as s:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            s.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                busy = not _is_open(partial, lock)
            except OSError as error:  # some network file systems have no locks
                busy = isinstance(error, BlockingIOError)
            if busy:
                raise self.kind.error(f"another run is writing {target}")
            s.callback(_recover, old, target)
            s.callback(_discard_open, partial, lock)
            _recover(old, target)
            self.check()
            for entry in list(partial.iterdir()):
                discard(entry)
            yield partial
            _sync_tree(partial)
            if os.path.lexists(target):
                os.rename(target, old)
            os.rename(partial, target)
            _sync(target.parent)


def discard(path: Path) -> None:
    """Removes a folder with its contents, a file, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _recover(old: Path, target: Path) -> None:
    """Moves the old folder back unless another took its place."""
    if old.is_dir() and not os.path.lexists(target):
        os.rename(old, target)
    else:
        discard(old)


def _is_open(folder: Path, descriptor: int) -> bool:
    return folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor))


def _discard_open(folder: Path, descriptor: int) -> None:
    if _is_open(folder, descriptor):
        discard(folder)


def _sync_tree(folder: Path) -> None:
    """Flushes all files, and the folders that name them."""
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        list(threads.map(_sync, [folder, *folder.rglob("*")]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
