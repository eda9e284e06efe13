"""How the Hopper attention kernel cuts its work: the rule, its settings, the launch's shape."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.compat import ROWS, SHARED_MEMORY


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of a launch.

    Attributes:
      block_keys: keys of a block, 64 or 128.
      stages: blocks of K and of V in flight, a multiple of key_groups.
      splits: units that a request's blocks are cut into; their partial results are merged.
      key_groups: warpgroups that take turns with the blocks of a unit, 1 or 2. 2 needs a single
        query tile for each CTA.
      tile_stages: of a pool in fp8, blocks of K and of V in 16 bits at once, 1 or 2. `stages` then
        counts the blocks in fp8 and may be odd. 0 for a pool in 16 bits.
    """

    block_keys: int
    stages: int
    splits: int
    key_groups: int = 1
    tile_stages: int = 0

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("block_keys", self.block_keys in (64, 128), "64 or 128"),
            ("stages", self.stages >= 2, "at least 2"),
            ("splits", self.splits >= 1, "at least 1"),
            ("key_groups", self.key_groups in (1, 2), "1 or 2"),
            ("tile_stages", self.tile_stages in (0, 1, 2), "0, 1 or 2"),
            (
                "stages",
                self.key_groups == 1 or self.stages % 2 == 0 or self.tile_stages > 0,
                "a multiple of key_groups 2",
            ),
        ):
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call, and how its query rows are packed into tiles of 64, one for each warpgroup.

    A tile holds `heads_per_tile` heads of `rows_per_head` rows each, and rows_per_head divides 64.
    With more than 64 rows a tile holds 64 rows of one head.
    """

    batch: int
    slots: int  # K
    rows: int  # T as tiles can hold it: 32, or a multiple of 64
    heads: int
    kv_heads: int
    dim: int  # head size
    chunk_size: int
    sms: int  # of the device
    narrow: bool = False  # whether the pool is in fp8

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
class Geometry(Shape):
    """Static shape of a launch."""

    tuning: Tuning
    query_slots: bool  # whether query rows differ between slots
    own_keys: int  # S, each request's own keys; 0 without
    scale: float

    def __post_init__(self) -> None:
        if self.tuning.key_groups > 1 and self.tiles_per_cta > 1:
            raise ValueError(
                f"key_groups must be 1 with {self.tiles_per_cta} query tiles for each CTA,"
                f" got {self.tuning.key_groups}"
            )
        if self.narrow != (self.tuning.tile_stages > 0):
            kind = "fp8 needs tile_stages" if self.narrow else "16 bits has no tile_stages"
            raise ValueError(f"a pool in {kind}, got {self.tuning.tile_stages}")

    @property
    def consumers(self) -> int:
        """Warpgroups of a CTA that multiply."""
        return self.tiles_per_cta * self.tuning.key_groups

    @property
    def tile_stages(self) -> int:
        """Blocks of K and of V in 16 bits at once."""
        return self.tuning.tile_stages or self.tuning.stages

    @property
    def tile_turns(self) -> int:
        """Barriers of those blocks, in turn: a barrier always belongs to the same warpgroup."""
        return math.lcm(self.tile_stages, self.tuning.key_groups)

    @property
    def flat_rows(self) -> int:
        """Rows (b, h, t) of a split's output, padded to whole tiles."""
        return -(-self.batch * self.heads * self.rows // ROWS) * ROWS

    @property
    def per_chunk(self) -> int:
        """Key blocks of a chunk."""
        return self.chunk_size // self.tuning.block_keys

    @property
    def own_blocks(self) -> int:
        """Key blocks of each request's own keys."""
        return -(-self.own_keys // self.tuning.block_keys)

    @property
    def blocks_of_unit(self) -> int:
        """The most key blocks that a unit of the block table can have."""
        return -(-(self.slots * self.per_chunk + self.own_blocks) // self.tuning.splits)

    @property
    def items(self) -> int:
        """Work items of the launch."""
        return self.batch * self.tuning.splits * self.kv_heads * self.groups


def shared_memory(
    block_keys: int, stages: int, warpgroups: int, dim: int, tile_stages: int = 0
) -> int:
    """Returns the bytes of a CTA, for half-precision operands.

    K and V, and for each warpgroup queries, weights, and the result if its shape is another. With
    tile_stages the stages are in fp8, and there are tiles in 16 bits beside them.
    """
    result, block = dim if block_keys != dim else 0, 2 * block_keys * dim
    kv = stages * block + tile_stages * 2 * block if tile_stages else 2 * stages * block
    return kv + 2 * warpgroups * ROWS * (dim + block_keys + result)


def choose(shape: Shape) -> Tuning:
    """Returns the settings: two warpgroups for each CTA, large key blocks, work for every SM."""
    keys = shape.slots * shape.chunk_size
    # Joining two warpgroups at the item's end does not pay with few keys.
    few = shape.batch == 1 and keys <= 4096
    key_groups = 2 if shape.tiles_per_cta == 1 and not few else 1
    block_keys = 64 if shape.chunk_size % 128 else 128
    # 128 KiB in flight; more was not faster.
    stages, tile_stages = 256 * 128 // (block_keys * shape.dim), 0
    if shape.narrow:
        # One tile of K and one of V: while one is multiplied, the other is converted.
        tile_stages, block = 1, 2 * block_keys * shape.dim
        sizes = shape.tiles_per_cta * key_groups, shape.dim, tile_stages
        space = SHARED_MEMORY - 1024 - shared_memory(block_keys, 0, *sizes)
        stages = min(space, 128 * 1024) // block
    unsplit = shape.batch * shape.kv_heads * shape.groups  # work items with one split
    if shape.batch > 1 and unsplit >= shape.sms // 2:
        # One unit for each chunk: requests that share a chunk read it at the same time.
        return Tuning(block_keys, stages, shape.slots, key_groups, tile_stages)
    splits = max(1, min(shape.sms // unsplit, keys // block_keys // 2, 32))
    return Tuning(block_keys, stages, splits, key_groups, tile_stages)
