"""How the Hopper kernel for products of few rows cuts its work: the rule and the launch's shape."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels.compat import ROWS, SHARED_MEMORY

Activation = Literal["none", "swiglu"]

_COLUMNS = 16  # the columns of a CTA are a multiple: whole pieces of 32 bytes
_MOST_COLUMNS = 256
_MOST_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static shape of a launch.

    Attributes:
      rows: 32, or a multiple of 64.
      inner: I, the inner dimension.
      outs: columns of each weight's product.
      columns: columns of each product that one CTA makes.
      splits: parts that the inner dimension is cut into.
      block: inner elements of a stage.
      stages: blocks in flight.
      activation: "swiglu" makes one result of two products, silu(first) * second.
    """

    rows: int
    inner: int
    outs: tuple[int, ...]
    columns: tuple[int, ...]
    splits: int
    block: int
    stages: int
    activation: Activation = "none"

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
    rows = 32 if rows <= 32 else -(-rows // ROWS) * ROWS
    candidates: list[Geometry] = []
    for units in range(1, sms + 1):
        if any(n % (units * _COLUMNS) for n in outs):
            continue
        columns = tuple(n // units for n in outs)
        if max(columns) > _MOST_COLUMNS:
            continue
        for splits in (1,) if activation == "swiglu" else (1, 2, 4, 8):
            if units * splits <= sms:
                geo = _with_stages(rows, inner, outs, columns, splits, activation)
                candidates += [] if geo is None else [geo]
    if not candidates:
        return None
    most = max(geo.units * geo.splits for geo in candidates)
    busy = [geo for geo in candidates if geo.units * geo.splits >= 0.95 * most]
    return max(busy, key=lambda geo: (geo.block, -geo.splits))


def _with_stages(
    rows: int,
    inner: int,
    outs: tuple[int, ...],
    columns: tuple[int, ...],
    splits: int,
    activation: Activation,
) -> Geometry | None:
    """Returns the geometry with the longest block and most stages that fit, at most six."""
    for block, least in ((256, 2), (128, 3), (64, 3)):
        if inner % (splits * block):
            continue
        for stages in range(6, least - 1, -1):
            geo = Geometry(rows, inner, outs, columns, splits, block, stages, activation)
            if geo.shared_memory <= SHARED_MEMORY:
                return geo
    return None
