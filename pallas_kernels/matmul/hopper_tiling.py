"""How the Hopper kernel for products of few rows cuts its work: the rule and the launch's shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Literal

from pallas_kernels.compat import ROWS, SHARED_MEMORY

Activation = Literal["none", "swiglu"]

FEW_ROWS = 128  # that the kernel takes at most
_ROWS = 8  # rows are multiples of it; columns of a CTA are multiples of a tile's 64
_MOST_TILES, _MOST_CONSUMERS = 4, 4
# By bytes of an element: (bytes of a row of weights in a stage, fewest stages), the longest first.
_BLOCKS = {2: ((512, 2), (256, 2), (128, 2)), 1: ((512, 3), (256, 3), (128, 2))}
# Bytes a microsecond at most: from memory, into all SMs, into one SM, converted by one SM.
_MEMORY, _ALL_SMS, _ONE_SM, _CONVERTED = 4.4e6, 8.5e6, 100e3, 40e3
_SUM = 1.5  # microseconds that the sum of splits takes at least, for each doubling
_OTHER_REGISTERS = 20  # of a thread, beside accumulators and converted weights


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of a launch.

    Attributes:
      columns: of a result, made by one CTA; the last CTA of a result begins earlier if they do not
        divide it.
      splits: parts that the inner dimension is cut into; their float32 results are summed.
      block: inner elements of a stage.
      stages: blocks in flight.
      parts: warpgroups that share a tile, each with its part of every block.
    """

    columns: int
    splits: int
    block: int
    stages: int
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static shape of a launch. A CTA makes columns of one result, with swiglu from two weights."""

    rows: int  # a multiple of 8
    inner: int  # I, the inner dimension
    outs: tuple[int, ...]  # columns of each weight's product
    tuning: Tuning
    activation: Activation = "none"  # "swiglu": silu(first) * second is the one result
    biases: bool = False
    itemsize: int = 2  # bytes of a weight's element

    @property
    def tiles(self) -> int:
        """Tiles of 64 columns of a CTA."""
        return self.tuning.columns // ROWS

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.tiles * self.tuning.parts

    @property
    def registers(self) -> int:
        """Registers that a thread of a consumer can have if the producer's have 40."""
        groups = self.consumers + 1
        if groups == 2:
            return 255
        at_start = 65536 // (128 * groups) // 8 * 8
        return (at_start * groups - 40) // self.consumers // 8 * 8

    @property
    def registers_used(self) -> int:
        """An estimate: accumulators, a tile's part of a block in half precision, others."""
        converted = self.tuning.block // self.tuning.parts // 2 if self.itemsize == 1 else 0
        return self.at_once * self.rows // 2 + converted + _OTHER_REGISTERS

    @property
    def at_once(self) -> int:
        """Weights that a CTA reads."""
        return 2 if self.activation == "swiglu" else 1

    @property
    def results(self) -> tuple[int, ...]:
        """Columns of each result."""
        return self.outs[:1] if self.activation == "swiglu" else self.outs

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first CTA of each result, and the number of CTAs of a split."""
        counts = (-(-n // self.tuning.columns) for n in self.results)
        return tuple(itertools.accumulate(counts, initial=0))

    @property
    def ctas(self) -> int:
        return self.firsts[-1] * self.tuning.splits

    @property
    def steps(self) -> int:
        """Blocks of the inner dimension that a CTA goes through."""
        return self.inner // self.tuning.splits // self.tuning.block

    @property
    def problem(self) -> str | None:
        """What the kernel does not take; None if it takes all."""
        cut = self.tuning
        depth = 128 // self.itemsize  # of a tile in shared memory
        for problem, found in (
            ("rows", self.rows > FEW_ROWS),
            ("columns", cut.columns % ROWS or cut.columns > min(_MOST_TILES * ROWS, *self.outs)),
            # Columns are stored in tiles of 64, the last CTA's too.
            ("outs", any(n % ROWS for n in self.results)),
            ("inner", self.inner % (cut.splits * cut.block) or cut.block % (depth * cut.parts)),
            ("consumers", self.consumers > _MOST_CONSUMERS),
            ("registers", self.registers_used > self.registers),
            ("shared memory", self.shared_memory > SHARED_MEMORY),
        ):
            if found:
                return problem
        return None

    @property
    def shared_memory(self) -> int:
        """Bytes of a CTA. Rows are in half precision; with splits results are float32."""
        cut = self.tuning
        stage = cut.block * (2 * self.rows + self.itemsize * self.at_once * cut.columns)
        result = self.rows * cut.columns * (4 if cut.splits > 1 else 2)
        sums = 4 * (cut.parts - 1) * self.at_once * self.rows * cut.columns
        return cut.stages * stage + result + sums + 10 * cut.columns + 2048

    @property
    def microseconds(self) -> float:
        """An estimate: reading memory, all SMs, one SM and its conversion; a sum of splits."""
        cut, depth = self.tuning, self.inner // self.tuning.splits
        memory = self.itemsize * self.inner * sum(self.outs)
        weights = self.itemsize * self.at_once * cut.columns * depth  # of a CTA
        own = weights + 2 * self.rows * depth
        seconds = max(memory / _MEMORY, own * self.ctas / _ALL_SMS, own / _ONE_SM)
        if self.itemsize == 1:
            seconds = max(seconds, weights / _CONVERTED)
        partial = 8 * cut.splits * self.rows * sum(self.results) / _ALL_SMS
        return seconds + (_SUM * math.log2(cut.splits) + partial if cut.splits > 1 else 0)


def candidates(
    rows: int,
    inner: int,
    outs: tuple[int, ...],
    activation: Activation = "none",
    biases: bool = False,
    sms: int = 132,
    itemsize: int = 2,
) -> list[Geometry]:
    """Returns the ways to cut products: those that run at once on the device's SMs, or else all."""
    found, padded = [], -(-rows // _ROWS) * _ROWS
    splits = (1,) if activation == "swiglu" else (1, 2, 4, 8)
    for tiles, split in itertools.product(range(1, _MOST_TILES + 1), splits):
        # The longest block and the most stages that fit, at most six.
        for size, least in _BLOCKS[itemsize]:
            # More warpgroups convert faster.
            orders = itertools.product((2, 1) if itemsize == 1 else (1,), range(6, least - 1, -1))
            cuts = [
                Tuning(tiles * ROWS, split, size // itemsize, stages, parts)
                for parts, stages in orders
            ]
            geos = [
                Geometry(padded, inner, outs, cut, activation, biases, itemsize) for cut in cuts
            ]
            fitting = [geo for geo in geos if geo.problem is None]
            if fitting:
                found.append(fitting[0])
                break
    return [geo for geo in found if geo.ctas <= sms] or found


@functools.cache
def choose(
    rows: int,
    inner: int,
    outs: tuple[int, ...],
    activation: Activation = "none",
    biases: bool = False,
    sms: int = 132,
    itemsize: int = 2,
) -> Geometry | None:
    """Returns how products of few rows are cut; None if the kernel does not take the shapes.

    Of the ways within 5% of the least estimated time: the longest pieces of a row of weights, then
    the fewest splits, then the most CTAs.
    """
    found = candidates(rows, inner, outs, activation, biases, sms, itemsize) if rows > 0 else []
    least = min((geo.microseconds for geo in found), default=0)
    near = [geo for geo in found if geo.microseconds <= 1.05 * least]
    return max(near, key=lambda geo: (geo.tuning.block, -geo.tuning.splits, geo.ctas), default=None)
