"""The tables of docs/performance.md and README: what each shows of which records.

A column is a head and a format string; it shows "-" where a row lacks a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any

Record = Mapping[str, Any]
Row = Mapping[str, Any]
Columns = Mapping[str, str]


def table(columns: Columns, rows: Iterable[Row]) -> Iterator[str]:
    """Yields the lines of a markdown table."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_cell(form, row) for form in columns.values())} |"


def _cell(form: str, row: Row) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):  # a value that is missing, or None
        return "-"


@dataclasses.dataclass(frozen=True)
class Section:
    """A table for each of several records.

    records: names of files in benchmarks/; those that are not there are left out.
    rows: the table's rows of a record. about: one line above the tables. picture: below them.
    """

    title: str
    records: tuple[str, ...]
    rows: Callable[[Record], Iterable[Row]]
    columns: Columns
    about: str = ""
    picture: str | None = None

    def lines(self, records: Mapping[str, Record]) -> Iterator[str]:
        """Yields the tables, each under the name of its record."""
        if self.about:
            yield self.about
        for name in self.records:
            if name in records:
                yield from ("", f"`{name}.json`", "")
                yield from table(self.columns, self.rows(records[name]))


def conditions(records: Mapping[str, Record]) -> Iterator[str]:
    """Yields the table of where and how records were made."""
    columns = {
        "record": "`{name}.json`", "hardware": "{hardware}", "jax": "{jax}",
        "memory copies, TB/s": "{copies:.2f}", "command": "`{command}`", "notes": "{notes}",
    }  # fmt: skip
    rows = []
    for name, record in records.items():
        device, count = record.get("device", record.get("hardware", "")), record.get("devices", 1)
        rows.append({
            "name": name, "jax": record["versions"]["jax"], "command": record["command"],
            "hardware": (f"{count} x {device}" if count > 1 else device) or record["target"],
            "copies": record["copy_bandwidth"] / 1e12 if "copy_bandwidth" in record else None,
            "notes": record.get("notes", ""),
        })  # fmt: skip
    yield from table(columns, rows)


def _requests(record: Record) -> Iterator[Row]:
    rows = {(r["prompt_tokens"], r["tokens"], r["method"]): r for r in record["end_to_end"]}
    for prompt, tokens in sorted({key[:2] for key in rows}):
        ours = rows[prompt, tokens, "prefilling"]
        row = {**ours, **ours["phases"]}
        for method in ("dual-cache", "plain"):
            if theirs := rows.get((prompt, tokens, method)):
                row |= {
                    method: theirs["seconds"],
                    f"{method} x": theirs["seconds"] / ours["seconds"],
                }
        yield row


def _meshes(record: Record) -> Iterator[Row]:
    first = record["step"][0]
    passes = {
        name.split(", mesh ", 1)[1]: seconds["median"]
        for name, seconds in record["seconds"].items()
        if name.startswith("score ")
    }
    for row in record["step"]:
        scored = passes.get(row["mesh"])
        yield {
            **row, "over": row["ms"] / first["ms"],
            "python_over": row["ms_from_python"] / first["ms_from_python"],
            "pass": None if scored is None else 1e3 * scored,
            "pass_over": None if scored is None else scored / passes[first["mesh"]],
        }  # fmt: skip


def _seconds(record: Record) -> Iterator[Row]:
    for name, seconds in record["seconds"].items():
        if name.startswith(("request ", "8 together")):
            continue  # these are the rows of the batch
        rates = {key.split(", ", 1)[0]: value for key, value in record["ratios"].items()
                 if key.endswith(f", {name}")}  # fmt: skip
        rate = "".join(f"{value:.0f} {unit}" for unit, value in rates.items())
        yield {"name": name, "rate": rate, **{k: 1e3 * s for k, s in seconds.items()}}


def _ratios(record: Record) -> Iterator[Row]:
    for name, value in record["ratios"].items():
        if not name.startswith("batch"):
            yield {"name": name, "value": value}


def _batch(record: Record) -> Iterator[Row]:
    seconds = record["seconds"]
    for part in ("encode", "decode"):
        alone = sum(
            r["median"] for n, r in seconds.items() if n.startswith("request") and part in n
        )
        together = seconds[f"8 together, {part}"]["median"]
        yield {"part": part, "alone": 1e3 * alone, "together": 1e3 * together,
               "gain": alone / together}  # fmt: skip


def _stream(record: Record) -> Iterator[Row]:
    for row in record["memory"].values():
        yield {**row, "gb": row["peak_bytes"] / 1e9, "us": 1e6 * row["seconds"] / row["tokens"]}


def _streamed(record: Record) -> Iterator[Row]:
    for row in record["stream"]:
        yield {**row, **row["phases"], "gb": row["peak_bytes"] / 1e9}


def _host(record: Record) -> Iterator[Row]:
    names = {
        "host_bytes": "KV in pinned host memory", "weight_bytes": "weights on the device",
        "peak_bytes": "most on the device",
    }  # fmt: skip
    yield from (
        {"name": text, "value": f"{record['memory'][key] / 1e9:.1f} GB"}
        for key, text in names.items()
    )
    yield {"name": "document", "value": f"{record['memory']['tokens']:,} tokens"}
    speed = f"{record['host_copy_bandwidth'] / 1e9:.1f} GB/s"
    yield {"name": "one large array from host to device", "value": speed}


