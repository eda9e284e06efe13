"""How command lines refuse and end: one line on stderr for what the user can mend, exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """One line, and no usage, for what it refuses."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def status(call: Callable[[], int | None]) -> int:
    """0 or what the call returns; otherwise as `guarded`."""
    code, result = guarded(call)
    return code or result or 0


def guarded(work: Callable[[], Result]) -> tuple[int, Result | None]:
    """(exit status, result): one line on stderr and no result for bad input (2), a device without
    memory (2), or an interrupt (130).
    """
    try:
        return 0, work()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2, None
    except RuntimeError as error:
        if (message := out_of_memory(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2, None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130, None


def out_of_memory(error: RuntimeError) -> str | None:
    """What to change where the device's memory has run out; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    says = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:120]
    return (
        f"the device ran out of memory ({says}): lower --encode-batch (chunks at a time), --top-k "
        "(K, chunks kept), --chunk-size, --gen-length or the document's length, or load with "
        "--dtype bfloat16; --memory-limit GB says beforehand which of them would fit"
    )
