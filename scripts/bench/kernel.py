"""Attention over chosen chunks: every implementation against the memory's speed.

A call is timed as a decode step makes it: a loop on the device goes through the layers of a stacked
pool, one call a layer with the same selection, so that the schedule of the kernel is made once for
all of them, the merge of its splits and a gather count for each, and the L2 cache (50 to 60 MB)
doesn't hold what the next call reads. The floor is the K and V bytes of the distinct chunks chosen
over what the memory gives to reads: the measured copy bandwidth times 3.0 / 2.92, as on an H100.
Times are the device's: what it costs to start a loop on the host is taken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench.record import command, conditions, copy_bandwidth, time_loop, write
from pallas_kernels import Partial, chunk_attention
from pallas_kernels.chunk_attention.cudnn import attention_with_lse
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_tiling import Tuning, shared_memory
from pallas_kernels.chunk_attention.reference import chunk_attention_reference
from pallas_kernels.compat import SHARED_MEMORY

READ_OVER_COPY = 3.0 / 2.92  # bandwidth of reads over that of copies
AT_ONCE = 16  # cases compiled side by side, and then timed one by one
CHUNKS = 40  # of the pool
SELECTIONS = 4  # that rounds take in turn


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. q_per_slot: rows rotated for each slot, as decoding has them."""

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
    settings: Tuning | None = None  # of the kernel; by default its own choice


def cases(quick: bool) -> Iterator[Case]:
    """The grid, what the README's table shows first; `quick` keeps that alone."""
    several = (4, 8, 16, 32)
    names = ("mosaic_gpu", "gather+cudnn", "contiguous cudnn")
    for name, rows, slots in itertools.product(names, (32, 64), several):
        yield Case(name, slots, rows)
        if (name, rows, slots) == ("mosaic_gpu", 64, 32):
            yield Case(name, 4, batch=8)
            for k in several:
                yield Case(name, k, heads=28, kv_heads=4)
    for slots, name in itertools.product(several, names[1:]):
        yield Case(name, slots, heads=28, kv_heads=4)
    for name in ("cudnn", "xla"):
        yield Case(name, 4, batch=8)
    for slots in several:
        yield Case("mosaic_gpu", slots, ragged=True)
        yield Case("mosaic_gpu", slots, q_per_slot=False)
    if quick:
        return
    yield Case("mosaic_gpu", 4, batch=8, heads=28, kv_heads=4)
    yield Case("mosaic_gpu", 4, batch=8, ragged=True)
    for slots, name in itertools.product(several, names):
        yield Case(name, slots, 128)
    for slots, name in itertools.product(several, ("cudnn", "xla")):
        yield Case(name, slots)
    for rows, slots, name in itertools.product((32, 64, 128), (1, 2), names):
        yield Case(name, slots, rows)


def tuning_cases() -> Iterator[Case]:
    """Block sizes, stages, splits and warpgroups for the shapes that matter most."""
    shapes = [Case("mosaic_gpu", slots) for slots in (1, 4, 8, 32)]
    shapes += [Case("mosaic_gpu", 4, rows=128), Case("mosaic_gpu", 4, batch=8)]
    shapes += [Case("mosaic_gpu", 8, heads=28, kv_heads=4)]
    for shape in shapes:
        tiles = 2 if shape.rows > 64 or shape.kv_heads < shape.heads else 1
        for keys, stages, turns in (
            (64, 6, 1),
            (128, 2, 1),
            (128, 3, 1),
            (64, 4, 2),
            (128, 2, 2),
        ):
            if tiles * turns > 2:
                continue
            if shared_memory(keys, stages, tiles * turns, shape.dim) > SHARED_MEMORY:
                continue
            for splits in (8, 16, 32) if shape.kv_heads < 32 else (2, 4, 8):
                yield dataclasses.replace(shape, settings=Tuning(keys, stages, splits, turns))


