"""How fast at LLaDA-8B shapes: the denoising step, the scoring pass, and whole requests.

Random weights, bfloat16; joint encoding of K = 4 chunks of 1,024, a query of 32 tokens, draft and
scores counted. Whole requests are timed as `generate_ids` is called, host time included, after a
first call that compiles; the baselines run in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.record import copy_bandwidth, write
from bench.run import Run, begin, peak
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    ModelConfig,
    SelectionConfig,
    denoise,
    denoise_step,
    draft_response,
    generate_ids,
    init_denoise,
    prefill,
    select_top_k,
)
from pdllm_jax.cache import ChunkCache, ChunkPool
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.planner import shapes_of
from pdllm_jax.programs import programs
from pdllm_jax.riders import Question

SECTIONS = ("step", "prefill", "end-to-end", "stream")
SELECT = SelectionConfig(top_k=4, masked_copies=4, draft_length=4, draft_steps=2)
BLOCK, PREFIX, QUERY = 32, 16, 32
# Evaluations of `plain` that are timed, or one a block where that is more, of as many as there are
# tokens: each is the same work.
PLAIN_EVALUATIONS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py speed`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/speed.json"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument(
        "--cached", nargs="+", type=int, default=[4, 8, 32], help="step: chunks attended to"
    )
    parser.add_argument(
        "--documents", nargs="+", type=int, default=[8, 16, 32], help="chunks of the documents"
    )
    parser.add_argument(
        "--stream", nargs="+", type=int, default=[128, 1024], help="chunks of streamed documents"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 128], help="of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")


def main(args: argparse.Namespace) -> int:
    """Runs the sections in order, as far as the limit lets them."""
    copied = copy_bandwidth(0.01 if args.tiny else 2.0, 2 if args.tiny else 50)
    run = begin(args)
    run.record["copy_bandwidth"] = copied
    run.record["step"], run.record["end_to_end"], run.record["stream"] = [], [], []
    sections = {"step": step, "prefill": score_document, "end-to-end": end_to_end, "stream": stream}
    for name in args.sections:
        if time.monotonic() - run.begun > args.limit:
            run.record["left_out"].append(name)
        else:
            sections[name](run)
    write(args.out, run.record)
    return 0


def weight_bytes(run: Run) -> int:
    """Bytes of weights that an evaluation reads: all but the embedding, of which it reads rows."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(run.model)))
    whole = sum(leaf.nbytes for leaf in leaves)
    config = run.model.config
    return whole if config.weight_tying else whole - run.model.embedding.weight[...].nbytes


def step(run: Run) -> None:
    """One evaluation of 32 rows against K chunks: the loop on the device, and one from Python."""
    config, size = run.model.config, run.args.chunk_size
    decode = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
    most = max(run.args.cached)
    shape = (config.n_layers, most, config.n_kv_heads, size, config.head_dim)

    @jax.jit
    def fill(key: jax.Array) -> jax.Array:
        one = jax.lax.map(
            lambda k: jax.random.normal(k, shape[1:], jnp.bfloat16), jax.random.split(key, shape[0])
        )
        return one.reshape(shape)

    pool = ChunkPool(fill(jax.random.key(1)), fill(jax.random.key(2)), jnp.full((most,), size))
    prompt = run.prompt(most, QUERY)
    prefix = jnp.zeros((config.n_layers, PREFIX, config.n_kv_heads, config.head_dim), jnp.bfloat16)
    cache = ChunkCache(
        pool, prompt.chunks[:most], prompt.chunk_lengths[:most], prompt.prefix,
        prompt.prefix_length, prefix, prefix,
    )  # fmt: skip

    def start(k: int):
        """As after joint encoding: live KV that is fresh."""
        chosen = select_top_k(-jnp.arange(most, dtype=jnp.float32), k)
        state = init_denoise(
            run.model, cache, chosen, prompt.query, decode, jax.random.key(0),
            query_length=prompt.query_length, encoding="independent",
        )  # fmt: skip
        return dataclasses.replace(state, stale=jnp.zeros((1,), bool), live_encoded=True)

    states = {k: start(k) for k in run.args.cached}
    with ThreadPoolExecutor() as threads:  # compiles side by side
        whole = {
            k: threads.submit(
                lambda s=s: denoise.lower(run.model, cache, s, config=decode).compile()
            )
            for k, s in states.items()
        }
        single = [
            threads.submit(lambda k=k: denoise_step(run.model, cache, start(k), config=decode))
            for k in states
        ]
        loops = {k: future.result() for k, future in whole.items()}
        jax.block_until_ready([future.result().tokens for future in single])
    chunk_bytes = 2 * int(np.prod(shape)) // most * 2
    for k in run.args.cached:
        spent = []
        for _ in range(run.args.repeats + 1):
            state = jax.block_until_ready(start(k))
            begun = time.perf_counter()
            jax.block_until_ready(loops[k](run.model, cache, state).tokens)
            spent.append((time.perf_counter() - begun) / BLOCK)
        python = []
        for _ in range(run.args.repeats):
            state = denoise_step(run.model, cache, start(k), config=decode)
            jax.block_until_ready(state.tokens)
            begun = time.perf_counter()
            for _ in range(BLOCK - 1):
                state = denoise_step(run.model, cache, state, config=decode)
            jax.block_until_ready(state.tokens)
            python.append((time.perf_counter() - begun) / (BLOCK - 1))
        floor = (weight_bytes(run) + k * chunk_bytes) / run.record["copy_bandwidth"]
        median = float(np.median(spent[1:]))
        row = {
            "chunks": k, "cached_tokens": k * size, "rows": BLOCK, "ms": 1e3 * median,
            "ms_least": 1e3 * min(spent[1:]), "ms_most": 1e3 * max(spent[1:]),
            "ms_floor": 1e3 * floor, "times_floor": median / floor,
            "ms_from_python": 1e3 * np.median(python),
            "python_over_loop": np.median(python) / median,
        }  # fmt: skip
        run.record["step"].append(row)
        print(
            f"step, {k * size} cached: {row['ms']:.3f} ms [{row['ms_least']:.3f}, "
            f"{row['ms_most']:.3f}], {row['times_floor']:.3f} times the floor; from Python "
            f"{row['ms_from_python']:.3f}",
            flush=True,
        )
        write(run.args.out, run.record)


