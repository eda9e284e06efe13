#!/usr/bin/env python3
"""Converts a PyTorch LLaDA checkpoint to Orbax, or back.

    scripts/convert_checkpoint.py SRC DST [--dtype keep|bfloat16|float32] [--verify] [--overwrite]
    scripts/convert_checkpoint.py --reverse SRC DST [--shard-size GB] [--verify] [--overwrite]

Exit status: 0 done, 2 bad input or a full disk (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from typing import Any, NoReturn

from command_line import Parser, guarded

# Conversion is disk work: an accelerator's memory must not be claimed for it.
os.environ["JAX_PLATFORMS"] = "cpu"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="of the weights in DST (default: keep)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read DST back and compare it with SRC, bit by bit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--reverse", action="store_true", help="SRC is a converted folder; DST gets safetensors"
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="GB",
        default=5.0,
        help="largest file that --reverse writes (default: 5)",
    )
    options = parser.parse_args(arguments)
    if options.reverse and options.dtype != "keep":
        parser.error("--reverse keeps the dtypes, so --dtype can not be given with it")
    if not 0 < options.shard_size < 1e6:
        parser.error(f"--shard-size must be a positive number of GB, got {options.shard_size}")
    return options


class _Bars:
    """Progress bars on stderr, one for every stage; none where stderr is no terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, nbytes: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if stage not in self._bars:
            self._bars[stage] = tqdm(desc=stage, total=total, unit="B", unit_scale=True)
        self._bars[stage].update(nbytes)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return guarded(lambda: _work(options))[0]


def _work(options: argparse.Namespace) -> None:
    from convert import convert, reverse

    bars = _Bars()
    start = time.perf_counter()
    common = {"verify": options.verify, "overwrite": options.overwrite, "progress": bars}
    with contextlib.closing(bars):
        if options.reverse:
            size = int(options.shard_size * 1e9)
            report = reverse(options.source, options.destination, shard_bytes=size, **common)
        else:
            report = convert(options.source, options.destination, dtype=options.dtype, **common)
    seconds = time.perf_counter() - start
    verified = ", verified" if options.verify else ""
    print(
        f"{options.destination}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB, "
        f"{report.dtype}{verified}, {seconds:.1f} s"
    )
    for name in report.ignored:
        print(f"left out: {name}")


def run() -> NoReturn:
    # A polite kill cleans up like an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())


if __name__ == "__main__":
    run()
