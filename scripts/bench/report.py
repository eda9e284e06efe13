"""Makes the tables of docs/performance.md and README, and the pictures, from benchmarks/*.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import pictures
from bench.record import ROOT, relative, replace
from bench.tables import SECTIONS, Record, conditions, section

BEGIN, END = "<!-- speed: made by scripts/benchmark.py report -->", "<!-- end of speed -->"
PAGE = ROOT / "docs" / "performance.md"

# Picture: its record, how it is drawn, and its caption.
PICTURES: dict[str, tuple[str, Callable[[Record], Any], str]] = {
    "kernel": ("kernel_h100", pictures.kernel, "Attention over chosen chunks: time over the floor"),
    "requests": (
        *("end_to_end", pictures.requests),
        "Seconds of a request against the prompt's length",
    ),
    "streaming": ("method", pictures.streaming, "Seconds and memory against the tokens streamed"),
}


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
    texts = {}
    for page, level in ((args.page, "##"), (args.readme, "###")):
        shown = [one for one in SECTIONS if page == args.page or "readme" in one]
        part = "\n".join(_part(shown, records, level, relative(args.pictures, page)))
        texts[page] = between(page, part + "\n")
    args.pictures.mkdir(parents=True, exist_ok=True)
    for name, (source, draw, _) in PICTURES.items():
        if source in records:
            target = args.pictures / f"{name}.png"
            draw(records[source]).savefig(target, dpi=110, metadata={"Software": None})
    for page, text in texts.items():
        replace(page, text)
    print(f"{args.page}, {args.readme} and the pictures in {args.pictures}")
    return 0


def between(page: Path, part: str) -> str:
    """Returns the page's text with `part` between the marks. ValueError unless each occurs once."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} does not have exactly one place between {BEGIN!r} and {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{part}{END}{after}"


def _part(
    sections: Sequence[Mapping[str, Any]], records: Mapping[str, Record], level: str, folder: str
) -> Iterator[str]:
    """Yields the conditions of the records that the sections show, then the sections."""
    names = dict.fromkeys(name for settings in sections for name in settings["records"])
    yield from conditions({name: records[name] for name in names if name in records})
    for settings in sections:
        if records.keys() & set(settings["records"]):
            yield from ("", f"{level} {settings['title']}", "")
            yield from section(settings, records)
            if name := settings.get("picture"):
                yield from ("", f"![{PICTURES[name][2]}]({folder}/{name}.png)")