def pass_flops(
    config: ModelConfig, chunks: int, size: int, riding: int, copies: int, scored: int
) -> float:
    """Multiplications and additions of encoding and scoring, of rows that exist alone.

    riding: rows of a masked copy, of which `scored` in all are read.

    Products of every row with the layers' weights, attention of chunk rows over prefix and chunk
    and of each masked copy over prefix, chunk and itself, and the LM head over scored rows.
    """
    model, kv = config.d_model, config.n_kv_heads * config.head_dim
    layer = 2 * model * (2 * model + 2 * kv + 3 * config.mlp_hidden_size)
    rider = copies * riding
    rows = PREFIX + chunks * (size + rider)
    keys = PREFIX**2 + chunks * (
        size * (PREFIX + size) + rider * (PREFIX + size + riding)
    )  # query rows times keys
    head = 2 * model * config.vocab_size * chunks * scored
    return config.n_layers * (rows * layer + 4 * model * keys) + head


def score_document(run: Run) -> None:
    """A document scored as joint encoding needs it: TFLOP/s of the pass, draft apart."""
    chunks = max(run.args.documents)
    prompt, passing = run.prompt(chunks, QUERY), SELECT.scoring()
    question = Question(prompt.prefix, prompt.prefix_length, prompt.query, prompt.query_length)
    draft = run.timed("draft", lambda: draft_response(run.model, question, passing))
    name = f"score {chunks} chunks"
    run.timed(name, lambda: prefill(run.model, prompt, SELECT, draft=draft)[1])
    work = pass_flops(
        run.model.config, chunks, run.args.chunk_size, QUERY + SELECT.draft_length,
        SELECT.masked_copies or 0, QUERY + SELECT.draft_steps,
    )  # fmt: skip
    run.note(f"TFLOP/s, {name}", work / run.median(name) / 1e12)


