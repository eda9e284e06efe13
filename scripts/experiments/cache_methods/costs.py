"""What the cells of a grid cost, one request at a time in a process that has the device alone.

A grid's answers are made in batches and by several processes, so their times are no benchmark.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.ahead import Programs

from experiments.answering import answer
from experiments.grids import Cell
from experiments.records import write_json
from experiments.retrieval import Retrieval, request


def measure_costs(
    bench: Retrieval,
    cells: Sequence[Cell],
    path: Path,
    record: dict[str, Any],
    deadline: float,
    repeats: int = 4,
) -> bool:
    """Times each cell's first examples, after one that warms up; writes every row when it is made.

    All programs are compiled first, side by side. A row has the seconds of a request, from its
    tokens to the response's, median, least and most; evaluations and network rows, the means; and
    the bytes on the device of the request's largest program, as the compiler says.

    Returns:
      False where the deadline (time.monotonic) came first.
    """
    rows = record.setdefault("rows", [])
    done = {row["cell"] for row in rows}
    missing = [cell for cell in cells if cell.key not in done]
    programs, begun = Programs(), time.monotonic()
    found = programs.find(partial(_answer, bench, cell, 0) for cell in missing)
    programs.compile()
    record["compile_seconds"] = record.get("compile_seconds", 0) + time.monotonic() - begun
    # The shortest first: a deadline then cuts the fewest.
    for cell, own in sorted(zip(missing, found, strict=True), key=lambda item: item[0].length):
        if time.monotonic() > deadline:
            return False
        timed = [_answer(bench, cell, index) for index in range(repeats + 1)][1:]
        spent = [seconds for seconds, _ in timed]
        names = ("evaluations", "rows")
        counts = {name: statistics.fmean(row[name] for _, row in timed) for name in names}
        times = {"seconds": statistics.median(spent), "least": min(spent), "most": max(spent)}
        rows.append({"cell": cell.key, **times, **counts, "bytes": programs.peak(own)})
        write_json(path, record)
    return True


def _answer(bench: Retrieval, cell: Cell, index: int) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of a request alone, and its answer's record."""
    example, engine = bench.example(cell, index), bench.engine(cell)
    asked, begun = request(cell, index, example), time.perf_counter()
    (answered,) = answer(engine, [asked], together=False)
    seconds = time.perf_counter() - begun
    return seconds, bench.record(cell, index, example, answered, engine.selection)
