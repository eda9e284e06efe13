"""Times a document whose KV is in host memory: encoding, fetching chunks, answers.

Random weights, bfloat16, the shapes of --model; of LLaDA-8B, 128 chunks of 1,024 tokens are 69 GB
of KV beside 16 GB of weights. On a GPU XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB must then allow 90 GB of
pinned memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import clock, peak
from bench.run import BLOCK, MODEL_OPTIONS, SELECT, Run
from pdllm_jax import DecodeConfig, Engine
from pdllm_jax.engine.offload import encode_offloaded, fetch, host_memory, select_offloaded
from pdllm_jax.engine.request import start_decoding

PARTS = ("draft, score, bring over", "encode", "decode")
OPTIONS = MODEL_OPTIONS | {
    "--chunks": (128, "of the document"),
    "--fetched": ([4, 8, 16], "chunks fetched at once"),
}


def main(args: argparse.Namespace) -> None:
    """Encodes, fetches chunks, answers; the record is written after each."""
    run = Run(args)
    run.record["host_copy_bandwidth"] = host_copy_bandwidth(0.01 if args.tiny else 1.0)
    prompt, group = run.prompt(args.chunks), SELECT.encode_batch

    def encode(prompt: Any) -> tuple[Any, ...]:
        document = encode_offloaded(run.model, prompt, encode_batch=group)
        return document, document.k, document.v

    encode(run.prompt(2 * group))  # compiles
    seconds, (document, *_) = clock(lambda: encode(prompt))
    run.keep("encode to host memory", [seconds])
    tokens, weights = args.chunks * (args.chunk_size - 1), jax.tree.leaves(run.model)
    memory = {"tokens": tokens, "host_bytes": document.nbytes}
    memory["weight_bytes"] = sum(leaf.nbytes for leaf in weights)
    run.record["memory"] = memory
    rng = np.random.default_rng(0)
    for k in args.fetched:
        name = f"bring {k} chunks over"
        # Other chunks every time, spread over the document.
        run.timed(name, lambda k=k: fetch(document, rng.permutation(args.chunks)[:k]))
        size = k * document.nbytes / len(document.k)
        run.note(f"GB/s, {name}", size / run.median(name) / 1e9)
    query = np.asarray(prompt.query[0])[: int(prompt.query_length[0])]
    decode = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)

    def ask(encoding: str) -> list[float]:
        """Returns the seconds of PARTS of one answer."""
        selecting = dataclasses.replace(SELECT, encoding=encoding)
        select = functools.partial(select_offloaded, run.model, document, query, selecting)
        choose, chosen = clock(select)
        start, state = clock(lambda: start_decoding(run.model, chosen, decode))
        answer = clock(lambda: Engine(run.model, decoding=decode).decode(state))
        return [choose, start, answer[0]]

    for encoding in ("independent", "joint"):
        ask(encoding)  # compiles
        answers = np.array([ask(encoding) for _ in range(args.repeats)])
        for part, spent in zip(PARTS, answers.T, strict=True):
            run.keep(f"{encoding}: {part}", spent.tolist())
        run.keep(f"{encoding}: answer", answers.sum(axis=1).tolist())
    memory["peak_bytes"] = peak()
    run.say(f"most on the device: {peak() / 1e9:.2f} GB")


def host_copy_bandwidth(gigabytes: float) -> float:
    """Returns bytes per second of one large array from host to device, best of three."""
    device = jax.device_put(0).sharding
    array = jnp.zeros((int(gigabytes * 2**30) // 4,), jnp.float32)
    on_host = jax.block_until_ready(jax.device_put(array, host_memory(device)))
    spent = [clock(lambda: jax.device_put(on_host, device))[0] for _ in range(4)]
    return on_host.nbytes / min(spent[1:])
