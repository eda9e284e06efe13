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
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from convert import converted
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    DocumentStore,
    GenerationResult,
    LLaDA,
    SelectionConfig,
    Tokenizer,
    ask_ids,
    generate,
    generate_ids,
    load_config,
    load_document,
    load_model,
    make_mesh,
)
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.config import BridgeTokens, Encoding, Positions, Remasking, Reselect
from pdllm_jax.debug import check_answer
from pdllm_jax.parallel import parse_mesh
from pdllm_jax.snapshot import snapshot_holds
from pdllm_jax.tokenizer import INSTRUCTION

Result = TypeVar("Result")
DTYPES = {"keep": None, "float32": "float32", "bfloat16": "bfloat16"}


class Parser(argparse.ArgumentParser):
    """One line, and no usage, for what it refuses."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


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


def parser() -> argparse.ArgumentParser:
    """Flags carry the field's names; defaults are the library's."""
    chunking, selection, decode = ChunkConfig(), SelectionConfig(), DecodeConfig()
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--context-file", type=Path, metavar="F", help="the document, UTF-8 text")
    source.add_argument(
        "--prompt-ids",
        type=Path,
        metavar="F",
        help='JSON {"prefix": [..], "context": [..], "query": [..]}; or {"prompt": [..]}',
    )
    source.add_argument(
        "--snapshot", type=Path, metavar="DIR", help="an encoded document, by scripts/prefill.py"
    )
    p.add_argument("--question", metavar="Q", help="goes with --context-file and --snapshot")
    p.add_argument(
        "--store", type=Path, metavar="DIR", help="keep encoded documents here, to ask again"
    )
    p.add_argument("--instruction", metavar="TEXT", help="what comes before the document")
    p.add_argument(
        "--method",
        choices=("prefilling", "plain", "prefix-cache", "dual-cache"),
        default="prefilling",
    )
    g = p.add_argument_group("decoding")
    g.add_argument("--gen-length", type=int, default=decode.gen_length, help="response tokens")
    g.add_argument("--block-length", type=int, help="tokens of a block (default: up to 32)")
    g.add_argument("--steps", type=int, help="evaluations in all (default: one per token)")
    g.add_argument("--temperature", type=float, default=decode.temperature)
    g.add_argument("--remasking", choices=get_args(Remasking), default=decode.remasking)
    g.add_argument("--threshold", type=float, help="unmask every slot at least this probable")
    g.add_argument("--factor", type=float, help="Fast-dLLM's factor rule")
    g.add_argument(
        "--early-stop", action="store_true", help="end with the block in which the text ends"
    )
    g.add_argument(
        "--guidance", type=float, default=decode.guidance, help="classifier-free; method plain"
    )
    g.add_argument(
        "--recompute",
        choices=("block", "response"),
        default=decode.recompute,
        help="rows recomputed in a step of method prefilling (default: %(default)s)",
    )
    g = p.add_argument_group("chunks and their selection (method prefilling)")
    g.add_argument("--chunk-size", type=int, default=chunking.chunk_size)
    g.add_argument("--overlap", type=int, default=chunking.overlap)
    g.add_argument("--no-anchors", action="store_true", help="no BOS at the head of a chunk")
    g.add_argument("--top-k", type=int, default=selection.top_k, help="chunks kept")
    g.add_argument(
        "--max-k", type=int, metavar="K",
        help="keep up to so many where scores lie close behind the last of top-k",
    )  # fmt: skip
    g.add_argument("--margin", type=float, metavar="X", help="how close, in units of the scores")
    g.add_argument(
        "--score",
        choices=(
            "draft",
            "leave-one-out",
            "query",
            "confidence",
            "attention",
            "first",
            "last",
            "random",
            "all",
            "oracle",
        ),
        default=selection.scorer,
        help="how chunks are scored; leave-one-out is draft with a copy for every scored token",
    )
    g.add_argument(
        "--chunks", type=int, nargs="+", metavar="ID", help="the chunks that oracle keeps"
    )
    g.add_argument(
        "--masked-copies", type=int, default=selection.masked_copies, metavar="R",
        help="copies of the query that ride along with a chunk",
    )  # fmt: skip
    g.add_argument("--draft-length", type=int, default=selection.draft_length)
    g.add_argument("--encode-batch", type=int, default=selection.encode_batch)
    g.add_argument("--keep-first", action="store_true", help="always keep the first chunk")
    g.add_argument(
        "--reselect",
        choices=get_args(Reselect),
        default=selection.reselect,
        help="score all chunks again while denoising (default: %(default)s)",
    )
    g.add_argument(
        "--encoding",
        choices=get_args(Encoding),
        default=selection.encoding,
        help="what the kept chunks' KV is computed from (default: %(default)s)",
    )
    g.add_argument(
        "--bridge-share", type=float, default=selection.bridge_share, metavar="X",
        help="share of a chunk's tokens that encoding bridge recomputes (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--bridge-tokens",
        choices=get_args(BridgeTokens),
        default=selection.bridge_tokens,
        help="which: those at its start, or those with most of the query's attention",
    )
    g.add_argument(
        "--positions",
        choices=get_args(Positions),
        default=selection.positions,
        help="where kept chunks are placed (default: %(default)s)",
    )
    g.add_argument(
        "--keep-tokens", type=int, metavar="B",
        help="tokens of a kept chunk that are attended to (default: all)",
    )  # fmt: skip
    g.add_argument(
        "--implementation",
        choices=("mosaic_gpu", "cudnn", "xla"),
        help="attention over chosen chunks (default: mosaic_gpu on Hopper GPUs, else xla)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--memory-limit", type=float, metavar="GB",
        help="refuse what would take more device memory (default: what the device gives)",
    )  # fmt: skip
    p.add_argument("--dtype", choices=tuple(DTYPES), default="keep")
    p.add_argument(
        "--check-nan", action="store_true",
        help="go through the answer's computation again, layer by layer, for NaN or infinity",
    )  # fmt: skip
    add_mesh(p)
    output = p.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print blocks as they are finished")
    return p


def settings(args: argparse.Namespace) -> tuple[ChunkConfig, SelectionConfig, DecodeConfig]:
    """The command line as the library's configs, which validate it."""
    exact = args.score == "leave-one-out"
    if args.margin is not None and args.max_k is None:
        raise ValueError("--margin needs --max-k")
    block_length = args.block_length
    if block_length is None:
        block_length = math.gcd(32, args.gen_length) if args.gen_length > 32 else args.gen_length
    return (
        ChunkConfig(args.chunk_size, anchors=not args.no_anchors, overlap=args.overlap),
        SelectionConfig(
            top_k=args.top_k,
            max_k=args.max_k,
            margin=0.0 if args.margin is None else args.margin,
            keep_first=args.keep_first,
            reselect=args.reselect,
            scorer="draft" if exact else args.score,
            masked_copies=None if exact else args.masked_copies,
            draft_length=args.draft_length,
            draft_steps=min(2, args.draft_length),
            encode_batch=args.encode_batch,
            encoding=args.encoding,
            bridge_share=args.bridge_share,
            bridge_tokens=args.bridge_tokens,
            positions=args.positions,
            keep_tokens=args.keep_tokens,
        ),
        DecodeConfig(
            gen_length=args.gen_length,
            block_length=block_length,
            steps=args.steps,
            temperature=args.temperature,
            remasking=args.remasking,
            threshold=args.threshold,
            factor=args.factor,
            guidance=args.guidance,
            recompute="response" if args.guidance else args.recompute,
        ),
    )


