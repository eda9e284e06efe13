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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pdllm_jax.cli import flags
from pdllm_jax.cli.errors import Parser, status
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.config import ChunkConfig
from pdllm_jax.debug import check_answer
from pdllm_jax.downloads import tokenizer_files
from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.engine.request import drop_other_chunks
from pdllm_jax.method.caches import cache_method
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import require
from pdllm_jax.storage import snapshot
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.storage.store import DocumentStore
from pdllm_jax.tokenizer import Tokenizer

Resolve = Callable[[Path], Path]


class Stream:
    """Writes a response as its blocks are finished; passed as `on_block`.

    stops: the text before the first of these is written.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = stops
        self.tokenizer: Tokenizer | None = None  # without a tokenizer, ids are written
        self.ids: list[int] = []
        self.written = ""

    def __call__(self, request: int, block: int, tokens: list[int]) -> None:
        self.ids += tokens
        if self.tokenizer is None:
            text = " ".join(map(str, self.ids))
        else:  # a character's last bytes may be in the next block
            text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
            text = before_stop(text, self.stops)  # the rest of a stop may be in the next block, too
            starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
            text = text[: len(text) - max((len(x) for x in starts if text.endswith(x)), default=0)]
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text

    def finish(self, text: str) -> None:
        """Writes the rest of `text`; all of it if a block has changed since it was written."""
        rest = text.removeprefix(self.written) if text.startswith(self.written) else f"\n{text}"
        print(rest, flush=True)
        self.written = text


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Returns the text before the first of the stop texts."""
    return text[: min((i for stop in stops if (i := text.find(stop)) >= 0), default=len(text))]


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a subcommand."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(method="prefilling", early_stop=False, stream=False)  # of commands without them
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    if command == "decode":
        p.add_argument("snapshot", metavar="SNAPSHOT", type=Path)
        flags.add_placement(p)
        flags.add_output(p)
        return p
    flags.add_request(p, answers=command == "answer")
    if command == "prefill":
        group = p.add_argument_group("the snapshot")
        flags.add(group, "out", Path, required=True)
        flags.add(group, "overwrite", bool)
        flags.add(group, "holds", choices=("state", "selection", "document"), default="state")
        flags.add(group, "whole-pool", bool)
    return p


def load(args: argparse.Namespace, folder: Path) -> MaskPredictor:
    """Loads the model that the placement flags describe."""
    settings = flags.load_settings(args)
    print(f"loading {folder}", file=sys.stderr)
    return load_model(folder, **settings)


