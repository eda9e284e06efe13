"""Attention over chosen chunks: every implementation against the memory's speed.

A call is timed as a decode step makes it: a loop on the device goes through the layers of a stacked
pool, one call a layer with the same selection, so that the schedule of the kernel is made once for
all layers of a round, the merge of its splits counts, and the L2 cache (50 MB) never holds what the
next call reads. The floor is the K and V bytes of the distinct chunks chosen over 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench.record import conditions, copy_bandwidth, time_loop, write
from pallas_kernels import Partial, chunk_attention
from pallas_kernels.cudnn import attention_with_lse
from pallas_kernels.mosaic_gpu import chunk_attention_mosaic_gpu
from pallas_kernels.reference import chunk_attention_reference
from pallas_kernels.tuning import SHARED_MEMORY, Tuning, shared_memory

FLOOR_BANDWIDTH = 3.0e12  # bytes a second
CHUNKS = 64  # of the pool
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
    """The grid; `quick` keeps what the README's table shows."""
    several = (4, 8, 16, 32) if quick else (1, 2, 4, 8, 16, 32)
    for rows in (32, 64) if quick else (32, 64, 128):
        for slots in several:
            for name in ("mosaic_gpu", "gather+cudnn", "contiguous cudnn"):
                yield Case(name, slots, rows)
            if rows == 32 and not quick:
                yield Case("cudnn", slots, rows)
                yield Case("xla", slots, rows)
    for slots in several:
        yield Case("mosaic_gpu", slots, q_per_slot=False)
        yield Case("mosaic_gpu", slots, ragged=True)
        for name in ("mosaic_gpu", "gather+cudnn", "contiguous cudnn"):
            yield Case(name, slots, heads=28, kv_heads=4)
    for name in ("mosaic_gpu", "cudnn", "xla"):
        yield Case(name, 4, batch=8)
    yield Case("mosaic_gpu", 4, batch=8, heads=28, kv_heads=4)
    yield Case("mosaic_gpu", 4, batch=8, ragged=True)


