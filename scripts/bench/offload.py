"""A document whose KV outgrows the device: encoded into host memory, and asked from there.

Random weights, bfloat16, LLaDA-8B shapes; 128 chunks of 1,024 tokens are 69 GB of KV beside 16 GB
of weights. On a GPU XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB must allow that much pinned memory (90).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import write
from bench.requests import BLOCK, QUERY, SELECT
from bench.run import begin, peak
from pdllm_jax import DecodeConfig, Engine
from pdllm_jax.engine.offload import encode_offloaded, fetch, host_memory, select_offloaded
from pdllm_jax.engine.request import start_decoding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py offload`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/offload.json"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=128, help="of the document")
    parser.add_argument(
        "--fetched", nargs="+", type=int, default=[4, 8, 16], help="chunks brought over at once"
    )
    parser.add_argument("--repeats", type=int, default=3)


def main(args: argparse.Namespace) -> int:
    """Encodes, brings chunks over, answers; each is written as soon as it is measured."""
    run = begin(args)
    run.record["host_copy_bandwidth"] = host_copy_bandwidth(0.01 if args.tiny else 1.0)
    write(args.out, run.record)
    prompt = run.prompt(args.chunks, QUERY)
    group = 2 * SELECT.encode_batch
    encode_offloaded(run.model, run.prompt(group, QUERY), encode_batch=SELECT.encode_batch)
    begun = time.perf_counter()
    document = encode_offloaded(run.model, prompt, encode_batch=SELECT.encode_batch)
    jax.block_until_ready((document.k, document.v))
    run.keep("encode to host memory", [time.perf_counter() - begun])
    run.record["memory"] = {
        "tokens": args.chunks * (args.chunk_size - 1),
        "host_bytes": document.nbytes,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(run.model)),
        "peak_bytes": peak(),
    }
    rng = np.random.default_rng(0)
    for k in args.fetched:
        # Chunks nobody has asked for before, spread over the document.
        name = f"bring {k} chunks over"
        run.timed(name, lambda k=k: fetch(document, rng.permutation(args.chunks)[:k]))
        size = k * document.nbytes / len(document.k)
        run.note(f"GB/s, {name}", size / run.median(name) / 1e9)
    query = np.asarray(prompt.query)[0, : int(prompt.query_length[0])]
    decode = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)

    def ask(encoding: str) -> dict[str, float]:
        """Seconds of the parts of one answer."""
        selecting = dataclasses.replace(SELECT, encoding=encoding)
        times = [time.perf_counter()]

        def done(*arrays: Any) -> None:
            jax.block_until_ready(arrays)
            times.append(time.perf_counter())

        chosen = select_offloaded(run.model, document, query, selecting)
        done(chosen.cache, chosen.selection)
        state = start_decoding(run.model, chosen, decode)
        done(state)
        Engine(run.model).decode(state)
        done()
        names = ("draft, score, bring over", "encode", "decode")
        return dict(zip(names, np.diff(times).tolist(), strict=True))

    for encoding in ("independent", "joint"):
        ask(encoding)
        made = [ask(encoding) for _ in range(args.repeats)]
        for part in made[0]:
            run.keep(f"{encoding}: {part}", [each[part] for each in made])
        run.keep(f"{encoding}: answer", [sum(each.values()) for each in made])
    run.record["memory"]["peak_bytes"] = peak()
    write(args.out, run.record)
    return 0


def host_copy_bandwidth(gigabytes: float) -> float:
    """Bytes a second of one large array from host memory to the device, best of three."""
    device = jax.device_put(0).sharding
    whole = jnp.zeros((int(gigabytes * 2**30) // 4,), jnp.float32)
    there = jax.block_until_ready(jax.device_put(whole, host_memory(device)))

    def seconds() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(jax.device_put(there, device))
        return time.perf_counter() - begun

    seconds()
    return there.nbytes / min(seconds() for _ in range(3))
