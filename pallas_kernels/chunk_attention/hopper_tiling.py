"""How the Hopper attention kernel cuts its work: the rule, its settings, the launch's shape."""

from __future__ import annotations

import dataclasses

from pallas_kernels.compat import ROWS


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of a launch.

    Attributes:
      block_keys: keys of a block, 64 or 128.
      stages: blocks of K and of V in flight, a multiple of key_groups.
      splits: units that a request's blocks are cut into; their partial results are merged.
      key_groups: warpgroups that take turns with the blocks of a unit, 1 or 2. 2 needs a single
        query tile for each CTA.
    """

    block_keys: int
    stages: int
    splits: int
    key_groups: int = 1

    def __post_init__(self) -> None:
        if self.block_keys not in (64, 128):
            raise ValueError(f"block_keys must be 64 or 128, got {self.block_keys}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.splits < 1:
            raise ValueError(f"splits must be at least 1, got {self.splits}")
        if self.key_groups not in (1, 2):
            raise ValueError(f"key_groups must be 1 or 2, got {self.key_groups}")
        if self.stages % self.key_groups:
            raise ValueError(
                f"stages must be a multiple of key_groups, got {self.stages} and {self.key_groups}"
            )


@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """How the query rows of a KV head are packed into tiles of 64 rows, one for each warpgroup.

    A tile holds `heads_per_tile` heads of `rows_per_head` rows each, and rows_per_head divides 64.
    With more than 64 rows a tile holds 64 rows of one head.
    """

    rows: int  # T: 32, or a multiple of 64
    heads: int
    kv_heads: int

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows_per_head(self) -> int:
        """Rows of a head in one tile."""
        return min(self.rows, ROWS)

    @property
    def heads_per_tile(self) -> int:
        return min(ROWS // self.rows_per_head, self.heads_per_kv)

    @property
    def tiles(self) -> int:
        """Tiles of a KV head."""
        return -(-self.heads_per_kv // self.heads_per_tile) * (self.rows // self.rows_per_head)

    @property
    def tiles_per_cta(self) -> int:
        return min(self.tiles, 2)

    @property
    def groups(self) -> int:
        """Work items that one unit and KV head needs for all its query tiles."""
        return -(-self.tiles // self.tiles_per_cta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry(QueryTiles):
    """Static shape of a launch."""

    batch: int
    dim: int  # head size
    query_slots: bool  # whether query rows differ between slots
    sms: int
    scale: float
    tuning: Tuning
    slots: int  # K
    per_chunk: int  # key blocks of a chunk
    own_blocks: int  # key blocks of each request's own KV

    def __post_init__(self) -> None:
        if self.tuning.key_groups > 1 and self.tiles_per_cta > 1:
            raise ValueError(
                f"key_groups must be 1 with {self.tiles_per_cta} query tiles for each CTA,"
                f" got {self.tuning.key_groups}"
            )

    @property
    def consumers(self) -> int:
        """Warpgroups of a CTA that multiply."""
        return self.tiles_per_cta * self.tuning.key_groups

    @property
    def flat_rows(self) -> int:
        """Rows (b, h, t) of a split's output, padded to whole tiles."""
        return -(-self.batch * self.heads * self.rows // ROWS) * ROWS

    @property
    def blocks_of_unit(self) -> int:
        """The most key blocks that a unit of the block table can have."""
        return -(-(self.slots * self.per_chunk + self.own_blocks) // self.tuning.splits)

    @property
    def items(self) -> int:
        """Work items of the launch."""
        return self.batch * self.tuning.splits * self.kv_heads * self.groups


def padded_rows(rows: int) -> int:
    """Returns T as tiles can hold it: 32, or a multiple of 64.

    At least 32, because the log-sum-exps of a head leave shared memory in one copy, whose address
    must be a multiple of 128 bytes.
    """
    return 32 if rows <= 32 else -(-rows // ROWS) * ROWS


def shared_memory(block_keys: int, stages: int, warpgroups: int, dim: int) -> int:
    """Returns the bytes of shared memory that a CTA needs, for half-precision operands.

    K and V, and for each warpgroup tiles of 64 rows: queries, weights, and the result if its shape
    differs from the weights'.
    """
    result = dim if block_keys != dim else 0
    return 2 * (2 * stages * block_keys * dim + warpgroups * ROWS * (dim + block_keys + result))


def choose(
    *, batch: int, slots: int, columns: int, chunk_size: int, dim: int, tiles: int, sms: int
) -> Tuning:
    """Returns the settings: two warpgroups for each CTA, large key blocks, work for every SM.

    Args:
      batch, slots: requests, and chunks of each.
      columns: independent pieces of work of one request: KV heads x groups of query tiles.
      chunk_size, dim: C and D.
      tiles: query tiles of 64 rows that share the keys in shared memory.
      sms: SMs of the device.
    """
    # Joining two warpgroups at the item's end does not pay with few keys.
    few = batch == 1 and slots * chunk_size <= 4096
    key_groups = 2 if tiles == 1 and not few else 1
    for block_keys in (128, 64):
        # 128 KiB in flight; more was not faster.
        stages = 256 * 128 // (block_keys * dim)
        if chunk_size % block_keys == 0:
            break
    if batch > 1 and batch * columns >= sms // 2:
        # One unit for each chunk: requests that share a chunk read it at the same time.
        return Tuning(block_keys, stages, slots, key_groups)
    blocks = slots * chunk_size // block_keys
    splits = max(1, min(sms // (batch * columns), blocks // 2, 32))
    return Tuning(block_keys, stages, splits, key_groups)
