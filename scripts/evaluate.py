#!/usr/bin/env python3
"""Scores of a checkpoint on long-context benchmarks, by method, on the same examples.

  scripts/evaluate.py CHECKPOINT generated CORPORA --out DIR --lengths 4096
  scripts/evaluate.py CHECKPOINT longbench FOLDER --out DIR --tasks hotpotqa trec --limit 50
  scripts/evaluate.py CHECKPOINT infinitebench FOLDER --out DIR
  scripts/evaluate.py CHECKPOINT ruler FOLDER --out DIR
  scripts/evaluate.py CHECKPOINT needle TEXT --out DIR --lengths 4096 8192

DIR gets records.jsonl (a line for each example and method), settings.json and summary.json; the
table goes to stdout. The same command goes on where a run was stopped or killed.
docs/evaluation.md says what is exact.

Exit status: 0; 1 when all is done but malformed lines were skipped; 2 and one line for bad input;
130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

import jax
from bench.record import conditions
from experiments.answering import METHODS
from experiments.benchmarks import generated, infinitebench, longbench, needle, ruler
from experiments.benchmarks.example import DataError, Malformed, OnMalformed, Task
from experiments.benchmarks.run import Asker, missing_work, summarise, table
from experiments.records import Records, read_json, write_json
from experiments.runner import run

from convert.__main__ import converted
from pdllm_jax import ChunkConfig, SelectionConfig, Tokenizer, load_config, load_model
from pdllm_jax.cli.errors import Parser, leave, status
from pdllm_jax.cli.flags import DTYPES, add_chunking, add_placement, from_args, mesh_of
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.method.scorers import SCORERS
from pdllm_jax.storage.manifest import MANIFEST


def common() -> argparse.ArgumentParser:
    """Flags of every benchmark."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument(
        "--methods", nargs="+", choices=METHODS, default=("plain", "dual-cache", "prefilling")
    )
    p.add_argument("--limit", type=int, metavar="N", help="the first N examples of every task")
    p.add_argument(
        "--on-malformed", choices=get_args(OnMalformed), default="stop",
        help="a malformed line ends the run, or is reported and left out (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--max-length", type=int, metavar="N",
        help="longest prompt of the baselines, whose middle is dropped (default: by the model)",
    )  # fmt: skip
    p.add_argument("--gen-length", type=int, metavar="N", help="instead of the benchmark's")
    p.add_argument("--block-length", type=int, default=32, help="at most (default: %(default)s)")
    p.add_argument(
        "--threshold", type=float, default=0.9,
        help="unmask every slot at least this probable; 0: one token a step (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--no-chat", action="store_true", help="no chat template around prompts")
    add_chunking(p)
    scorers = [name for name in SCORERS if name != "oracle"]
    p.add_argument("--score", choices=scorers, default=SelectionConfig().scorer.name)
    p.add_argument("--seed", type=int, default=0)
    add_placement(p)
    return p


BENCHMARKS = {
    "generated": ("retrieval tasks made from the corpora of small_model/corpus.py", "CORPORA"),
    "longbench": ("LongBench v1, or LongBench-E, from a local copy", "FOLDER"),
    "infinitebench": ("InfiniteBench from a local copy", "FOLDER"),
    "ruler": ("RULER from files that its scripts made", "FOLDER"),
    "needle": ("needle in a haystack: a text file, or a folder of them", "TEXT"),
}


def parser() -> argparse.ArgumentParser:
    """CHECKPOINT, the benchmark and its data, then flags."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    kinds = p.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    shared, subs = common(), {}
    for name, (text, data) in BENCHMARKS.items():
        sub = kinds.add_parser(name, help=text, description=text, parents=[shared])
        sub.add_argument("data", type=Path, metavar=data)
        if name in ("generated", "needle"):
            sub.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="TOKENS")
        else:
            sub.add_argument("--tasks", nargs="+", metavar="TASK")
        subs[name] = sub
    sub = subs["generated"]
    sub.add_argument("--tasks", nargs="+", choices=generated.NAMES, default=generated.NAMES)
    sub.add_argument("--examples", type=int, default=500, help="of a cell (default: %(default)s)")
    sub.add_argument("--first", type=int, default=100_000, help="seed of the first example")
    subs["longbench"].add_argument("--config", type=Path, help="folder of dataset2prompt.json")
    subs["infinitebench"].add_argument(
        "--templates", type=Path, metavar="F", help="JSON: prompts by task"
    )
    sub = subs["needle"]
    sub.add_argument("--depths", type=int, default=11, metavar="N", help="evenly from 0 to 1")
    sub.add_argument("--needle", default=needle.NEEDLE)
    sub.add_argument("--question", default=needle.QUESTION)
    sub.add_argument("--expect", nargs="+", default=needle.EXPECTED, metavar="PHRASE")
    return p


def load_tasks(args: argparse.Namespace, tokenizer: Tokenizer, malformed: Malformed) -> list[Task]:
    """Loads the benchmark's tasks with their examples."""
    if not args.data.exists():
        raise DataError(f"{args.data} does not exist")
    if args.benchmark == "generated":
        return load_generated(args, tokenizer)
    if args.benchmark == "longbench":
        return longbench.load(args.data, args.tasks, malformed, args.config)
    if args.benchmark == "infinitebench":
        templates = args.templates and read_json(args.templates, DataError)
        return infinitebench.load(args.data, args.tasks, malformed, templates)
    if args.benchmark == "ruler":
        return ruler.load(args.data, args.tasks, malformed)
    if args.depths < 2:
        raise DataError(f"--depths must be at least 2, got {args.depths}")
    return needle.grid(
        needle.read_haystack(args.data), tokenizer, args.lengths,
        [i / (args.depths - 1) for i in range(args.depths)],
        needle=args.needle, question=args.question, expected=args.expect,
        gen_length=args.gen_length or 32,
    )  # fmt: skip


