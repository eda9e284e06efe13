#!/usr/bin/env python3
"""Prefills a request, or encodes a document, into a snapshot for another process.

  scripts/prefill.py CHECKPOINT --context-file book.txt --question 'Who?' --out request
  scripts/decode.py CHECKPOINT request

  scripts/prefill.py CHECKPOINT --context-file book.txt --holds document --out book
  scripts/generate.py CHECKPOINT --snapshot book --question 'Who?'

Takes scripts/generate.py's settings of the method. A document alone has no question, and uses no
flags of selection and decoding. Exit status 2 and one line on bad input.
"""

import signal
import sys

from convert.__main__ import converted
from pdllm_jax.cli.commands import run
from pdllm_jax.cli.errors import leave


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    return run("prefill", argv, converted, __doc__)


if __name__ == "__main__":
    # SIGTERM cleans up like an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    leave(main())
