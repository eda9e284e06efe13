#!/usr/bin/env python3
"""Decodes what scripts/prefill.py has prefilled, in another process, later or elsewhere.

  scripts/decode.py CHECKPOINT SNAPSHOT [--stream | --json]

All settings, the seed among them, are those of the snapshot, so that the tokens are those of
scripts/generate.py in one process. Exit status 2 and one line on bad input: a snapshot that is
damaged, or of another model, dtype, RoPE setting, tokenizer or version.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import generate
import options
from command_line import Parser, leave

from pdllm_jax import GenerationResult, begin, finish, load_prefilled
from pdllm_jax.engine.request import Stopwatch
from pdllm_jax.storage.snapshot import snapshot_holds


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    p.add_argument("snapshot", metavar="SNAPSHOT", type=Path)
    options.add_placement(p)
    options.add_output(p)
    return p


def run(args: argparse.Namespace, stream: generate.Stream | None) -> GenerationResult:
    """The snapshot's manifest is looked at before the model is loaded."""
    if snapshot_holds(args.snapshot) == "document":
        raise ValueError(
            f"{args.snapshot} holds a document without a question: "
            "scripts/generate.py --snapshot asks one"
        )
    model, folder = options.load(args)
    tokenizer = options.load_tokenizer(folder, needed=False)
    if stream is not None:
        stream.tokenizer = tokenizer
    prefilled = load_prefilled(args.snapshot, model, tokenizer=tokenizer)
    watch = Stopwatch()
    if prefilled.state is None:
        if prefilled.decode is None:
            raise ValueError(f"{args.snapshot} says nothing of decoding")
        prefilled = begin(
            model, prefilled, prefilled.decode, implementation=args.implementation, watch=watch
        )
    (result,) = finish(
        model, prefilled, implementation=args.implementation, on_block=stream, watch=watch
    )
    return generate.with_text(result, tokenizer)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    return generate.answered(parser().parse_args(argv), run)


if __name__ == "__main__":
    leave(main())
