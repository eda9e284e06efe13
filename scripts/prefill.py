#!/usr/bin/env python3
"""Prefills a request, or encodes a document, into a snapshot that another process goes on from.

  scripts/prefill.py CHECKPOINT --context-file book.txt --question 'Who?' --out request
  scripts/decode.py CHECKPOINT request

  scripts/prefill.py CHECKPOINT --context-file book.txt --holds document --out book
  scripts/generate.py CHECKPOINT --snapshot book --question 'Who?'

Takes scripts/generate.py's settings of the method; a document alone has no question, and what is
said of its selection and decoding goes unread. Exit status 2 and one line on bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path

import options
from command_line import guarded, leave

from convert.__main__ import converted
from pdllm_jax import (
    Prefilled,
    encode_document,
    load_model,
    prefill_request,
    save_document,
    save_prefilled,
    without_other_chunks,
)
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.engine.memory import require_document_memory
from pdllm_jax.method.chunking import check_token_ids, chunk_prompt
from pdllm_jax.storage.snapshot import check_destination
from pdllm_jax.tokenizer import INSTRUCTION


def parser() -> argparse.ArgumentParser:
    """generate.py's of a request, and where the snapshot goes."""
    p = options.parser(__doc__, answers=False)
    g = p.add_argument_group("the snapshot")
    g.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    g.add_argument("--overwrite", action="store_true", help="replace a snapshot at --out")
    g.add_argument(
        "--holds",
        choices=("state", "selection", "document"),
        default="state",
        help="the state that denoising starts from; what was chosen, to be encoded by whoever "
        "decodes; or the document alone, for any question (default: %(default)s)",
    )
    g.add_argument(
        "--whole-pool", action="store_true", help="keep the KV of all chunks, chosen or not"
    )
    return p


def run(args: argparse.Namespace) -> str:
    """What was written, in a line."""
    chunking, selection, decode = options.settings(args)
    document = args.holds == "document"
    if document and args.question is not None:
        raise ValueError("--question is for a request: --holds document takes none")
    check_destination(args.out, overwrite=args.overwrite)
    folder = converted(args.checkpoint)
    if args.prompt_ids is not None:
        tokenizer = options.load_tokenizer(folder, needed=False)
        prefix, context, query = options.read_prompt_ids(args.prompt_ids, "prefilling")
    else:
        text = options.read_context(args, question=not document)
        tokenizer = options.load_tokenizer(folder, needed=True)
        prefix, query = tokenizer.around_document(
            "?" if document else args.question,
            INSTRUCTION if args.instruction is None else args.instruction,
        )
        context = tokenizer.encode(text)
    mesh = options.mesh_of(args)
    model = load_model(folder, dtype=options.DTYPES[args.dtype], mesh=mesh, sums=args.sums)
    bos_id = tokenizer.bos_id if tokenizer else model.config.bos_token_id
    decode = options.stopping(args, decode, tokenizer, model.config)
    start = time.perf_counter()
    common = {"chunking": chunking, "tokenizer": tokenizer, "overwrite": args.overwrite}
    if document:
        vocab = model.config.vocab_size
        before, ids = (
            check_token_ids(name, ids, vocab)
            for name, ids in (("prefix", prefix), ("context", context))
        )
        prompt = chunk_prompt(before, ids, query or [0], chunking, bos_id=bos_id, tight=True)
        limit = options.memory_limit(args)
        require_document_memory(model, prompt, args.encode_batch, limit=limit)
        cache = encode_document(model, prompt, encode_batch=args.encode_batch)
        save_document(args.out, model, cache, **common)
        n_chunks = prompt.n_chunks
    else:
        prefilled: Prefilled = prefill_request(
            model, prefix, context, query,
            chunking=chunking, selection=selection,
            decode=None if args.holds == "selection" else decode,
            bos_id=bos_id, oracle=args.chunks, seed=args.seed, implementation=args.implementation,
            memory_limit=options.memory_limit(args),
        )  # fmt: skip
        if args.holds == "selection":
            prefilled = dataclasses.replace(prefilled, decode=decode)
        if not args.whole_pool:
            prefilled = without_other_chunks(prefilled)
        save_prefilled(args.out, model, prefilled, **common)
        n_chunks = int(prefilled.counts[0])
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    seconds = time.perf_counter() - start
    return f"{args.out}: {args.holds}, {n_chunks} chunks, {size / 1e6:.1f} MB, {seconds:.1f} s"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    args = parser().parse_args(argv)
    enable_compilation_cache()
    return guarded(lambda: print(run(args)), args)[0]


if __name__ == "__main__":
    # A polite kill cleans up like an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    leave(main())
