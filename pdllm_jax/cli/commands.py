"""The subcommands answer, prefill and decode.

`resolve` turns the CHECKPOINT argument into the folder of a converted checkpoint: the console
script and scripts/ pass a function that converts a PyTorch folder on first use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdllm_jax.cli.errors import Parser, guarded
from pdllm_jax.cli.flags import (
    DTYPES,
    add_output,
    add_placement,
    add_source,
    memory_limit,
    mesh_of,
    read_context,
    read_prompt_ids,
    settings,
)
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.config import ChunkConfig
from pdllm_jax.debug import check_answer
from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.engine.request import drop_other_chunks
from pdllm_jax.method.cache_methods import Method, cache_method
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.storage.snapshot import (
    check_destination,
    load_document,
    load_request,
    save_document,
    save_request,
    snapshot_holds,
)
from pdllm_jax.storage.store import DocumentStore
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

Resolve = Callable[[Path], Path]


class Stream:
    """Writes a response as its blocks are finished; passed as `on_block`."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None  # without a tokenizer, ids are written
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
        """Writes the rest of `text`; all of it if a block has changed since it was written."""
        if not text.startswith(self.written):
            print()
            self.written = ""
        self._write(text)
        print()

    def _write(self, text: str) -> None:
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a subcommand."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if command == "decode":
        p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
        p.add_argument("snapshot", metavar="SNAPSHOT", type=Path)
        add_placement(p)
        add_output(p)
        return p
    add_source(p, answers=command == "answer")
    if command == "prefill":
        g = p.add_argument_group("the snapshot")
        g.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
        g.add_argument("--overwrite", action="store_true", help="replace a snapshot at --out")
        g.add_argument(
            "--holds",
            choices=("state", "selection", "document"),
            default="state",
            help="the state that denoising starts from; the selected chunks, which the decoder "
            "encodes; or the document alone, for any question (default: %(default)s)",
        )
        g.add_argument(
            "--whole-pool", action="store_true", help="keep the KV of all chunks, chosen or not"
        )
    return p


def load(args: argparse.Namespace, folder: Path) -> MaskPredictor:
    """Loads the model that the placement flags describe."""
    mesh = mesh_of(args)
    print(f"loading {folder}", file=sys.stderr)
    return load_model(folder, dtype=DTYPES[args.dtype], mesh=mesh, sums=args.sums)


