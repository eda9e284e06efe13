"""How command lines refuse and end: one line on stderr for what the user can mend, exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """One line, and no usage, for what it refuses."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def status(call: Callable[[], int | None], args: argparse.Namespace | None = None) -> int:
    """0 or what the call returns; otherwise as `guarded`."""
    code, result = guarded(call, args)
    return code or result or 0


def guarded(
    work: Callable[[], Result], args: argparse.Namespace | None = None
) -> tuple[int, Result | None]:
    """(exit status, result): one line on stderr and no result for bad input (2), a device without
    memory (2), or an interrupt (130).

    args: the command line's; of its flags those are named that take less memory.
    """
    _spell_out()
    message: str | None
    try:
        result = work()
        sys.stdout.flush()  # a full disk, or a reader that has gone, is met here
        return 0, result
    except (ValueError, OSError, OverflowError) as error:
        message = str(error) or repr(error)
    except MemoryError as error:
        message = f"the host ran out of memory ({error}): lower what is asked for"
    except RuntimeError as error:
        if (found := out_of_memory(error, args)) is None:
            raise
        message = found
    except KeyboardInterrupt:
        message = None
    _drop_output()
    if message is None:
        print("interrupted", file=sys.stderr)
        return 130, None
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr)
    return 2, None


def _drop_output() -> None:
    """What could not be written is not tried again when the process ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Ends the process; after an interrupt at once, for a computation of JAX can't be called back,
    and would be waited for.
    """
    if code == 130:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _spell_out() -> None:
    """Characters that stdout's encoding lacks are written as escapes, not refused."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


# What takes less memory, by the name of its flag.
_LOWER = {
    "encode_batch": "--encode-batch (chunks at a time)", "top_k": "--top-k (K, chunks kept)",
    "chunk_size": "--chunk-size", "gen_length": "--gen-length",
}  # fmt: skip


def out_of_memory(error: RuntimeError, args: argparse.Namespace | None = None) -> str | None:
    """What to change where the device's memory has run out; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    says = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:120]
    flags = {} if args is None else vars(args)
    lower = [words for name, words in _LOWER.items() if name in flags]
    if not lower:
        advice = "take less of it, e.g. a lower K, or free what else lies on the device"
    else:
        advice = f"lower {', '.join(lower)} or the document's length"
        if flags.get("dtype", "bfloat16") != "bfloat16":
            advice += ", or load with --dtype bfloat16"
        if "memory_limit" in flags:
            advice += "; --memory-limit GB says beforehand which of them would fit"
    return f"the device ran out of memory ({says}): {advice}"