def tuning_cases() -> Iterator[Case]:
    """Block sizes, stages and splits for the shapes that matter most."""
    shapes = [Case("mosaic_gpu", slots) for slots in (1, 4, 8, 32)]
    shapes += [Case("mosaic_gpu", 4, rows=128), Case("mosaic_gpu", 4, batch=8)]
    shapes += [Case("mosaic_gpu", 8, heads=28, kv_heads=4)]
    for shape in shapes:
        tiles = 2 if shape.rows > 64 or shape.kv_heads < shape.heads else 1
        for keys, stages in ((64, 3), (64, 6), (128, 2), (128, 3)):
            if shared_memory(keys, stages, tiles, shape.dim) > SHARED_MEMORY:
                continue
            for splits in (8, 16, 32) if shape.kv_heads < 32 else (1, 2, 4, 8):
                yield dataclasses.replace(shape, settings=Tuning(keys, stages, splits))


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
        return lambda q, k, v, ids, lengths, layer: chunk_attention_mosaic_gpu(
            q if q.ndim == 5 else q[:, None], k, v, layer, ids, lengths, scale,
            settings=case.settings,
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


def gather(pool: jax.Array, ids: jax.Array, layer: int) -> jax.Array:
    """The chosen chunks of a layer one behind the other, [B, K C, G, D]."""
    batch, slots = ids.shape
    _, _, kv_heads, chunk_size, dim = pool.shape
    chosen = pool[layer, ids]  # [B, K, G, C, D]
    return chosen.swapaxes(2, 3).reshape(batch, slots * chunk_size, kv_heads, dim)


def run_case(case: Case, layers: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Times one case, and its error against the float32 reference in the first layer."""
    rng = np.random.default_rng(0)
    k, v = make_pool(layers, case.kv_heads, case.chunk_size, case.dim)
    lengths = np.full(CHUNKS, case.chunk_size)
    if case.ragged:
        lengths = rng.integers(1, case.chunk_size + 1, CHUNKS)
    selections = [
        np.stack([rng.permutation(CHUNKS)[: case.slots] for _ in range(case.batch)])
        for _ in range(SELECTIONS)
    ]
    keys = float(np.mean([lengths[np.unique(ids)].sum() for ids in selections]))
    moved = 2 * keys * case.kv_heads * case.dim * k.dtype.itemsize
    dense = case.implementation in ("gather+cudnn", "contiguous cudnn")
    per_slot = (case.slots,) if case.q_per_slot and not dense else ()
    shape = (case.batch, *per_slot, case.rows, case.heads, case.dim)
    queries = jax.random.normal(jax.random.key(1), (SELECTIONS, *shape), jnp.bfloat16)
    ids = jnp.asarray(np.stack(selections), jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    one = attend(case)
    floor = moved / FLOOR_BANDWIDTH
    rounds = max(2, int(seconds / (2 * floor * layers)))

    def loop(queries, k, v, ids, lengths):
        """Every round another selection and other rows, so that nothing can be done beforehand."""

        def round_(i, carry):
            q, chosen = queries[i % SELECTIONS], ids[i % SELECTIONS]
            return [one(q, k, v, chosen, lengths, layer) for layer in range(layers)]

        empty = jax.eval_shape(lambda: round_(0, None))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
        return jax.lax.fori_loop(0, rounds, round_, start)

    contiguous = case.implementation == "contiguous cudnn"
    pools: tuple[Any, Any] = (k, v)
    if contiguous:
        take = jax.jit(gather, static_argnums=2)
        pools = tuple([take(pool, ids[0], layer) for layer in range(layers)] for pool in (k, v))
    args = (queries, *pools, ids, lengths)
    timing = time_loop(jax.jit(loop), args, rounds * layers, repeats)
    got = jax.jit(lambda q, k, v, *rest: one(q, k, v, *rest, 0))(
        queries[0], *pools, ids[0], lengths
    )
    q = queries[0] if per_slot else queries[0][:, None]
    q = jnp.broadcast_to(q, (case.batch, case.slots, *q.shape[2:]))
    want = jax.jit(chunk_attention_reference, static_argnums=5)(
        q.astype(jnp.float32), k[0], v[0], ids[0], lengths, case.dim**-0.5
    )
    difference = jnp.linalg.norm(got.out.astype(jnp.float32) - want.out)
    return {
        **dataclasses.asdict(case),
        "us": round(timing.median, 2),
        "us_least": round(timing.least, 2),
        "us_most": round(timing.most, 2),
        "bytes": round(moved),
        "times_floor": round(timing.median / (floor * 1e6), 3),
        "relative_error": float(difference / jnp.linalg.norm(want.out)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py kernel`."""
    parser.add_argument(
        "--out", type=Path, help="benchmarks/kernel.json, or kernel_tuning.json with --tune"
    )
    parser.add_argument("--quick", action="store_true", help="the README's table alone")
    parser.add_argument("--tune", action="store_true", help="the kernel's own settings instead")
    parser.add_argument("--layers", type=int, default=8, help="of the pool; 1.07 GB each")
    parser.add_argument("--seconds", type=float, default=0.02, help="of one loop on the device")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")


def main(args: argparse.Namespace) -> int:
    """Runs the grid; writes the record after every case, prints a line for each."""
    begun = time.monotonic()
    name = "kernel_tuning.json" if args.tune else "kernel.json"
    out = args.out or Path("benchmarks") / name
    copied = copy_bandwidth()
    print(f"copy bandwidth {copied / 1e12:.3f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    record = {
        "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
        **conditions(),
        "copy_bandwidth": copied,
        "floor_bandwidth": FLOOR_BANDWIDTH,
        "pool": {"chunks": CHUNKS, "layers": args.layers, "dtype": "bfloat16"},
        "left_out": 0,
        "rows": rows,
    }
    grid = list(tuning_cases() if args.tune else cases(args.quick))
    for case in tqdm(grid, disable=not sys.stderr.isatty()):
        if time.monotonic() - begun > args.limit:
            record["left_out"] = len(grid) - len(rows)
            break
        row = run_case(case, args.layers, args.seconds, args.repeats)
        row["of_copy_bandwidth"] = round(row["bytes"] / (row["us"] * 1e-6) / copied, 3)
        rows.append(row)
        write(out, record)
        print(describe(row), flush=True)
    write(out, record)
    print(f"{len(rows)} cases in {time.monotonic() - begun:.0f} s, {out}")
    return 0


def describe(row: dict[str, Any]) -> str:
    """One line of a table."""
    kind = f"{row['heads']}/{row['kv_heads']}" + (" ragged" if row["ragged"] else "")
    kind += "" if row["q_per_slot"] else " shared rows"
    if (chosen := row["settings"]) is not None:
        kind += " {block_keys}x{stages} S{splits}".format(**chosen)
    return (
        f"{row['implementation']:17} B={row['batch']} K={row['slots']:2} Lq={row['rows']:3} "
        f"{kind:18} {row['us']:8.1f} us [{row['us_least']:.1f}, {row['us_most']:.1f}] "
        f"{row['times_floor']:5.2f}x floor, {100 * row['of_copy_bandwidth']:3.0f}% of copy, "
        f"error {row['relative_error']:.1e}"
    )


def plot(source: Path, target: Path) -> None:
    """Time over the floor against K, one panel for each Lq, from the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    record = json.loads(source.read_text(encoding="utf-8"))
    plain = [
        row
        for row in record["rows"]
        if row["batch"] == 1
        and row["heads"] == row["kv_heads"]
        and not row["ragged"]
        and row["q_per_slot"]
        and row["settings"] is None
    ]
    panels = sorted({row["rows"] for row in plain})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, squeeze=False
    )
    for axis, rows in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(row["implementation"] for row in plain):
            line = [r for r in plain if r["rows"] == rows and r["implementation"] == name]
            if line:
                axis.plot(
                    [r["slots"] for r in line],
                    [r["times_floor"] for r in line],
                    marker="o",
                    label=name,
                )
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="chunks chosen, K", title=f"{rows} query rows")
        axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axis.set_yticks([1, 1.25, 1.5, 2, 3, 5, 8], ["1", "1.25", "1.5", "2", "3", "5", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time / (K and V bytes / 3.0 TB/s)")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{record['device']}, H = 32, D = 128, C = 1024, bfloat16", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