def load_generated(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Task]:
    """Makes the generated tasks."""
    from small_model import tasks
    from small_model.corpus import load

    generated.check_tokenizer(args.data, tokenizer.backend)
    encode = tasks.Encoder(tokenizer.backend)
    tokenizer.backend.encode_special_tokens = False  # the tasks spell the chat template out
    try:
        count = args.examples if args.limit is None else min(args.examples, args.limit)
        return generated.make(
            args.tasks, args.lengths, count,
            corpora=load(args.data, held_out=True), encode=encode, first_seed=args.first,
        )  # fmt: skip
    finally:
        tokenizer.backend.encode_special_tokens = True


def settings(ask: Asker, folder: Path) -> dict[str, Any]:
    """Returns what a record depends on beside its example and method."""
    plain = {k: v for k, v in vars(ask).items() if k not in ("model", "tokenizer")}
    return {
        **plain,
        "chunking": dataclasses.asdict(ask.chunking),
        "selection": ask.selection.to_flat(),
        "checkpoint": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        "dtype": str(ask.model.dtype),
        **({} if ask.model.mesh is None else {"mesh": dict(ask.model.mesh.shape)}),
    }


def evaluate(args: argparse.Namespace) -> int:
    """Runs all that the command line asks for; returns the exit status."""
    for name in ("limit", "gen_length", "block_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not all(phrase.strip() for phrase in getattr(args, "expect", ())):
        raise ValueError("--expect must not hold an empty phrase: every answer contains it")
    malformed = Malformed(args.on_malformed, lambda line: print(line, file=sys.stderr))
    chunking = from_args(ChunkConfig, args)
    selection = from_args(SelectionConfig, args, scorer=args.score)
    mesh = mesh_of(args)
    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    tasks = load_tasks(args, tokenizer, malformed)
    tasks = [dataclasses.replace(t, examples=t.examples[: args.limit]) for t in tasks]
    ask = Asker(
        model=load_model(folder, dtype=DTYPES[args.dtype], mesh=mesh, sums=args.sums),
        tokenizer=tokenizer,
        chunking=chunking, selection=selection, threshold=args.threshold or None,
        block_length=args.block_length, gen_length=args.gen_length, max_length=args.max_length,
        chat=not args.no_chat, seed=args.seed, implementation=args.implementation,
    )  # fmt: skip
    for task in tasks:
        ask.decoding(task)  # refuses bad settings before anything is computed
    where = {**conditions(), "platform": jax.default_backend()}
    with Records(args.out, settings(ask, folder)) as records:
        if records.dropped:
            print(
                f"{records.path}: the last line was cut off ({records.dropped} bytes dropped)",
                file=sys.stderr,
            )
        work = list(missing_work(ask, tasks, args.methods, records))
        total = sum(len(task.examples) for task in tasks) * len(args.methods)
        run(work, records, total=total, started=total - len(work), note=where)
        rows = summarise(tasks, args.methods, records)
    summary = {
        "command": " ".join(["scripts/evaluate.py", *sys.argv[1:]]),
        "conditions": where,
        "settings": read_json(args.out / "settings.json"),
        "malformed_lines": malformed.count,
        "rows": rows,
    }
    write_json(args.out / "summary.json", summary)
    print(table(rows))
    if malformed.count:
        print(f"{malformed.count} malformed lines were left out", file=sys.stderr)
    return 1 if malformed.count else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    enable_compilation_cache()
    return status(lambda: evaluate(args), args)


if __name__ == "__main__":
    leave(main())
