"""Makes the tables of docs/performance.md and README, and the pictures, from benchmarks/*.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import pictures
from bench.pages import between, relative, replace
from bench.record import ROOT
from bench.tables import REQUESTS, SECTIONS, Record, Section, conditions

BEGIN, END = "<!-- speed: made by scripts/benchmark.py report -->", "<!-- end of speed -->"
PAGE = ROOT / "docs" / "performance.md"

# Picture: its record, how it is drawn, and its caption.
PICTURES: dict[str, tuple[str, Callable[[Record], Any], str]] = {
    "kernel": (
        "kernel_h100", pictures.kernel, "Attention over chosen chunks: time over the floor"
    ),
    "requests": (
        "end_to_end", pictures.requests, "Seconds of a request against the prompt's length"
    ),
    "streaming": (
        "method", pictures.streaming, "Seconds and memory against the tokens streamed"
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py report`."""
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")


def main(args: argparse.Namespace) -> int:
    """Writes both pages between their marks, and the pictures. ValueError where marks lack."""
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(args.records.glob("*.json"))
    }
    texts = {page: page.read_text(encoding="utf-8") for page in (args.page, args.readme)}
    for page, text in texts.items():
        between(text, BEGIN, END, "", page)  # before anything is written
    args.pictures.mkdir(parents=True, exist_ok=True)
    for name, (source, draw, _) in PICTURES.items():
        if source in records:
            target = args.pictures / f"{name}.png"
            draw(records[source]).savefig(target, dpi=110, metadata={"Software": None})
    for page, sections in ((args.page, SECTIONS), (args.readme, (REQUESTS,))):
        level = "##" if page == args.page else "###"
        part = "\n".join(_part(sections, records, level, relative(args.pictures, page)))
        replace(page, between(texts[page], BEGIN, END, part + "\n", page))
    print(f"{args.page}, {args.readme} and the pictures in {args.pictures}")
    return 0


def _part(
    sections: tuple[Section, ...], records: Mapping[str, Record], level: str, pictures_at: str
) -> Iterator[str]:
    """Yields the conditions of the records that the sections show, then the sections."""
    names = dict.fromkeys(name for section in sections for name in section.records)
    yield from conditions({name: records[name] for name in names if name in records})
    for section in sections:
        if not records.keys() & set(section.records):
            continue
        yield from ("", f"{level} {section.title}", "")
        yield from section.lines(records)
        if section.picture is not None:
            caption = PICTURES[section.picture][2]
            yield from ("", f"![{caption}]({pictures_at}/{section.picture}.png)")
