"""Command line flags derived from the settings' dataclasses, and what their values name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jax.sharding import Mesh

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.cache_methods import Method
from pdllm_jax.method.encodings import ENCODINGS, Bridge
from pdllm_jax.method.sampling import CONFIDENCES
from pdllm_jax.method.scorers import SCORERS, DraftScorer
from pdllm_jax.network.sharding import make_mesh, parse_mesh

DTYPES = {"keep": None, "float32": "float32", "bfloat16": "bfloat16"}
Settings = TypeVar("Settings")

# Fields with another flag's name, and fields without a flag (`settings` derives them).
NAMES = {"scorer": "score", "share": "bridge_share", "tokens": "bridge_tokens"}
DERIVED = ("draft_steps", "stop_ids", "unmask")
# Values of fields that a table's name or an object fills.
CHOICES = {
    "scorer": ("leave-one-out", *SCORERS),
    "encoding": tuple(ENCODINGS),
    "remasking": tuple(CONFIDENCES),
}
# (metavar, help) of a field's flag; the rest of a flag comes from the field.
HELP = {
    "chunk_size": ("C", "tokens of a chunk, its anchor included"),
    "anchors": (None, "no BOS at the head of a chunk"),
    "overlap": ("N", "tokens that a chunk repeats of the one before"),
    "top_k": ("K", "chunks kept"),
    "max_k": ("K", "keep up to this many where scores are close to the last of top-k"),
    "margin": ("X", "how close, in units of the scores; needs --max-k"),
    "keep_first": (None, "always keep the first chunk"),
    "reselect": (None, "score all chunks again while denoising"),
    "scorer": (None, "how chunks are scored; leave-one-out is draft, every token in its own copy"),
    "masked_copies": ("R", "masked copies of the query that go along with a chunk"),
    "draft_length": ("N", "tokens guessed for scorer draft, in two evaluations"),
    "encode_batch": ("N", "chunks that are encoded at a time"),
    "encoding": (None, "what the kept chunks' KV is computed from"),
    "share": ("X", "share of a chunk's tokens that encoding bridge recomputes"),
    "tokens": (None, "which: at its start, or with most of the query's attention"),
    "positions": (None, "where kept chunks are placed"),
    "keep_tokens": ("B", "tokens of a kept chunk that are attended to (default: all)"),
    "gen_length": ("N", "tokens of the response"),
    "block_length": ("N", "tokens of a block (default: up to 32)"),
    "steps": ("N", "evaluations in all (default: one per token)"),
    "temperature": ("T", "of the Gumbel noise on the logits, 0 for none"),
    "remasking": (None, "confidence of a prediction; the most confident ones are unmasked"),
    "threshold": ("P", "unmask every slot at least this probable"),
    "factor": ("F", "Fast-dLLM's factor rule"),
    "guidance": ("W", "classifier-free guidance, for method plain"),
    "recompute": (None, "rows recomputed in a step of method prefilling"),
}


def add_fields(
    parser: Any, settings: type, names: Collection[str] | None = None, **changes: Mapping[str, Any]
) -> None:
    """Adds a flag for each field of a settings dataclass.

    Args:
      parser: a parser or its argument group.
      names: fields, by default all that have a flag.
      changes: arguments of `add_argument` by field, instead of those that the field gives.
    """
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in DERIVED or (names is not None and field.name not in names):
            continue
        metavar, text = HELP.get(field.name, (None, field.name.replace("_", " ")))
        kinds = _alternatives(hints[field.name])
        choices = [
            value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)
        ]
        flag = NAMES.get(field.name, field.name).replace("_", "-")
        options: dict[str, Any] = {"dest": NAMES.get(field.name, field.name), "help": text}
        if field.name == "scorer":
            options["dest"] = field.name
        choices = list(CHOICES.get(field.name, choices))
        if kinds[0] is bool:
            flag = f"no-{flag}" if field.default else flag
            options["action"] = "store_false" if field.default else "store_true"
        else:
            options["default"] = getattr(field.default, "name", field.default)
            options |= {"choices": choices} if choices else {"type": kinds[0], "metavar": metavar}
        options |= changes.get(field.name, {})
        if options.get("default") is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{flag}", **options)


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union, None left out."""
    union = get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for kind in (get_args(hint) if union else (hint,)) if kind is not type(None)]


