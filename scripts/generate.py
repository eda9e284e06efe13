#!/usr/bin/env python3
"""Answers a question about a long document with a checkpoint.

CHECKPOINT is a converted folder, or a PyTorch folder, which is converted into a cache folder on
first use. Results go to stdout, progress to stderr. Exit status 2 and one line on bad input, 130
when interrupted.

  scripts/generate.py CHECKPOINT --context-file book.txt --question 'Who lives at Pemberley?'
  scripts/generate.py CHECKPOINT --prompt-ids ids.json --method dual-cache --json
  scripts/generate.py CHECKPOINT --snapshot book --question 'And who lives at Kellynch?'
  scripts/generate.py CHECKPOINT --requests requests.jsonl > answers.jsonl

--snapshot names an encoded document that scripts/prefill.py has written; --store keeps the
documents that it encodes in a folder, and finds them there again.

A line of --requests is {"context": TEXT, "question": TEXT} or an object as in --prompt-ids, with
"seed", "oracle" (ids of chunks) and "id" (any value, for the line of the answer) where wanted. All
lines are checked before the first is answered. The lines of the answers have the same order.

--stop cuts the printed text. The response is computed to its end all the same: tokens, evaluations
and confidence of --json are those of the complete response. --early-stop ends it with EOS.

--stream writes every block of the answer to stdout as soon as it is finished.
"""

from convert.__main__ import converted
from pdllm_jax.cli.commands import run
from pdllm_jax.cli.errors import leave


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    return run("answer", argv, converted, __doc__)


if __name__ == "__main__":
    leave(main())