def read_prompt_ids(path: Path, method: str) -> tuple[list[int], list[int], list[int]]:
    """(prefix, context, query) of a prompt file; a bare prompt is all query."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object")
    parts = ("prefix", "context", "query")
    if set(raw) == {"prompt"}:
        if method == "prefilling":
            raise ValueError(f"{path} holds a bare prompt: method prefilling needs {parts}")
        raw = {"prefix": [], "context": [], "query": raw["prompt"]}
    if set(raw) != set(parts):
        raise ValueError(f"{path} must hold the keys {parts}, or the key prompt; got {tuple(raw)}")
    for name in parts:
        ids = raw[name]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError(f"{path}: {name} must be a list of integers")
    return raw["prefix"], raw["context"], raw["query"]


def add_mesh(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mesh", metavar="DATAxTENSOR",
        help="devices to divide chunks and requests over, times those to divide each layer over",
    )  # fmt: skip


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """That of --mesh."""
    return None if args.mesh is None else make_mesh(*parse_mesh(args.mesh))


def load(args: argparse.Namespace) -> tuple[LLaDA, Path]:
    """The model, and the converted folder that it comes from."""
    mesh = mesh_of(args)
    folder = converted(args.checkpoint)
    print(f"loading {folder}", file=sys.stderr)
    return load_model(folder, dtype=DTYPES[args.dtype], mesh=mesh), folder


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
        "memory_limit": None if args.memory_limit is None else int(1e9 * args.memory_limit),
    }
    if args.prompt_ids is not None:
        prefix, context, query = read_prompt_ids(args.prompt_ids, args.method)
        model, folder = load(args)
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.load(folder, model.config)
        if stream is not None:
            stream.tokenizer = tokenizer
        bos_id = tokenizer.bos_id if tokenizer else model.config.bos_token_id
        if args.early_stop:
            stops = tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,)
            common["decode"] = dataclasses.replace(decode, stop_ids=stops)
        result = generate_ids(model, prefix, context, query, bos_id=bos_id, **common)
        if args.check_nan:
            check_answer(model, prefix, context, query, chunking, result, bos_id)
        if tokenizer is not None:
            return GenerationResult(**{**vars(result), "text": tokenizer.decode(result.tokens)})
        return result
    context = read_context(args)
    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    if stream is not None:
        stream.tokenizer = tokenizer
    if args.early_stop:
        common["decode"] = dataclasses.replace(decode, stop_ids=tokenizer.stop_ids)
    model, _ = load(args)
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
    if args.chunks is not None:
        raise ValueError("--chunks is for a document that is encoded for its question alone")
    request = None
    if args.snapshot is not None:
        if args.store is not None:
            raise ValueError("--snapshot names a document already: --store is for --context-file")
        if args.question is None:
            raise ValueError("--snapshot needs --question")
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
    if args.early_stop:
        stops = tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,)
        decode = dataclasses.replace(decode, stop_ids=stops)
    if args.snapshot is not None:
        cache, made = load_document(args.snapshot, model, tokenizer=tokenizer)
        if chunking not in (made, ChunkConfig()):
            raise ValueError(f"{args.snapshot} was cut otherwise: {made}")
    else:
        store = DocumentStore(args.store, model, tokenizer)
        if request is not None:
            bos_id = tokenizer.bos_id if tokenizer else model.config.bos_token_id
            cache = store.encode_ids(
                *request[:2], chunking=chunking, bos_id=bos_id, encode_batch=args.encode_batch
            )
        else:
            cache = store.encode_text(
                context,
                instruction=INSTRUCTION if args.instruction is None else args.instruction,
                chunking=chunking,
                encode_batch=args.encode_batch,
            )
    if request is not None:
        query = request[2]
    else:
        if not args.question.strip():
            raise ValueError("question is empty")
        query = tokenizer.around_document(args.question)[1]
    (result,) = ask_ids(
        model, cache, [query], selection=selection, decode=decode, seeds=[args.seed],
        implementation=args.implementation, on_block=stream,
    )  # fmt: skip
    return with_text(result, tokenizer)


def with_text(result: GenerationResult, tokenizer: Tokenizer | None) -> GenerationResult:
    if tokenizer is None:
        return result
    return dataclasses.replace(result, text=tokenizer.decode(result.tokens))


def load_tokenizer(folder: Path, *, needed: bool) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none and none is needed."""
    if not needed and not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(folder, load_config(folder))


