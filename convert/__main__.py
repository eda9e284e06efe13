"""Converts a PyTorch checkpoint (LLaDA, Dream) to Orbax, or back.

    pdllm-convert SRC DST [--dtype keep|bfloat16|float32] [--weights full|fp8|int8]
                  [--adapter FOLDER] [--follow-links] [--verify] [--overwrite]
    pdllm-convert --reverse SRC DST [--shard-size GB] [--verify] [--overwrite]
    scripts/convert_checkpoint.py ...    the same, from a clone

Exit status: 0 done, 2 bad input or a full disk (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

from convert import converted as convert_cached
from convert.convert import OutputDtype, Progress, convert
from convert.export import reverse
from pdllm_jax.cli.errors import Parser, status
from pdllm_jax.network.config import WeightFormat
from pdllm_jax.rules import listed


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="pdllm-convert", description=__doc__, formatter_class=raw)
    add: Any = parser.add_argument
    add("source", metavar="SRC", help="folder to read")
    add("destination", metavar="DST", help="folder to make")
    helped = "of the weights in DST (default: keep)"
    add("--dtype", choices=get_args(OutputDtype), default="keep", help=helped)
    helped = "of the layers' matrices in DST: 8 bits, or full for --dtype (default: full)"
    add("--weights", choices=get_args(WeightFormat), default="full", help=helped)
    helped = "LoRA adapter of peft, merged into the weights"
    add("--adapter", metavar="FOLDER", type=Path, help=helped)
    helped = "read files that symbolic links place outside of SRC or FOLDER"
    add("--follow-links", action="store_true", help=helped)
    helped = "read DST again and compare it with SRC bit by bit"
    add("--verify", action="store_true", help=helped)
    add("--overwrite", action="store_true", help="replace DST if it exists")
    helped = "SRC is a converted folder; DST gets safetensors"
    add("--reverse", action="store_true", help=helped)
    helped = "largest file that --reverse writes, and the memory it takes (default: 2)"
    add("--shard-size", type=float, metavar="GB", default=2.0, help=helped)
    options = parser.parse_args(arguments)
    if options.reverse and options.dtype != "keep":
        parser.error("--reverse keeps the dtypes: --dtype cannot be given with it")
    if options.reverse and options.weights != "full":
        parser.error("--reverse writes full weights: --weights cannot be given with it")
    if options.reverse and (options.adapter or options.follow_links):
        parser.error("--adapter and --follow-links cannot be given with --reverse")
    if not 0 < options.shard_size < 1e6:
        parser.error(f"--shard-size must be a positive number of GB, got {options.shard_size}")
    return options


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    """Yields progress bars on stderr, one for every stage, if stderr is a terminal."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:

        @functools.cache
        def bar(stage: str, total: int) -> Any:
            form: Any = {"unit": "B", "unit_scale": True, "disable": None}
            return stack.enter_context(tqdm(desc=stage, total=total, **form))

        yield lambda stage, nbytes, total: bar(stage, total).update(nbytes)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parse(arguments)
    return status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    if options.reverse:
        run = functools.partial(reverse, shard_bytes=int(options.shard_size * 1e9))
    else:
        given = {name: getattr(options, name) for name in ("dtype", "weights", "adapter")}
        run = functools.partial(convert, **given, follow_links=options.follow_links)
    common = {"verify": options.verify, "overwrite": options.overwrite}
    with _bars() as progress:
        report = run(options.source, options.destination, progress=progress, **common)
    seconds = time.perf_counter() - start
    verified = ", verified" if options.verify else ""
    print(
        f"{options.destination}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB, "
        f"{report.dtype}{verified}, {seconds:.1f} s"
    )
    for note in report.notes:
        print(note)
    if report.ignored:
        print(f"left out: {listed(report.ignored)}")


def converted(path: str | Path) -> Path:
    """Returns `convert.converted(path)` for text, and says on stderr when it converts."""
    return convert_cached(path, text=True, notify=lambda line: print(line, file=sys.stderr))


def run() -> NoReturn:
    """Runs `pdllm-convert` and ends the process."""
    import jax

    # Conversion is disk work: it must not claim an accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    # SIGTERM cleans up like an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())


if __name__ == "__main__":
    run()
