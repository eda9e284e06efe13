#!/usr/bin/env python3
"""Answers a question about a long document with a LLaDA checkpoint.

CHECKPOINT is a converted folder, or a PyTorch folder, which is converted into a cache folder on
first use. Results go to stdout, progress to stderr. Exit status 2 and one line on bad input, 130
when interrupted.

  scripts/generate.py CHECKPOINT --context-file book.txt --question 'Who lives at Pemberley?'
  scripts/generate.py CHECKPOINT --prompt-ids ids.json --method dual-cache --json
  scripts/generate.py CHECKPOINT --snapshot book --question 'And who lives at Kellynch?'

--snapshot names an encoded document that scripts/prefill.py has written; --store keeps the
documents that it encodes in a folder, and finds them there again.

--stream writes every block of the answer to stdout as soon as it is finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

import numpy as np
from command_line import guarded, leave
from options import (
    load,
    load_tokenizer,
    memory_limit,
    parser,
    read_context,
    read_prompt_ids,
    settings,
    stopping,
)

from convert.__main__ import converted
from pdllm_jax import (
    ChunkConfig,
    DocumentStore,
    GenerationResult,
    Tokenizer,
    ask_ids,
    generate,
    generate_ids,
    load_document,
)
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.debug import check_answer
from pdllm_jax.storage.snapshot import snapshot_holds
from pdllm_jax.tokenizer import INSTRUCTION


class Stream:
    """Writes a response as its blocks are finished, called as `on_block`."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None  # without one, ids are written
        self.ids: list[int] = []
        self.written = ""

    def __call__(self, request: int, block: int, tokens: list[int]) -> None:
        self.ids += tokens
        if self.tokenizer is None:
            self._write(" ".join(map(str, self.ids)))
        else:
            # A character's last bytes may be in the next block.
            self._write(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def finish(self, text: str) -> None:
        """What is missing of `text`; all of it where a block has changed since it was written."""
        if not text.startswith(self.written):
            print()
            self.written = ""
        self._write(text)
        print()

    def _write(self, text: str) -> None:
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text


def run(args: argparse.Namespace, stream: Stream | None = None) -> GenerationResult:
    """Everything cheap is checked before the model is loaded."""
    chunking, selection, decode = settings(args)
    if args.snapshot is not None or args.store is not None:
        if args.check_nan:
            raise ValueError("--check-nan is for a document that is encoded here")
        return run_encoded(args, stream)
    common = {
        "method": args.method,
        "chunking": chunking,
        "selection": selection,
        "decode": decode,
        "oracle": args.chunks,
        "seed": args.seed,
        "implementation": args.implementation,
        "on_block": stream,
        "memory_limit": memory_limit(args),
    }
    if args.prompt_ids is not None:
        prefix, context, query = read_prompt_ids(args.prompt_ids, args.method)
        model, folder = load(args)
        tokenizer = load_tokenizer(folder, needed=False)
        if stream is not None:
            stream.tokenizer = tokenizer
        bos_id = tokenizer.bos_id if tokenizer else model.config.bos_token_id
        common["decode"] = stopping(args, decode, tokenizer, model.config)
        result = generate_ids(model, prefix, context, query, bos_id=bos_id, **common)
        if args.check_nan:
            check_answer(model, prefix, context, query, chunking, result, bos_id)
        return with_text(result, tokenizer)
    context = read_context(args)
    tokenizer = load_tokenizer(converted(args.checkpoint), needed=True)
    if stream is not None:
        stream.tokenizer = tokenizer
    model, _ = load(args)
    common["decode"] = stopping(args, decode, tokenizer, model.config)
    if args.instruction is not None:
        common["instruction"] = args.instruction
    result = generate(model, tokenizer, context=context, question=args.question, **common)
    if args.check_nan:
        prefix, query = tokenizer.around_document(
            args.question, INSTRUCTION if args.instruction is None else args.instruction
        )
        check_answer(model, prefix, tokenizer.encode(context), query, chunking, result)
    return result


def run_encoded(args: argparse.Namespace, stream: Stream | None) -> GenerationResult:
    """Asks about a document whose KV comes from a snapshot or a store."""
    chunking, selection, decode = settings(args)
    if args.method != "prefilling":
        raise ValueError(f"--snapshot and --store are for method prefilling, not {args.method}")
    request = None
    if args.snapshot is not None:
        if args.store is not None:
            raise ValueError("--snapshot names a document already: --store is for --context-file")
        if args.question is None:
            raise ValueError("--snapshot needs --question")
        if args.instruction is not None:
            raise ValueError("--instruction is part of the document that --snapshot names")
        holds = snapshot_holds(args.snapshot)
        if holds != "document":
            raise ValueError(f"{args.snapshot} holds a {holds}: scripts/decode.py goes on with it")
    elif args.prompt_ids is not None:
        request = read_prompt_ids(args.prompt_ids, args.method)
    else:
        context = read_context(args)
    folder = converted(args.checkpoint)
    tokenizer = load_tokenizer(folder, needed=request is None)
    if stream is not None:
        stream.tokenizer = tokenizer
    model, _ = load(args)
    decode = stopping(args, decode, tokenizer, model.config)
    if args.snapshot is not None:
        cache, made = load_document(args.snapshot, model, tokenizer=tokenizer)
        if chunking not in (made, ChunkConfig()):
            raise ValueError(f"{args.snapshot} was cut otherwise: {made}")
    else:
        store = DocumentStore(args.store, model, tokenizer)
        encoding = {
            "chunking": chunking, "encode_batch": args.encode_batch,
            "memory_limit": memory_limit(args),
        }  # fmt: skip
        if request is not None:
            bos_id = tokenizer.bos_id if tokenizer else model.config.bos_token_id
            cache = store.encode_ids(*request[:2], bos_id=bos_id, **encoding)
        else:
            instruction = INSTRUCTION if args.instruction is None else args.instruction
            cache = store.encode_text(context, instruction=instruction, **encoding)
    if request is not None:
        query = request[2]
    else:
        if not args.question.strip():
            raise ValueError("question is empty")
        query = tokenizer.around_document(args.question)[1]
    (result,) = ask_ids(
        model, cache, [query], selection=selection, decode=decode,
        oracle=None if args.chunks is None else [args.chunks], seeds=[args.seed],
        implementation=args.implementation, on_block=stream, memory_limit=memory_limit(args),
    )  # fmt: skip
    return with_text(result, tokenizer)


def with_text(result: GenerationResult, tokenizer: Tokenizer | None) -> GenerationResult:
    if tokenizer is None:
        return result
    return dataclasses.replace(result, text=tokenizer.decode(result.tokens))


def response(result: GenerationResult) -> str:
    """The text, or the ids where there is no tokenizer."""
    return result.text if result.text is not None else " ".join(map(str, result.tokens))


def details(result: GenerationResult) -> str:
    """What else a person wants to see."""
    lines = []
    if result.selection is not None:
        scores = result.selection["scores"]
        kept = ", ".join(
            str(i) if scores is None else f"{i} ({scores[i]:.3f})"
            for i in result.selection["chunks"]
        )
        lines.append(f"chunks kept: {kept}")
        if "rescored" in result.selection:
            at_end, again = result.selection["chunks_at_end"], result.selection["rescored"]
            lines.append(f"after {again} more scorings: {', '.join(map(str, at_end))}")
    lines.append(f"evaluations: {result.evaluations}")
    lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in result.timings.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for bad input."""
    return answered(parser(__doc__).parse_args(argv), run)


def answered(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Stream | None], GenerationResult],
) -> int:
    """Runs a command line that has --json and --stream, and prints what comes out."""
    stream = Stream() if args.stream else None
    enable_compilation_cache()

    def work() -> None:
        result = run(args, stream)
        if args.json:
            scores = result.selection["scores"] if result.selection else None
            assert scores is None or np.isfinite(scores).all()
            print(json.dumps(result.to_dict()))
            return
        if stream is None:
            print(response(result))
        else:
            stream.finish(response(result))
        print(details(result))

    return guarded(work, args)[0]


if __name__ == "__main__":
    leave(main())
