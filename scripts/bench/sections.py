"""Parts of docs/performance.md: what each says of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any

Record = Mapping[str, Any]


def conditions(record: Record) -> str:
    """Where and how a record was made."""
    command, device, count = record["command"], record["device"], record.get("devices", 1)
    several = f"{count} x " if count > 1 else ""
    place = f"{several}{device}, jax {record['versions']['jax']}, `{command}`"
    if "copy_bandwidth" in record:
        place += f"; its memory copies at {record['copy_bandwidth'] / 1e12:.2f} TB/s"
    return f"{place}. {record.get('notes', '')}".rstrip()


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """A markdown table."""
    heads = list(heads)
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def step(record: Record) -> Iterator[str]:
    """A denoising step."""
    yield conditions(record)
    yield "One evaluation of 32 rows after joint encoding. Floor: weights and chunks' KV read once"
    yield "at the speed of copies."
    yield ""
    yield from table(
        ("cached tokens", "ms [least, most]", "floor, ms", "times the floor",
         "`denoise_step` from Python, ms", "slower than the loop"),
        (
            (f"{r['cached_tokens']:,}", f"{r['ms']:.2f} [{r['ms_least']:.2f}, {r['ms_most']:.2f}]",
             f"{r['ms_floor']:.2f}", f"{r['times_floor']:.2f}", f"{r['ms_from_python']:.2f}",
             f"{100 * (r['python_over_loop'] - 1):.1f}%")
            for r in record["step"]
        ),
    )  # fmt: skip
    for name, seconds in record["seconds"].items():
        speed = record["ratios"].get(f"TFLOP/s, {name}")
        if speed is not None:
            yield ""
            yield f"The pass that scores, `{name}`: {1000 * seconds['median']:.0f} ms,"
            yield f"{speed:.0f} TFLOP/s of products and attention over rows that exist."


def requests(record: Record) -> Iterator[str]:
    """Whole requests beside the baselines."""
    yield "As `generate_ids` is called. The baselines in the same process; of `plain`, evaluations"
    yield "are all alike, so that two, or one a block, are timed and counted as often as there are"
    yield "tokens."
    yield ""
    yield conditions(record)
    yield ""
    rows = {(r["prompt_tokens"], r["tokens"], r["method"]): r for r in record["end_to_end"]}
    phases = ("draft", "score", "encode", "decode")

    def line(prompt: int, tokens: int) -> Iterator[str]:
        ours = rows[prompt, tokens, "prefilling"]
        yield f"{prompt:,}"
        yield str(tokens)
        yield f"{ours['seconds']:.2f} [{ours['least']:.2f}, {ours['most']:.2f}]"
        yield " + ".join(f"{ours['phases'][name]:.2f}" for name in phases)
        for method in ("dual-cache", "plain"):
            theirs = rows.get((prompt, tokens, method))
            if theirs is None:
                yield "-"
            else:
                yield f"{theirs['seconds']:.2f} ({theirs['seconds'] / ours['seconds']:.1f})"

    yield from table(
        ("prompt tokens", "response", "prefilling, s", " + ".join(phases),
         "dual-cache, s (times ours)", "plain, s (times ours)"),
        (line(n, tokens) for n, tokens in sorted({key[:2] for key in rows})),
    )  # fmt: skip


def meshes(*records: Record) -> Iterator[str]:
    """Step and scoring pass on meshes of several GPUs."""
    yield "Meshes are `data` x `tensor` (`docs/parallel.md`); in brackets the time over that on one"
    yield "GPU in the same run. `mosaic_gpu`, the default, makes few rows' sums where it is named,"
    yield "elsewhere XLA makes them all."
    for record in records:
        yield ""
        yield conditions(record)
        yield ""
        steps = {r["mesh"]: r for r in record["step"]}
        first = next(iter(steps))
        passes = {
            name.split(", mesh ", 1)[1]: seconds["median"]
            for name, seconds in record["seconds"].items()
            if name.startswith("score ")
        }

        def over(found: Mapping[str, float], mesh: str, scale: float, first: str = first) -> str:
            if mesh not in found:
                return "-"
            return f"{scale * found[mesh]:.2f} ({found[mesh] / found[first]:.3f})"

        loop, python = (
            {mesh: r[key] for mesh, r in steps.items()} for key in ("ms", "ms_from_python")
        )
        cached = steps[first]["cached_tokens"]
        yield from table(
            ("mesh", f"step, {cached:,} cached, ms", "`denoise_step` from Python, ms",
             "scoring pass, ms"),
            (
                (mesh, over(loop, mesh, 1), over(python, mesh, 1), over(passes, mesh, 1e3))
                for mesh in steps
            ),
        )  # fmt: skip


def offload(record: Record) -> Iterator[str]:
    """A document in host memory."""
    memory = record["memory"]
    yield conditions(record)
    host, weights, most = (
        f"{memory[name] / 1e9:.1f} GB" for name in ("host_bytes", "weight_bytes", "peak_bytes")
    )
    yield f"{memory['tokens']:,} tokens: {host} of KV in pinned host memory, {weights} of weights"
    yield f"on the device, which held at most {most}. One large array comes over at"
    yield f"{record['host_copy_bandwidth'] / 1e9:.1f} GB/s. Encoding on the device alone takes what"
    yield '"Streaming" says; the rest is pinning memory and sending, not told apart.'
    yield ""
    speeds = record["ratios"]
    yield from table(
        ("", "ms [least, most]", "GB/s"),
        (
            (name, f"{1e3 * r['median']:.1f} [{1e3 * r['least']:.1f}, {1e3 * r['most']:.1f}]",
             f"{speeds[key]:.1f}" if (key := f"GB/s, {name}") in speeds else "")
            for name, r in record["seconds"].items()
        ),
    )  # fmt: skip


def snapshots(record: Record) -> Iterator[str]:
    """Writing and reading a snapshot, beside copies of the same files."""
    loads = ", ".join(f"{r['load_average']:.1f}" for r in record["rounds"])
    yield f"{record['hardware']}, jax {record['versions']['jax']}, `{record['command']}`."
    yield f"{record['size_gb']:.2f} GB in {record['files']:,} files; load averages {loads}."
    yield ""

    def spread(name: str) -> str:
        values = [r[name] for r in record["rounds"]]
        return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"

    yield from table(
        ("", "GB/s [least, most]", "`cp -r`, flushed, GB/s", "speed over the copy's"),
        (
            (what, *(spread(name) for name in names))
            for what, names in {
                "writing": ("write_gb_per_s", "copy_warm_gb_per_s", "write_over_copy_warm"),
                "reading, cold page cache":
                    ("read_cold_gb_per_s", "copy_cold_gb_per_s", "read_cold_over_copy_cold"),
                "reading, warm page cache":
                    ("read_warm_gb_per_s", "copy_warm_gb_per_s", "read_warm_over_copy_warm"),
            }.items()
        ),
    )  # fmt: skip


def load(record: Record) -> Iterator[str]:
    """Loading a checkpoint, beside plain reads of its files."""
    yield conditions(record)
    yield f"{record['bytes'] / 1e9:.1f} GB, onto JAX's device, each load a process of its own."
    yield ""
    yield from table(
        ("page cache", "s", "GB/s", "plain reads, GB/s", "load over reads", "host peak, GB"),
        (
            (r["page_cache"], f"{r['seconds']:.1f}", f"{r['gb_per_s']:.2f}",
             f"{r['disk_gb_per_s']:.2f}", f"{r['of_disk']:.2f}",
             f"{r['host_peak_bytes'] / 1e9:.1f}")
            for r in record["rows"]
        ),
    )  # fmt: skip


def cold(record: Record) -> Iterator[str]:
    """Time to the first tokens in a new process."""
    yield conditions(record)
    yield f"A document of {record['document_tokens']:,} tokens."
    yield ""
    phases = list(record["rows"][0]["seconds"])
    yield from table(
        ("compilation cache", "to the first tokens, s", *phases, "asked again, s"),
        (
            (r["cache"], f"{r['to first tokens']:.1f}",
             *(f"{r['seconds'][name]:.1f}" for name in phases), f"{r['asked again']:.1f}")
            for r in record["rows"]
        ),
    )  # fmt: skip


def method(record: Record) -> Iterator[str]:
    """Phases and choices."""
    yield conditions(record)
    yield ""
    yield from table(
        ("phase", "ms [least, most]"),
        (
            (name, " ".join((f"{1000 * r['median']:.1f}",
                             f"[{1000 * r['least']:.1f}, {1000 * r['most']:.1f}]")))
            for name, r in record["seconds"].items()
            if not name.startswith(("request ", "8 together"))
        ),
    )  # fmt: skip
    ratios = {k: v for k, v in record["ratios"].items() if not k.startswith("batch")}
    yield ""
    yield from table(("ratio", ""), ((name, f"{value:.3f}") for name, value in ratios.items()))


def stream(record: Record) -> Iterator[str]:
    """Documents of growing length through one program."""
    yield conditions(record)
    yield "One compiled program for all: shorter documents are padded to the longest one's chunks,"
    yield "which are not computed."
    yield ""
    yield from table(
        ("tokens", "s", "µs a token", "most device memory, GB"),
        (
            (f"{r['tokens']:,}", f"{r['seconds']:.2f}", f"{1e6 * r['seconds'] / r['tokens']:.1f}",
             f"{r['peak_bytes'] / 1e9:.2f}")
            for r in record["memory"].values()
        ),
    )  # fmt: skip


def streamed_requests(record: Record) -> Iterator[str]:
    """Whole requests about documents that are streamed."""
    yield conditions(record)
    yield "Independent encoding, 32 tokens in 32 steps; one call each, compiling taken off."
    yield ""
    yield from table(
        ("document tokens", "s", "scoring pass, s", "decoding, s", "most device memory, GB"),
        (
            (f"{r['document_tokens']:,}", f"{r['seconds']:.1f}", f"{r['phases']['score']:.1f}",
             f"{r['phases']['decode']:.2f}", f"{r['peak_bytes'] / 1e9:.2f}")
            for r in record["stream"]
        ),
    )  # fmt: skip


def batch(record: Record, *_: Record) -> Iterator[str]:
    """Ragged requests together. Of several records the first counts."""
    yield conditions(record)
    yield "Eight ragged requests of four chunks (up to 4,096 tokens) each, 32 steps, together and"
    yield "one at a time. Joint encoding is bound by arithmetic: there a batch gains nothing."
    yield ""
    seconds = record["seconds"]

    def alone(part: str) -> float:
        return sum(r["median"] for n, r in seconds.items() if n.startswith("request") and part in n)

    yield from table(
        ("", "one at a time, ms", "together, ms", "throughput"),
        (
            (part, f"{1000 * alone(part):.0f}",
             f"{1000 * seconds[f'8 together, {part}']['median']:.0f}",
             f"{alone(part) / seconds[f'8 together, {part}']['median']:.2f}")
            for part in ("encode", "decode")
        ),
    )  # fmt: skip


def kernel(*records: Record) -> Iterator[str]:
    """Attention over chosen chunks, a table for each record."""
    yield "Schedule and merge included, device time, inputs rotated so that the L2 does not serve"
    yield "them. D = 128, C = 1,024, rows rotated for every chunk. Floor: K and V of the distinct"
    yield "chunks read once at the speed of copies times 3.0 / 2.92. In brackets: how many times"
    yield "faster the kernel is."
    for record in records:

        def case(r: Record) -> tuple[Any, ...]:
            return r["batch"], f"{r['heads']}/{r['kv_heads']}", r["rows"], r["slots"]

        rows = {
            (*case(r), r["implementation"]): r
            for r in record["rows"]
            if not r["ragged"] and r["settings"] is None
            and (r["q_per_slot"] or r["implementation"] != "mosaic_gpu")
        }  # fmt: skip
        yield ""
        yield conditions(record)
        yield ""

        def line(case: tuple, rows: dict = rows) -> Iterator[str]:
            ours = rows[*case, "mosaic_gpu"]
            yield from map(str, case)
            yield f"{ours['us']:.1f} [{ours['us_least']:.1f}, {ours['us_most']:.1f}]"
            yield f"{ours['times_floor']:.2f}"
            yield f"{100 * ours['of_copy_bandwidth']:.0f}%"
            yield f"{ours['relative_error']:.1e}"
            for name in ("gather+cudnn", "contiguous cudnn"):
                theirs = rows.get((*case, name))
                yield f"{theirs['us']:.0f} ({theirs['us'] / ours['us']:.1f})" if theirs else "-"

        yield from table(
            ("requests", "heads", "query rows", "K", "kernel, µs [least, most]", "times the floor",
             "of copy bandwidth", "relative error", "gather + cuDNN, µs", "cuDNN, contiguous, µs"),
            (line(key[:4]) for key in rows if key[4] == "mosaic_gpu"),
        )  # fmt: skip


def compiled(record: Record) -> Iterator[str]:
    """What the compiler says of the kernels."""
    yield f"jax {record['versions']['jax']}, `{record['command']}` ({record['target']})."
    warnings = sum(len(row["warnings"]) for row in record["rows"])
    yield f"Warnings, as of serialised WGMMA: {warnings}."
    yield ""
    yield from table(
        ("", "kernels: registers, bytes spilled", "temporaries, MB"),
        (
            (row["case"],
             "; ".join(f"{k['kernel']}: {k['registers']}, {k['spilled_bytes']}"
                       for k in row["kernels"]),
             f"{row['temporary_bytes'] / 1e6:.1f}")
            for row in record["rows"]
        ),
    )  # fmt: skip


def memory(record: Record) -> Iterator[str]:
    """What was planned beside what the device held."""
    yield conditions(record)
    yield ""
    yield from table(
        ("setting", "planned, GB", "phase", "measured, GB", "planned / measured"),
        (
            (r["setting"], f"{r['planned'] / 1e9:.2f}", r["phase"], f"{r['measured'] / 1e9:.2f}",
             f"{r['planned_over_measured']:.3f}")
            for r in record["rows"]
        ),
    )  # fmt: skip


def each(section: Callable[[Record], Iterator[str]]) -> Callable[..., Iterator[str]]:
    """The section for each of several records."""

    def run(*records: Record) -> Iterator[str]:
        for number, record in enumerate(records):
            if number:
                yield ""
            yield from section(record)

    return run


SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[..., Iterator[str]], str | None], ...] = (
    ("Whole requests", ("end_to_end",), requests, "requests"),
    ("A denoising step, and the scoring pass", ("speed",), step, None),
    ("Several GPUs", ("mesh", "mesh_flags", "mesh_four"), meshes, None),
    ("Phases and choices", ("method",), method, None),
    ("Streaming", ("method",), stream, "streaming"),
    ("Streamed requests", ("speed_stream",), streamed_requests, None),
    ("KV in host memory", ("offload",), offload, None),
    ("Loading a checkpoint", ("load_h100", "load"), each(load), None),
    ("Time to the first token", ("cold_h100", "cold"), each(cold), None),
    ("Snapshots on a disk", ("snapshot",), snapshots, None),
    ("Batches", ("method_batch", "method"), batch, None),
    ("Attention over chosen chunks", ("kernel_h100", "kernel"), kernel, "kernel"),
    ("Registers, spills, temporaries", ("compiled",), compiled, None),
    ("Memory, planned and measured", ("memory",), memory, None),
)
