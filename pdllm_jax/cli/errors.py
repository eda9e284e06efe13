"""How command lines end: one line on stderr for what the user can correct, and the exit status."""

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
    """Reports a wrong flag in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def status(call: Callable[[], int | None], args: argparse.Namespace | None = None) -> int:
    """Returns what the call returns, or 0; otherwise as `guarded`."""
    code, result = guarded(call, args)
    return code or result or 0


def guarded(
    work: Callable[[], Result], args: argparse.Namespace | None = None
) -> tuple[int, Result | None]:
    """Runs a command line.

    Args:
      args: of the command line; the message about memory names those of its flags that lower it.

    Returns:
      (exit status, result). Bad input and a device without memory give 2, an interrupt gives 130:
      one line on stderr and no result.
    """
    _spell_out()
    message: str | None
    try:
        result = work()
        sys.stdout.flush()  # raises for a full disk or a closed pipe
        return 0, result
    except (ValueError, OSError, OverflowError) as error:
        message = str(error) or repr(error)
    except MemoryError as error:
        message = f"the host ran out of memory ({error}): lower what is asked for"
    except RuntimeError as error:
        if (message := out_of_memory(error, args)) is None:
            raise
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
    """Discards output that could not be written, so that the exit does not try again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Ends the process; at once after an interrupt: a computation of JAX cannot be cancelled."""
    if code == 130:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _spell_out() -> None:
    """Writes characters that stdout's encoding lacks as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


# Flags that lower the memory.
_LOWER = {
    "encode_batch": "--encode-batch (chunks at a time)", "top_k": "--top-k (K, chunks kept)",
    "chunk_size": "--chunk-size", "gen_length": "--gen-length",
}  # fmt: skip


def out_of_memory(error: RuntimeError, args: argparse.Namespace | None = None) -> str | None:
    """Returns what to change if the device ran out of memory; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    says = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:120]
    flags = {} if args is None else vars(args)
    lower = [words for name, words in _LOWER.items() if name in flags]
    if not lower:
        advice = "take less of it, e.g. a lower K, or free other arrays on the device"
    else:
        advice = f"lower {', '.join(lower)} or the document's length"
        if flags.get("dtype", "bfloat16") != "bfloat16":
            advice += ", or load with --dtype bfloat16"
        if "memory_limit" in flags:
            advice += "; --memory-limit GB says beforehand which of them would fit"
    return f"the device ran out of memory ({says}): {advice}"
