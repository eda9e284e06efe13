#!/usr/bin/env python3
"""Ablations of the method on retrieval from long documents: run them, and report them.

  scripts/ablate.py run [CHECKPOINT] --out DIR [--grid main depth ...] [--time-limit SECONDS]
  scripts/ablate.py run --out DIR --quick                on a CPU, in minutes
  scripts/ablate.py report DIR/ablation.json             docs/results.md and pictures

`run` answers the same examples under every setting of the grids and records each answer in
DIR/records.jsonl. The same command goes on where it stopped, even if it was killed. It ends by
writing DIR/ablation.json: accuracy with intervals, paired tests, checks. CHECKPOINT is a converted
or a PyTorch folder; the default is the small model (assembled as the quickstart does: pip fetches
its base once). Without --corpora the texts are the repository's and Python's pydoc.

Exit status: 0, also where the time limit came first; 1 a failed check; 2, one line, for bad input;
130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from experiments.grids import GRIDS, Cell, all_cells
from experiments.records import Records, count_lines, read_json, write_json
from experiments.runner import run, run_processes

from pdllm_jax.cli.errors import Parser, status

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, QUICK_EXAMPLES = 352, 4  # 352: 88 of each task, 32 at each of 11 depths
MEASUREMENTS = {
    "attention": "attention on anchors by layer and head",
    "order": "the denoising order of four responses",
    "speed": "seconds against length, one request at a time",
}


def parser() -> argparse.ArgumentParser:
    """Flags of both subcommands."""
    raw = argparse.RawTextHelpFormatter
    p = Parser(description=__doc__, formatter_class=raw)
    commands = p.add_subparsers(dest="command", required=True)
    grids = [f"  {name:11} {g.question} ({len(g.cells())})" for name, g in GRIDS.items()]
    grids += [f"  {name:11} {text}" for name, text in MEASUREMENTS.items()]
    sub = commands.add_parser("run", help="answer and record", formatter_class=raw)
    sub.add_argument("checkpoint", type=Path, nargs="?", help="default: the small model")
    sub.add_argument("--out", type=Path, required=True, help="folder of the run")
    sub.add_argument(
        "--grid", nargs="+", choices=(*GRIDS, *MEASUREMENTS, "full"), default=["main"],
        metavar="GRID",
        help="\n".join(["what to compare (cells):", *grids, "  full        all but quick"]),
    )  # fmt: skip
    sub.add_argument("--quick", action="store_true", help="grid quick")
    sub.add_argument("--corpora", type=Path, help="folder of small_model/corpus.py")
    sub.add_argument(
        "--examples", type=int, help=f"a cell, {EXAMPLES} by default ({QUICK_EXAMPLES} of quick)"
    )
    sub.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="settings of all cells, where their grid does not vary them: chunk_size=1024",
    )  # fmt: skip
    sub.add_argument("--first", type=int, default=100_000, help="seed of the first example")
    sub.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="float32 on CPUs, else bfloat16"
    )
    sub.add_argument("--implementation", choices=("mosaic_gpu", "cudnn", "xla"))
    sub.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    sub.add_argument("--processes", type=int, default=1, help="that share the GPUs")
    sub.add_argument("--shard", help=argparse.SUPPRESS)
    sub = commands.add_parser("report", help="write up a run")
    sub.add_argument("record", type=Path, help="ablation.json")
    sub.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    sub.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    return p


def changes_of(pairs: list[str]) -> dict[str, Any]:
    """Returns NAME=VALUE pairs as settings of cells; values are JSON, or strings."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or name not in Cell.__dataclass_fields__:
            raise ValueError(f"--set needs NAME=VALUE with a cell's setting, got {pair!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
        if name == "tasks":
            changes[name] = tuple(value.split("+"))
    return changes


def checkpoint_of(args: argparse.Namespace) -> Path:
    """Returns the converted folder; assembles and converts it first where needed."""
    if args.checkpoint is None:
        import quickstart

        return quickstart.checkpoint()
    from convert.__main__ import converted

    return converted(args.checkpoint)


def load_bench(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns the model with its examples, and a note on where it runs."""
    import jax
    from bench.record import conditions
    from experiments.retrieval import Retrieval

    from pdllm_jax.compilation import enable_compilation_cache

    enable_compilation_cache()
    bench = Retrieval.load(
        checkpoint_of(args), args.corpora, first_seed=args.first,
        dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        implementation=args.implementation,
    )  # fmt: skip
    note = {
        **conditions(), "processes": args.processes, "encode_batch": bench.encode_batch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(bench.model)),
    }  # fmt: skip
    return bench, note


def answer_cells(
    args: argparse.Namespace, bench: Any, note: Any, cells: list[Cell], wanted: int, deadline: float
) -> bool:
    """Answers what is missing in this process; False where the deadline came first."""
    from experiments.retrieval import missing_work, records_of, shard_cells

    name = "records"
    if args.shard is not None:
        index, count = map(int, args.shard.split("/"))
        cells, name = shard_cells(cells, index, count), f"records-{index}"
    by_key = {cell.key: cell for cell in cells}
    with Records(args.out, bench.identity, name) as records:

        def line(key: str) -> str:
            rows = records_of(by_key[key], records.done, wanted).values()
            right = sum(row["score"] for row in rows)
            return f"{right:.0f} of {len(rows)} right  {by_key[key].label()}"

        started = sum(len(records_of(cell, records.done, wanted)) for cell in cells)
        return run(
            missing_work(bench, cells, wanted, records), records,
            total=len(cells) * wanted, started=started, deadline=deadline, note=note,
            parent=None if args.shard is None else os.getppid(),
            show=False if args.shard else None, on_group=line,
        )  # fmt: skip


def run_command(args: argparse.Namespace) -> int:
    """Runs `ablate.py run`."""
    begun = time.monotonic()
    deadline, changes = begun + args.time_limit, changes_of(args.set)
    names = ["quick"] if args.quick else args.grid
    if "full" in names:
        names = [*(name for name in GRIDS if name != "quick"), *MEASUREMENTS]
    grids = [name for name in dict.fromkeys(names) if name in GRIDS]
    cells = all_cells(grids, changes)
    if args.examples is not None and args.examples < 1:
        raise ValueError(f"--examples must be at least 1, got {args.examples}")
    wanted = args.examples or (QUICK_EXAMPLES if "quick" in grids else EXAMPLES)
    total, complete, bench, note = len(cells) * wanted, True, None, None
    if args.shard == "prepare":
        checkpoint_of(args)
        return 0
    if cells and args.processes > 1 and args.shard is None:
        command = [sys.executable, __file__, *args.argv]
        if code := run_processes(command, args.processes, args.out, total):
            print(f"error: a process ended with status {code}", file=sys.stderr)
            return 1
        complete = count_lines(args.out) >= total
    elif cells:
        bench, note = load_bench(args)
        complete = answer_cells(args, bench, note, cells, wanted, deadline)
    if args.shard is not None:
        return 0
    measurements = [name for name in MEASUREMENTS if name in names]
    if complete and measurements:
        from experiments.measurements import measure

        bench, note = (bench, note) if bench else load_bench(args)
        quick = "quick" in grids
        cell = Cell(**{**(GRIDS["quick"].base if quick else {}), **changes})
        complete = measure(
            bench, measurements, cell, args.out, deadline=deadline, note=note, tiny=quick
        )
    return write_summary(args, grids, wanted, complete, total, time.monotonic() - begun)


def write_summary(
    args: argparse.Namespace, grids: list[str], wanted: int, complete: bool, total: int, took: float
) -> int:
    """Writes ablation.json and says what is in it; returns the exit status."""
    from experiments.summary import summarise

    record = summarise(args.out, grids, wanted, changes_of(args.set))
    calls = args.out / "calls.json"
    seconds = read_json(calls)["seconds"] if calls.exists() else []
    record["calls"] = [*seconds, round(took, 1)]
    write_json(calls, {"seconds": record["calls"]})
    # The command line without the names of this machine's folders.
    folders = {args.checkpoint: "CHECKPOINT", args.corpora: "CORPORA", args.out: "DIR"}
    names = {str(folder): name for folder, name in folders.items()}
    record["command"] = " ".join(["scripts/ablate.py", *(names.get(w, w) for w in args.argv)])
    write_json(args.out / "ablation.json", record)
    done = sum(cell["examples"] for cell in record["cells"].values())
    print(f"{done} of {total} answers, {args.out / 'ablation.json'}")
    if not complete:
        print("stopped by the time limit: the same command goes on")
    failed = [check["name"] for check in record["checks"] if not check["ok"]]
    for name in failed:
        print(f"check failed: {name}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(**vars(parser().parse_args(argv)), argv=argv)
    if args.command == "report":
        from experiments.report import write_report

        return status(lambda: write_report(args.record, args.results, args.pictures))
    return status(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
