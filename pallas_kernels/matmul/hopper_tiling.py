"""How the Hopper kernel for products of few rows cuts its work: the rule and the launch's shape."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels.compat import ROWS, SHARED_MEMORY, padded_rows

Activation = Literal["none", "swiglu"]

_COLUMNS = 16  # the columns of a CTA are a multiple: whole pieces of 32 bytes
_MOST_COLUMNS = 256
_MOST_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static shape of a launch."""

    rows: int  # 32, or a multiple of 64
    inner: int  # I, the inner dimension
    outs: tuple[int, ...]  # columns of each weight's product
    columns: tuple[int, ...]  # columns of each product that one CTA makes
    splits: int  # parts that the inner dimension is cut into
    block: int  # inner elements of a stage
    stages: int  # blocks in flight
    activation: Activation = "none"  # "swiglu": silu(first) * second is the one result

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows, one for each warpgroup that multiplies."""
        return -(-self.rows // ROWS)

    @property
    def units(self) -> int:
        """CTAs side by side."""
        return self.outs[0] // self.columns[0]

    @property
    def steps(self) -> int:
        """Blocks of the inner dimension that a CTA goes through."""
        return self.inner // self.splits // self.block

    @property
    def results(self) -> int:
        return 1 if self.activation == "swiglu" else len(self.outs)

    @property
    def fits(self) -> bool:
        """Whether blocks divide the inner dimension, and a CTA's shared memory is enough."""
        return self.inner % (self.splits * self.block) == 0 and self.shared_memory <= SHARED_MEMORY

    @property
    def shared_memory(self) -> int:
        """Bytes of a CTA. Operands are in half precision; with splits results are float32."""
        stage = 2 * self.block * (self.tiles * ROWS + sum(self.columns))
        result = self.tiles * ROWS * sum(self.columns[: self.results])
        return self.stages * stage + result * (4 if self.splits > 1 else 2)


def choose(
    rows: int, inner: int, outs: tuple[int, ...], activation: Activation, sms: int
) -> Geometry | None:
    """Returns how products of few rows are cut; None if the kernel does not take the shapes.

    Of the ways that keep nearly the most SMs busy, it takes the one that reads the longest pieces
    of a row of weights, then the one with the fewest splits, whose float32 results are written and
    read again.
    """
    if not 0 < rows <= _MOST_ROWS:
        return None
    candidates = []
    for units in range(1, sms + 1):
        columns = tuple(n // units for n in outs)
        if any(n % (units * _COLUMNS) for n in outs) or max(columns) > _MOST_COLUMNS:
            continue
        for splits in (1,) if activation == "swiglu" else (1, 2, 4, 8):
            cut = (padded_rows(rows), inner, outs, columns, splits)
            # The longest block and the most stages that fit, at most six.
            fitting = (
                geo
                for block, least in ((256, 2), (128, 3), (64, 3))
                for stages in range(6, least - 1, -1)
                if (geo := Geometry(*cut, block, stages, activation)).fits
            )
            if units * splits <= sms and (first := next(fitting, None)) is not None:
                candidates.append(first)
    most = max((geo.units * geo.splits for geo in candidates), default=0)
    busy = [geo for geo in candidates if geo.units * geo.splits >= 0.95 * most]
    return max(busy, key=lambda geo: (geo.block, -geo.splits), default=None)
