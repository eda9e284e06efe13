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
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

import jax
from bench.record import conditions
from experiments.benchmarks import generated, needle, published
from experiments.benchmarks.example import DataError, Malformed, OnMalformed, Task
from experiments.benchmarks.metrics import RULES
from experiments.benchmarks.run import Asker, missing_work, scores_table, summarise
from experiments.records import Records, read_json, write_json
from experiments.runner import run

from convert.__main__ import converted
from pdllm_jax import ChunkConfig, Engine, SelectionConfig, Tokenizer, load_config, load_model
from pdllm_jax.cli.errors import Parser, leave, seed, status
from pdllm_jax.cli.flags import (
    METAVARS,
    METHODS,
    UNMASKS,
    add_chunking,
    add_placement,
    from_args,
    load_settings,
    method,
    unmask,
)
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.method.caches import cache_method
from pdllm_jax.method.scorers import SCORERS

BENCHMARKS = {
    "generated": ("retrieval tasks made from the corpora of small_model/corpus.py", "CORPORA"),
    "longbench": ("LongBench v1, or LongBench-E, from a local copy", "FOLDER"),
    "infinitebench": ("InfiniteBench from a local copy", "FOLDER"),
    "ruler": ("RULER from files that its scripts made", "FOLDER"),
    "needle": ("needle in a haystack: a text file, or a folder of them", "TEXT"),
}


def common() -> argparse.ArgumentParser:
    """Flags of every benchmark."""
    p = argparse.ArgumentParser(add_help=False)
    add, default = p.add_argument, "(default: %(default)s)"
    add("--out", type=Path, required=True, metavar="DIR")
    text = f"{METHODS} (default: plain dual-cache prefilling)"
    methods = [cache_method(name) for name in ("plain", "dual-cache", "prefilling")]
    metavar = METAVARS[method]
    add("--methods", nargs="+", type=method, default=methods, metavar=metavar, help=text)
    add("--limit", type=int, metavar="N", help="the first N examples of every task")
    text = f"a malformed line ends the run, or is reported and left out {default}"
    add("--on-malformed", choices=get_args(OnMalformed), default="stop", help=text)
    text = "longest prompt of the baselines, whose middle is dropped (default: by the model)"
    add("--max-length", type=int, metavar="N", help=text)
    add("--gen-length", type=int, metavar="N", help="instead of the benchmark's")
    add("--block-length", type=int, default=32, help=f"at most {default}")
    text = f"unmask every slot at least this probable; 0: one token a step {default}"
    add("--threshold", type=float, default=0.9, help=text)
    text = f"a rule instead of --threshold: {UNMASKS}"
    add("--unmask", type=unmask, metavar=METAVARS[unmask], help=text)
    add("--no-chat", action="store_true", help="no chat template around prompts")
    add_chunking(p)
    scorers = [name for name in SCORERS if name != "oracle"]
    add("--score", choices=scorers, default=SelectionConfig().scorer.name)
    add("--seed", type=seed, default=0)
    add_placement(p)
    return p


