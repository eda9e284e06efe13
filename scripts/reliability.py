#!/usr/bin/env python3
"""Campaigns against the library: broken input, kills, and what bfloat16 costs.

  scripts/reliability.py fuzz [--kinds KIND ...] [--count 10000] [--seed 0] [--out fuzz.json]
  scripts/reliability.py fuzz --kinds KIND --only NUMBER     # one case again, with its traceback
  scripts/reliability.py kills [--kinds KIND ...] [--count 100] [--seed 0] [--out kills.json]
  scripts/reliability.py drift CHECKPOINT TEXT [--gen-length 128] [--out drift.json]

docs/reliability.md has what they do and what came of them. Exit status: 0; 1 where there is a
finding; 2 and one line for bad input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, status

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    from campaigns import fuzz

    sub = commands.add_parser("fuzz", help="broken input of every kind")
    sub.add_argument("--kinds", nargs="+", choices=fuzz.KINDS, default=fuzz.KINDS, metavar="KIND")
    sub.add_argument("--count", type=int, default=10_000, metavar="N", help="cases of each kind")
    sub.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--only", type=int, metavar="N", help="this case alone, in this process")
    sub.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    sub.add_argument("--out", type=Path, metavar="FILE", help="JSON with counts and findings")
    from campaigns import kills

    sub = commands.add_parser("kills", help="SIGKILL at random points")
    sub.add_argument("--kinds", nargs="+", choices=kills.KINDS, default=kills.KINDS, metavar="KIND")
    sub.add_argument("--count", type=int, default=100, metavar="N", help="kills of each kind")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, metavar="FILE", help="JSON with counts and findings")
    sub = commands.add_parser("drift", help="bfloat16 against float32 over a long generation")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    sub.add_argument("text", type=Path, metavar="TEXT", help="a document, UTF-8")
    sub.add_argument("--question", default="What happens next?", metavar="Q")
    sub.add_argument("--gen-length", type=int, default=128, metavar="N")
    sub.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens, step by step")
    sub.add_argument("--context", type=int, default=2048, metavar="N", help="tokens, by the method")
    sub.add_argument("--chunk-size", type=int, default=512)
    methods = ("plain", "dual-cache", "prefilling")
    sub.add_argument("--methods", nargs="+", choices=methods, default=methods)
    sub.add_argument("--out", type=Path, metavar="FILE", help="JSON with every step")
    return p


def run_fuzz(args: argparse.Namespace) -> int:
    """Every kind in turn; one line for each."""
    from campaigns import fuzz

    if args.only is not None:
        for kind in args.kinds:
            print(f"{kind} {args.only}: {fuzz.reproduce(kind, args.seed, args.only)}")
        return 0
    if args.count < 1 or args.workers < 1:
        raise ValueError("--count and --workers must be positive")
    check_torch(args.kinds)
    tallies = []
    for kind in args.kinds:
        tally = fuzz.fuzz(kind, args.count, args.seed, first=args.first, workers=args.workers)
        tallies.append(tally)
        outcomes = ", ".join(f"{tally.outcomes[x]} {x}" for x in ("refused", "loaded", "finding"))
        rate = tally.cases / tally.seconds
        print(
            f"{kind}: {tally.cases} cases, seed {args.seed}: {outcomes}; {tally.seconds:.1f} s, "
            f"{rate:.0f} a second, the slowest {tally.slowest:.2f} s",
            flush=True,
        )
        for number, what in tally.findings[:20]:
            print(f"  case {number}: {what}", flush=True)
    if args.out is not None:
        fuzz.write_record(args.out, tallies, machine())
    return 1 if any(tally.findings for tally in tallies) else 0


def check_torch(kinds: Sequence[str]) -> None:
    """Refuses what PyTorch is needed for where it is missing."""
    if "bin" in kinds and importlib.util.find_spec("torch") is None:
        raise ValueError("bin needs PyTorch, which is not installed: see --kinds")


def run_kills(args: argparse.Namespace) -> int:
    """Every kind in turn."""
    from campaigns import kills

    if args.count < 1:
        raise ValueError("--count must be positive")
    check_torch(args.kinds)
    tallies = []
    for kind in args.kinds:
        tally = kills.kill(kind, args.count, args.seed)
        tallies.append(tally)
        by = ", ".join(f"{n} by {how}" for how, n in sorted(tally.by.items()))
        print(
            f"{kind}: {tally.kills} kills ({by}), seed {args.seed}: {len(tally.findings)} "
            f"findings; {tally.ended_before} more had ended before; {tally.seconds:.0f} s"
        )
        for found, times in sorted(tally.found.items()):
            print(f"  {times:4} times: {found}")
        for what in tally.findings[:20]:
            print(f"  FINDING {what}", flush=True)
    if args.out is not None:
        kills.write_record(args.out, tallies, machine())
    return 1 if any(tally.findings for tally in tallies) else 0


def run_drift(args: argparse.Namespace) -> int:
    """Step by step on a short prompt, then whole responses by three methods."""
    import dataclasses
    import json

    from campaigns import drift

    from convert.__main__ import converted
    from pdllm_jax import (
        ChunkConfig,
        DecodeConfig,
        SelectionConfig,
        Tokenizer,
        load_config,
        load_model,
    )
    from pdllm_jax.compilation import enable_compilation_cache

    enable_compilation_cache()
    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    text = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    prefix, query = tokenizer.around_document(args.question)
    wide, narrow = (load_model(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    config = DecodeConfig(gen_length=args.gen_length, block_length=min(32, args.gen_length))
    if args.prompt < 1:
        raise ValueError(f"--prompt must be positive, got {args.prompt}")
    prompt = [*prefix, *text[: args.prompt], *query]
    steps = drift.drift(wide, narrow, prompt, config)
    rows = drift.summary(steps)
    print(f"{len(prompt)} tokens of prompt, {len(steps)} steps, the same tokens to both:")
    for row in rows:
        print(
            "  steps {steps[0]:3}-{steps[1]:3}: logits {error:.2%} apart (at most "
            "{error_most:.2%}), probability of the prediction at most {probability_most:.3f}, same "
            "prediction {same:.1%}, same slot next {order:.1%}".format(**row),
            flush=True,
        )
    chunking = ChunkConfig(args.chunk_size)
    selection = SelectionConfig(top_k=2, encode_batch=2)
    whole = []
    for method in args.methods:
        context = args.context if method == "prefilling" else args.prompt
        parts = prefix, text[:context], query
        row = drift.agreement(wide, narrow, parts, config, method, chunking, selection)
        whole.append({**row, "context": context})
        print(
            "  {method}, {context} tokens of text: {same:.1%} of {tokens} tokens the same, "
            "the first difference at {first_difference}".format(**whole[-1]),
            flush=True,
        )
    if args.out is not None:
        record = {
            "conditions": machine(), "gen_length": args.gen_length, "prompt": len(prompt),
            "quarters": rows, "responses": whole, "steps": list(map(dataclasses.asdict, steps)),
        }  # fmt: skip
        args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, object]:
    """Where a campaign ran, in words."""
    import platform
    from importlib.metadata import version

    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(), "cores": os.cpu_count(),
        "system": platform.system(), "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("jax", "orbax-checkpoint", "safetensors", "tokenizers", "numpy")
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    # For the workers, which are forked from a server that imports everything once.
    path = [str(ROOT), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = parser().parse_args(argv)
    commands = {"fuzz": run_fuzz, "kills": run_kills, "drift": run_drift}
    return status(lambda: commands[args.command](args))


if __name__ == "__main__":
    # A polite kill ends workers and clears up as an interrupt does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
