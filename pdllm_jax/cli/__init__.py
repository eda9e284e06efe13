"""Command lines: `pdllm answer`, `pdllm prefill` and `pdllm decode`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

USAGE = """usage: pdllm {answer,prefill,decode} ...

  pdllm answer CHECKPOINT --context-file book.txt --question 'Who lives at Pemberley?'
  pdllm prefill CHECKPOINT --context-file book.txt --question 'Who?' --out request
  pdllm decode CHECKPOINT request

`pdllm COMMAND --help` lists the flags. Exit status: 0; 2 and one line on bad input;
130 when interrupted.
"""


def main(argv: list[str] | None = None, *, resolve: Callable[[Path], Path] = Path) -> int:
    """Runs `pdllm`; returns the exit status.

    resolve: turns CHECKPOINT into the folder of a converted checkpoint.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("answer", "prefill", "decode"):
        from pdllm_jax.cli.commands import run

        return run(command, rest, resolve, USAGE)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(f"error: command {command!r} is not known (answer, prefill, decode)", file=sys.stderr)
    return 2
