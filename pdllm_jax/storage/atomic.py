"""Folders that appear complete or not at all.

A folder is written as .NAME.partial beside its destination, and renamed when every byte is on disk.
A killed run leaves .NAME.partial behind, and .NAME.replaced if it was killed during the swap; the
next run for the same destination repairs both. A lock on .NAME.partial keeps a second run out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdllm_jax.storage.manifest import FolderKind

# Beyond the arrays: JSON, directory blocks, the tokenizer.
_SPARE_BYTES = 64 << 20
# Enough for a disk's queue; file systems flush in groups.
_SYNC_THREADS = 16


@dataclasses.dataclass(frozen=True)
class AtomicFolder:
    """A folder to make.

    Args:
      destination: absolute path; its parent exists.
      kind: names the folder in errors and gives their class.
      replaceable: says whether an existing folder may be replaced; it guards other people's files.
      overwrite: replaces an existing folder.

    Every method raises `kind.error`.
    """

    destination: Path
    kind: FolderKind
    replaceable: Callable[[Path], bool]
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
        if target.is_symlink() or not target.is_dir() or not self.replaceable(target):
            raise self.kind.error(f"{target} holds more than a {self.kind.name}: not overwritten")

    def check_space(self, nbytes: int) -> None:
        """Refuses a disk without room for `nbytes`."""
        free, needed = shutil.disk_usage(self.destination.parent).free, nbytes + _SPARE_BYTES
        if free < needed:
            raise self.kind.error(
                f"disk full: {self.destination.parent} has {free / 1e9:.2f} GB free, "
                f"{needed / 1e9:.2f} GB are needed"
            )

    @contextlib.contextmanager
    def write(self) -> Iterator[Path]:
        """Yields the folder to write into, and puts it in place when the context ends.

        Where the context ends by an error, what was written goes and the old folder stays.
        """
        self.check()
        partial = self.destination.with_name(f".{self.destination.name}.partial")
        replaced = self.destination.with_name(f".{self.destination.name}.replaced")
        lock = self._lock(partial)
        try:
            self._recover(replaced)
            self.check()
            for entry in list(partial.iterdir()):
                discard(entry)
            yield partial
            _sync_tree(partial)
            if os.path.lexists(self.destination):
                os.rename(self.destination, replaced)
            os.rename(partial, self.destination)
            _sync(self.destination.parent)
        except self.kind.error:
            raise
        except Exception as error:  # TensorStore and Orbax raise various classes
            raise self._write_error(error) from error
        finally:
            if _is_locked(partial, lock):
                discard(partial)
            self._recover(replaced)
            os.close(lock)

    def _lock(self, partial: Path) -> int:
        try:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise self.kind.error(f"{partial} cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = not _is_locked(partial, lock)
        except OSError as error:  # some network file systems have no locks
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if busy:
            os.close(lock)
            raise self.kind.error(f"another run is writing {self.destination}")
        return lock

    def _recover(self, replaced: Path) -> None:
        """Moves the old folder back unless another took its place."""
        if replaced.is_dir() and not os.path.lexists(self.destination):
            os.rename(replaced, self.destination)
        else:
            discard(replaced)

    def _write_error(self, error: Exception) -> ValueError:
        # TensorStore has the system's message inside a ValueError.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full |= any(text in str(error) for text in ("No space left", "File too large", "quota"))
        problem = "disk full while writing {}" if full else "{} cannot be written"
        return self.kind.error(f"{problem.format(self.destination)}: {reason(error)}")


def discard(path: Path) -> None:
    """Removes a folder with its contents, a file, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, without TensorStore's dump of its settings."""
    line = next(iter(str(error).splitlines()), "") or repr(error)
    return line.partition(" [tensorstore_spec=")[0]


def _is_locked(partial: Path, lock: int) -> bool:
    return partial.exists() and os.path.samestat(partial.stat(), os.fstat(lock))


def _sync_tree(folder: Path) -> None:
    """Flushes the files, then the folders that name them."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    folders = [Path(root) for root, _, _ in os.walk(folder)]
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        list(threads.map(_sync, files))
        list(threads.map(_sync, folders))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
