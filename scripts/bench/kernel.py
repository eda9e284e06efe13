"""Times attention over chosen chunks against the speed of the memory, every implementation.

A call is timed as a decode step makes it: a loop on the device goes through the layers of a stacked
pool, one call a layer with the same selection. So the kernel's schedule is made once for all
layers, the merge of its splits and a gather count for each, and the L2 cache (50 to 60 MB) does not
hold what the next call reads. The floor is the K and V bytes of the distinct chunks chosen over the
read bandwidth: the measured copy bandwidth times 3.0 / 2.92, as on an H100. Times are the device's,
without the cost of starting a loop on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import Record, copy_bandwidth, time_loop
from bench.run import random_layers
from pallas_kernels import Partial, chunk_attention
from pallas_kernels.chunk_attention.cudnn import attention_with_lse
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_tiling import Tuning, shared_memory
from pallas_kernels.chunk_attention.reference import chunk_attention_reference
from pallas_kernels.compat import SHARED_MEMORY

READ_OVER_COPY = 3.0 / 2.92  # read bandwidth over copy bandwidth
AT_ONCE = 16  # cases compiled side by side, then timed one by one
DENSE = ("gather+cudnn", "contiguous cudnn")
CHUNKS = 40  # of the pool
SELECTIONS = 4  # used in turn, round by round


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. q_per_slot: query rows are rotated for each slot, as in decoding."""

    implementation: str
    slots: int
    rows: int = 32
    heads: int = 32
    kv_heads: int = 32
    batch: int = 1
    ragged: bool = False
    q_per_slot: bool = True
    dim: int = 128
    chunk_size: int = 1024
    settings: Tuning | None = None  # None: the kernel's choice


def cases(quick: bool) -> Iterator[Case]:
    """Yields the grid, the cases of docs/performance.md first; `quick` ends after them."""
    several = (4, 8, 16, 32)
    names = ("mosaic_gpu", *DENSE)
    for name, rows, slots in itertools.product(names, (32, 64), several):
        yield Case(name, slots, rows)
        if (name, rows, slots) == ("mosaic_gpu", 64, 32):
            yield Case(name, 4, batch=8)
            # Dream-7B, whose passes have the row in front of a block too.
            for rows, slots in itertools.product((32, 33), several):
                yield Case(name, slots, rows, heads=28, kv_heads=4)
    for slots, name in itertools.product(several, names[1:]):
        yield Case(name, slots, heads=28, kv_heads=4)
    yield from (Case(name, 4, batch=8) for name in ("cudnn", "xla"))
    for slots in several:
        yield Case("mosaic_gpu", slots, ragged=True)
        yield Case("mosaic_gpu", slots, q_per_slot=False)
    if quick:
        return
    yield Case("mosaic_gpu", 4, batch=8, heads=28, kv_heads=4)
    yield Case("mosaic_gpu", 4, batch=8, ragged=True)
    yield from (Case(name, slots, 128) for slots, name in itertools.product(several, names))
    yield from (Case(name, slots) for slots, name in itertools.product(several, ("cudnn", "xla")))
    for rows, slots, name in itertools.product((32, 64, 128), (1, 2), names):
        yield Case(name, slots, rows)


def tuning_cases() -> Iterator[Case]:
    """Yields block sizes, stages, splits and warpgroups for the shapes that matter most."""
    shapes = [Case("mosaic_gpu", slots) for slots in (1, 4, 8, 32)]
    shapes += [Case("mosaic_gpu", 4, rows=128), Case("mosaic_gpu", 4, batch=8)]
    shapes += [Case("mosaic_gpu", 8, heads=28, kv_heads=4)]
    blocks = ((64, 6, 1), (128, 2, 1), (128, 3, 1), (64, 4, 2), (128, 2, 2))
    for shape, (keys, stages, turns) in itertools.product(shapes, blocks):
        groups = turns * (2 if shape.rows > 64 or shape.kv_heads < shape.heads else 1)
        if groups <= 2 and shared_memory(keys, stages, groups, shape.dim) <= SHARED_MEMORY:
            for splits in (8, 16, 32) if shape.kv_heads < 32 else (2, 4, 8):
                yield dataclasses.replace(shape, settings=Tuning(keys, stages, splits, turns))


@functools.lru_cache(maxsize=2)
def make_pool(layers: int, kv_heads: int, chunk_size: int, dim: int) -> tuple[jax.Array, ...]:
    """Returns K and V [layers, CHUNKS, G, C, D], random bfloat16."""
    shape = (layers, CHUNKS, kv_heads, chunk_size, dim)
    return tuple(jax.block_until_ready(random_layers(shape, jax.random.key(i))) for i in range(2))