def parser() -> argparse.ArgumentParser:
    """CHECKPOINT, the benchmark and its data, then flags."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    kinds = p.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    shared, add = common(), {}
    for name, (text, data) in BENCHMARKS.items():
        sub = kinds.add_parser(name, help=text, description=text, parents=[shared])
        sub.add_argument("data", type=Path, metavar=data)
        add[name] = sub.add_argument
        if name in ("generated", "needle"):
            sub.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="TOKENS")
        else:
            sub.add_argument("--tasks", nargs="+", metavar="TASK")
    add["generated"]("--tasks", nargs="+", choices=generated.NAMES, default=generated.NAMES)
    add["generated"]("--examples", type=int, default=500, help="of a cell (default: %(default)s)")
    add["generated"]("--first", type=seed, default=100_000, help="seed of the first example")
    add["longbench"]("--config", type=Path, help="folder of dataset2prompt.json")
    add["infinitebench"]("--templates", type=Path, metavar="F", help="JSON: prompts by task")
    text = "published version of prompts and metrics (default: %(default)s)"
    add["infinitebench"]("--rules", choices=RULES, default=RULES[0], help=text)
    add["needle"]("--depths", type=int, default=11, metavar="N", help="evenly from 0 to 1")
    add["needle"]("--needle", default=needle.NEEDLE)
    add["needle"]("--question", default=needle.QUESTION)
    add["needle"]("--expect", nargs="+", default=needle.EXPECTED, metavar="PHRASE")
    return p


def load_tasks(args: argparse.Namespace, tokenizer: Tokenizer, malformed: Malformed) -> list[Task]:
    """Loads the benchmark's tasks with their examples."""
    if not args.data.exists():
        raise DataError(f"{args.data} does not exist")
    if args.benchmark == "generated":
        count = args.examples if args.limit is None else min(args.examples, args.limit)
        seeds = range(args.first, args.first + count)
        return generated.make(args.data, tokenizer.backend, args.tasks, args.lengths, seeds)
    if args.benchmark == "needle":
        text, wording = needle.read_haystack(args.data), (args.needle, args.question, args.expect)
        grid = text, tokenizer, args.lengths, args.depths
        return needle.grid(*grid, *wording, gen_length=args.gen_length or 32)
    changes: dict[str, Any] = {"config": getattr(args, "config", None)}
    if args.benchmark == "infinitebench":
        changes["rules"] = args.rules
        if args.templates:
            changes["templates"] = read_json(args.templates, DataError)
    return published.load(args.benchmark, args.data, args.tasks, malformed, **changes)


def evaluate(args: argparse.Namespace) -> int:
    """Runs all that the command line asks for; returns the exit status."""
    for name in ("limit", "gen_length", "block_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not all(phrase.strip() for phrase in getattr(args, "expect", ())):
        raise ValueError("--expect must not hold an empty phrase: every answer contains it")
    malformed = Malformed(args.on_malformed, lambda line: print(line, file=sys.stderr))
    selection = from_args(SelectionConfig, args, scorer=args.score)
    chunking, settings = from_args(ChunkConfig, args), load_settings(args)
    folder = converted(args.checkpoint)
    config, selection = load_config(folder), selection.calibrated(folder)
    selection.scorer.check(config)
    tokenizer = Tokenizer.load(folder, config)
    tasks = load_tasks(args, tokenizer, malformed)
    tasks = [dataclasses.replace(t, examples=t.examples[: args.limit]) for t in tasks]
    model = load_model(folder, **settings)
    ask = Asker(
        Engine(model, tokenizer, chunking, selection, implementation=args.implementation),
        threshold=args.threshold or None,
        unmask=args.unmask,
        **{name: getattr(args, name) for name in ("block_length", "gen_length", "max_length")},
        chat=not args.no_chat,
        seed=args.seed,
    )
    arms = {str(one): partial(ask, method=one) for one in args.methods}
    for task in tasks:  # refuses what cannot be answered before anything is computed
        ask.decoding(task)
        for one in (one for one in args.methods if one.longest is not None):
            for example in task.examples:
                ask.check(task, example, one)
    where = {**conditions(), "platform": jax.default_backend()}
    rules = {"rules": args.rules} if args.benchmark == "infinitebench" else {}
    with Records(args.out, {**ask.settings(folder), **rules}) as records:
        if records.dropped:
            dropped = f"the last line was cut off ({records.dropped} bytes dropped)"
            print(f"{records.path}: {dropped}", file=sys.stderr)
        work = list(missing_work(arms, tasks, records))
        total = sum(len(task.examples) for task in tasks) * len(arms)
        run(work, records, total=total, started=total - len(work), note=where)
        rows = summarise(tasks, arms, records)
    summary = {
        "command": " ".join(["scripts/evaluate.py", *sys.argv[1:]]),
        "conditions": where,
        "settings": read_json(args.out / "settings.json"),
        "malformed_lines": malformed.count,
        "rows": rows,
    }
    write_json(args.out / "summary.json", summary)
    print(scores_table(rows))
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