def _load(record: Record) -> Iterator[Row]:
    for row in record["rows"]:
        yield {**row, "gb": row["bytes"] / 1e9, "peak": row["host_peak_bytes"] / 1e9}


def _cold(record: Record) -> Iterator[Row]:
    for row in record["rows"]:
        yield {**row, **row["seconds"], "tokens": record["document_tokens"]}


def _snapshot(record: Record) -> Iterator[Row]:
    for what, keys in {
        "write": ("write_gb_per_s", "copy_warm_gb_per_s", "write_over_copy_warm"),
        "read, cold page cache":
            ("read_cold_gb_per_s", "copy_cold_gb_per_s", "read_cold_over_copy_cold"),
        "read, warm page cache":
            ("read_warm_gb_per_s", "copy_warm_gb_per_s", "read_warm_over_copy_warm"),
    }.items():  # fmt: skip
        spreads = []
        for key in keys:
            values = [row[key] for row in record["rounds"]]
            spreads.append(f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
        speed, copy, ratio = spreads
        yield {"what": what, "speed": speed, "copy": copy, "ratio": ratio, **record}


def _convert(record: Record) -> Iterator[Row]:
    yield from ({**row, **record} for row in record["runs"])


def _kernel(record: Record) -> Iterator[Row]:
    cases: dict[tuple, dict[str, Row]] = {}
    for row in record["rows"]:
        ours = row["implementation"] == "mosaic_gpu"
        if not row["ragged"] and row["settings"] is None and (row["q_per_slot"] or not ours):
            case = tuple(row[key] for key in ("batch", "heads", "kv_heads", "rows", "slots"))
            cases.setdefault(case, {})[row["implementation"]] = row
    for by_name in cases.values():
        if ours := by_name.get("mosaic_gpu"):
            row = {**ours, "percent": 100 * ours["of_copy_bandwidth"]}
            for name in ("gather+cudnn", "contiguous cudnn"):
                if theirs := by_name.get(name):
                    row |= {name: theirs["us"], f"{name} x": theirs["us"] / ours["us"]}
            yield row


def _compiled(record: Record) -> Iterator[Row]:
    for row in record["rows"]:
        kernels = "; ".join(
            f"{k['kernel']}: {k['registers']}, {k['spilled_bytes']}" for k in row["kernels"]
        )
        yield {"case": row["case"], "kernels": kernels, "mb": row["temporary_bytes"] / 1e6,
               "warnings": len(row["warnings"])}  # fmt: skip


def _memory(record: Record) -> Iterator[Row]:
    for row in record["rows"]:
        yield {**row, "plan_gb": row["planned"] / 1e9, "gb": row["measured"] / 1e9}


SPREAD = "{median:.1f} [{least:.1f}, {most:.1f}]"
REQUESTS = Section(
    "Whole requests", ("end_to_end",), _requests,
    {
        "prompt tokens": "{prompt_tokens:,}", "response": "{tokens}",
        "prefilling, s": "{seconds:.2f} [{least:.2f}, {most:.2f}]",
        "draft + score + encode + decode":
            "{draft:.2f} + {score:.2f} + {encode:.2f} + {decode:.2f}",
        "dual-cache, s (times ours)": "{dual-cache:.2f} ({dual-cache x:.1f})",
        "plain, s (times ours)": "{plain:.2f} ({plain x:.1f})",
    },
    "Every cost counted. Baselines ran in the same process; some evaluations of `plain` were timed "
    "and the rest counted as the same.",
    "requests",
)  # fmt: skip
STEP = Section(
    "Denoising step", ("speed",), lambda record: record["step"],
    {
        "cached tokens": "{cached_tokens:,}", "ms": "{ms:.2f} [{ms_least:.2f}, {ms_most:.2f}]",
        "floor, ms": "{ms_floor:.2f}", "times the floor": "{times_floor:.2f}",
        "`denoise_step` from Python, ms": "{ms_from_python:.2f}",
        "Python over loop": "{python_over_loop:.3f}",
    },
    "One evaluation of 32 rows after joint encoding. Floor: weights and KV read once at the speed "
    "of memory copies.",
)  # fmt: skip
PHASES = {"phase": "{name}", "ms": SPREAD, "rate": "{rate}"}
RATIOS = {"": "{name}", "value": "{value}"}
SECTIONS = (
    REQUESTS,
    STEP,
    Section("Scoring pass", ("speed",), _seconds, PHASES),
    Section(
        "Several GPUs", ("mesh", "mesh_flags", "mesh_four"), _meshes,
        {
            "mesh": "{mesh}", "cached tokens": "{cached_tokens:,}",
            "step, ms": "{ms:.2f} ({over:.3f})",
            "`denoise_step` from Python, ms": "{ms_from_python:.2f} ({python_over:.3f})",
            "scoring pass, ms": "{pass:.2f} ({pass_over:.3f})",
        },
        "Meshes are data x tensor (`docs/parallel.md`). In brackets: over the time on one GPU. "
        "XLA makes the sums where `mosaic_gpu` is not named.",
    ),
    Section("Phases and choices", ("method",), _seconds, {"phase": "{name}", "ms": SPREAD}),
    Section("Ratios of phases", ("method",), _ratios, {"ratio": "{name}", "": "{value:.3f}"}),
    Section(
        "Streaming", ("method",), _stream,
        {
            "tokens": "{tokens:,}", "s": "{seconds:.2f}", "µs a token": "{us:.1f}",
            "most device memory, GB": "{gb:.2f}",
        },
        "One program for all lengths; padding chunks are not computed.", "streaming",
    ),
    Section(
        "Streamed requests", ("speed_stream",), _streamed,
        {
            "document tokens": "{document_tokens:,}", "s": "{seconds:.1f}",
            "scoring pass, s": "{score:.1f}", "decoding, s": "{decode:.2f}",
            "most device memory, GB": "{gb:.2f}",
        },
        "Independent encoding, 32 tokens in 32 steps; one call each, compiling taken off.",
    ),
    Section("KV in host memory", ("offload",), _host, RATIOS),
    Section("Phases with KV in host memory", ("offload",), _seconds, PHASES),
    Section(
        "Loading a checkpoint", ("load_h100", "load"), _load,
        {
            "page cache": "{page_cache}", "GB": "{gb:.1f}", "s": "{seconds:.1f}",
            "GB/s": "{gb_per_s:.2f}", "plain reads, GB/s": "{disk_gb_per_s:.2f}",
            "load over reads": "{of_disk:.2f}", "host peak, GB": "{peak:.1f}",
        },
        "Onto the device of JAX, each load in a new process.",
    ),
    Section(
        "Converting a checkpoint", ("convert",), _convert,
        {
            "GB": "{size_gb:.1f}", "`cp -r`, s": "{copy_seconds:.1f}",
            "conversion, s": "{convert_seconds:.1f}",
            "speed over the copy's": "{speed_relative_to_copy:.2f}",
            "peak resident, GB": "{convert_peak_resident_gb:.2f}",
            "load average": "{load_average:.1f}", "round trip exact": "{round_trip_bit_exact}",
        },
        "Cold page cache, fsync of every file on both sides, start of Python counted.",
    ),
    Section(
        "Snapshots on a disk", ("snapshot",), _snapshot,
        {
            "": "{what}", "GB": "{size_gb:.2f}", "files": "{files:,}", "GB/s": "{speed}",
            "`cp -r`, flushed, GB/s": "{copy}", "speed over the copy's": "{ratio}",
        },
        "Median [least, most] of the rounds.",
    ),
    Section(
        "Time to the first token", ("cold_h100", "cold"), _cold,
        {
            "compilation cache": "{cache}", "document tokens": "{tokens:,}",
            "to the first tokens, s": "{to first tokens:.1f}", "start": "{start:.1f}",
            "load": "{load:.1f}", "compile": "{compile:.1f}", "first block": "{first block:.1f}",
            "asked again, s": "{asked again:.1f}",
        },
    ),
    Section(
        "Batches", ("method_batch",), _batch,
        {
            "phase": "{part}", "one at a time, ms": "{alone:.0f}", "together, ms": "{together:.0f}",
            "throughput": "{gain:.2f}",
        },
        "Eight ragged requests of four chunks, 32 steps, joint encoding.",
    ),
    Section(
        "Attention over chosen chunks", ("kernel_h100", "kernel"), _kernel,
        {
            "requests": "{batch}", "heads": "{heads}/{kv_heads}", "query rows": "{rows}",
            "K": "{slots}", "kernel, µs": "{us:.1f} [{us_least:.1f}, {us_most:.1f}]",
            "times the floor": "{times_floor:.2f}", "of copy bandwidth": "{percent:.0f}%",
            "relative error": "{relative_error:.1e}",
            "gather + cuDNN, µs": "{gather+cudnn:.0f} ({gather+cudnn x:.1f})",
            "cuDNN, contiguous, µs": "{contiguous cudnn:.0f} ({contiguous cudnn x:.1f})",
        },
        "Device time with schedule and merge; inputs rotate, so that the L2 cache does not serve "
        "them. D = 128, C = 1,024. Floor: K and V of the distinct chunks read once at the speed of "
        "copies times 3.0 / 2.92. In brackets: how many times faster the kernel is.",
        "kernel",
    ),
    Section(
        "Registers, spills, temporaries", ("compiled",), _compiled,
        {
            "case": "{case}", "kernel: registers, bytes spilled": "{kernels}",
            "temporaries, MB": "{mb:.1f}", "warnings": "{warnings}",
        },
    ),
    Section(
        "Memory, planned and measured", ("memory",), _memory,
        {
            "setting": "{setting}", "planned, GB": "{plan_gb:.2f}", "phase": "{phase}",
            "measured, GB": "{gb:.2f}", "planned / measured": "{planned_over_measured:.3f}",
        },
    ),
)  # fmt: skip
