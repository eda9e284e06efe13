#!/usr/bin/env python3
# ruff: noqa
"""Checks and times variants of the kernels at Dream-7B's shapes. Writes $OUT/ker_probe.json.

python3 scripts/ker_probe.py [--part attention|profile|matmul|all] [--limit SECONDS]
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax
import jax.numpy as jnp
import numpy as np
from bench.record import conditions, copy_bandwidth, time_loop

from pallas_kernels import OwnKV
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_tiling import Tuning
from pallas_kernels.chunk_attention.reference import chunk_attention_reference
from pallas_kernels.matmul import api
from pallas_kernels.matmul import hopper_tiling as mt

START = time.monotonic()
LAYERS, CHUNKS, HEADS, KV, DIM = 16, 40, 28, 4, 128
NO_GRAPH = {"xla_gpu_enable_command_buffer": ""}


SHARDING = None  # of a device that is not there


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SHARDING)


def like(x):
    return spec(*x.shape, dtype=x.dtype)


def left(args):
    return args.limit - (time.monotonic() - START)


# ---------------------------------------------------------------- attention
BASE = Tuning(128, 2, 16)
R = dataclasses.replace
ORD = R(BASE, ordered=True)
INP = R(BASE, in_place=True)
BOTH = R(BASE, ordered=True, in_place=True)
EARLY = R(BOTH, early=True)
PAIR = R(BOTH, paired=True)
ALL = R(EARLY, paired=True)


def attention_cases():
    """(name, K, rows, tuning, compiler options, own keys), the most telling first."""
    for k in (8, 32, 4, 16):
        yield "base", k, 32, BASE, None, 0
        yield "ordered+in_place", k, 32, BOTH, None, 0
        yield "all", k, 32, ALL, None, 0
        yield "all, no graph", k, 32, ALL, NO_GRAPH, 0
        yield "ordered+in_place, paired", k, 32, PAIR, None, 0
        yield "ordered+in_place, early, no graph", k, 32, EARLY, NO_GRAPH, 0
    for k in (8, 32):
        yield "ordered", k, 32, ORD, None, 0
        yield "in_place", k, 32, INP, None, 0
        yield "base, no graph", k, 32, BASE, NO_GRAPH, 0
    for k in (8, 4, 16, 32):
        yield "33 rows, ordered+in_place", k, 33, BOTH, None, 0
        yield "33 rows, all", k, 33, ALL, None, 0
    for k in (4, 8, 32):
        yield "all 64x4", k, 32, R(ALL, block_keys=64, stages=4), None, 0
        yield "ordered+in_place 64x4", k, 32, R(BOTH, block_keys=64, stages=4), None, 0
    for k in (4, 8):
        yield "all S8", k, 32, R(ALL, splits=8), None, 0
        yield "ordered+in_place S8", k, 32, R(BOTH, splits=8), None, 0
        yield "no merge: S1", k, 32, R(BOTH, splits=1), None, 0
        yield "own keys 256", k, 33, ALL, None, 256


class Attention:
    def __init__(self, case, floor):
        self.name, self.k, rows, self.tuning, options, self.own = case
        self.rows = rows
        rng = np.random.default_rng(0)
        self.ids = jnp.array(np.stack([rng.permutation(CHUNKS)[: self.k] for _ in range(4)]))
        places = self.k + (self.own > 0)
        shape = (4, 1, places, self.rows, HEADS, DIM)
        self.q = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
        self.lengths = jnp.full((CHUNKS,), 1024, jnp.int32)
        self.bytes = 2 * (self.k * 1024 + self.own) * KV * DIM * 2
        self.floor = self.bytes / floor * 1e6
        self.rounds = max(2, int(0.012e6 / (max(self.floor * 2, 8) * LAYERS)))
        pool = spec(LAYERS, CHUNKS, KV, 1024, DIM)
        live = spec(1, max(self.own, 128), KV, DIM)
        args = like(self.q), pool, pool, like(self.ids), like(self.lengths), live
        lowered = jax.jit(self.loop).lower(*args)
        self.run = lowered.compile(compiler_options=options)

    def call(self, q, k, v, ids, lengths, live, layer):
        own = OwnKV(live, live, jnp.array([self.own])) if self.own else None
        return chunk_attention_hopper(
            q, k, v, layer, ids[None], lengths, DIM**-0.5, own, tuning=self.tuning
        )

    def loop(self, q, k, v, ids, lengths, live):
        def call(i, layer):
            part = self.call(q[i % 4], k, v, ids[i % 4], lengths, live, layer)
            return jax.lax.optimization_barrier(part)

        def round_(i, used):
            outs = [call(i, layer).out[0, 0, 0, 0] for layer in range(LAYERS)]
            return used + jnp.stack(outs).astype(jnp.float32).sum()

        used = jax.lax.fori_loop(0, self.rounds, round_, jnp.float32(0))
        return used, call(self.rounds, LAYERS - 1)

    def measure(self, pools, check, repeats=7):
        live = jax.random.normal(jax.random.key(5), (1, max(self.own, 128), KV, DIM), jnp.bfloat16)
        args = self.q, *pools, self.ids, self.lengths, live
        timing = time_loop(self.run, args, self.rounds * LAYERS + 1, repeats)
        got = self.run(*args)[1]
        i = self.rounds % 4
        want = check(self.q[i], pools, self.ids[i], live, self.own)
        error = jnp.linalg.norm(got.out.astype(jnp.float32) - want.out.astype(jnp.float32))
        error = float(error / jnp.linalg.norm(want.out.astype(jnp.float32)))
        row = {"case": self.name, "K": self.k, "rows": self.rows, "own": self.own}
        row |= {"tuning": str(self.tuning), "us": timing[0], "us_least": timing[1]}
        row |= {"floor_us": self.floor, "times_floor": timing[0] / self.floor, "error": error}
        row["lse_error"] = float(jnp.abs(got.lse - want.lse).max())
        same = [jnp.array_equal(self.run(*args)[1].out, got.out) for _ in range(5)]
        row["repeats_itself"] = bool(jnp.stack(same).all())
        return row


def reference(q, pools, ids, live, own):
    k, v = (pool[LAYERS - 1] for pool in pools)  # [N, G, C, D]
    ids, lengths = ids[None], jnp.full((CHUNKS,), 1024)
    if own:
        more = -(-own // 1024)
        rows = jnp.pad(live[0, :own], ((0, more * 1024 - own), (0, 0), (0, 0)))
        rows = rows.reshape(more, 1024, KV, DIM).swapaxes(1, 2)
        k, v = jnp.concatenate([k, rows]), jnp.concatenate([v, rows])
        ids = jnp.concatenate([ids, CHUNKS + jnp.arange(more)[None]], axis=1)
        lengths = jnp.concatenate([lengths, jnp.array([own])])
    return chunk_attention_reference(q, k[None], v[None], 0, ids, lengths, DIM**-0.5)


def in_time(args, make, items):
    """Yields made items, several compiled side by side, timed when nothing compiles."""
    items = list(items)
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(items), 16):
            if left(args) < 12:
                print(f"left out: {[str(i)[:60] for i in items[first:]]}", flush=True)
                return

            def safe(item):
                try:
                    return make(item)
                except Exception as error:
                    return f"{str(item)[:80]}: {type(error).__name__}: {str(error)[:300]}"

            for made in list(pool.map(safe, items[first : first + 16])):
                if isinstance(made, str):
                    print("FAILED", made, flush=True)
                elif left(args) > 3:
                    yield made


def attention(args, record, save, floor):
    pools = [
        jnp.stack(
            [
                jax.random.normal(jax.random.key(s * 99 + i), (CHUNKS, KV, 1024, DIM), jnp.bfloat16)
                for i in range(LAYERS)
            ]
        )
        for s in range(2)
    ]
    check = jax.jit(reference, static_argnums=4)

    def make(case):
        return Attention(case, floor)

    for made in in_time(args, make, attention_cases()):
        show(record, save, made.measure(pools, check))
    return pools


def show(record, save, row):
    record["rows"].append(row)
    save()
    if "K" in row:
        flag = "" if row["error"] < 5e-3 and row["repeats_itself"] else "  WRONG"
        print(
            f"K={row['K']:2} rows={row['rows']:2} {row['case']:36} {row['us']:7.2f} us "
            f"[{row['us_least']:.2f}] {row['times_floor']:5.2f}x  err {row['error']:.1e}{flag}",
            flush=True,
        )
    else:
        flag = "" if row["error"] < 8e-3 else "  WRONG"
        print(
            f"{row['shape']:8} rows={row['rows']:3} {row['cut']:34} {row['us']:7.2f} us "
            f"{row['times_floor']:5.2f}x est {row['estimate']:5.1f} err {row['error']:.1e}"
            f"{flag}",
            flush=True,
        )


# ---------------------------------------------------------------- profile
def profile(args, record, save, floor, pools):
    """Durations of kernels and the gaps between them, of a few attention programs."""
    wanted = [
        ("base", 8, 32, BASE, None, 0),
        ("all", 8, 32, ALL, None, 0),
        ("all, no graph", 8, 32, ALL, NO_GRAPH, 0),
        ("all", 32, 32, ALL, None, 0),
        ("ordered+in_place", 32, 32, BOTH, None, 0),
        ("all", 8, 33, ALL, None, 0),
    ]
    live = jnp.zeros((1, 128, KV, DIM), jnp.bfloat16)
    record["profile"] = []
    for case in wanted:
        if left(args) < 8:
            return
        made = Attention(case, floor)
        inputs = made.q, *pools, made.ids, made.lengths, live
        jax.block_until_ready(made.run(*inputs))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(made.run(*inputs))
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            data = jax.profiler.ProfileData.from_file(path)
        events = []
        for plane in data.planes:
            if "GPU" in plane.name:
                for line in plane.lines:
                    if "Stream" in line.name:
                        events += [(e.start_ns, e.duration_ns, e.name) for e in line.events]
        events.sort()
        names, gaps = collections.defaultdict(list), collections.defaultdict(list)
        for before, after in zip([None, *events], events):
            names[after[2]].append(after[1] / 1e3)
            if before is not None:
                gap = (after[0] - before[0] - before[1]) / 1e3
                gaps[f"{before[2][:24]} -> {after[2][:24]}"].append(gap)
        out = {"case": case[0], "K": case[1], "rows": case[2]}
        out["kernels_us"] = {n: [len(v), float(np.median(v))] for n, v in names.items()}
        out["gaps_us"] = {n: [len(v), float(np.median(v))] for n, v in gaps.items() if len(v) > 20}
        record["profile"].append(out)
        save()
        print(
            "profile",
            case[0],
            "K",
            case[1],
            "rows",
            case[2],
            {n[:28]: (c, round(u, 2)) for n, (c, u) in out["kernels_us"].items() if c > 20},
            {n: round(u, 2) for n, (c, u) in out["gaps_us"].items()},
            flush=True,
        )


# ---------------------------------------------------------------- products
SHAPES = {
    "qkv": (3584, (3584, 512, 512), "none", True),
    "o": (3584, (3584,), "none", False),
    "gate_up": (3584, (18944, 18944), "swiglu", False),
    "down": (18944, (3584,), "none", False),
    "LL qkv": (4096, (4096,) * 3, "none", False),
    "LL o": (4096, (4096,), "none", False),
    "LL gu": (4096, (12288,) * 2, "swiglu", False),
    "LL down": (12288, (4096,), "none", False),
}


def product_cases():
    def some(name, rows, most):
        inner, outs, act, bias = SHAPES[name]
        found = mt.candidates(rows, inner, outs, act, bias)
        chosen = mt.choose(rows, inner, outs, act, bias)
        cuts = [chosen.tuning]
        by = sorted(found, key=lambda g: g.microseconds)
        for split in (1, 4, 2, 8):  # the best of each split, then the most CTAs of each
            of = [g for g in by if g.tuning.splits == split]
            cuts += [g.tuning for g in of[:1]]
            cuts += [g.tuning for g in sorted(of, key=lambda g: -g.ctas)[:1]]
        c = chosen.tuning
        for block, stages in ((64, 6), (128, 4), (128, 3), (256, 2), (64, 4)):
            cuts.append(dataclasses.replace(c, block=block, stages=stages))
        for early in (True,):
            cuts.insert(1, dataclasses.replace(c, early=early))
        seen = []
        for cut in cuts:
            geo = dataclasses.replace(chosen, tuning=cut)
            if cut not in seen and geo.problem is None and geo.ctas <= 132:
                seen.append(cut)
        return [(name, rows, cut) for cut in seen[:most]]

    for rows in (32, 33):
        for name in ("gate_up", "down", "qkv", "o"):
            yield name, rows, None
            yield from some(name, rows, 8)
    for name in ("LL qkv", "LL o", "LL gu", "LL down"):
        yield name, 32, None
        yield from some(name, 32, 3)
    for rows in (64, 128):
        for name in ("gate_up", "down", "qkv", "o"):
            yield name, rows, None
            yield from some(name, rows, 3)


class Product:
    def __init__(self, case, floor):
        self.name, self.rows, self.cut = case
        self.inner, self.outs, self.act, bias = SHAPES[self.name]
        self.bytes = 2 * self.inner * sum(self.outs)
        self.floor = self.bytes / floor * 1e6
        self.sets = max(3, -(-320_000_000 // self.bytes))
        self.rounds = max(2, int(0.012e6 / (1.5 * self.floor * self.sets)))
        self.geo = mt.choose(self.rows, self.inner, self.outs, self.act, bias)
        if self.cut is not None:
            self.geo = dataclasses.replace(self.geo, tuning=self.cut)
        self.x = jax.random.normal(jax.random.key(3), (4, self.rows, self.inner), jnp.bfloat16)
        self.biases = (
            tuple(jax.random.normal(jax.random.key(4), (n,), jnp.bfloat16) for n in self.outs)
            if bias
            else ()
        )
        weights = [[spec(n, self.inner) for n in self.outs]] * self.sets
        args = like(self.x), weights, tuple(map(like, self.biases))
        self.run = jax.jit(self.loop).lower(*args).compile()

    def call(self, x, weights, biases):
        if self.cut is None:
            return api.matmul_xla(x, *weights, biases=biases, activation=self.act)
        return launch(self.geo, x, weights, biases)

    def loop(self, x, weights, biases):
        def round_(i, used):
            outs = [jax.lax.optimization_barrier(self.call(x[i % 4], w, biases)) for w in weights]
            return used + sum(o[0, 0].astype(jnp.float32) for out in outs for o in out)

        used = jax.lax.fori_loop(0, self.rounds, round_, jnp.float32(0))
        return used, self.call(x[self.rounds % 4], weights[-1], biases)

    def measure(self, weights):
        args = self.x, weights[: self.sets], self.biases
        timing = time_loop(self.run, args, self.rounds * self.sets + 1, 5)
        got = self.run(*args)[1]
        x, last = self.x[self.rounds % 4], weights[: self.sets][-1]
        wide = exact(x, last)
        if self.biases:
            wide = [p + b.astype(jnp.float32) for p, b in zip(wide, self.biases)]
        if self.act == "swiglu":
            wide = [jax.nn.silu(wide[0]) * wide[1]]
        error = max(
            float(jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w))
            for g, w in zip(got, wide)
        )
        cut = (
            "xla"
            if self.cut is None
            else (
                f"c{self.cut.columns} s{self.cut.splits} {self.cut.block}x{self.cut.stages}"
                f"{' early' * self.cut.early} ({self.geo.ctas} CTAs)"
            )
        )
        return {
            "shape": self.name,
            "rows": self.rows,
            "cut": cut,
            "us": timing[0],
            "us_least": timing[1],
            "floor_us": self.floor,
            "times_floor": timing[0] / self.floor,
            "error": error,
            "estimate": self.geo.microseconds,
            "tuning": str(self.cut),
        }


launch = jax.jit(api.launch, static_argnums=0)


@jax.jit
def exact(x, weights):
    x = x.astype(jnp.float32)
    return [jnp.matmul(x, w.astype(jnp.float32).T, precision="highest") for w in weights]


def products(args, record, save, floor):
    made_of = {}

    def weights(made):
        key = made.name
        if key not in made_of:
            made_of.clear()
            made_of[key] = [
                [
                    jax.random.normal(jax.random.key(i * 7 + j), (n, made.inner), jnp.bfloat16) / 16
                    for j, n in enumerate(made.outs)
                ]
                for i in range(made.sets)
            ]
            jax.block_until_ready(made_of[key])
        return made_of[key]

    for made in in_time(args, lambda case: Product(case, floor), product_cases()):
        show(record, save, made.measure(weights(made)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="all")
    parser.add_argument("--limit", type=float, default=145)
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", "/tmp")) / f"ker_probe_{args.part}.json"
    copied = copy_bandwidth()
    floor = copied * 3.0 / 2.92
    record = {**conditions(), "copy_bandwidth": copied, "floor_bandwidth": floor, "rows": []}
    save = lambda: out.write_text(json.dumps(record, indent=1))
    print(f"copies {copied / 1e12:.2f} TB/s, floor at {floor / 1e12:.2f} TB/s", flush=True)
    if args.part in ("attention", "all", "profile"):
        whole, pools = args.limit, None
        if args.part == "all":
            args.limit = whole * 0.6
        if args.part == "profile":
            args.limit = 0
        pools = attention(args, record, save, floor)
        args.limit = whole if args.part != "all" else whole * 0.6 + 15
        try:
            profile(args, record, save, floor, pools)
        except Exception as error:
            print("FAILED profile", type(error).__name__, str(error)[:300])
        del pools
        args.limit = whole
    if args.part in ("matmul", "all"):
        products(args, record, save, floor)
    print(f"{len(record['rows'])} rows in {time.monotonic() - START:.0f} s, {out}")


if __name__ == "__main__":
    main()
