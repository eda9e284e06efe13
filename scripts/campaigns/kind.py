"""A kind of input, to the fuzzer: how it is broken, loaded, and checked against its bytes."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, ClassVar


class Kind:
    """One kind of input. A case is made by `write`, read by `load`, and what comes of it checked.

    folder: the kind's own, which `write` may change; nothing beside it is to be touched.
    refusals: what `load` raises for bad input, as documented.
    """

    name: ClassVar[str]
    refusals: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, folder: Path) -> None:
        """Writes the good files that cases are made from."""
        self.folder = folder

    def write(self, rng: Random) -> None:
        """Puts a case on the disk."""
        raise NotImplementedError

    def load(self) -> Any:
        """What the library makes of it."""
        raise NotImplementedError

    def check(self, loaded: Any) -> None:
        """AssertionError where what was loaded is not what the bytes say, read by other means."""
        raise NotImplementedError


def require(condition: bool, message: str) -> None:
    """An assertion that -O leaves in."""
    if not condition:
        raise AssertionError(message)
