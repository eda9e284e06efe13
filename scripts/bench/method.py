"""The method's phases at LLaDA-8B shapes: scoring, later questions, streaming, batches, choices.

Random weights; every compiled program is timed as a whole call, host time included, after a
warm-up, and compilation apart. Each section is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import write
from bench.run import Run, begin, peak
from pdllm_jax import (
    DecodeConfig,
    SelectionConfig,
    batch_prompts,
    denoise,
    init_denoise,
    prefill,
    score_chunks,
    select_top_k,
)
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.prefill import prefill_top_k
from pdllm_jax.method.scoring import draft_response

SECTIONS = ("stream", "scoring", "ask", "batch", "choices")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py method`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/method.json"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--document", type=int, default=32, help="chunks of the document asked")
    parser.add_argument(
        "--stream", nargs="+", type=int, default=[128, 256, 1024], help="chunks that are streamed"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")


@dataclasses.dataclass
class Asked(Run):
    """With the document that is asked about."""

    cache: ChunkCache | None = None

    def document(self) -> ChunkCache:
        """The cache of the document that is asked about, made once."""
        if self.cache is None:
            go = self.compile("encode")
            self.cache = go["encode"](self.model, self.prompt(self.args.document))[0]
        return self.cache


def main(args: argparse.Namespace) -> int:
    """Runs the sections in order, as far as the limit lets them."""
    made = begin(args)
    run = Asked(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})
    sections = {
        "stream": (lower_stream, stream),
        "scoring": (lower_scoring, scoring),
        "ask": (lower_ask, ask),
        "batch": (lower_batch, batch),
        "choices": (lower_choices, choices),
    }
    wanted = list(args.sections)
    if {"ask", "choices"} & set(wanted) and "scoring" not in wanted:
        wanted.insert(wanted.index("stream") + 1 if "stream" in wanted else 0, "scoring")
    for name in wanted:
        sections[name][0](run)
    for name in wanted:
        if time.monotonic() - run.begun > args.limit:
            run.record["left_out"].append(name)
        else:
            sections[name][1](run)
    write(args.out, run.record)
    run.tracer.shutdown(cancel_futures=True)
    return 0


SELECT = SelectionConfig(top_k=4, masked_copies=4, draft_length=4, draft_steps=2)
DECODE = DecodeConfig(gen_length=32, block_length=32)
INDEPENDENT = dataclasses.replace(SELECT, encoding="independent")
ENCODE = SelectionConfig(scorer="first", encoding="independent")


def lower_stream(run: Run) -> None:
    longest = run.prompt(max(run.args.stream))
    run.lower(stream=lambda: prefill_top_k.lower(run.model, longest, INDEPENDENT))


def stream(run: Run) -> None:
    """Documents of growing length through one program; what is kept is K chunks and a group."""
    go = run.compile("stream")["stream"]
    places = run.prompt(max(run.args.stream)).chunks.shape[1]

    def padded(chunks: int):
        prompt = run.prompt(chunks)
        extra = places - prompt.chunks.shape[1]
        return dataclasses.replace(
            prompt,
            chunks=jnp.pad(prompt.chunks, ((0, 0), (0, extra), (0, 0))),
            chunk_lengths=jnp.pad(prompt.chunk_lengths, ((0, 0), (0, extra))),
        )

    jax.block_until_ready(go(run.model, padded(min(run.args.stream))))
    for chunks in run.args.stream:
        ready = jax.block_until_ready(padded(chunks))
        start = time.perf_counter()
        jax.block_until_ready(go(run.model, ready))
        seconds = time.perf_counter() - start
        tokens = chunks * (run.args.chunk_size - 1)
        run.record["memory"][f"stream {chunks} chunks"] = {
            "tokens": tokens, "seconds": seconds, "peak_bytes": peak(),
        }  # fmt: skip
        print(
            f"{time.monotonic() - run.begun:5.0f} s  stream {chunks} chunks, {tokens} tokens: "
            f"{seconds:.2f} s, {1e6 * seconds / tokens:.2f} us a token, peak {peak() / 1e9:.2f} GB",
            flush=True,
        )
        write(run.args.out, run.record)


def lower_scoring(run: Run) -> None:
    prompt = run.prompt(run.args.document)
    question, passing = prompt.question, SELECT.scoring()

    def with_draft():
        draft = jax.eval_shape(lambda: draft_response(run.model, question, passing))
        return prefill.lower(run.model, prompt, INDEPENDENT, draft=draft)

    run.lower(
        draft=lambda: draft_response.lower(run.model, question, passing),
        encode=lambda: prefill.lower(run.model, prompt, ENCODE),
        encode_and_score=with_draft,
    )


def scoring(run: Run) -> None:
    """The same chunks encoded alone, and with R = 4 masked copies of the question riding along."""
    prompt = run.prompt(run.args.document)
    go = run.compile("draft", "encode", "encode_and_score")
    made = run.timed("draft", lambda: go["draft"](run.model, prompt.question))
    run.timed("encode the document", lambda: go["encode"](run.model, prompt)[1])
    run.timed(
        "encode and score it", lambda: go["encode_and_score"](run.model, prompt, draft=made)[1]
    )
    alone = run.median("encode the document")
    run.note("scoring over encoding", run.median("encode and score it") / alone)


def lower_ask(run: Run) -> None:
    prompt, later = run.prompt(run.args.document), run.prompt(1, seed=1)
    passing = SELECT.scoring()

    def score():
        cache = jax.eval_shape(lambda: prefill(run.model, prompt, ENCODE)[0])
        draft = jax.eval_shape(lambda: draft_response(run.model, later.question, passing))
        return score_chunks.lower(
            run.model, cache, later.query, passing, query_length=later.query_length, draft=draft
        )

    def joint():
        cache = jax.eval_shape(lambda: prefill(run.model, prompt, ENCODE)[0])
        return init_denoise.lower(
            run.model, cache.without_pool(), _first_four(prompt), later.query, DECODE,
            jax.random.key(0), query_length=later.query_length, selecting=SELECT,
        )  # fmt: skip

    run.lower(score=score, joint=joint)


def _first_four(prompt):
    return select_top_k(jnp.zeros(prompt.chunk_lengths.shape), 4)


def ask(run: Run) -> None:
    """A second question on an encoded document against the first, every cost counted."""
    prompt, later, cache = run.prompt(run.args.document), run.prompt(1, seed=1), run.document()
    go = run.compile("score", "joint")
    draft = go["draft"](run.model, later.question)
    run.timed(
        "score another question",
        lambda: go["score"](
            run.model, cache, later.query, query_length=later.query_length, draft=draft
        ),
    )
    run.timed(
        "joint encoding of 4 chunks",
        lambda: go["joint"](
            run.model, cache.without_pool(), _first_four(prompt), later.query, jax.random.key(0),
            query_length=later.query_length,
        ).stale,
    )  # fmt: skip
    first = run.median("draft") + run.median("encode and score it")
    second = run.median("draft") + run.median("score another question")
    encode = run.median("joint encoding of 4 chunks")
    run.note("second over first question, independent", second / first)
    run.note("second over first question, joint", (second + encode) / (first + encode))


REQUESTS = 8


def _ragged(run: Run):
    """Prompts of K chunks, the last of random length, with questions of 20 to 32 tokens."""
    size, k = run.args.chunk_size, SELECT.top_k
    rng = np.random.default_rng(2)
    prompts = [run.prompt(k, query=int(rng.integers(20, 33)), seed=b) for b in range(REQUESTS)]
    return [
        dataclasses.replace(
            p, chunk_lengths=p.chunk_lengths.at[:, -1].set(int(rng.integers(1, size)))
        )
        for p in prompts
    ]


def _begin_args(prompt):
    """Of `init_denoise`, without what is static; all chunks are chosen."""
    cache = ChunkCache(
        None, prompt.chunks, prompt.chunk_lengths, prompt.prefix, prompt.prefix_length, None, None
    )
    chosen = select_top_k(jnp.zeros(prompt.chunk_lengths.shape), SELECT.top_k)
    return cache, chosen, prompt.query


def lower_batch(run: Run) -> None:
    ragged = _ragged(run)

    def begin(prompt, lower=True):
        make = init_denoise.lower if lower else init_denoise
        return make(
            run.model, *_begin_args(prompt), DECODE, jax.random.key(0),
            query_length=prompt.query_length, selecting=SELECT,
        )  # fmt: skip

    def decode(prompt):
        state = jax.eval_shape(lambda: begin(prompt, lower=False))
        return denoise.lower(run.model, None, state, config=DECODE)

    together = batch_prompts(ragged)
    run.lower(
        begin_one=lambda: begin(ragged[0]),
        begin_all=lambda: begin(together),
        decode_one=lambda: decode(ragged[0]),
        decode_all=lambda: decode(together),
    )


def batch(run: Run) -> None:
    """Ragged requests together against one at a time: joint encoding, 32 tokens in 32 steps."""
    run.cache = None  # makes room
    go = run.compile("begin_one", "begin_all", "decode_one", "decode_all")

    def measure(name: str, which: str, prompt) -> tuple[float, float]:
        spent: dict[str, list[float]] = {"encode": [], "decode": []}
        for _ in range(run.args.repeats + 1):
            start = time.perf_counter()
            state = go[f"begin_{which}"](
                run.model, *_begin_args(prompt), jax.random.key(0), query_length=prompt.query_length
            )
            jax.block_until_ready(state)
            middle = time.perf_counter()
            jax.block_until_ready(go[f"decode_{which}"](run.model, None, state).tokens)
            spent["encode"].append(middle - start)
            spent["decode"].append(time.perf_counter() - middle)
        for part, seconds in spent.items():
            run.keep(f"{name}, {part}", seconds[1:])
        return tuple(float(np.median(seconds[1:])) for seconds in spent.values())

    ragged = _ragged(run)
    alone = np.array([measure(f"request {b} alone", "one", p) for b, p in enumerate(ragged)])
    encode, decode = measure(f"{REQUESTS} together", "all", batch_prompts(ragged))
    run.note("batch throughput, decoding", alone[:, 1].sum() / decode)
    run.note("batch throughput, joint encoding and decoding", alone.sum() / (encode + decode))


CHOICES = {
    "independent": INDEPENDENT,
    "bridge, 15% at chunk starts": dataclasses.replace(SELECT, encoding="bridge"),
    "bridge, 15% by attention": dataclasses.replace(
        SELECT, encoding="bridge", bridge_tokens="attention"
    ),
    "query-conditioned": dataclasses.replace(SELECT, encoding="query-conditioned"),
    "independent, 512 tokens kept": dataclasses.replace(INDEPENDENT, keep_tokens=512),
}


def lower_choices(run: Run) -> None:
    prompt = run.prompt(run.args.document)

    def begin(config, lower=True):
        cache = jax.eval_shape(lambda: prefill(run.model, prompt, ENCODE)[0])
        make = init_denoise.lower if lower else init_denoise
        args = (prompt.query, DECODE, jax.random.key(0))
        settings = {"query_length": prompt.query_length, "selecting": config}
        if lower:
            return make(run.model, cache, _first_four(prompt), *args, **settings)
        return cache, jax.eval_shape(
            lambda cache: make(run.model, cache, _first_four(prompt), *args, **settings), cache
        )

    def decode(selecting=None):
        cache, state = begin(INDEPENDENT, lower=False)
        return denoise.lower(run.model, cache, state, config=DECODE, selecting=selecting)

    run.lower(
        **{name: lambda c=config: begin(c) for name, config in CHOICES.items()},
        decode=decode,
        reselect=lambda: decode(dataclasses.replace(INDEPENDENT, reselect="step")),
    )


def choices(run: Run) -> None:
    """What the other encodings, kept tokens and re-selection cost beside the default."""
    prompt, cache = run.prompt(run.args.document), run.document()
    go = run.compile(*CHOICES, "decode", "reselect")

    def start(name: str):
        return go[name](
            run.model, cache, _first_four(prompt), prompt.query, jax.random.key(0),
            query_length=prompt.query_length,
        )  # fmt: skip

    for name in CHOICES:
        run.timed(f"encode: {name}", lambda name=name: start(name).stale)
    run.timed(
        "independent, and 32 steps",
        lambda: go["decode"](run.model, cache, start("independent")).tokens,
    )
    run.timed(
        "independent, and 32 steps with re-selection at each",
        lambda: go["reselect"](run.model, cache, start("independent")).tokens,
        repeats=1,
    )
