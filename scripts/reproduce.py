#!/usr/bin/env python3
"""The runs of the method's authors on LongBench MultiFieldQA-en, beside what they published.

  scripts/reproduce.py CHECKPOINT DATA [--out DIR] [--rows reference full-recompute] [--limit N]

CHECKPOINT is a converted or a PyTorch folder of Dream-v0-Base-7B; other models run too. DATA is
multifieldqa_en.jsonl or a folder that holds it. DIR gets the records of scripts/evaluate.py, and
the table as table.md and summary.json; it also goes to stdout. The same command goes on where a run
was stopped or killed; more rows and a higher limit may be asked for.
docs/reproducing.md says what the rows are and what a run costs.

Exit status: 0; 2 and one line for bad input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
from bench.record import conditions
from experiments.benchmarks.reproduction import (
    PUBLISHED,
    ROWS,
    load_task,
    markdown,
    notes_on,
    plan_runs,
    report,
)
from experiments.benchmarks.run import Asker, missing_work
from experiments.records import Records, write_json, write_text
from experiments.runner import run as answer_all

from convert.__main__ import converted
from pdllm_jax import (
    ChunkConfig,
    Engine,
    SelectionConfig,
    Tokenizer,
    load_config,
    load_model,
)
from pdllm_jax.cli.errors import Parser, leave, status
from pdllm_jax.cli.flags import add_fields, add_placement, from_args, load_settings
from pdllm_jax.compilation import enable_compilation_cache


def parser() -> argparse.ArgumentParser:
    """CHECKPOINT and DATA, then flags."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path)
    add("data", metavar="DATA", type=Path)
    add("--out", type=Path, default=Path("reproduced"), metavar="DIR", help="(%(default)s)")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    add("--limit", type=int, metavar="N", help="the first N examples")
    add_fields(p, ChunkConfig, ("chunk_size",))
    add_fields(p, SelectionConfig, ("top_k", "encode_batch"))
    add_placement(p)
    return p


def reproduce(args: argparse.Namespace) -> int:
    """Runs all that the command line asks for; returns the exit status."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    task, chunking = load_task(args.data, args.limit), from_args(ChunkConfig, args)
    common = {name: getattr(args, name) for name in ("top_k", "encode_batch")}
    SelectionConfig.paper(**common)  # refuses bad settings before anything is converted
    folder = converted(args.checkpoint)
    config = load_config(folder)
    runs = plan_runs(config, **common)
    asked = {name: runs[name] for name in args.rows}
    tokenizer = Tokenizer.load(folder, config)
    model = load_model(folder, **load_settings(args))
    engine = Engine(model, tokenizer, chunking=chunking, implementation=args.implementation)
    ask = Asker(engine, chat=task.chat)
    arms = {}
    longest = max(task.examples, key=lambda example: len(example.prompt.context))
    for run in asked.values():
        own = dataclasses.replace(ask, engine=dataclasses.replace(engine, selection=run.selection))
        own.check(task, longest, run.method)
        arms[run.name] = partial(own, method=run.method)
    where = {**conditions(), "pdllm-jax": version("pdllm-jax"), "platform": jax.default_backend()}
    settings = {
        **ask.settings(folder),
        "decoding": ask.decoding(task).to_flat(),
        "rows": {name: [run.method, run.selection.to_flat()] for name, run in runs.items()},
    }
    with Records(args.out, settings) as records:
        work = list(missing_work(arms, [task], records))
        total = len(task.examples) * len(arms)
        answer_all(work, records, total=total, started=total - len(work), note=where)
        rows = report(asked, task, records)
        notes = notes_on(rows, config.family, args.chunk_size, args.top_k, len(records.runs))
    text = markdown(rows, notes)
    summary = {
        "command": shlex.join(["scripts/reproduce.py", *args.argv]),
        "conditions": records.runs,
        "published": PUBLISHED,
        "settings": settings,
        "rows": rows,
        "notes": notes,
    }
    write_json(args.out / "summary.json", summary)
    write_text(args.out / "table.md", text + "\n")
    print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(**vars(parser().parse_args(argv)), argv=argv)
    enable_compilation_cache()
    return status(lambda: reproduce(args), args)


if __name__ == "__main__":
    leave(main())
