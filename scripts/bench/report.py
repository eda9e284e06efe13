"""Makes the tables of docs/performance.md and README, and the pictures, from benchmarks/*.json.

tables.toml has the tables; here are the rows that are not in a record as they stand.
"""

from __future__ import annotations

import argparse
import json
import string
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import pictures
from bench.record import ROOT, relative, replace, spread

Record = Mapping[str, Any]
Row = Mapping[str, Any]

TABLES = Path(__file__).with_name("tables.toml").read_text(encoding="utf-8")
SECTIONS = tomllib.loads(TABLES)["section"]
BEGIN, END = "<!-- speed: made by scripts/benchmark.py report -->", "<!-- end of speed -->"
PAGE = ROOT / "docs" / "performance.md"

DEFAULT_SCORER = "draft"  # of records that do not name it
WEIGHTS = {"full": "bf16", "fp8": "fp8", "int8": "int8"}

# Picture: its record, and how it is drawn.
PICTURES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "kernel": ("kernel_h100", pictures.kernel),
    "requests": ("end_to_end", pictures.requests),
    "streaming": ("method", pictures.streaming),
}
OPTIONS = {
    "--records": (ROOT / "benchmarks", ""),
    "--page": (PAGE, ""),
    "--readme": (ROOT / "README.md", ""),
    "--pictures": (ROOT / "docs" / "pictures", ""),
}


def main(args: argparse.Namespace) -> None:
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
    for name, (source, draw) in PICTURES.items():
        if source in records:
            target = args.pictures / f"{name}.png"
            draw(records[source]).savefig(target, dpi=110, metadata={"Software": None})
    for page, text in texts.items():
        replace(page, text)
    print(f"{args.page}, {args.readme} and the pictures in {args.pictures}")


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
                yield from ("", f"![{settings['caption']}]({folder}/{name}.png)")