def from_args(settings: type[Settings], args: argparse.Namespace, **values: Any) -> Settings:
    """Builds settings from parsed flags, which validates them; `values` replace fields."""
    names = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    parsed = {name: value for name, value in vars(args).items() if name in names}
    return settings(**{**parsed, **values})


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of chunking, selection and decoding."""
    group = parser.add_argument_group("decoding")
    add_fields(group, DecodeConfig, block_length={"default": None})
    group.add_argument(
        "--early-stop", action="store_true", help="end with the block in which the text ends"
    )
    group = parser.add_argument_group("chunks and their selection (method prefilling)")
    add_fields(group, ChunkConfig)
    add_fields(group, SelectionConfig, margin={"default": None})
    add_fields(group, DraftScorer)
    add_fields(group, Bridge)
    group.add_argument(
        "--chunks", type=int, nargs="+", metavar="ID", help="chunks for scorer oracle"
    )


def add_chunking(parser: Any) -> None:
    """Adds the flags of the chunking, and of the selection's most common settings."""
    add_fields(parser, ChunkConfig)
    add_fields(parser, SelectionConfig, ("top_k", "encode_batch", "encoding", "positions"))


def settings(args: argparse.Namespace) -> tuple[ChunkConfig, SelectionConfig, DecodeConfig]:
    """The settings of `add_settings`, validated."""
    if args.margin is not None and args.max_k is None:
        raise ValueError("--margin needs --max-k")
    exact = args.scorer == "leave-one-out"
    selected = {field.name for field in dataclasses.fields(SelectionConfig)}
    selected |= {"draft_length", "bridge_share", "bridge_tokens"}
    selected -= {"margin", "scorer"}
    length = args.gen_length
    block = math.gcd(32, length) if length > 32 else length
    return (
        from_args(ChunkConfig, args),
        SelectionConfig.from_flat(
            **{name: value for name, value in vars(args).items() if name in selected},
            margin=args.margin or 0.0,
            scorer="draft" if exact else args.scorer,
            masked_copies=None if exact else args.masked_copies,
            draft_steps=min(2, args.draft_length),
        ),
        from_args(
            DecodeConfig,
            args,
            block_length=block if args.block_length is None else args.block_length,
            recompute="response" if args.guidance else args.recompute,
        ),
    )


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of where and in what precision a model runs."""
    parser.add_argument(
        "--implementation",
        choices=("mosaic_gpu", "cudnn", "xla"),
        help="attention over chosen chunks (default: mosaic_gpu on Hopper GPUs, else xla)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="keep",
        help="of weights and activations (default: the checkpoint's)",
    )
    parser.add_argument(
        "--mesh",
        metavar="DATAxTENSOR",
        help="devices that divide chunks and requests, times devices that divide each layer",
    )
    parser.add_argument(
        "--sums",
        choices=("mosaic_gpu", "xla"),
        help="on a mesh, what adds up a few rows (default: mosaic_gpu on Hopper GPUs that access "
        "each other's memory, else xla)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --stream."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print blocks as they are finished")


def add_source(parser: argparse.ArgumentParser, *, answers: bool) -> None:
    """Adds the flags of the checkpoint and the request; answers: with the flags of an answer."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--context-file", type=Path, metavar="F", help="the document, UTF-8 text")
    source.add_argument(
        "--prompt-ids",
        type=Path,
        metavar="F",
        help='JSON {"prefix": [..], "context": [..], "query": [..]}; or {"prompt": [..]}',
    )
    parser.add_argument("--question", metavar="Q", help="goes with a document that is text")
    parser.add_argument("--instruction", metavar="TEXT", help="text before the document")
    if answers:
        source.add_argument("--snapshot", type=Path, metavar="DIR", help="a document of prefill")
        parser.add_argument(
            "--store", type=Path, metavar="DIR", help="keep encoded documents here, to ask again"
        )
        parser.add_argument(
            "--method",
            choices=get_args(Method),
            default="prefilling",
            help="plain is LLaDA's generation, the caches are Fast-dLLM's (default: %(default)s)",
        )
        parser.add_argument(
            "--check-nan",
            action="store_true",
            help="compute the answer again, layer by layer, to find NaN or infinity",
        )
        add_output(parser)
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="refuse a request that takes more device memory (default: what the device gives)",
    )
    add_placement(parser)


def read_prompt_ids(path: Path, method: str) -> tuple[list[int], list[int], list[int]]:
    """Reads (prefix, context, query) of a prompt file; a bare prompt is all query."""
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


def read_context(args: argparse.Namespace, *, question: bool = True) -> str:
    """Reads the document of --context-file."""
    if question and args.question is None:
        raise ValueError("--context-file needs --question")
    try:
        context = args.context_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{args.context_file} is not UTF-8 text") from None
    if not context.strip():
        raise ValueError(f"{args.context_file} is empty")
    return context


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh from --mesh."""
    return None if args.mesh is None else make_mesh(*parse_mesh(args.mesh))


def memory_limit(args: argparse.Namespace) -> int | None:
    """The bytes from --memory-limit."""
    if args.memory_limit is None:
        return None
    if not 0 < args.memory_limit < 1e6:
        raise ValueError(f"--memory-limit must be a number of GB, got {args.memory_limit}")
    return int(1e9 * args.memory_limit)
