"""docs/performance.md, README's part and the pictures: every number is of the benchmarks' JSON.

A part whose record is not there is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import pictures
from bench.pages import between, relative, replace
from bench.sections import SECTIONS, Record, requests, step

BEGIN, END = "<!-- speed: made by scripts/benchmark.py report -->", "<!-- end of speed -->"
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"

# Picture: the record that it is drawn from, and how.
PICTURES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "kernel": ("kernel_h100", pictures.kernel),
    "requests": ("end_to_end", pictures.requests),
    "streaming": ("method", pictures.streaming),
}
CAPTIONS = {
    "kernel": "Attention over chosen chunks: time over the floor",
    "requests": "Seconds of a request against the prompt's length",
    "streaming": "Seconds and memory against the tokens streamed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py report`."""
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")


def main(args: argparse.Namespace) -> int:
    """Writes all three. ValueError where README has no place marked for its part."""
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(args.records.glob("*.json"))
    }
    text = args.readme.read_text(encoding="utf-8")
    between(text, BEGIN, END, "", args.readme)  # before anything is written
    args.pictures.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (source, draw) in PICTURES.items():
        if source in records:
            target = args.pictures / f"{name}.png"
            draw(records[source]).savefig(target, dpi=110, metadata={"Software": None})
            drawn.append(name)

    def picture(name: str, page: Path) -> list[str]:
        path = f"{relative(args.pictures, page)}/{name}.png"
        return ["", f"![{CAPTIONS[name]}]({path})"] if name in drawn else []

    lines = ["# Performance", "", INTRODUCTION]
    for title, names, section, shown in SECTIONS:
        found = [records[name] for name in names if name in records]
        if not found:
            continue
        lines += ["", f"## {title}", "", *section(*found)]
        lines += picture(shown, args.page) if shown else []
    replace(args.page, "\n".join(lines) + "\n")
    part = list(readme_part(records, relative(args.page, args.readme)))
    part += picture("requests", args.readme)
    replace(args.readme, between(text, BEGIN, END, "\n".join(part) + "\n", args.readme))
    print(f"{args.page}, {args.readme} and {len(drawn)} pictures in {args.pictures}")
    return 0


INTRODUCTION = """
Made by `scripts/benchmark.py report` from the records in `benchmarks/`, which hold hardware,
versions, commands and spreads. LLaDA-8B shapes, random weights, bfloat16, chunks of 1,024, four
kept, a question of 32 tokens, draft and scores counted, where nothing else is said. Medians, host
time included; compiling is apart. `docs/kernel.md` says how the kernels work and what bounds them.
""".strip()


def readme_part(records: Mapping[str, Record], page: str) -> Iterator[str]:
    """The two tables that say most."""
    if (record := records.get("end_to_end")) is not None:
        yield "**Whole requests**, every cost counted, against the baselines in the same process:"
        yield from requests(record)
        yield ""
    if (record := records.get("speed")) is not None:
        yield "**A denoising step**:"
        yield from step(record)
        yield ""
    yield f"Phases, streams, batches, the kernel and memory: `{page}`."