class _Cell(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        """Also takes a divisor: {x:.1f/1e9}."""
        spec, _, divisor = spec.partition("/")
        return format(value / float(divisor) if divisor else value, spec)

    def fill(self, form: str, row: Row) -> str:
        """Returns "-" where a value is missing, or None."""
        try:
            return self.vformat(form, (), row)
        except (KeyError, TypeError):
            return "-"


def table(heads: str, cells: str, rows: Iterable[Row]) -> Iterator[str]:
    """Yields the lines of a markdown table. heads, cells: of the columns, " | " between them."""
    columns = cells.split(" | ")
    yield f"| {heads} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_Cell().fill(form, row) for form in columns)} |"


def section(settings: Mapping[str, Any], records: Mapping[str, Record]) -> Iterator[str]:
    """Yields the tables of a section of tables.toml, each under the name of its record."""
    if "about" in settings:
        yield settings["about"]
    for name in settings["records"]:
        if name in records:
            rows = ROWS.get(settings["rows"], plain(settings["rows"]))(records[name])
            rows = beside(rows, settings.get("beside"), records)
            yield from ("", f"`{name}.json`", "")
            yield from table(settings["heads"], settings["cells"], rows)


def beside(
    rows: Iterable[Row], join: Mapping[str, Any] | None, records: Mapping[str, Record]
) -> Iterator[Row]:
    """Adds to each row the fields of another record's row that agrees with it in some keys."""
    keys, others = (join["keys"], records[join["record"]]["rows"]) if join else ((), ())
    for row in rows:
        named = {key: row.get(key) for key in keys}
        same = [other for other in others if named.items() <= other.items()]
        yield {**row, **(same[0] if same else {})}


def conditions(records: Mapping[str, Record]) -> Iterator[str]:
    """Yields the table of where and how records were made."""
    heads = "record | hardware | jax | memory copies, TB/s | command | notes"
    cells = "`{name}.json` | {hardware} | {versions[jax]} | {copy_bandwidth:.2f/1e12} | "
    rows = []
    for name, record in records.items():
        device, count = record.get("device", record.get("hardware", "")), record.get("devices", 1)
        hardware = (f"{count} x {device}" if count > 1 else device) or record["target"]
        rows.append({"notes": "", **record, "name": name, "hardware": hardware})
    yield from table(heads, cells + "`{command}` | {notes}", rows)


def plain(key: str) -> Callable[[Record], Iterator[Row]]:
    """Returns the rows under a key, each with the record's fields."""

    def rows(record: Record) -> Iterator[Row]:
        for row in record.get(key, ()):
            merged = {"weights": "full", **record, **row}
            yield {**merged, "weights": WEIGHTS[merged["weights"]]}

    return rows


def _versus(row: dict[str, Any], others: Mapping[str, Row], field: str) -> Row:
    """Adds the others' times under their names, and how many times longer they are."""
    for name, other in others.items():
        row |= {name: other[field], f"{name} x": other[field] / row[field]}
    return row


def _requests(record: Record) -> Iterator[Row]:
    """Ours beside the baselines in the same format, and as "16-bit ..." beside those in 16 bits."""
    cases: dict[tuple[int, int], list[Row]] = {}
    for row in record["end_to_end"]:
        cases.setdefault((row["prompt_tokens"], row["tokens"]), []).append(row)
    for _, rows in sorted(cases.items()):
        ours = [row for row in rows if row["method"] == "prefilling"]
        baselines = {(x.get("weights", "full"), x["method"]): x for x in rows if x not in ours}
        for row in ours:
            weights, by = row.get("weights", "full"), row.get("scorer", DEFAULT_SCORER)
            if by == "heads":
                by += f", {row['head_layers']} of {record['model']['n_layers']} layers"
            result = {**row, **row["phases"], "weights": WEIGHTS[weights], "scored by": by}
            for mark, kind in (("", weights), ("16-bit ", "full")):
                same = {f"{mark}{name}": x for (of, name), x in baselines.items() if of == kind}
                _versus(result, same, "seconds")
            yield result


def _meshes(record: Record) -> Iterator[Row]:
    first, mark = record["step"][0], ", mesh "
    passes = {
        name.split(mark, 1)[1]: 1e3 * seconds["median"]
        for name, seconds in record["seconds"].items()
        if name.startswith("score ")
    }
    for row in record["step"]:
        over = {"over": "ms", "python_over": "ms_from_python"}
        result = {**row, **{name: row[key] / first[key] for name, key in over.items()}}
        if (scored := passes.get(row["mesh"])) is not None:
            result |= {"pass": scored, "pass_over": scored / passes[first["mesh"]]}
        yield result


def _phases(record: Record) -> Iterator[Row]:
    for name, seconds in record["seconds"].items():
        if name.startswith(("request ", "8 together")):
            continue  # these are the rows of the batch
        rates = (key.split(", ", 1) for key in record["ratios"] if key.endswith(f", {name}"))
        rate = "".join(f"{record['ratios'][f'{unit}, {what}']:.0f} {unit}" for unit, what in rates)
        yield {"name": name, "rate": rate, **{k: 1e3 * s for k, s in seconds.items()}}


def _ratios(record: Record) -> Iterator[Row]:
    for name, value in record["ratios"].items():
        if not name.startswith("batch"):
            yield {"name": name, "value": value}


def _batches(record: Record) -> Iterator[Row]:
    medians = {name: 1e3 * row["median"] for name, row in record["seconds"].items()}
    for part in ("encode", "decode"):
        alone = sum(ms for name, ms in medians.items() if name[:7] == "request" and part in name)
        together = medians[f"8 together, {part}"]
        yield {"part": part, "alone": alone, "together": together, "gain": alone / together}


def _streaming(record: Record) -> Iterator[Row]:
    for row in record["memory"].values():
        yield {**row, "us": 1e6 * row["seconds"] / row["tokens"]}


def _host(record: Record) -> Iterator[Row]:
    names = {"host_bytes": "KV in pinned host memory", "weight_bytes": "weights on the device"}
    names["peak_bytes"] = "most on the device"
    for key, text in names.items():
        yield {"name": text, "value": f"{record['memory'][key] / 1e9:.1f} GB"}
    yield {"name": "document", "value": f"{record['memory']['tokens']:,} tokens"}
    speed = f"{record['host_copy_bandwidth'] / 1e9:.1f} GB/s"
    yield {"name": "one large array from host to device", "value": speed}


def _snapshots(record: Record) -> Iterator[Row]:
    def shown(key: str) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(
            *spread([row[key] for row in record["rounds"]]).values()
        )

    for what, call, copy in (
        ("write", "write", "copy_warm"),
        ("read, cold page cache", "read_cold", "copy_cold"),
        ("read, warm page cache", "read_warm", "copy_warm"),
    ):
        speeds = {"speed": shown(f"{call}_gb_per_s"), "copy": shown(f"{copy}_gb_per_s")}
        yield {**record, "what": what, **speeds, "ratio": shown(f"{call}_over_{copy}")}


def _kernels(record: Record) -> Iterator[Row]:
    cases: dict[tuple, dict[str, Row]] = {}
    for row in record["rows"]:
        ours = row["implementation"] == "mosaic_gpu"
        if not row["ragged"] and row["settings"] is None and (row["q_per_slot"] or not ours):
            case = tuple(row[key] for key in ("batch", "heads", "kv_heads", "rows", "slots"))
            cases.setdefault(case, {})[row["implementation"]] = row
    for by_name in cases.values():
        if "mosaic_gpu" in by_name:
            yield _versus({**by_name.pop("mosaic_gpu")}, by_name, "us")


def _programs(record: Record) -> Iterator[Row]:
    for row in record["rows"]:
        used = (f"{k['kernel']}: {k['registers']}, {k['spilled_bytes']}" for k in row["kernels"])
        yield {**row, "registers": "; ".join(used), "count": len(row["warnings"])}


ROWS: dict[str, Callable[[Record], Iterable[Row]]] = {
    "requests": _requests,
    "meshes": _meshes,
    "phases": _phases,
    "ratios": _ratios,
    "batches": _batches,
    "streaming": _streaming,
    "host": _host,
    "snapshots": _snapshots,
    "kernels": _kernels,
    "programs": _programs,
}
