"""How command lines end: one line on stderr for what the user can correct, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pdllm_jax.rules import SEED

# Flags that lower the memory.
_LOWER = ("encode_batch", "top_k", "chunk_size", "gen_length")


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def seed(text: str) -> int:
    """Returns a flag's seed, checked before anything is loaded."""
    value = int(text)
    if not SEED.allows(value):
        raise argparse.ArgumentTypeError(SEED.message.format("seed", value))
    return value


def status(call: Callable[[], int | None], args: argparse.Namespace | None = None) -> int:
    """Runs a command line and returns its exit status.

    Args:
      call: its result is the status, None for 0.
      args: the message about device memory names the flags of these that lower it.

    Returns:
      2 for bad input or too little memory, 130 for an interrupt, each with one line on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 2
    try:
        result = call()
        sys.stdout.flush()  # raises for a full disk or a closed pipe
        return result or 0
    except (ValueError, OSError, OverflowError) as error:
        message = f"error: {str(error) or repr(error)}"
    except MemoryError as error:
        message = f"error: the host ran out of memory ({error}): lower what is asked for"
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = f"error: {_out_of_memory(error, {} if args is None else vars(args))}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # discard the output, so that the exit does not try again
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    line = " ".join(message.split())
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process; at once after an interrupt: a computation of JAX cannot be cancelled."""
    if code == 130:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _out_of_memory(error: RuntimeError, flags: dict[str, object]) -> str:
    says = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:120]
    lower = ", ".join(f"--{name.replace('_', '-')}" for name in _LOWER if name in flags)
    advice = "take less of it, e.g. a lower K, or free other arrays on the device"
    if lower:
        advice = f"lower {lower} or the document's length"
        if flags.get("dtype", "bfloat16") != "bfloat16":
            advice += ", or load with --dtype bfloat16"
        if "memory_limit" in flags:
            advice += "; --memory-limit GB says beforehand which of them would fit"
    return f"the device ran out of memory ({says}): {advice}"