def attend(case: Case, q: Any, k: Any, v: Any, ids: Any, lengths: Any, layer: Any) -> Partial:
    """Calls a case's implementation.

    The two cuDNN baselines get the layout that suits cuDNN best: the keys as one sequence of full
    chunks, and rows shared by the slots. "contiguous cudnn" gets the gathered keys, one array for
    each layer, and gathers nothing.
    """
    scale, name = case.dim**-0.5, case.implementation
    if name == "contiguous cudnn":
        return attention_with_lse(q, k[layer], v[layer], None, scale)
    if name == "gather+cudnn":
        return attention_with_lse(q, gather(k, ids, layer), gather(v, ids, layer), None, scale)
    if case.settings is not None:
        q = q if q.ndim == 5 else q[:, None]
        return chunk_attention_hopper(q, k, v, layer, ids, lengths, scale, tuning=case.settings)
    return chunk_attention(q, k, v, ids, lengths, layer=layer, implementation=name)


def gather(pool: jax.Array, ids: jax.Array, layer: int | jax.Array) -> jax.Array:
    """Returns the chosen chunks of a layer in one sequence, [B, K C, G, D]."""
    batch, slots = ids.shape
    _, _, kv_heads, chunk_size, dim = pool.shape
    chosen = pool[layer, ids]  # [B, K, G, C, D]
    return chosen.swapaxes(2, 3).reshape(batch, slots * chunk_size, kv_heads, dim)


class Prepared:
    """A case with its inputs and its compiled loop of rounds, each through all layers of the pool.

    Touches no pool before `measure`. seconds: of the loop. floor_bandwidth: bytes a second.
    """

    def __init__(self, case: Case, layers: int, seconds: float, floor_bandwidth: float):
        self.case, self.layers, self.floor_bandwidth = case, layers, floor_bandwidth
        rng, size = np.random.default_rng(0), case.chunk_size
        lengths = rng.integers(1, size + 1, CHUNKS) if case.ragged else np.full(CHUNKS, size)
        selections = [
            np.stack([rng.permutation(CHUNKS)[: case.slots] for _ in range(case.batch)])
            for _ in range(SELECTIONS)
        ]
        keys = float(np.mean([lengths[np.unique(ids)].sum() for ids in selections]))
        self.moved = 2 * keys * case.kv_heads * case.dim * 2  # bytes of K and V that a call reads
        self.contiguous = case.implementation == "contiguous cudnn"
        per_slot = case.q_per_slot and not (
            self.contiguous or case.implementation == "gather+cudnn"
        )
        shape = (case.batch, *(case.slots,) * per_slot, case.rows, case.heads, case.dim)
        queries = jax.random.normal(jax.random.key(1), (SELECTIONS, *shape), jnp.bfloat16)
        ids = jnp.asarray(np.stack(selections), jnp.int32)
        self.inputs = queries, ids, jnp.asarray(lengths, jnp.int32)
        self.rounds = max(2, int(seconds / (2 * self.moved / floor_bandwidth * layers)))

        def arrays(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        layer = (CHUNKS, case.kv_heads, size, case.dim)
        pool: Any = arrays(layers, *layer)
        if self.contiguous:
            pool = [arrays(case.batch, case.slots * size, case.kv_heads, case.dim)] * layers
        self.loop = jax.jit(self._loop).lower(queries, pool, pool, *self.inputs[1:]).compile()
        inputs = (queries[0], arrays(*layer), arrays(*layer), ids[0], self.inputs[2])
        self.reference = jax.jit(reference).lower(*inputs).compile()

    def _loop(self, queries: Any, k: Any, v: Any, ids: Any, lengths: Any):
        """Uses another selection and other rows in every round, so that nothing can be hoisted.

        One number of every call is used, so that no call can be removed; to carry more from round
        to round would cost a copy a call. Returns it with one call more, of the last layer.
        """

        def call(i, layer) -> Partial:
            chosen, rows = ids[i % SELECTIONS], queries[i % SELECTIONS]
            result = attend(self.case, rows, k, v, chosen, lengths, layer)
            return jax.lax.optimization_barrier(result)

        def round_(i, used):
            outs = [call(i, layer).out[0, 0, 0, 0] for layer in range(self.layers)]
            return used + jnp.stack(outs).astype(jnp.float32).sum()

        used = jax.lax.fori_loop(0, self.rounds, round_, jnp.float32(0))
        return used, call(self.rounds, self.layers - 1)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Returns the row; the error is of the timed loop's last call against the reference."""
        (queries, ids, lengths), case = self.inputs, self.case
        pools = make_pool(self.layers, case.kv_heads, case.chunk_size, case.dim)
        last, layer = self.rounds % SELECTIONS, self.layers - 1
        read: Any = pools
        if self.contiguous:
            last_ids, take = ids[0], jax.jit(gather)
            layers = [jnp.int32(i) for i in range(self.layers)]
            read = tuple([take(pool, last_ids, i) for i in layers] for pool in pools)
        else:
            last_ids = ids[last]
        args = (queries, *read, ids, lengths)
        timing = time_loop(self.loop, args, self.rounds * self.layers + 1, repeats)
        got = self.loop(*args)[1].out.astype(jnp.float32)
        want = self.reference(queries[last], *(pool[layer] for pool in pools), last_ids, lengths)
        seconds, figures = timing[0] * 1e-6, (round(us, 2) for us in timing)
        return {
            **dataclasses.asdict(case),
            **dict(zip(("us", "us_least", "us_most"), figures, strict=True)),
            "bytes": round(self.moved),
            "times_floor": round(seconds / (self.moved / self.floor_bandwidth), 3),
            "of_copy_bandwidth": round(
                self.moved / seconds / self.floor_bandwidth * READ_OVER_COPY, 3
            ),
            "relative_error": float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)),
        }


