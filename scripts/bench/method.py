"""Times the phases of the method at the shapes of LLaDA-8B: random weights, bfloat16.

Every jitted function is timed as a whole call, host time included, after a first call that
compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import write
from bench.run import BLOCK, SELECT, Run, add_model_arguments, begin, peak
from pdllm_jax import (
    DecodeConfig,
    Selection,
    batch_prompts,
    denoise,
    encode_document,
    init_denoise,
    prefill,
    score_chunks,
    select_top_k,
)
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.prefill import prefill_top_k
from pdllm_jax.method.scoring import draft_response

DECODE = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
INDEPENDENT = dataclasses.replace(SELECT, encoding="independent")
CHOICES = {
    "independent": INDEPENDENT,
    "bridge, 15% at chunk starts": dataclasses.replace(SELECT, encoding="bridge"),
    "bridge, 15% by attention": dataclasses.replace(
        SELECT, encoding="bridge", bridge_tokens="attention"
    ),
    "query-conditioned": dataclasses.replace(SELECT, encoding="query-conditioned"),
    "independent, 512 tokens kept": dataclasses.replace(INDEPENDENT, keep_tokens=512),
}
REQUESTS = 8  # of a batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py method`."""
    add_model_arguments(parser)
    option = parser.add_argument
    option("--out", type=Path, default=Path("benchmarks/method.json"))
    option("--sections", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    option("--document", type=int, default=32, help="chunks of the document that is asked about")
    option("--stream", nargs="+", type=int, default=[128, 256, 1024], help="chunks streamed")


def main(args: argparse.Namespace) -> int:
    """Runs the sections; "ask" compares with the times of "scoring"."""
    run, names = begin(args), list(args.sections)
    if "ask" in names and "scoring" not in names:
        names.insert(names.index("ask"), "scoring")
    run.sections(SECTIONS, names)
    write(args.out, run.record)
    return 0


def stream(run: Run) -> None:
    """Times documents of growing length in one program that keeps K chunks and a group."""
    places = run.prompt(max(run.args.stream)).chunks.shape[1]

    def padded(chunks: int) -> ChunkedPrompt:
        prompt = run.prompt(chunks)
        spare = places - prompt.chunks.shape[1]
        return dataclasses.replace(
            prompt,
            chunks=jnp.pad(prompt.chunks, ((0, 0), (0, spare), (0, 0))),
            chunk_lengths=jnp.pad(prompt.chunk_lengths, ((0, 0), (0, spare))),
        )

    def once(chunks: int) -> float:
        prompt = jax.block_until_ready(padded(chunks))
        start = time.perf_counter()
        jax.block_until_ready(prefill_top_k(run.model, prompt, INDEPENDENT))
        return time.perf_counter() - start

    once(min(run.args.stream))
    for chunks in run.args.stream:
        seconds, tokens = once(chunks), chunks * (run.args.chunk_size - 1)
        run.record["memory"][f"stream {chunks} chunks"] = {
            "tokens": tokens, "seconds": seconds, "peak_bytes": peak(),
        }  # fmt: skip
        run.say(f"stream {tokens} tokens: {seconds:.2f} s, peak {peak() / 1e9:.2f} GB")


def _draft(run: Run, prompt: ChunkedPrompt) -> Any:
    return draft_response(run.model, prompt.question, SELECT.scoring())


def scoring(run: Run) -> None:
    """Times the same chunks encoded alone, and with R = 4 masked copies of the question."""
    prompt = run.prompt(run.args.document)
    draft = run.timed("draft", lambda: _draft(run, prompt))
    run.timed("encode the document", lambda: _encode(run, prompt).pool)
    run.timed(
        "encode and score it", lambda: prefill(run.model, prompt, INDEPENDENT, draft=draft)[1]
    )
    alone = run.median("encode the document")
    run.note("scoring over encoding", run.median("encode and score it") / alone)


def _encode(run: Run, prompt: ChunkedPrompt) -> ChunkCache:
    return encode_document(run.model, prompt, encode_batch=SELECT.encode_batch)


def _first(prompt: ChunkedPrompt) -> Selection:
    return select_top_k(jnp.zeros(prompt.chunk_lengths.shape), SELECT.top_k)


def ask(run: Run) -> None:
    """Times a second question on an encoded document against the first, every cost counted."""
    prompt, later = run.prompt(run.args.document), run.prompt(1, seed=1)
    cache, draft = _encode(run, prompt), _draft(run, later)
    run.timed(
        "score another question",
        lambda: score_chunks(
            run.model, cache, later.query, SELECT.scoring(),
            query_length=later.query_length, draft=draft,
        ),
    )  # fmt: skip
    joint = dataclasses.replace(later, chunk_lengths=prompt.chunk_lengths)
    run.timed(
        "joint encoding of 4 chunks", lambda: _start(run, cache.without_pool(), joint, SELECT).stale
    )
    first = run.median("draft") + run.median("encode and score it")
    second = run.median("draft") + run.median("score another question")
    encode = run.median("joint encoding of 4 chunks")
    run.note("second over first question, independent", second / first)
    run.note("second over first question, joint", (second + encode) / (first + encode))


def _start(run: Run, cache: ChunkCache, prompt: ChunkedPrompt, config: Any) -> Any:
    """Returns the state that denoising starts from, the first four chunks kept."""
    return init_denoise(
        run.model, cache, _first(prompt), prompt.query, DECODE, jax.random.key(0),
        query_length=prompt.query_length, settings=config,
    )  # fmt: skip


def batch(run: Run) -> None:
    """Times ragged requests together and one at a time: joint encoding, 32 tokens in 32 steps."""
    rng, size, k = np.random.default_rng(2), run.args.chunk_size, SELECT.top_k
    prompts = [run.prompt(k, query=int(rng.integers(20, 33)), seed=b) for b in range(REQUESTS)]
    ragged = [
        dataclasses.replace(
            p, chunk_lengths=p.chunk_lengths.at[0, -1].set(int(rng.integers(1, size)))
        )
        for p in prompts
    ]

    def measure(name: str, prompt: ChunkedPrompt) -> np.ndarray:
        cache = ChunkCache(
            None, prompt.chunks, prompt.chunk_lengths, prompt.prefix, prompt.prefix_length, None,
            None,
        )  # fmt: skip
        spent = []
        for _ in range(run.args.repeats + 1):
            start = time.perf_counter()
            state = jax.block_until_ready(_start(run, cache, prompt, SELECT))
            middle = time.perf_counter()
            jax.block_until_ready(denoise(run.model, None, state, config=DECODE).tokens)
            spent.append((middle - start, time.perf_counter() - middle))
        for part, seconds in zip(("encode", "decode"), zip(*spent[1:], strict=True), strict=True):
            run.keep(f"{name}, {part}", list(seconds))
        return np.median(spent[1:], axis=0)

    alone = sum(measure(f"request {b} alone", p) for b, p in enumerate(ragged))
    together = measure(f"{REQUESTS} together", batch_prompts(ragged))
    run.note("batch throughput, decoding", alone[1] / together[1])
    run.note("batch throughput, joint encoding and decoding", alone.sum() / together.sum())


def choices(run: Run) -> None:
    """Times the other encodings, kept tokens and re-selection beside the default."""
    prompt = run.prompt(run.args.document)
    cache = _encode(run, prompt)

    def decode(again: Any = None) -> Any:
        state = _start(run, cache, prompt, INDEPENDENT)
        return denoise(run.model, cache, state, config=DECODE, settings=again).tokens

    for name, config in CHOICES.items():
        run.timed(f"encode: {name}", functools.partial(_stale, run, cache, prompt, config))
    run.timed("independent, and 32 steps", decode)
    run.timed(
        "independent, and 32 steps with re-selection at each",
        lambda: decode(dataclasses.replace(INDEPENDENT, reselect="step")),
        repeats=1,
    )


def _stale(run: Run, cache: ChunkCache, prompt: ChunkedPrompt, config: Any) -> Any:
    return _start(run, cache, prompt, config).stale


SECTIONS: dict[str, Callable[[Run], None]] = {
    "stream": stream, "scoring": scoring, "ask": ask, "batch": batch, "choices": choices,
}  # fmt: skip