def load_tokenizer(folder: Path, *, needed: bool) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none and none is needed."""
    if not needed and not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(folder, load_config(folder))


def load_engine(
    args: argparse.Namespace, resolve: Resolve, *, text: bool, stream: Stream | None = None
) -> Engine:
    """Loads tokenizer and model. text: the request is text, so that a tokenizer is needed."""
    chunking, selection, decoding = settings(args)
    method: Method = getattr(args, "method", "prefilling")
    limit = memory_limit(args)
    cache_method(method).decode_config(decoding)
    folder = resolve(args.checkpoint)
    tokenizer = load_tokenizer(folder, needed=text)
    if stream is not None:
        stream.tokenizer = tokenizer
    model = load(args, folder)
    if args.early_stop:
        stops = tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,)
        decoding = dataclasses.replace(decoding, stop_ids=stops)
    return Engine(
        model,
        tokenizer,
        chunking=chunking,
        selection=selection,
        decoding=decoding,
        method=method,
        instruction=INSTRUCTION if args.instruction is None else args.instruction,
        bos_id=tokenizer.bos_id if tokenizer else model.config.bos_token_id,
        implementation=args.implementation,
        memory_limit=limit,
    )


def read_request(args: argparse.Namespace, *, question: bool = True) -> Request:
    """The request of the flags; question: False for a document alone, with question ""."""
    given = {"oracle": args.chunks, "seed": args.seed}
    if args.prompt_ids is not None:
        if (args.question, args.instruction) != (None, None):
            raise ValueError(
                "--question and --instruction are part of the ids that --prompt-ids names"
            )
        method = getattr(args, "method", "prefilling")
        prefix, context, query = read_prompt_ids(args.prompt_ids, method)
        return Request(context, query, prefix=prefix, **given)
    context_text = read_context(args, question=question)
    if question and not args.question.strip():
        raise ValueError("question is empty")
    return Request(context_text, args.question or "", **given)


def answer(args: argparse.Namespace, resolve: Resolve, stream: Stream | None) -> Answer:
    """Answers a request, or asks about a document of a snapshot or a store."""
    settings(args)
    if args.snapshot is not None or args.store is not None:
        return ask(args, resolve, stream)
    request = read_request(args)
    text = isinstance(request.context, str)
    engine = load_engine(args, resolve, text=text, stream=stream)
    result = engine.answer(**request._asdict(), on_block=stream)
    if args.check_nan:
        prefix, context, query = engine.token_ids(request)
        check_answer(engine, prefix, context, query, result)
    return result


def ask(args: argparse.Namespace, resolve: Resolve, stream: Stream | None) -> Answer:
    """Asks about a document whose KV comes from a snapshot or a store."""
    if args.check_nan:
        raise ValueError("--check-nan is for a document that is encoded here")
    if args.method != "prefilling":
        raise ValueError(f"--snapshot and --store are for method prefilling, not {args.method}")
    if args.snapshot is None:
        request = read_request(args)
    else:
        if args.store is not None:
            raise ValueError("--snapshot names a document already: --store is for --context-file")
        if args.question is None:
            raise ValueError("--snapshot needs --question")
        if args.instruction is not None:
            raise ValueError("--instruction is part of the document that --snapshot names")
        holds = snapshot_holds(args.snapshot)
        if holds != "document":
            raise ValueError(f"{args.snapshot} holds a {holds}: scripts/decode.py goes on with it")
        request = Request("", args.question, oracle=args.chunks, seed=args.seed)
    text = isinstance(request.question, str)
    engine = load_engine(args, resolve, text=text, stream=stream)
    if args.snapshot is not None:
        cache, chunking = load_document(args.snapshot, engine.model, tokenizer=engine.tokenizer)
        if engine.chunking not in (chunking, ChunkConfig()):
            raise ValueError(f"{args.snapshot} was cut with other settings: {chunking}")
    else:
        store = DocumentStore(args.store, engine.model, engine.tokenizer)
        prefix, context, _ = engine.token_ids(request)
        cache = store.encode_ids(
            prefix,
            context,
            chunking=engine.chunking,
            bos_id=engine.bos_id,
            encode_batch=args.encode_batch,
            memory_limit=engine.memory_limit,
        )
    oracle = None if request.oracle is None else [request.oracle]
    return engine.ask(
        cache, [request.question], oracle=oracle, seeds=[request.seed], on_block=stream
    )[0]


def prefill(args: argparse.Namespace, resolve: Resolve) -> str:
    """Writes a snapshot; returns a line about it."""
    settings(args)
    document = args.holds == "document"
    if document and args.question is not None:
        raise ValueError("--question is for a request: --holds document takes none")
    check_destination(args.out, overwrite=args.overwrite)
    request = read_request(args, question=not document)
    engine = load_engine(args, resolve, text=isinstance(request.context, str))
    start = time.perf_counter()
    common = {
        "chunking": engine.chunking,
        "tokenizer": engine.tokenizer,
        "overwrite": args.overwrite,
    }
    if document:
        cache = engine.encode(request.context, prefix=request.prefix)
        save_document(args.out, engine.model, cache, **common)
        n_chunks = int(np.count_nonzero(np.asarray(cache.lengths)))
    else:
        prefilled = engine.prefill(**request._asdict(), encode=args.holds == "state")
        if not args.whole_pool:
            prefilled = drop_other_chunks(prefilled)
        save_request(args.out, engine.model, prefilled, **common)
        n_chunks = int(prefilled.counts[0])
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    seconds = time.perf_counter() - start
    return f"{args.out}: {args.holds}, {n_chunks} chunks, {size / 1e6:.1f} MB, {seconds:.1f} s"


def decode(args: argparse.Namespace, resolve: Resolve, stream: Stream | None) -> Answer:
    """Decodes a snapshot; its manifest is checked before the model is loaded."""
    if snapshot_holds(args.snapshot) == "document":
        raise ValueError(
            f"{args.snapshot} holds a document without a question: "
            "scripts/generate.py --snapshot asks one"
        )
    folder = resolve(args.checkpoint)
    model = load(args, folder)
    tokenizer = load_tokenizer(folder, needed=False)
    if stream is not None:
        stream.tokenizer = tokenizer
    request = load_request(args.snapshot, model, tokenizer=tokenizer)
    if request.decoding is None:
        raise ValueError(f"{args.snapshot} has no settings for decoding")
    engine = Engine(model, tokenizer, implementation=args.implementation)
    return engine.decode(request, on_block=stream)[0]


def details(result: Answer) -> str:
    """The lines after a response."""
    lines = []
    if result.selection is not None:
        scores, chunks = result.selection["scores"], result.selection["chunks"]
        kept = [str(i) if scores is None else f"{i} ({scores[i]:.3f})" for i in chunks]
        lines.append(f"chunks kept: {', '.join(kept)}")
        if "rescored" in result.selection:
            at_end = ", ".join(map(str, result.selection["chunks_at_end"]))
            lines.append(f"after {result.selection['rescored']} more scorings: {at_end}")
    lines.append(f"evaluations: {result.evaluations}")
    lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in result.timings.items()))
    return "\n".join(lines)


def show(result: Answer, args: argparse.Namespace, stream: Stream | None) -> None:
    """Prints an answer as --json, --stream or neither asks."""
    if args.json:
        scores = result.selection["scores"] if result.selection else None
        assert scores is None or np.isfinite(scores).all()
        print(json.dumps(result.to_dict()))
        return
    text = result.text if result.text is not None else " ".join(map(str, result.tokens))
    print(text) if stream is None else stream.finish(text)
    print(details(result))


def run(command: str, argv: list[str] | None, resolve: Resolve, description: str | None) -> int:
    """Runs a subcommand. Exit status: 0, or 2 with one line on stderr for bad input."""
    args = parser_of(command, description).parse_args(argv)
    enable_compilation_cache()

    def work() -> None:
        if command == "prefill":
            print(prefill(args, resolve))
            return
        stream = Stream() if args.stream else None
        show((answer if command == "answer" else decode)(args, resolve, stream), args, stream)

    return guarded(work, args)[0]