@functools.lru_cache(maxsize=2)
def make_pool(layers: int, kv_heads: int, chunk_size: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """K and V [layers, CHUNKS, kv_heads, chunk_size, dim], random bfloat16, layer by layer."""
    shape = (CHUNKS, kv_heads, chunk_size, dim)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(pool: jax.Array, layer: jax.Array, key: jax.Array) -> jax.Array:
        return pool.at[layer].set(jax.random.normal(key, shape, jnp.bfloat16))

    pools = []
    for side in range(2):
        pool = jnp.zeros((layers, *shape), jnp.bfloat16)
        for layer in range(layers):
            pool = fill(pool, jnp.int32(layer), jax.random.key(side * layers + layer))
        pools.append(jax.block_until_ready(pool))
    return pools[0], pools[1]


def attend(case: Case) -> Callable[..., Partial]:
    """(q, k, v, ids, lengths, layer) -> Partial for a case's implementation.

    The two cuDNN baselines see the keys as one sequence of full chunks, which suits cuDNN best, and
    rows shared by the slots; "contiguous" is given what the gather would make, one array for each
    layer, and gathers nothing.
    """
    scale = case.dim**-0.5
    if case.settings is not None:
        return lambda q, k, v, ids, lengths, layer: chunk_attention_hopper(
            q if q.ndim == 5 else q[:, None], k, v, layer, ids, lengths, scale,
            tuning=case.settings,
        )  # fmt: skip
    if case.implementation == "contiguous cudnn":
        return lambda q, k, v, ids, lengths, layer: attention_with_lse(
            q, k[layer], v[layer], None, scale
        )
    if case.implementation == "gather+cudnn":
        return lambda q, k, v, ids, lengths, layer: attention_with_lse(
            q, gather(k, ids, layer), gather(v, ids, layer), None, scale
        )
    return lambda q, k, v, ids, lengths, layer: chunk_attention(
        q, k, v, ids, lengths, layer=layer, implementation=case.implementation
    )


def gather(pool: jax.Array, ids: jax.Array, layer: int | jax.Array) -> jax.Array:
    """The chosen chunks of a layer one behind the other, [B, K C, G, D]."""
    batch, slots = ids.shape
    _, _, kv_heads, chunk_size, dim = pool.shape
    chosen = pool[layer, ids]  # [B, K, G, C, D]
    return chosen.swapaxes(2, 3).reshape(batch, slots * chunk_size, kv_heads, dim)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case, its compiled loop of `rounds` rounds, each through all layers of the pool, and what
    the loop's last call should give.

    moved: bytes of K and V that a call has to read, the mean of the selections.
    """

    case: Case
    loop: Callable[..., tuple[jax.Array, Partial]]
    reference: Callable[..., jax.Array]
    rounds: int
    layers: int
    moved: float
    queries: jax.Array
    ids: jax.Array
    lengths: jax.Array

    def pools(self) -> tuple[Any, Any]:
        """K and V as the case reads them."""
        case = self.case
        k, v = make_pool(self.layers, case.kv_heads, case.chunk_size, case.dim)
        if case.implementation != "contiguous cudnn":
            return k, v
        take = jax.jit(gather)
        layers = [jnp.int32(i) for i in range(self.layers)]
        return tuple([take(pool, self.ids[0], i) for i in layers] for pool in (k, v))


def prepare(case: Case, layers: int, seconds: float, floor_bandwidth: float) -> Prepared:
    """Inputs of a case and its compiled loop; touches no pool."""
    rng = np.random.default_rng(0)
    lengths = np.full(CHUNKS, case.chunk_size)
    if case.ragged:
        lengths = rng.integers(1, case.chunk_size + 1, CHUNKS)
    selections = [
        np.stack([rng.permutation(CHUNKS)[: case.slots] for _ in range(case.batch)])
        for _ in range(SELECTIONS)
    ]
    keys = float(np.mean([lengths[np.unique(ids)].sum() for ids in selections]))
    moved = 2 * keys * case.kv_heads * case.dim * 2
    dense = case.implementation in ("gather+cudnn", "contiguous cudnn")
    per_slot = (case.slots,) if case.q_per_slot and not dense else ()
    shape = (case.batch, *per_slot, case.rows, case.heads, case.dim)
    queries = jax.random.normal(jax.random.key(1), (SELECTIONS, *shape), jnp.bfloat16)
    ids = jnp.asarray(np.stack(selections), jnp.int32)
    rounds = max(2, int(seconds / (2 * moved / floor_bandwidth * layers)))
    one = attend(case)

    def loop(queries, k, v, ids, lengths):
        """Every round another selection and other rows, so that nothing can be done beforehand.

        Of every call one number is used, so that none can be left out; to carry more from round to
        round would cost a copy a call. Returns it with one call more, of the last layer.
        """

        def call(i, layer) -> Partial:
            found = one(queries[i % SELECTIONS], k, v, ids[i % SELECTIONS], lengths, layer)
            return jax.lax.optimization_barrier(found)

        def round_(i, used):
            outs = [call(i, layer).out[0, 0, 0, 0] for layer in range(layers)]
            return used + jnp.stack(outs).astype(jnp.float32).sum()

        return jax.lax.fori_loop(0, rounds, round_, jnp.float32(0)), call(rounds, layers - 1)

    whole = (layers, CHUNKS, case.kv_heads, case.chunk_size, case.dim)
    pool: Any = jax.ShapeDtypeStruct(whole, jnp.bfloat16)
    if case.implementation == "contiguous cudnn":
        columns = (case.batch, case.slots * case.chunk_size, case.kv_heads, case.dim)
        pool = [jax.ShapeDtypeStruct(columns, jnp.bfloat16)] * layers
    facts = jnp.asarray(lengths, jnp.int32)
    compiled = jax.jit(loop).lower(queries, pool, pool, ids, facts).compile()
    one_layer = jax.ShapeDtypeStruct(whole[1:], jnp.bfloat16)
    wanted = jax.jit(reference).lower(queries[0], one_layer, one_layer, ids[0], facts).compile()
    return Prepared(case, compiled, wanted, rounds, layers, moved, queries, ids, facts)


def reference(q, k, v, ids, lengths) -> jax.Array:
    """The output in float32, from q with or without an axis of slots and one layer's pool."""
    q = q if q.ndim == 5 else q[:, None]
    q = jnp.broadcast_to(q, (*ids.shape, *q.shape[2:])).astype(jnp.float32)
    return chunk_attention_reference(q, k[None], v[None], 0, ids, lengths, q.shape[-1] ** -0.5).out


def run_case(ready: Prepared, repeats: int, floor_bandwidth: float) -> dict[str, Any]:
    """Times one case; the error is that of the timed loop's last call against the reference."""
    case = ready.case
    args = (ready.queries, *ready.pools(), ready.ids, ready.lengths)
    timing = time_loop(ready.loop, args, ready.rounds * ready.layers + 1, repeats)
    got = ready.loop(*args)[1].out.astype(jnp.float32)
    last, layer = ready.rounds % SELECTIONS, ready.layers - 1
    chosen = 0 if case.implementation == "contiguous cudnn" else last
    k, v = make_pool(ready.layers, case.kv_heads, case.chunk_size, case.dim)
    want = ready.reference(
        ready.queries[last], k[layer], v[layer], ready.ids[chosen], ready.lengths
    )
    return {
        **dataclasses.asdict(case),
        "us": round(timing.median, 2),
        "us_least": round(timing.least, 2),
        "us_most": round(timing.most, 2),
        "bytes": round(ready.moved),
        "times_floor": round(timing.median * 1e-6 / (ready.moved / floor_bandwidth), 3),
        "relative_error": float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py kernel`."""
    parser.add_argument(
        "--out", type=Path, help="benchmarks/kernel.json, or kernel_tuning.json with --tune"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the kernel's table of docs/performance.md alone"
    )
    parser.add_argument("--tune", action="store_true", help="the kernel's own settings instead")
    parser.add_argument("--implementations", nargs="+", help="only these")
    parser.add_argument("--slots", nargs="+", type=int, help="only these K")
    parser.add_argument("--rows", nargs="+", type=int, help="only these numbers of query rows")
    parser.add_argument("--layers", type=int, default=32, help="of the pool; 0.67 GB each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.08,
        help="of one loop on the device; its launch costs about 0.4 ms",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")


def main(args: argparse.Namespace) -> int:
    """Runs the grid; writes the record after every case, prints a line for each."""
    begun = time.monotonic()
    name = "kernel_tuning.json" if args.tune else "kernel.json"
    out = args.out or Path("benchmarks") / name
    copied = copy_bandwidth()
    print(f"copy bandwidth {copied / 1e12:.3f} TB/s", flush=True)
    floor = copied * READ_OVER_COPY
    rows: list[dict[str, Any]] = []
    record = {
        "command": command(),
        **conditions(),
        "copy_bandwidth": copied,
        "floor_bandwidth": floor,
        "pool": {"chunks": CHUNKS, "layers": args.layers, "dtype": "bfloat16"},
        "left_out": 0,
        "rows": rows,
    }
    grid = [
        case
        for case in (tuning_cases() if args.tune else cases(args.quick))
        if case.implementation in (args.implementations or [case.implementation])
        and case.slots in (args.slots or [case.slots])
        and case.rows in (args.rows or [case.rows])
    ]
    with tqdm(total=len(grid), disable=not sys.stderr.isatty()) as bar, ThreadPoolExecutor() as run:
        for start in range(0, len(grid), AT_ONCE):
            if time.monotonic() - begun > args.limit:
                break
            some = grid[start : start + AT_ONCE]
            # Timed only when nothing compiles: compiling runs small programs on the device.
            compiled = list(run.map(lambda c: prepare(c, args.layers, args.seconds, floor), some))
            print(f"{time.monotonic() - begun:.0f} s, {len(some)} compiled", flush=True)
            for ready in compiled:
                row = run_case(ready, args.repeats, floor)
                row["of_copy_bandwidth"] = round(row["bytes"] / (row["us"] * 1e-6) / copied, 3)
                rows.append(row)
                write(out, record)
                bar.update()
                print(describe(row), flush=True)
    record["left_out"] = len(grid) - len(rows)
    write(out, record)
    print(f"{len(rows)} cases in {time.monotonic() - begun:.0f} s, {out}")
    return 0


def describe(row: dict[str, Any]) -> str:
    """One line of a table."""
    kind = f"{row['heads']}/{row['kv_heads']}" + (" ragged" if row["ragged"] else "")
    kind += "" if row["q_per_slot"] else " shared rows"
    if (chosen := row["settings"]) is not None:
        kind += " {block_keys}x{stages} S{splits} G{key_groups}".format(**chosen)
    return (
        f"{row['implementation']:17} B={row['batch']} K={row['slots']:2} Lq={row['rows']:3} "
        f"{kind:18} {row['us']:8.1f} us [{row['us_least']:.1f}, {row['us_most']:.1f}] "
        f"{row['times_floor']:5.2f}x floor, {100 * row['of_copy_bandwidth']:3.0f}% of copy, "
        f"error {row['relative_error']:.1e}"
    )
