#!/usr/bin/env python3
"""Decodes a request of scripts/prefill.py, in another process, later or elsewhere.

  scripts/decode.py CHECKPOINT SNAPSHOT [--stream | --json]

All settings, also the seed, come from the snapshot: the tokens are the same as from
scripts/generate.py in one process. Exit status 2 and one line on bad input: a snapshot that is
damaged, or of another model, dtype, RoPE setting, tokenizer or version.
"""

from convert.__main__ import converted
from pdllm_jax.cli.commands import run
from pdllm_jax.cli.errors import leave


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    return run("decode", argv, converted, __doc__)


if __name__ == "__main__":
    leave(main())
