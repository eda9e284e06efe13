"""A folder that comes into being whole or not at all.

It is written beside its destination, under a name that nothing loads, and renamed when everything
is on disk. A run that was killed leaves that sibling behind; the next run for the same destination
removes it. The sibling is locked while a run lives, so that two runs can't work on it at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pdllm_jax.storage.checkpoint import CheckpointError, reason

# Beyond the arrays: JSON, directory blocks, the tokenizer.
_SPARE_BYTES = 64 << 20
# Files that are flushed at a time: enough for a disk's queue, and file systems flush in groups.
_SYNC_THREADS = 16


class AtomicFolder:
    """Context manager around the making of `destination`.

    `path` is where to write. Leaving the context without `commit` removes what was written.

    overwrite: an existing destination is replaced, provided that `replaceable` says so of it; it
      stays as it was until `commit`.
    kind: what the folder is called in errors; error: the class of these.
    Raises `error` for a destination that exists, or that another run is writing.
    """

    def __init__(
        self,
        destination: Path,
        *,
        overwrite: bool,
        replaceable: Callable[[Path], bool],
        kind: str = "checkpoint",
        error: type[ValueError] = CheckpointError,
    ) -> None:
        self.destination = destination
        self.path = destination.with_name(f".{destination.name}.partial")
        self._replaced = destination.with_name(f".{destination.name}.replaced")
        self._overwrite = overwrite
        self._replaceable = replaceable
        self._kind = kind
        self._error = error
        self._lock = -1

    def check(self) -> None:
        """Refuses a destination that can't be written, before any work is done."""
        target = self.destination
        if not target.parent.is_dir():
            raise self._error(f"{target.parent}, which is to hold {target.name}, is no folder")
        if not os.path.lexists(target):
            return
        if not self._overwrite:
            raise self._error(f"{target} exists (--overwrite replaces it)")
        # A slip of the pen must not cost somebody a home folder.
        if target.is_symlink() or not target.is_dir() or not self._replaceable(target):
            raise self._error(
                f"{target} is not a {self._kind} and nothing else, so --overwrite leaves it alone"
            )

    def __enter__(self) -> AtomicFolder:
        self.check()
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:  # a file or a link by this name, no right to write
            raise self._error(f"{self.path} can not be made: {error.strerror}") from None
        try:
            self._acquire()
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._recover()
            self.check()
            _clear(self.path)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._lock)):
                shutil.rmtree(self.path, ignore_errors=True)
            self._recover()
        finally:
            os.close(self._lock)

    def commit(self) -> None:
        """Makes the folder durable and puts it in its place."""
        _sync_tree(self.path)
        if os.path.lexists(self.destination):
            os.rename(self.destination, self._replaced)
        os.rename(self.path, self.destination)
        _sync(self.destination.parent)

    def _acquire(self) -> None:
        busy = self._error(f"another run is writing {self.destination}")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise busy from None
            # Some network file systems have no locks: two runs at once are the user's affair there.
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._lock)):
            raise busy

    def _recover(self) -> None:
        """The folder that was moved aside goes away, or back if no other took its place."""
        aside = not self._replaced.is_symlink() and self._replaced.is_dir()
        if aside and not os.path.lexists(self.destination):
            os.rename(self._replaced, self.destination)
        else:
            discard(self._replaced)


def discard(path: Path) -> None:
    """Removes what has this name, if anything: a folder with all that is in it, a file, a link (not
    what it leads to), a pipe (`shutil.rmtree` would wait for a writer).
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        discard(Path(entry.path))


def check_space(folder: Path, nbytes: int, error: type[ValueError] = CheckpointError) -> None:
    """Refuses what the disk has no room for, before anything is written."""
    free = shutil.disk_usage(folder).free
    needed = nbytes + _SPARE_BYTES
    if free < needed:
        raise error(
            f"disk full: {folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed"
        )


@contextlib.contextmanager
def write_errors(destination: Path, kind: type[ValueError] = CheckpointError) -> Iterator[None]:
    """Turns what Orbax, TensorStore and the system raise while writing into a `kind`."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )
        # TensorStore reports the system's message inside a ValueError.
        if full or any(text in str(error) for text in ("No space left", "File too large", "quota")):
            raise kind(f"disk full while writing {destination}: {reason(error)}") from error
        raise kind(f"{destination} can not be written: {reason(error)}") from error


def _sync_tree(folder: Path) -> None:
    """Everything in the folder is on disk: the files, then the folders that name them."""
    files, folders = [], []
    for root, _, names in os.walk(folder):
        files += [Path(root, name) for name in names]
        folders.append(Path(root))
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        for paths in (files, folders):
            for _ in threads.map(_sync, paths):
                pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
