#!/usr/bin/env python3
"""Benchmarks of the library, results as JSON with hardware and versions.

  scripts/benchmark.py kernel [--out benchmarks/kernel.json] [--quick | --tune]
  scripts/benchmark.py method [--out benchmarks/method.json] [--sections stream scoring ...]
  scripts/benchmark.py speed [--out benchmarks/speed.json] [--sections step prefill end-to-end]
  scripts/benchmark.py plot benchmarks/kernel.json benchmarks/kernel.png

`kernel` times attention over chosen chunks: the Hopper kernel, cuDNN with and without a gather, and
the portable path. `method` times the method's phases at LLaDA-8B shapes on random weights, `speed`
the denoising step, the scoring pass and whole requests beside the baselines. `plot` draws what
`kernel` has written; it needs matplotlib and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("plot", help="draw a record")
    drawing.add_argument("source", type=Path)
    drawing.add_argument("target", type=Path)
    from bench import kernel, method, speed

    kernel.add_arguments(commands.add_parser("kernel", help="attention over chosen chunks"))
    method.add_arguments(commands.add_parser("method", help="phases of the method"))
    speed.add_arguments(commands.add_parser("speed", help="step, scoring pass, whole requests"))
    args = parser.parse_args()
    if args.command == "plot":
        kernel.plot(args.source, args.target)
        return 0
    return {"kernel": kernel, "method": method, "speed": speed}[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
