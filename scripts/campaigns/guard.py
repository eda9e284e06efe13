"""A worker's walls: memory, and an audit of what it opens, removes, connects to and starts."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of which paths are changed: the places of these among the arguments, each with that of the
# folder's descriptor that it is relative to, if there may be one.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),), "os.setxattr": ((0, None),), "os.utime": ((0, 3),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
}  # fmt: skip
_FORBIDDEN = (
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
    "ctypes.dlopen", "pty.spawn", "webbrowser.open", "urllib.Request",
)  # fmt: skip


class Violation(BaseException):
    """Something was attempted that no input may cause; no library code catches it."""


def limit_memory(more: int) -> None:
    """What the process may allocate from now on: so many bytes beside what it holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises Violation for connections and child processes."""
    if event in _FORBIDDEN:
        raise Violation(f"{event} {arguments!r:.200}")
    if event == "socket.__new__":
        # An event loop's own wake-up pair is AF_UNIX, and goes nowhere.
        import socket

        if arguments[1] != socket.AF_UNIX:
            raise Violation(f"a socket of family {arguments[1]}")


def watch(folder: Path) -> None:
    """From now on whatever would change a file outside of `folder` raises Violation.

    So do connections and child processes. It can't be undone. Python's own calls are seen, not
    those of native code, for which the campaign looks at the folders themselves.
    """
    root = os.path.realpath(folder)

    def outside(path: Any, folder: int | None = None) -> bool:
        if isinstance(path, int) or path is None:
            return False
        path = os.fsdecode(path)
        if folder is not None:
            # A link itself is removed, not what it leads to.
            base = f"/proc/self/fd/{folder}" if folder >= 0 else "."
            holder, name = os.path.split(os.path.join(base, path.rstrip("/")))
            real = os.path.join(os.path.realpath(holder), name)
        else:
            real = os.path.realpath(path)
        return real not in (root, os.devnull) and not real.startswith((root + os.sep, "/proc/"))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & _WRITES or any(c in (mode or "") for c in "wax+")
            if writes and outside(path):
                raise Violation(f"{path!r} was opened for writing")
        elif event in _CHANGES:
            for place, folder in _CHANGES[event]:
                if outside(arguments[place], -1 if folder is None else arguments[folder]):
                    raise Violation(f"{event} {arguments[place]!r}")
        else:
            forbid(event, arguments)

    sys.addaudithook(audit)