def read_context(args: argparse.Namespace, *, question: bool = True) -> str:
    """The document of --context-file."""
    if question and args.question is None:
        raise ValueError("--context-file needs --question")
    try:
        context = args.context_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{args.context_file} is not UTF-8 text") from None
    if not context.strip():
        raise ValueError(f"{args.context_file} is empty")
    return context


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
    return answered(parser().parse_args(argv), run)


def guarded(work: Callable[[], Result]) -> tuple[int, Result | None]:
    """(exit status, result): one line on stderr, and no result, for bad input or an interrupt."""
    try:
        enable_compilation_cache()
        return 0, work()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2, None
    except jax.errors.JaxRuntimeError as error:
        if (message := out_of_memory(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2, None
    except KeyboardInterrupt:
        return 130, None


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str | None:
    """What to change where the device's memory has run out; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    says = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:120]
    return (
        f"the device ran out of memory ({says}): lower --encode-batch (chunks at a time), --top-k "
        "(K, chunks kept), --chunk-size, --gen-length or the document's length, or load with "
        "--dtype bfloat16; --memory-limit GB says beforehand which of them would fit"
    )


def answered(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Stream | None], GenerationResult],
) -> int:
    """Runs a command line that has --json and --stream, and prints what comes out."""
    stream = Stream() if args.stream else None
    status, result = guarded(lambda: run(args, stream))
    if result is None:
        return status
    if args.json:
        scores = result.selection["scores"] if result.selection else None
        assert scores is None or np.isfinite(scores).all()
        print(json.dumps(result.to_dict()))
        return 0
    if stream is None:
        print(response(result))
    else:
        stream.finish(response(result))
    print(details(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
