"""Block sizes of the GPU kernels: the rules, and what they may choose from."""

from __future__ import annotations

import dataclasses

from pallas_kernels.geometry import ROWS, Activation, MatmulGeometry

# Shared memory that a block may ask for on sm_90, less what the compiler takes for itself.
SHARED_MEMORY = 227 * 1024 - 1024


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel cuts its work.

    block_keys: keys of a block, 64 or 128.
    stages: blocks of K and of V in flight, a multiple of key_groups.
    splits: units that a request's blocks are cut into; their partial results are merged.
    key_groups: warpgroups that take turns with the blocks of a unit, 1 or 2; 2 where a block of
      threads has a single query tile.
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
            raise ValueError(f"splits must be positive, got {self.splits}")
        if self.key_groups not in (1, 2):
            raise ValueError(f"key_groups must be 1 or 2, got {self.key_groups}")
        if self.stages % self.key_groups:
            raise ValueError(
                f"stages must be a multiple of key_groups, got {self.stages} and {self.key_groups}"
            )


def shared_memory(block_keys: int, stages: int, warpgroups: int, dim: int) -> int:
    """Bytes for K, V, and each warpgroup's tiles of 64 rows: queries, weights, and the result where
    it has another shape than the weights. In half precision.
    """
    result = dim if block_keys != dim else 0
    return 2 * (2 * stages * block_keys * dim + warpgroups * 64 * (dim + block_keys + result))


def choose(
    *, batch: int, slots: int, columns: int, chunk_size: int, dim: int, tiles: int, processors: int
) -> Tuning:
    """The rule: two warpgroups a block of threads, the largest blocks of keys, and work for every
    processor.

    Args:
      batch, slots: requests, and chunks of each.
      columns: independent pieces of work for one request: KV heads x groups of query tiles.
      tiles: query tiles of 64 rows that share the keys in shared memory.
      processors: of the device.
    """
    # Two join at the end, which does not pay where there are few keys.
    few = batch == 1 and slots * chunk_size <= 4096
    key_groups = 2 if tiles == 1 and not few else 1
    for block_keys in (128, 64):
        # 128 KiB in flight; more has not been faster.
        stages = 256 * 128 // (block_keys * dim)
        if chunk_size % block_keys == 0:
            break
    if batch > 1 and batch * columns >= processors // 2:
        # One unit a chunk: requests that share a chunk read it together.
        return Tuning(block_keys, stages, slots, key_groups)
    blocks = slots * chunk_size // block_keys
    splits = max(1, min(processors // (batch * columns), blocks // 2, 32))
    return Tuning(block_keys, stages, splits, key_groups)


# Columns of a result that a block of threads makes are whole 32-byte pieces.
_COLUMNS = 16
_MOST_ROWS = 128


def matmul_geometry(
    rows: int, inner: int, outs: tuple[int, ...], activation: Activation, processors: int
) -> MatmulGeometry | None:
    """How the products of few rows are cut; None where the kernel does not take the shapes.

    Of the ways that keep nearly as many processors busy as any does, the one that reads the longest
    pieces of a row of weights, then the one of fewest splits: their float32 results are written and
    read again.
    """
    if not 0 < rows <= _MOST_ROWS:
        return None
    rows = 32 if rows <= 32 else -(-rows // ROWS) * ROWS
    found: list[MatmulGeometry] = []
    for units in range(1, processors + 1):
        if any(n % (units * _COLUMNS) for n in outs):
            continue
        columns = tuple(n // units for n in outs)
        if max(columns) > 256:
            continue
        for splits in (1,) if activation == "swiglu" else (1, 2, 4, 8):
            if units * splits > processors:
                continue
            geo = _with_stages(rows, inner, outs, columns, splits, activation)
            if geo is not None:
                found.append(geo)
    if not found:
        return None
    most = max(geo.units * geo.splits for geo in found)
    busy = [geo for geo in found if geo.units * geo.splits >= 0.95 * most]
    return max(busy, key=lambda geo: (geo.block, -geo.splits))


def _with_stages(
    rows: int,
    inner: int,
    outs: tuple[int, ...],
    columns: tuple[int, ...],
    splits: int,
    activation: Activation,
) -> MatmulGeometry | None:
    """With as many blocks in flight as fit, at most six."""
    for block, least in ((256, 2), (128, 3), (64, 3)):
        if inner % (splits * block):
            continue
        for stages in range(6, least - 1, -1):
            geo = MatmulGeometry(rows, inner, outs, columns, splits, block, stages, activation)
            if geo.shared_memory <= SHARED_MEMORY:
                return geo
    return None
