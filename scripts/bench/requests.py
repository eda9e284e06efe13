"""Whole requests as `generate_ids` is called: beside baselines, and about streamed documents."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.programs import programs
from bench.record import write
from bench.run import Run, of_mesh, on, peak
from pdllm_jax import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.deprecated import generate_ids
from pdllm_jax.engine.memory import shapes_of

SELECT = SelectionConfig(top_k=4, masked_copies=4, draft_length=4, draft_steps=2)
BLOCK, PREFIX, QUERY = 32, 16, 32
# Evaluations of `plain` that are timed, or one a block where that is more, of as many as there are
# tokens: each is the same work.
PLAIN_EVALUATIONS = 2


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
            run.record["left_out"].append(f"{n} chunks{on(run.model)}")
            continue
        if run.model.mesh is None:
            begun = time.perf_counter()
            compile_all(cases)
            run.record["compile_seconds"][f"{n} chunks, side by side"] = time.perf_counter() - begun
            print(f"compiled for {n} chunks: {time.perf_counter() - begun:.0f} s", flush=True)
        begun = time.perf_counter()
        for case in cases:
            request(*case)
        name = f"{n} chunks, first calls{on(run.model)}"
        run.record["compile_seconds"][name] = time.perf_counter() - begun
        print(f"first calls: {time.perf_counter() - begun:.0f} s", flush=True)
        for method, _, tokens in cases:
            # What takes longest is repeated least.
            repeats = run.args.repeats if method == "prefilling" else 1
            made = [request(method, n, tokens) for _ in range(repeats)]
            seconds = sorted(s for s, _ in made)
            row = {
                **of_mesh(run.model), "method": method, "chunks": n,
                "prompt_tokens": around + len(contexts[n]), "tokens": tokens,
                "seconds": float(np.median(seconds)), "least": seconds[0], "most": seconds[-1],
                "phases": made[-1][1].timings, "paths": made[-1][1].paths,
                "evaluations_timed": made[-1][1].evaluations,
            }  # fmt: skip
            run.record["end_to_end"].append(row)
            print(f"{method:11} {n:3} chunks {tokens:4} tokens {row['seconds']:8.3f} s", flush=True)
            write(run.args.out, run.record)
        jax.clear_caches()  # makes room
    took = {
        (r["method"], r["chunks"], r["tokens"]): r["seconds"]
        for r in run.record["end_to_end"]
        if r.items() >= of_mesh(run.model).items()
    }
    for (method, n, tokens), seconds in took.items():
        if method != "prefilling" and ("prefilling", n, tokens) in took:
            faster = seconds / took["prefilling", n, tokens]
            name = f"{method} over prefilling, {n} chunks, {tokens} tokens{on(run.model)}"
            run.note(name, faster)


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
            **of_mesh(run.model), "chunks": chunks, "document_tokens": len(context),
            "tokens": BLOCK, "seconds": seconds,
            "compile": result.timings["compile"], "phases": result.timings, "peak_bytes": peak(),
        }  # fmt: skip
        run.record["stream"].append(row)
        print(
            f"streamed {len(context):,} tokens, {BLOCK} out: {seconds:.1f} s, peak "
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        write(run.args.out, run.record)
