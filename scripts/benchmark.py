#!/usr/bin/env python3
"""Benchmarks of the library, results as JSON with hardware and versions.

  scripts/benchmark.py kernel [--out benchmarks/kernel.json] [--quick | --tune]
  scripts/benchmark.py method [--out benchmarks/method.json] [--sections stream scoring ...]
  scripts/benchmark.py speed [--out benchmarks/speed.json] [--sections step end-to-end ...]
  scripts/benchmark.py memory [--out benchmarks/memory.json] [--settings NAME ...] [--compiled]
  scripts/benchmark.py load [--out benchmarks/load.json] [--checkpoint FOLDER | --layers 32]
  scripts/benchmark.py cold [--out benchmarks/cold.json] [--checkpoint FOLDER | --model llada-8b]
  scripts/benchmark.py offload [--out benchmarks/offload.json] [--chunks 128]
  scripts/benchmark.py compiled [--out benchmarks/compiled.json] [--target FILE]
  scripts/benchmark.py report [--records benchmarks] [--page docs/performance.md]

`kernel` times attention over chosen chunks: the Hopper kernel, cuDNN with and without a gather, and
the portable path. `method` times the method's phases at LLaDA-8B shapes on random weights, `speed`
the denoising step, the scoring pass and whole requests beside the baselines. `memory` puts the
planner's figures beside the device's. `load` loads a checkpoint beside the disk's speed, `cold`
times the first token from a cold and from a warm compilation cache. `offload` asks about a document
whose KV lies in host memory. `compiled` shows registers, spills and temporaries of the kernels.
`report` makes pages and pictures of the records; it needs matplotlib and no GPU. Exit status: 0; 1
where `compiled` finds a spill or a warning; 2 and one line for bad input; 130 when interrupted:
records hold what was measured by then.
"""

from __future__ import annotations

import argparse
import sys

from command_line import status


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    from bench import cold, compiled, kernel, load, memory, method, offload, report, speed

    kernel.add_arguments(commands.add_parser("kernel", help="attention over chosen chunks"))
    method.add_arguments(commands.add_parser("method", help="phases of the method"))
    speed.add_arguments(commands.add_parser("speed", help="step, scoring pass, whole requests"))
    memory.add_arguments(commands.add_parser("memory", help="planned against measured memory"))
    load.add_arguments(commands.add_parser("load", help="loading against the disk's speed"))
    cold.add_arguments(commands.add_parser("cold", help="time to the first token"))
    offload.add_arguments(commands.add_parser("offload", help="KV in host memory"))
    compiled.add_arguments(
        commands.add_parser("compiled", help="what the compiler says of kernels")
    )
    report.add_arguments(commands.add_parser("report", help="pages and pictures of the records"))
    args = parser.parse_args(argv)
    modules = {
        "kernel": kernel, "method": method, "speed": speed, "memory": memory, "load": load,
        "cold": cold, "offload": offload, "compiled": compiled, "report": report,
    }  # fmt: skip
    return status(lambda: modules[args.command].main(args))


if __name__ == "__main__":
    sys.exit(main())
