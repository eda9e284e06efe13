"""Options that command lines share, and what they name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

from command_line import Parser
from jax.sharding import Mesh

from convert import converted
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    MaskPredictor,
    ModelConfig,
    SelectionConfig,
    Tokenizer,
    load_config,
    load_model,
    make_mesh,
)
from pdllm_jax.config import Positions, Recompute, Remasking, Reselect
from pdllm_jax.method.encodings import ENCODINGS, Bridge, BridgeTokens
from pdllm_jax.method.scorers import DraftScorer
from pdllm_jax.network.sharding import parse_mesh

DTYPES = {"keep": None, "float32": "float32", "bfloat16": "bfloat16"}


def parser(description: str | None, *, answers: bool = True) -> argparse.ArgumentParser:
    """Flags of a request carry the field's names; defaults are the library's.

    answers: with those of the answer, its method and its output.
    """
    selection, decode = SelectionConfig(), DecodeConfig()
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--context-file", type=Path, metavar="F", help="the document, UTF-8 text")
    source.add_argument(
        "--prompt-ids",
        type=Path,
        metavar="F",
        help='JSON {"prefix": [..], "context": [..], "query": [..]}; or {"prompt": [..]}',
    )
    p.add_argument("--question", metavar="Q", help="goes with a document that is text")
    p.add_argument("--instruction", metavar="TEXT", help="what comes before the document")
    if answers:
        source.add_argument(
            "--snapshot", type=Path, metavar="DIR", help="an encoded document, by prefill.py"
        )
        _add_answer(p)
    g = p.add_argument_group("decoding")
    g.add_argument(
        "--gen-length",
        type=int,
        default=decode.gen_length,
        metavar="N",
        help="tokens of the response (default: %(default)s)",
    )
    g.add_argument("--block-length", type=int, help="tokens of a block (default: up to 32)")
    g.add_argument("--steps", type=int, help="evaluations in all (default: one per token)")
    g.add_argument(
        "--temperature", type=float, default=decode.temperature, metavar="T",
        help="of Gumbel noise on the logits, 0 for none (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--remasking",
        choices=get_args(Remasking),
        default=decode.remasking.name,
        help="how sure a prediction is; the surest are unmasked (default: %(default)s)",
    )
    g.add_argument("--threshold", type=float, help="unmask every slot at least this probable")
    g.add_argument("--factor", type=float, help="Fast-dLLM's factor rule")
    g.add_argument(
        "--early-stop", action="store_true", help="end with the block in which the text ends"
    )
    g.add_argument(
        "--guidance",
        type=float,
        default=decode.guidance,
        metavar="W",
        help="classifier-free; method plain (default: %(default)s, none)",
    )
    g.add_argument(
        "--recompute",
        choices=get_args(Recompute),
        default=decode.recompute,
        help="rows recomputed in a step of method prefilling (default: %(default)s)",
    )
    g = p.add_argument_group("chunks and their selection (method prefilling)")
    add_chunking(g)
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
        default=selection.scorer.name,
        help="how chunks are scored; leave-one-out is draft with a copy for every scored token "
        "(default: %(default)s)",
    )
    g.add_argument(
        "--chunks", type=int, nargs="+", metavar="ID", help="the chunks that oracle keeps"
    )
    g.add_argument(
        "--masked-copies", type=int, default=DraftScorer.masked_copies, metavar="R",
        help="copies of the query that ride along with a chunk (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--draft-length", type=int, default=DraftScorer.draft_length, metavar="N",
        help="tokens guessed for scorer draft, in two evaluations (default: %(default)s)",
    )  # fmt: skip
    g.add_argument("--keep-first", action="store_true", help="always keep the first chunk")
    g.add_argument(
        "--reselect",
        choices=get_args(Reselect),
        default=selection.reselect,
        help="score all chunks again while denoising (default: %(default)s)",
    )
    g.add_argument(
        "--bridge-share", type=float, default=Bridge.share, metavar="X",
        help="share of a chunk's tokens that encoding bridge recomputes (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--bridge-tokens",
        choices=get_args(BridgeTokens),
        default=Bridge.tokens,
        help="which: those at its start, or those with most of the query's attention "
        "(default: %(default)s)",
    )
    g.add_argument(
        "--keep-tokens", type=int, metavar="B",
        help="tokens of a kept chunk that are attended to (default: all)",
    )  # fmt: skip
    p.add_argument(
        "--seed", type=int, default=0, help="of all that is random (default: %(default)s)"
    )
    p.add_argument(
        "--memory-limit", type=float, metavar="GB",
        help="refuse what would take more device memory (default: what the device gives)",
    )  # fmt: skip
    add_placement(p)
    return p


def _add_answer(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--store", type=Path, metavar="DIR", help="keep encoded documents here, to ask again"
    )
    p.add_argument(
        "--method",
        choices=("prefilling", "plain", "prefix-cache", "dual-cache"),
        default="prefilling",
        help="plain is LLaDA's generation, the caches are Fast-dLLM's (default: %(default)s)",
    )
    p.add_argument(
        "--check-nan", action="store_true",
        help="go through the answer's computation again, layer by layer, for NaN or infinity",
    )  # fmt: skip
    add_output(p)


def add_chunking(g: Any) -> None:
    """How a document is cut, and what is kept of it and where; `g` is a parser or its group."""
    chunking, selection = ChunkConfig(), SelectionConfig()
    g.add_argument(
        "--chunk-size", type=int, default=chunking.chunk_size, metavar="C",
        help="tokens of a chunk, its anchor among them (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--overlap", type=int, default=chunking.overlap, metavar="N",
        help="tokens that a chunk repeats of the one before (default: %(default)s)",
    )  # fmt: skip
    g.add_argument("--no-anchors", action="store_true", help="no BOS at the head of a chunk")
    g.add_argument(
        "--top-k", type=int, default=selection.top_k, metavar="K",
        help="chunks kept (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--encode-batch", type=int, default=selection.encode_batch, metavar="N",
        help="chunks that are encoded at a time (default: %(default)s)",
    )  # fmt: skip
    g.add_argument(
        "--encoding",
        choices=tuple(ENCODINGS),
        default=selection.encoding.name,
        help="what the kept chunks' KV is computed from (default: %(default)s)",
    )
    g.add_argument(
        "--positions",
        choices=get_args(Positions),
        default=selection.positions,
        help="where kept chunks are placed (default: %(default)s)",
    )


def add_placement(p: argparse.ArgumentParser) -> None:
    """Where and in what precision a model runs."""
    p.add_argument(
        "--implementation",
        choices=("mosaic_gpu", "cudnn", "xla"),
        help="attention over chosen chunks (default: mosaic_gpu on Hopper GPUs, else xla)",
    )
    p.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="keep",
        help="of weights and activations (default: the checkpoint's)",
    )
    p.add_argument(
        "--mesh", metavar="DATAxTENSOR",
        help="devices to divide chunks and requests over, times those to divide each layer over",
    )  # fmt: skip
    p.add_argument(
        "--sums", choices=("mosaic_gpu", "xla"),
        help="on a mesh, what adds up a few rows (default: mosaic_gpu on Hopper GPUs that access "
        "each other's memory, else xla)",
    )  # fmt: skip


def add_output(p: argparse.ArgumentParser) -> None:
    """--json or --stream."""
    output = p.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print blocks as they are finished")


def settings(args: argparse.Namespace) -> tuple[ChunkConfig, SelectionConfig, DecodeConfig]:
    """The command line as the library's configs, which validate it."""
    exact = args.score == "leave-one-out"
    if args.margin is not None and args.max_k is None:
        raise ValueError("--margin needs --max-k")
    if args.prompt_ids is not None and (args.question, args.instruction) != (None, None):
        raise ValueError("--question and --instruction are part of the ids that --prompt-ids names")
    block_length = args.block_length
    if block_length is None:
        block_length = math.gcd(32, args.gen_length) if args.gen_length > 32 else args.gen_length
    return (
        ChunkConfig(args.chunk_size, anchors=not args.no_anchors, overlap=args.overlap),
        SelectionConfig.from_flat(
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


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """That of --mesh."""
    return None if args.mesh is None else make_mesh(*parse_mesh(args.mesh))


def memory_limit(args: argparse.Namespace) -> int | None:
    """That of --memory-limit, in bytes."""
    if args.memory_limit is None:
        return None
    if not 0 < args.memory_limit < 1e6:
        raise ValueError(f"--memory-limit must be a number of GB, got {args.memory_limit}")
    return int(1e9 * args.memory_limit)


def load(args: argparse.Namespace) -> tuple[MaskPredictor, Path]:
    """The model, and the converted folder that it comes from."""
    mesh = mesh_of(args)
    folder = converted(args.checkpoint)
    print(f"loading {folder}", file=sys.stderr)
    return load_model(folder, dtype=DTYPES[args.dtype], mesh=mesh, sums=args.sums), folder


def stopping(
    args: argparse.Namespace, decode: DecodeConfig, tokenizer: Tokenizer | None, config: ModelConfig
) -> DecodeConfig:
    """`decode`, with the ids that end a text where --early-stop asks for it."""
    if not args.early_stop:
        return decode
    stops = tokenizer.stop_ids if tokenizer else (config.eos_token_id,)
    return dataclasses.replace(decode, stop_ids=stops)


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