def reference(q, k, v, ids, lengths) -> jax.Array:
    """Returns the output in float32, from q with or without a slot axis and one layer's pool."""
    q = q if q.ndim == 5 else q[:, None]
    q = jnp.broadcast_to(q, (*ids.shape, *q.shape[2:])).astype(jnp.float32)
    return chunk_attention_reference(q, k[None], v[None], 0, ids, lengths, q.shape[-1] ** -0.5).out


OPTIONS = {
    "--quick": (False, "the cases of docs/performance.md alone"),
    "--tune": (False, "settings of the kernel instead; the record is kernel_tuning.json"),
    "--implementations": ([str], "only these"),
    "--slots": ([int], "only these K"),
    "--rows": ([int], "only these numbers of query rows"),
    "--heads": ([int], "only these numbers of heads: 32, or Dream-7B's 28 over 4 KV heads"),
    "--layers": (32, "of the pool; 0.67 GB each"),
    "--seconds": (0.08, "of one loop; its launch takes 0.4 ms"),
    "--repeats": (7, ""),
    "--limit": (math.inf, "seconds in all"),
}


def main(args: argparse.Namespace) -> None:
    """Runs the grid; writes the record after every case, prints a line for each."""
    start, copied = time.monotonic(), copy_bandwidth()
    floor = copied * READ_OVER_COPY
    out = args.out.with_stem(f"{args.out.stem}_tuning") if args.tune else args.out
    grid = [
        case
        for case in (tuning_cases() if args.tune else cases(args.quick))
        if case.implementation in (args.implementations or [case.implementation])
        and case.slots in (args.slots or [case.slots])
        and case.rows in (args.rows or [case.rows])
        and case.heads in (args.heads or [case.heads])
    ]
    record = Record(out, copy_bandwidth=copied, floor_bandwidth=floor, left_out=len(grid), rows=[])
    record["pool"] = {"chunks": CHUNKS, "layers": args.layers, "dtype": "bfloat16"}
    prepare = functools.partial(
        Prepared, layers=args.layers, seconds=args.seconds, floor_bandwidth=floor
    )
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(grid), AT_ONCE):
            if time.monotonic() - start > args.limit:
                break
            # Timed only when nothing compiles: compiling runs small programs on the device.
            for ready in list(pool.map(prepare, grid[first : first + AT_ONCE])):
                record["left_out"] -= 1
                row = ready.measure(args.repeats)
                record.add(row, describe(row))
    print(f"{len(record['rows'])} cases in {time.monotonic() - start:.0f} s, {out}")


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a case."""
    kind = "{heads}/{kv_heads}".format(**row) + " ragged" * row["ragged"]
    kind += "" if row["q_per_slot"] else " shared rows"
    if (chosen := row["settings"]) is not None:
        kind += " {block_keys}x{stages} S{splits} G{key_groups}".format(**chosen)
    line = (
        "{implementation:17} B={batch} K={slots:2} Lq={rows:3} {kind:18} {us:8.1f} us "
        "[{us_least:.1f}, {us_most:.1f}] {times_floor:5.2f}x floor, {of_copy_bandwidth:.0%} of "
        "copy, error {relative_error:.1e}"
    )
    return line.format(kind=kind, **row)
