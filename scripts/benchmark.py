#!/usr/bin/env python3
"""Benchmarks of the library; results are JSON with hardware and versions.

  scripts/benchmark.py kernel [--quick | --tune]     attention over chosen chunks and its floor
  scripts/benchmark.py compiled [--target FILE]      registers and spills of the kernels
  scripts/benchmark.py speed [--sections step ...]   step, scoring pass and requests, with baselines
  scripts/benchmark.py method [--sections ask ...]   phases of the method, encodings, batches
  scripts/benchmark.py memory [--settings NAME ...]  the memory plan beside the device's peak
  scripts/benchmark.py offload [--chunks 128]        a document whose KV is in host memory
  scripts/benchmark.py convert WORK                  conversion against cp, with peak memory
  scripts/benchmark.py load WORK                     loading against the disk's speed
  scripts/benchmark.py snapshot WORK                 writing and reading KV against cp
  scripts/benchmark.py cold                          time to the first token, cold and warm caches
  scripts/benchmark.py compare CHECKOUT COMMAND ...  a command in two checkouts, in turn
  scripts/benchmark.py report                        tables and pictures of benchmarks/*.json

WORK is a folder on the disk to measure; what is made there is removed at the end. A benchmark times
the checkout that its script lies in. Exit status: 0; 1 where `compiled` finds a spill or a warning;
2 and one line for bad input; 130 when interrupted: the record holds what was measured by then.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's packages

from pdllm_jax.cli.errors import status

COMMANDS = ("kernel", "compiled", "speed", "method", "memory", "offload", "convert", "load")
COMMANDS += ("snapshot", "cold", "compare", "report")


def parse(words: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Returns a command's module, the only one that is imported, and its arguments.

    The module's OPTIONS are {flag: (default, help)}. A default may also be the type of an option
    without one; a list makes an option of several values, a tuple one of these values.
    """
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(words[:1]).command
    module = importlib.import_module(
        f"bench.{'disk' if command in ('convert', 'load', 'snapshot') else command}"
    )
    options = argparse.ArgumentParser(prog=f"benchmark.py {command}", description=module.__doc__)
    options.set_defaults(command=command)
    options.add_argument("--one", help=argparse.SUPPRESS)  # what `in_process` measures
    common = {"--out": (Path("benchmarks", f"{command}.json"), "the record")}
    for flag, (default, text) in {**common, **module.OPTIONS}.items():
        settings: dict[str, Any] = {"default": default, "type": type(default)}
        if isinstance(default, type):
            settings = {"type": default}
        elif isinstance(default, bool):
            settings = {"action": "store_true"}
        elif isinstance(default, tuple):
            settings = {"default": default, "choices": default, "nargs": "+"}
        elif isinstance(default, list):
            kind = default[0] if isinstance(default[0], type) else type(default[0])
            values = [] if kind is default[0] else default
            settings = {"default": values, "type": kind, "nargs": "+"}
        elif default is argparse.REMAINDER:
            settings = {"nargs": default}
        options.add_argument(flag, help=text, **settings)
    return module, options.parse_args(words[1:])


def main(argv: list[str] | None = None) -> int:
    """Runs a command."""
    module, args = parse(sys.argv[1:] if argv is None else argv)
    if args.one is None:
        return status(lambda: module.main(args))
    return status(lambda: print(json.dumps(module.one(args))))


if __name__ == "__main__":
    sys.exit(main())
