"""Converts a PyTorch LLaDA checkpoint to Orbax, or back.

    pdllm-convert SRC DST [--dtype keep|bfloat16|float32] [--verify] [--overwrite]
    pdllm-convert --reverse SRC DST [--shard-size GB] [--verify] [--overwrite]
    scripts/convert_checkpoint.py ...    the same, from a clone

Exit status: 0 done, 2 bad input or a full disk (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="pdllm-convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="of the weights in DST (default: keep)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read DST again and compare it with SRC bit by bit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--reverse", action="store_true", help="SRC is a converted folder; DST gets safetensors"
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="GB",
        default=2.0,
        help="largest file that --reverse writes, and the memory it takes (default: 2)",
    )
    options = parser.parse_args(arguments)
    if options.reverse and options.dtype != "keep":
        parser.error("--reverse keeps the dtypes: --dtype cannot be given with it")
    if not 0 < options.shard_size < 1e6:
        parser.error(f"--shard-size must be a positive number of GB, got {options.shard_size}")
    return options


class _Bars:
    """Progress bars on stderr, one for every stage, if stderr is a terminal."""

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
    """Runs the command line and returns its exit status."""
    options = _parse(arguments)
    try:
        _run(options)
        sys.stdout.flush()
    except (ValueError, OSError, MemoryError) as error:
        line = " ".join(str(error).split()) or repr(error)
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
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


def converted(path: str | Path) -> Path:
    """Returns `convert.converted(path)`, and says on stderr when it converts."""
    from convert.convert import converted

    return converted(path, notify=lambda line: print(line, file=sys.stderr))


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