def end_to_end(run: Run) -> None:
    """Whole requests by each method, and how many times faster the method is than each baseline."""
    enable_compilation_cache()
    rng = np.random.default_rng(0)
    words = run.model.config.vocab_size - 8
    prefix, query = rng.integers(0, words, PREFIX), rng.integers(0, words, QUERY)
    # Whole prompts of n times C tokens: where n is a power of two the baselines compute no padding.
    around = PREFIX + QUERY
    contexts = {
        n: rng.integers(0, words, n * run.args.chunk_size - around) for n in run.args.documents
    }

    def decoding(method: str, tokens: int) -> DecodeConfig:
        fewest = max(PLAIN_EVALUATIONS, tokens // BLOCK)
        steps = fewest if method == "plain" else tokens
        return DecodeConfig(gen_length=tokens, block_length=BLOCK, steps=steps)

    def request(method: str, chunks: int, tokens: int) -> tuple[float, Any]:
        decode = decoding(method, tokens)
        steps = decode.steps
        begun = time.perf_counter()
        if method == "prefilling":
            result = generate_ids(
                run.model, prefix, contexts[chunks], query, selection=SELECT, decode=decode,
                chunking=ChunkConfig(run.args.chunk_size),
            )  # fmt: skip
        else:
            prompt = np.concatenate([prefix, contexts[chunks], query])
            result = generate_ids(run.model, [], [], prompt, method=method, decode=decode)
        seconds = time.perf_counter() - begun
        assert result.evaluations == steps, result.evaluations
        # Evaluations that were not made count as those that were; all else counts once.
        return seconds + result.timings["decode"] * (tokens / steps - 1), result

    def compile_all(cases: list[tuple[str, int, int]]) -> None:
        """Fills the persistent cache, many programs at a time.

        Calls that compile can't be made side by side: a CUDA graph that one thread captures fails
        on what another does to the device meanwhile.
        """
        lowered = []
        for method, n, tokens in cases:
            chunked = method == "prefilling"
            shapes, select, settings = shapes_of(
                len(contexts[n]) + (0 if chunked else around),
                prefix=PREFIX if chunked else 0, query=QUERY if chunked else 0,
                method=method, chunking=ChunkConfig(run.args.chunk_size), selection=SELECT,
                decode=decoding(method, tokens),
            )  # fmt: skip
            needed = programs(run.model.config, shapes, select, settings, dtype=jnp.bfloat16)
            lowered += [program.lower() for program in needed]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda program: program.compile(), lowered))

    for n in run.args.documents:
        cases = [
            (method, n, tokens)
            for tokens in run.args.tokens
            for method in ("prefilling", "dual-cache", "plain")
        ]
        if time.monotonic() - run.begun > run.args.limit:
            run.record["left_out"].append(f"{n} chunks")
            continue
        begun = time.perf_counter()
        compile_all(cases)
        run.record["compile_seconds"][f"{n} chunks, side by side"] = time.perf_counter() - begun
        print(f"compiled for {n} chunks: {time.perf_counter() - begun:.0f} s", flush=True)
        begun = time.perf_counter()
        for case in cases:
            request(*case)
        run.record["compile_seconds"][f"{n} chunks, first calls"] = time.perf_counter() - begun
        print(f"first calls: {time.perf_counter() - begun:.0f} s", flush=True)
        for method, _, tokens in cases:
            # What takes longest is repeated least.
            repeats = run.args.repeats if method == "prefilling" else 1
            made = [request(method, n, tokens) for _ in range(repeats)]
            seconds = sorted(s for s, _ in made)
            row = {
                "method": method, "chunks": n, "prompt_tokens": around + len(contexts[n]),
                "tokens": tokens, "seconds": float(np.median(seconds)), "least": seconds[0],
                "most": seconds[-1], "phases": made[-1][1].timings, "paths": made[-1][1].paths,
                "evaluations_timed": made[-1][1].evaluations,
            }  # fmt: skip
            run.record["end_to_end"].append(row)
            print(f"{method:11} {n:3} chunks {tokens:4} tokens {row['seconds']:8.3f} s", flush=True)
            write(run.args.out, run.record)
        jax.clear_caches()  # makes room
    took = {(r["method"], r["chunks"], r["tokens"]): r["seconds"] for r in run.record["end_to_end"]}
    for (method, n, tokens), seconds in took.items():
        if method != "prefilling" and ("prefilling", n, tokens) in took:
            faster = seconds / took["prefilling", n, tokens]
            run.note(f"{method} over prefilling, {n} chunks, {tokens} tokens", faster)


def stream(run: Run) -> None:
    """Whole requests whose document is streamed, and the most that the device has held by then.

    One call each, what it compiles taken off.
    """
    rng = np.random.default_rng(0)
    words, size = run.model.config.vocab_size - 8, run.args.chunk_size
    prefix, query = rng.integers(0, words, PREFIX), rng.integers(0, words, QUERY)
    select = dataclasses.replace(SELECT, encoding="independent")
    decode = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
    for chunks in run.args.stream:
        context = rng.integers(0, words, chunks * (size - 1))
        begun = time.perf_counter()
        result = generate_ids(
            run.model, prefix, context, query, selection=select, decode=decode,
            chunking=ChunkConfig(size),
        )  # fmt: skip
        seconds = time.perf_counter() - begun - result.timings["compile"]
        row = {
            "chunks": chunks, "document_tokens": len(context), "tokens": BLOCK, "seconds": seconds,
            "compile": result.timings["compile"], "phases": result.timings, "peak_bytes": peak(),
        }  # fmt: skip
        run.record["stream"].append(row)
        print(
            f"streamed {len(context):,} tokens, {BLOCK} out: {seconds:.1f} s, peak "
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        write(run.args.out, run.record)
