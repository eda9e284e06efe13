"""Command line flags, most of them fields of the settings' dataclasses, and what they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import json
import math
import sys
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jax.sharding import Mesh

from pdllm_jax.cli.errors import seed
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.inputs import Request
from pdllm_jax.method.caches import CACHE_METHODS, RECOMPUTE, CacheMethod, cache_method
from pdllm_jax.method.encodings import ENCODINGS, Bridge
from pdllm_jax.method.sampling import CONFIDENCES
from pdllm_jax.method.scorers import SCORERS, DraftScorer
from pdllm_jax.method.unmasking import UNMASKING, Unmasking, unmasking_rule
from pdllm_jax.naming import settings_text
from pdllm_jax.network.config import WeightFormat
from pdllm_jax.network.sharding import make_mesh, parse_mesh
from pdllm_jax.rules import ConfigError, require
from pdllm_jax.text_files import read_text

DTYPES = {"keep": None, "float32": "float32", "bfloat16": "bfloat16"}
Settings = TypeVar("Settings")

# Fields with another flag's name, and fields without a flag, which other flags decide.
NAMES = {
    "Bridge.share": "bridge_share",
    "Bridge.tokens": "bridge_tokens",
    "DecodeConfig.top_k": "sample_top_k",
    "DecodeConfig.top_p": "sample_top_p",
    "SelectionConfig.kv_format": "kv",
}
DERIVED = ("draft_steps", "stop_ids")

CHOICES = {
    "scorer": ("leave-one-out", *SCORERS),
    "encoding": tuple(ENCODINGS),
    "remasking": tuple(CONFIDENCES),
    "recompute": tuple(RECOMPUTE),
}


def method(text: str) -> CacheMethod:
    """Returns a flag's cache method, checked before anything is loaded."""
    try:
        return cache_method(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def unmask(text: str) -> Unmasking:
    """Returns a flag's unmasking rule, checked before anything is loaded."""
    try:
        return unmasking_rule(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


METAVARS = {int: "N", seed: "N", float: "X", Path: "PATH"}
METAVARS |= dict.fromkeys((method, unmask), "NAME[:SETTING=VALUE..]")
METHODS, UNMASKS = (
    ", ".join(map(settings_text, table.values())) for table in (CACHE_METHODS, UNMASKING)
)
# What --help says of each flag; a default is added where the text has none.
HELP = {
    "context-file": "the document, UTF-8 text; - for standard input",
    "requests": "JSON lines of requests, answered by JSON lines; - for standard input",
    "batch-size": "requests that are answered at a time",
    "prompt-ids": 'JSON {"prefix": [..], "context": [..], "query": [..]}; or {"prompt": [..]}',
    "question": "goes with a document that is text",
    "instruction": "text before the document",
    "system": "text of a system turn, for a chat template that takes one",
    "no-chat-template": "BOS before the text, and no chat template around it",
    "stop": "print the text before this one alone; may be given several times",
    "snapshot": "a document of prefill",
    "store": "keep encoded documents in this folder, to ask again",
    "method": f"the KV that denoising steps reuse; with the defaults of its settings: {METHODS}",
    "check-nan": "compute the answer again, layer by layer, to find NaN or infinity",
    "json": "print one JSON object",
    "stream": "print blocks as they are finished",
    "seed": "of all randomness, from 0 to 2**64 - 1",
    "memory-limit": "GB; refuse a request that takes more (default: what the device gives)",
    "implementation": "attention over chosen chunks (default: mosaic_gpu on Hopper GPUs, else xla)",
    "dtype": "of weights and activations (default: the checkpoint's)",
    "weights": "of the layers; fp8 and int8 take half the memory (default: the checkpoint's)",
    "mesh": "devices that divide chunks and requests, times devices that divide each layer",
    "sums": "on a mesh, what adds up a few rows (default: mosaic_gpu on Hopper GPUs that access "
    "each other's memory, else xla)",
    "gen-length": "tokens of the response",
    "block-length": "tokens of a block (default: up to 32)",
    "steps": "evaluations in all (default: one per token)",
    "temperature": "of the Gumbel noise on the logits, 0 for none",
    "remasking": "confidence of a prediction; the most confident ones are unmasked",
    "schedule": "tokens of a step: as many in each, or Dream's share of the masks that are left",
    "eps": "time after the last step of --schedule time",
    "sample-top-p": "sample from the likeliest tokens of this probability together",
    "sample-top-k": "sample from this many of the likeliest tokens",
    "scaled-confidence": "confidence after temperature and filters, as Dream's",
    "order-temperature": "draw the slots to unmask by confidence / X; 0 takes the best",
    "first-slot-alone": "a block's first evaluation fills its first slot alone (Fast-dLLM)",
    "threshold": "unmask every slot at least this probable",
    "factor": "Fast-dLLM's factor rule",
    "unmask": "a rule instead of --steps, --threshold and --factor; with the defaults of its "
    f"settings: {UNMASKS}",
    "guidance": "classifier-free guidance, for method plain",
    "logits-eos-inf": "never predict EOS, as LLaDA's published evaluation can",
    "confidence-eos-eot-inf": "unmask slots that predict EOS or EOT last, as published",
    "eot-token-id": "EOT of --confidence-eos-eot-inf (default: the tokenizer's)",
    "recompute": "rows recomputed in a step of method prefilling",
    "early-stop": "end with the block in which the text ends",
    "chunk-size": "tokens of a chunk, its anchor included",
    "no-anchors": "no BOS at the head of a chunk",
    "overlap": "tokens that a chunk repeats of the one before",
    "top-k": "chunks kept, K",
    "max-k": "keep up to this many where scores are close to the last of top-k",
    "margin": "how close, in units of the scores; needs --max-k",
    "keep-first": "always keep the first chunk",
    "reselect": "score all chunks again while denoising",
    "score": "how chunks are scored; heads needs pdllm-calibrate CHECKPOINT once; bm25 reads "
    "token ids alone; causal and chunk-draft need a logit shift (Dream); leave-one-out is "
    "draft, every token in its own copy",
    "masked-copies": "masked copies of the query that go along with a chunk",
    "draft-length": "tokens guessed for scorers draft, causal and chunk-draft; two are filled in",
    "encode-batch": "chunks that are encoded at a time",
    "encoding": "what the kept chunks' KV is computed from",
    "bridge-share": "share of a chunk's tokens that encoding bridge recomputes",
    "bridge-tokens": "which: at its start, or with most of the query's attention",
    "positions": "where kept chunks are placed",
    "keep-tokens": "tokens of a kept chunk that are attended to (default: all)",
    "kv": "format of the chunks' KV; fp8 has half the bytes",
    "keep-by": "attention that ranks a chunk's tokens for --keep-tokens",
    "chunks": "ids of the chunks for scorer oracle",
    "out": "folder to make",
    "overwrite": "replace a snapshot at --out",
    "holds": "the state that denoising starts from; the selected chunks, which the decoder "
    "encodes; or the document alone, for any question",
    "whole-pool": "keep the KV of all chunks, chosen or not",
}


def add(parser: Any, name: str, kind: Callable[[str], Any] = str, **options: Any) -> None:
    """Adds a flag of HELP: a switch for `bool`, otherwise an option of this type."""
    text = HELP[name]
    if kind is bool:
        options.setdefault("action", "store_true")
    elif "choices" not in options:
        options = {"type": kind, "metavar": METAVARS.get(kind, "TEXT"), **options}
    if options.get("default") is not None and "(default" not in text:
        text += " (default: %(default)s)"
    parser.add_argument(f"--{name}", help=text, **options)


def add_fields(parser: Any, settings: type, names: Collection[str] | None = None) -> None:
    """Adds a flag for each field of a settings dataclass, or for some.

    Args:
      parser: a parser or its argument group.
      names: the fields, by default all that have a flag.
    """
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in DERIVED or (names is not None and field.name not in names):
            continue
        dest = dest_of(settings, field.name)
        name = "score" if dest == "scorer" else dest.replace("_", "-")
        hint = hints[field.name]
        kind = get_args(hint)[0] if get_origin(hint) is types.UnionType else hint
        kind = {"unmask": unmask}.get(field.name, kind)
        if kind is bool:
            action = "store_false" if field.default else "store_true"
            add(parser, f"no-{name}" if field.default else name, bool, dest=dest, action=action)
            continue
        options = {"dest": dest, "default": getattr(field.default, "name", field.default)}
        if choices := CHOICES.get(field.name) or get_args(kind):
            options["choices"] = choices
        add(parser, name, kind, **options)


def from_args(settings: type[Settings], args: argparse.Namespace, **values: Any) -> Settings:
    """Builds settings from parsed flags, which validates them; `values` replace fields."""
    names = inspect.signature(settings).parameters
    dests = {name: dest_of(settings, name) for name in names}
    parsed = {name: getattr(args, dest) for name, dest in dests.items() if dest in args}
    return settings(**{**parsed, **values})


def dest_of(settings: type, field: str) -> str:
    """Returns the name of a field's flag among the parsed flags."""
    return NAMES.get(f"{settings.__name__}.{field}", field)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of decoding, chunking and selection."""
    group: Any = parser.add_argument_group("decoding")
    add_fields(group, DecodeConfig)
    parser.set_defaults(block_length=None)
    add(group, "early-stop", bool)
    group = parser.add_argument_group("chunks and their selection (method prefilling)")
    for settings in (ChunkConfig, SelectionConfig, DraftScorer, Bridge):
        add_fields(group, settings)
    add(group, "chunks", int, nargs="+", metavar="ID")


def add_chunking(parser: Any) -> None:
    """Adds the flags of the chunking, and of the selection's most common settings."""
    add_fields(parser, ChunkConfig)
    names = ("top_k", "encode_batch", "encoding", "positions", "kv_format")
    add_fields(parser, SelectionConfig, names)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The `Engine`'s settings that `add_request` has flags for, validated."""
    length, limit = args.gen_length, args.memory_limit
    blocks = math.gcd(32, length) if length > 32 else length
    selection: dict[str, Any] = {"draft_steps": min(2, args.draft_length)}
    if args.scorer == "leave-one-out":
        selection |= {"scorer": "draft", "masked_copies": None}
    fits = limit is None or 0 < limit < 1e6
    require(fits, f"--memory-limit must be a number of GB, got {limit}")
    chosen = cache_method(args.method)
    decoding = from_args(
        DecodeConfig,
        args,
        block_length=blocks if args.block_length is None else args.block_length,
        recompute="response" if args.guidance else args.recompute,
    )
    settings = {
        "chunking": from_args(ChunkConfig, args),
        "selection": from_args(SelectionConfig, args, **selection),
        "decoding": chosen.decode_config(decoding),
        "method": chosen,
        "memory_limit": None if limit is None else int(1e9 * limit),
    }
    texts = {name: getattr(args, name) for name in ("instruction", "system")}
    settings |= {name: text for name, text in texts.items() if text is not None}
    return {**settings, "chat": args.chat}


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of where and in what precision a model runs."""
    add(parser, "implementation", choices=("mosaic_gpu", "cudnn", "xla"))
    add(parser, "dtype", choices=tuple(DTYPES), default="keep")
    add(parser, "weights", choices=get_args(WeightFormat))
    add(parser, "mesh", metavar="DATAxTENSOR")
    add(parser, "sums", choices=("mosaic_gpu", "xla"))


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --json, --stream and --stop."""
    add(parser, "stop", action="append")
    output = parser.add_mutually_exclusive_group()
    add(output, "json", bool)
    add(output, "stream", bool)


def add_request(parser: argparse.ArgumentParser, *, answers: bool) -> None:
    """Adds the flags of a request and of the model; answers: also the flags of an answer."""
    source = parser.add_mutually_exclusive_group(required=True)
    add(source, "context-file", Path)
    add(source, "prompt-ids", Path)
    add(parser, "question")
    add(parser, "instruction")
    add(parser, "system")
    add(parser, "no-chat-template", bool, dest="chat", action="store_false")
    if answers:
        add(source, "requests", Path)
        add(parser, "batch-size", int, default=8)
        add(source, "snapshot", Path)
        add(parser, "store", Path)
        add(parser, "method", method, default="prefilling")
        add(parser, "check-nan", bool)
        add_output(parser)
    add_settings(parser)
    add(parser, "seed", seed, default=0)
    add(parser, "memory-limit", float)
    add_placement(parser)


def read_file(path: Path) -> str:
    """Returns the text of a file, of standard input for "-", without its byte order mark."""
    if str(path) != "-":
        return read_text(path)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: byte {error.start}") from None


def read_prompt_ids(path: Path, *, parts: bool) -> tuple[list[int], list[int], list[int]]:
    """Reads (prefix, context, query) of a prompt file.

    parts: the method cuts documents; without, a bare prompt is all query.
    """
    several = f"{path} holds several prompts: --prompt-ids takes one prompt, --requests JSON lines"
    raw = _parse(read_text(path), f"{path}", several)
    listed = isinstance(raw, list) and any(isinstance(x, dict | list) for x in raw)
    require(not listed, several)
    return _id_parts(raw, f"{path}", parts)


def read_requests(
    path: Path, *, parts: bool, seed: int, oracle: list[int] | None
) -> list[tuple[int, dict[str, Any], Request]]:
    """Reads JSON lines of requests.

    A line is an object with `context` and `question` (text), or with the keys of --prompt-ids.
    `seed` and `oracle` replace those given here. `id`, text or an integer, goes with the answer.

    Returns:
      The number of each line, from 1; its `id` in an object, empty without one; and its request.
      Blank lines are left out.
    """
    requests = []
    for number, line in enumerate(read_file(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            raw = _parse(line, where, f"{where} holds several JSON values")
            require(isinstance(raw, dict), f"{where} must hold a JSON object")
            chosen: dict[str, Any] = {"seed": seed, "oracle": oracle}
            chosen |= {name: raw[name] for name in chosen if name in raw}
            ids, given = chosen["oracle"], {*raw} - {"id", *chosen}
            name = {"id": raw["id"]} if "id" in raw else {}
            require(
                isinstance(raw.get("id", ""), str | int), f"{where}: id must be text or an integer"
            )
            require(type(chosen["seed"]) is int, f"{where}: seed must be an integer")
            require(ids is None or _are_ids(ids), f"{where}: oracle must be a list of integers")
            if given == {"context", "question"}:
                texts = raw["context"], raw["question"]
                valid = all(isinstance(text, str) for text in texts)
                require(valid, f"{where}: context and question must be text")
                request = Request(*texts, **chosen)
            else:
                named = {name: raw[name] for name in given}
                prefix, context, query = _id_parts(named, where, parts, " context and question,")
                request = Request(context, query, prefix, **chosen)
            requests.append((number, name, request))
    require(bool(requests), f"{path} holds no requests")
    return requests


def _parse(text: str, where: str, several: str) -> Any:
    """Parses a JSON value. several: the message for more than one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            raise ValueError(several) from None
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _id_parts(
    raw: Any, where: str, parts: bool, others: str = ""
) -> tuple[list[int], list[int], list[int]]:
    """(prefix, context, query) of an object of token ids. others: keys that are allowed instead."""
    names = ("prefix", "context", "query")
    require(isinstance(raw, dict), f"{where} must hold a JSON object with the keys {names}")
    if set(raw) == {"prompt"}:
        require(not parts, f"{where} holds a bare prompt: method prefilling needs {names}")
        raw = {"prefix": [], "context": [], "query": raw["prompt"]}
    keys = f"{where} must hold the keys{others} {names}, or the key prompt; got {tuple(raw)}"
    require(set(raw) == set(names), keys)
    for name in names:
        require(_are_ids(raw[name]), f"{where}: {name} must be a list of integers")
    return raw["prefix"], raw["context"], raw["query"]


def load_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `load_model` takes beside the folder, from the flags of `add_placement`."""
    settings = {"dtype": DTYPES[args.dtype], "weights": args.weights, "sums": args.sums}
    return settings | {"mesh": mesh_of(args)}


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh from --mesh."""
    return None if args.mesh is None else make_mesh(*parse_mesh(args.mesh))