class Command:
    """A command line; each subcommand is a method."""

    def __init__(self, args: argparse.Namespace, resolve: Resolve) -> None:
        self.args, self.resolve = args, resolve
        self.stops = getattr(args, "stop", None) or []
        require("" not in self.stops, "--stop must not be empty")
        self.stream = Stream(self.stops) if args.stream else None

    @property
    def cuts(self) -> bool:
        """Whether the method cuts documents into chunks."""
        return cache_method(self.args.method).uses_chunks

    def engine(self, *, text: bool, **settings: Any) -> Engine:
        """Loads tokenizer and model. text: the request is text, so that a tokenizer is needed."""
        folder = self.resolve(self.args.checkpoint)
        tokenizer = None
        if text or tokenizer_files(folder):
            tokenizer = Tokenizer.load(folder, load_config(folder))
        require(not self.stops or tokenizer is not None, "--stop needs a tokenizer, for text")
        if self.stream is not None:
            self.stream.tokenizer = tokenizer
        if "method" in settings and settings["method"].uses_chunks:
            settings["selection"] = settings["selection"].calibrated(folder)
            settings["selection"].scorer.check(load_config(folder))
        model = load(self.args, folder)
        bos = model.config.bos_token_id if tokenizer is None else tokenizer.bos_id
        if self.args.early_stop:
            stops = tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,)
            settings["decoding"] = dataclasses.replace(settings["decoding"], stop_ids=stops)
        path = self.args.implementation
        return Engine(model, tokenizer, bos_id=bos, implementation=path, **settings)

    def request(self, *, question: bool = True) -> Request:
        """The request of the flags; question: False for a document alone, with question ""."""
        args, chosen = self.args, {"oracle": self.args.chunks, "seed": self.args.seed}
        if args.prompt_ids is not None:
            for name in ("question", "instruction", "system"):
                given = getattr(args, name) is not None
                require(not given, f"--{name} is part of the ids that --prompt-ids names")
            require(args.chat, "--no-chat-template is for text, --prompt-ids names ids")
            prefix, context, query = flags.read_prompt_ids(args.prompt_ids, parts=self.cuts)
            return Request(context, query, prefix=prefix, **chosen)
        require(not question or args.question is not None, "--context-file needs --question")
        document = flags.read_file(args.context_file)
        require(bool(document.strip()), f"{args.context_file} is empty")
        require(not question or bool(args.question.strip()), "question is empty")
        return Request(document, args.question or "", **chosen)

    def answer(self) -> None:
        """Answers a request, or asks about a document of a snapshot or a store."""
        args, settings = self.args, flags.engine_settings(self.args)
        if args.snapshot is not None or args.store is not None:
            self.ask(settings)
            return
        if args.requests is not None:
            self.answer_lines(settings)
            return
        request = self.request()
        engine = self.engine(text=isinstance(request.context, str), **settings)
        result = engine.answer(**request._asdict(), on_block=self.stream)
        if args.check_nan:
            parts = engine.token_ids(request)
            check_answer(engine, *parts, result)
        self.show(result)

    def answer_lines(self, settings: dict[str, Any]) -> None:
        """Answers JSON lines of requests in batches, after all of them are checked."""
        args, size = self.args, self.args.batch_size
        for name in ("question", "stream", "check_nan", "store"):
            refused = getattr(args, name) not in (None, False)
            require(not refused, f"--{name.replace('_', '-')} is not for the lines of --requests")
        require(size > 0, f"--batch-size must be at least 1, got {size}")
        chosen: dict[str, Any] = {"seed": args.seed, "oracle": args.chunks}
        lines = flags.read_requests(args.requests, parts=self.cuts, **chosen)
        text = any(isinstance(request.context, str) for _, _, request in lines)
        engine = self.engine(text=text, **settings)
        batches = [lines[i : i + size] for i in range(0, len(lines), size)]
        for batch in batches:
            self.check_lines(engine, batch)
        for batch in batches:
            answers = engine.answer_batch([request for _, _, request in batch])
            for (_, given, _), answer in zip(batch, answers, strict=True):
                print(json.dumps({**given, **self.stopped(answer).to_dict()}, allow_nan=False))
            sys.stdout.flush()

    def check_lines(self, engine: Engine, lines: list[tuple[int, dict[str, Any], Request]]) -> None:
        """Raises ValueError, with the number of the line, for a request that cannot be answered."""
        try:
            engine.check([request for _, _, request in lines])
        except ValueError as error:
            first, last = lines[0][0], lines[-1][0]
            if first == last:
                raise type(error)(f"{self.args.requests}, line {first}: {error}") from None
            for line in lines:
                self.check_lines(engine, [line])
            advice = "lower --batch-size"  # each can be answered alone
            where = f"{self.args.requests}, lines {first} to {last} together"
            raise type(error)(f"{where}: {error}; {advice}") from None

    def ask(self, settings: dict[str, Any]) -> None:
        """Asks about a document whose KV comes from a snapshot or a store."""
        args, method, folder = self.args, settings["method"], self.args.snapshot
        require(not args.check_nan, "--check-nan is for a document that is encoded here")
        require(method.uses_chunks, f"--snapshot and --store need prefilling, not {method}")
        if folder is None:
            request = self.request()
        else:
            require(args.store is None, "--snapshot names a document, --store is for another one")
            require(args.question is not None, "--snapshot needs --question")
            for name in ("instruction", "system"):
                given = getattr(args, name) is not None
                require(not given, f"--{name} is part of the document of --snapshot")
            holds = snapshot.snapshot_holds(folder)
            require(holds == "document", f"{folder} holds a {holds}: scripts/decode.py decodes it")
            request = Request("", args.question, oracle=args.chunks, seed=args.seed)
        engine = self.engine(text=isinstance(request.question, str), **settings)
        if folder is None:
            store = DocumentStore(args.store, engine.model, engine.tokenizer)
            cache = store.encode_ids(
                *engine.token_ids(request)[:2],
                chunking=engine.chunking,
                bos_id=engine.bos_id,
                encode_batch=args.encode_batch,
                kv_format=engine.selection.kv_format,
                memory_limit=engine.memory_limit,
            )
        else:
            cache, cut = snapshot.load_document(folder, engine.model, tokenizer=engine.tokenizer)
            fits = engine.chunking in (cut, ChunkConfig())
            require(fits, f"{folder} was cut with other settings: {cut}")
        oracle = None if request.oracle is None else [request.oracle]
        asked: dict[str, Any] = {"oracle": oracle, "seeds": [request.seed]}
        self.show(engine.ask(cache, [request.question], on_block=self.stream, **asked)[0])

    def prefill(self) -> None:
        """Writes a snapshot and prints a line about it."""
        args, settings = self.args, flags.engine_settings(self.args)
        out, document = args.out, args.holds == "document"
        allowed = not document or args.question is None
        require(allowed, "--question is for a request: --holds document takes none")
        snapshot.check_destination(out, overwrite=args.overwrite)
        request = self.request(question=not document)
        engine = self.engine(text=isinstance(request.context, str), **settings)
        start = time.perf_counter()
        saved: dict[str, Any] = {"chunking": engine.chunking, "overwrite": args.overwrite}
        saved["tokenizer"] = engine.tokenizer
        if document:
            cache = engine.encode(request.context, prefix=request.prefix)
            snapshot.save_document(out, engine.model, cache, **saved)
            n_chunks = int(np.count_nonzero(np.asarray(cache.lengths)))
        else:
            prefilled = engine.prefill(**request._asdict(), encode=args.holds == "state")
            if not args.whole_pool:
                prefilled = drop_other_chunks(prefilled)
            snapshot.save_request(out, engine.model, prefilled, **saved)
            n_chunks = int(prefilled.counts[0])
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        seconds = time.perf_counter() - start
        print(f"{out}: {args.holds}, {n_chunks} chunks, {size / 1e6:.1f} MB, {seconds:.1f} s")

    def decode(self) -> None:
        """Decodes a snapshot; its manifest is checked before the model is loaded."""
        folder = self.args.snapshot
        document = snapshot.snapshot_holds(folder) == "document"
        require(not document, f"{folder} holds a document: scripts/generate.py --snapshot asks it")
        engine = self.engine(text=False)
        request = snapshot.load_request(folder, engine.model, tokenizer=engine.tokenizer)
        require(request.decoding is not None, f"{folder} has no settings for decoding")
        self.show(engine.decode(request, on_block=self.stream)[0])

    def stopped(self, answer: Answer) -> Answer:
        """The answer with its text before --stop; all else is of the complete response."""
        if answer.text is None:
            return answer
        return dataclasses.replace(answer, text=before_stop(answer.text, self.stops))

    def show(self, result: Answer) -> None:
        """Prints an answer as --json, --stream or neither asks."""
        result = self.stopped(result)
        if self.args.json:
            print(json.dumps(result.to_dict(), allow_nan=False))
            return
        text = " ".join(map(str, result.tokens)) if result.text is None else result.text
        print(text) if self.stream is None else self.stream.finish(text)
        if result.selection is not None:
            scores, chunks = result.selection["scores"], result.selection["chunks"]
            kept = [str(i) if scores is None else f"{i} ({scores[i]:.3f})" for i in chunks]
            print(f"chunks kept: {', '.join(kept)}")
            if "rescored" in result.selection:
                at_end = ", ".join(map(str, result.selection["chunks_at_end"]))
                print(f"after {result.selection['rescored']} more scorings: {at_end}")
        print(f"evaluations: {result.evaluations}")
        print("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in result.timings.items()))


def run(command: str, argv: list[str] | None, resolve: Resolve, description: str | None) -> int:
    """Runs a subcommand. Exit status: 0, or 2 with one line on stderr for bad input."""
    args = parser_of(command, description).parse_args(argv)
    enable_compilation_cache()
    return status(lambda: getattr(Command(args, resolve), command)(), args)
