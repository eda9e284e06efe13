"""Times the phases of the method at the shapes of --model: random weights, bfloat16.

Every jitted function is timed as a whole call, host time included, after a first call that
compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pdllm_jax as pdllm
from bench.record import clock, peak
from bench.run import BLOCK, MODEL_OPTIONS, SELECT, Run
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.prefill import prefill_top_k
from pdllm_jax.method.scoring import draft_response

DECODE = pdllm.DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
_choice = functools.partial(dataclasses.replace, SELECT)
INDEPENDENT = _choice(encoding="independent")
CHOICES = {
    "independent": INDEPENDENT,
    "bridge, 15% at chunk starts": _choice(encoding="bridge"),
    "bridge, 15% by attention": _choice(encoding="bridge", bridge_tokens="attention"),
    "query-conditioned": _choice(encoding="query-conditioned"),
    "independent, 512 tokens kept": dataclasses.replace(INDEPENDENT, keep_tokens=512),
}
REQUESTS = 8  # of a batch


def main(args: argparse.Namespace) -> None:
    """Runs the sections; "ask" compares with the times of "scoring"."""
    names = list(args.sections)
    if "ask" in names and "scoring" not in names:
        names.insert(names.index("ask"), "scoring")
    run = Run(args)
    for _ in run.formats():
        run.sections(SECTIONS, names)


def stream(run: Run) -> None:
    """Times documents of growing length in one program that keeps K chunks and a group."""
    places = run.prompt(max(run.args.stream)).chunks.shape[1]

    def padded(chunks: int) -> ChunkedPrompt:
        prompt = run.prompt(chunks)
        spare = (0, places - prompt.chunks.shape[1])
        ids = jnp.pad(prompt.chunks, ((0, 0), spare, (0, 0)))
        lengths = jnp.pad(prompt.chunk_lengths, ((0, 0), spare))
        return dataclasses.replace(prompt, chunks=ids, chunk_lengths=lengths)

    def once(chunks: int) -> float:
        prompt = jax.block_until_ready(padded(chunks))
        return clock(lambda: prefill_top_k(run.model, prompt, INDEPENDENT))[0]

    once(min(run.args.stream))  # compiles
    for chunks in run.args.stream:
        seconds, tokens = once(chunks), chunks * (run.args.chunk_size - 1)
        row = {"tokens": tokens, "seconds": seconds, "peak_bytes": peak()}
        run.record["memory"][f"stream {chunks} chunks{run.on}"] = row
        run.say(f"stream {tokens} tokens: {seconds:.2f} s, peak {peak() / 1e9:.2f} GB")


def _draft(run: Run, prompt: ChunkedPrompt) -> Any:
    return draft_response(run.model, prompt.question, SELECT.scoring())


def _encode(run: Run, prompt: ChunkedPrompt) -> ChunkCache:
    return pdllm.encode_document(run.model, prompt, encode_batch=SELECT.encode_batch)


def _start(run: Run, cache: ChunkCache, prompt: ChunkedPrompt, config: Any) -> Any:
    """Returns the state that denoising starts from, the first four chunks kept."""
    first = pdllm.select_top_k(jnp.zeros(prompt.chunk_lengths.shape), SELECT.top_k)
    settings = {"query_length": prompt.query_length, "settings": config}
    key = jax.random.key(0)
    return pdllm.init_denoise(run.model, cache, first, prompt.query, DECODE, key, **settings)


def scoring(run: Run) -> None:
    """Times the same chunks encoded alone, and with R = 4 masked copies of the question."""
    prompt = run.prompt(run.args.document)
    draft = run.timed("draft", lambda: _draft(run, prompt))
    score = functools.partial(pdllm.prefill, run.model, prompt, INDEPENDENT, draft=draft)
    run.timed("encode the document", lambda: _encode(run, prompt).pool)
    run.timed("encode and score it", lambda: score()[1])
    alone = run.median("encode the document")
    run.note("scoring over encoding", run.median("encode and score it") / alone)


def ask(run: Run) -> None:
    """Times a second question on an encoded document against the first, every cost counted."""
    prompt, later = run.prompt(run.args.document), run.prompt(1, seed=1)
    cache, draft = _encode(run, prompt), _draft(run, later)
    question = {"query_length": later.query_length, "draft": draft}
    score = functools.partial(pdllm.score_chunks, run.model, cache, later.query, SELECT.scoring())
    run.timed("score another question", lambda: score(**question))
    joint = dataclasses.replace(later, chunk_lengths=prompt.chunk_lengths)
    start = functools.partial(_start, run, cache.without_pool(), joint, SELECT)
    run.timed("joint encoding of 4 chunks", lambda: start().stale)
    first = run.median("draft") + run.median("encode and score it")
    second = run.median("draft") + run.median("score another question")
    encode = run.median("joint encoding of 4 chunks")
    run.note("second over first question, independent", second / first)
    run.note("second over first question, joint", (second + encode) / (first + encode))


def batch(run: Run) -> None:
    """Times ragged requests together and one at a time: joint encoding, 32 tokens in 32 steps."""
    rng, size, k = np.random.default_rng(2), run.args.chunk_size, SELECT.top_k
    prompts = [run.prompt(k, query=int(rng.integers(20, 33)), seed=b) for b in range(REQUESTS)]
    for b, prompt in enumerate(prompts):
        lengths = prompt.chunk_lengths.at[0, -1].set(int(rng.integers(1, size)))
        prompts[b] = dataclasses.replace(prompt, chunk_lengths=lengths)

    def measure(name: str, prompt: ChunkedPrompt) -> np.ndarray:
        ids = (prompt.chunks, prompt.chunk_lengths, prompt.prefix, prompt.prefix_length)
        cache = ChunkCache(None, *ids, None, None)
        spent = []
        for _ in range(run.args.repeats + 1):
            encode, state = clock(lambda: _start(run, cache, prompt, SELECT))
            decode = functools.partial(pdllm.denoise, run.model, None, state, config=DECODE)
            spent.append((encode, clock(lambda decode=decode: decode().tokens)[0]))
        for part, seconds in zip(("encode", "decode"), zip(*spent[1:], strict=True), strict=True):
            run.keep(f"{name}, {part}", list(seconds))
        return np.median(spent[1:], axis=0)

    alone = sum(measure(f"request {b} alone", p) for b, p in enumerate(prompts))
    together = measure(f"{REQUESTS} together", pdllm.batch_prompts(prompts))
    run.note("batch throughput, decoding", alone[1] / together[1])
    run.note("batch throughput, joint encoding and decoding", alone.sum() / together.sum())


def choices(run: Run) -> None:
    """Times the other encodings, kept tokens and re-selection beside the default."""
    prompt = run.prompt(run.args.document)
    cache = _encode(run, prompt)
    start = functools.partial(_start, run, cache, prompt)

    def decode(selecting: Any = None) -> Any:
        settings = {"config": DECODE, "settings": selecting}
        return pdllm.denoise(run.model, cache, start(INDEPENDENT), **settings).tokens

    for name, config in CHOICES.items():
        run.timed(f"encode: {name}", lambda config=config: start(config).stale)
    run.timed("independent, and 32 steps", decode)
    every = dataclasses.replace(INDEPENDENT, reselect="step")
    name = "independent, and 32 steps with re-selection at each"
    run.timed(name, lambda: decode(every), repeats=1)


SECTIONS: dict[str, Callable[[Run], None]] = {
    function.__name__: function for function in (stream, scoring, ask, batch, choices)
}
OPTIONS = MODEL_OPTIONS | {
    "--sections": (tuple(SECTIONS), ""),
    "--document": (32, "chunks of the document that is asked about"),
    "--stream": ([128, 256, 1024], "chunks streamed"),
}
