"""Static shapes of launches of the GPU kernels: tiles, groups and work items."""

from __future__ import annotations

import dataclasses
from typing import Literal

ROWS = 64  # of a query tile: what one warpgroup multiplies at once


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static shape of a launch.

    A query tile holds `heads_per_tile` heads of `rows_per_head` rows each, rows_per_head dividing
    64; or 64 of a head's rows, where it has more. tiles: of a KV head; tiles_per_block: side by
    side in one block of threads. key_groups: warpgroups of a tile, which take turns with the blocks
    of keys.
    """

    batch: int
    rows: int  # T: 32, or a multiple of 64
    heads: int
    kv_heads: int
    dim: int
    query_slots: bool  # whether query rows differ from slot to slot
    processors: int
    scale: float = 1.0
    block_keys: int = 64
    stages: int = 2
    splits: int = 1
    key_groups: int = 1
    per_chunk: int = 1  # key blocks of a chunk
    slots: int = 1  # K
    near_blocks: int = 0  # blocks of keys that every request has to itself

    def __post_init__(self) -> None:
        if self.key_groups > 1 and self.tiles_per_block > 1:
            raise ValueError(
                f"key_groups = {self.key_groups} leaves no warpgroups for"
                f" {self.tiles_per_block} query tiles"
            )

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows_per_head(self) -> int:
        """In one tile."""
        return min(self.rows, ROWS)

    @property
    def heads_per_tile(self) -> int:
        return min(ROWS // self.rows_per_head, self.heads_per_kv)

    @property
    def tiles(self) -> int:
        return -(-self.heads_per_kv // self.heads_per_tile) * (self.rows // self.rows_per_head)

    @property
    def tiles_per_block(self) -> int:
        return min(self.tiles, 2)

    @property
    def groups(self) -> int:
        """Blocks of threads that one unit and KV head needs for all its query tiles."""
        return -(-self.tiles // self.tiles_per_block)

    @property
    def flat_rows(self) -> int:
        """Rows (b, h, t) of a split's output, as whole tiles."""
        return -(-self.batch * self.heads * self.rows // ROWS) * ROWS

    @property
    def blocks_of_unit(self) -> int:
        """Most blocks of keys that a unit of the block table has."""
        return -(-(self.slots * self.per_chunk + self.near_blocks) // self.splits)

    @property
    def items(self) -> int:
        return self.batch * self.splits * self.kv_heads * self.groups


Activation = Literal["none", "swiglu"]


@dataclasses.dataclass(frozen=True)
class MatmulGeometry:
    """Static shape of a launch.

    rows: 32, or a multiple of 64; inner: I; outs: columns of each result; columns: of each that one
    block of threads makes; splits: of the inner dimension; block: inner elements of a stage.
    activation: "swiglu" makes one result of two weights, silu(first) * second.
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
        return -(-self.rows // ROWS)

    @property
    def units(self) -> int:
        return self.outs[0] // self.columns[0]

    @property
    def steps(self) -> int:
        """Blocks of the inner dimension that a block of threads goes through."""
        return self.inner // self.splits // self.block

    @property
    def results(self) -> int:
        return 1 if self.activation == "swiglu" else len(self.outs)

    @property
    def shared_memory(self) -> int:
        """Bytes; `splits` of half-precision operands give float32 results."""
        stage = 2 * self.block * (self.tiles * ROWS + sum(self.columns))
        result = self.tiles * ROWS * sum(self.columns[: self.results])
        return self.stages * stage + result * (4 if self.splits > 1 else 2)
