"""Whole requests as a user makes them: beside the baselines, and about streamed documents."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.programs import programs
from bench.run import BLOCK, PREFIX, QUERY, SELECT, Run, of_mesh, on, peak
from pdllm_jax import ChunkConfig, DecodeConfig, Engine
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.engine.memory import plan_memory

METHODS = ("prefilling", "dual-cache", "plain")
# Evaluations of "plain" that are timed, at least one a block. All are the same work: the others
# count as much as these.
PLAIN_EVALUATIONS = 2


def decoding(method: str, tokens: int) -> DecodeConfig:
    """Returns one token a step; for "plain" the fewest steps."""
    steps = max(PLAIN_EVALUATIONS, tokens // BLOCK) if method == "plain" else tokens
    return DecodeConfig(gen_length=tokens, block_length=BLOCK, steps=steps)


@dataclasses.dataclass
class Requests:
    """Random requests. Whole prompts have n times C tokens: baselines compute no padding."""

    run: Run

    def __post_init__(self) -> None:
        rng, self.words = np.random.default_rng(0), self.run.model.config.vocab_size - 8
        self.prefix, self.query = (rng.integers(0, self.words, n) for n in (PREFIX, QUERY))
        self.chunking = ChunkConfig(self.run.args.chunk_size)
        self.contexts = {
            n: rng.integers(0, self.words, n * self.chunking.chunk_size - PREFIX - QUERY)
            for n in self.run.args.documents
        }

    def answer(self, method: str, chunks: int, tokens: int) -> tuple[float, Any]:
        """Answers once; returns the seconds of all its evaluations, and the result."""
        decode, context = decoding(method, tokens), self.contexts[chunks]
        begun = time.perf_counter()
        if method == "prefilling":
            engine = Engine(
                self.run.model, selection=SELECT, decoding=decode, chunking=self.chunking
            )
            result = engine.answer(context, self.query, prefix=self.prefix)
        else:
            prompt = np.concatenate([self.prefix, context, self.query])
            engine = Engine(self.run.model, decoding=decode, method=method)
            result = engine.answer([], prompt)
        seconds = time.perf_counter() - begun
        if result.evaluations != decode.steps:
            raise AssertionError(f"{result.evaluations} evaluations instead of {decode.steps}")
        return seconds + result.timings["decode"] * (tokens / decode.steps - 1), result

    def compile(self, cases: list[tuple[str, int, int]]) -> None:
        """Fills the persistent cache, several programs at a time.

        Calls that compile cannot run side by side: a CUDA graph that one thread captures fails on
        what another thread does to the device.
        """
        lowered = []
        for method, n, tokens in cases:
            chunked = method == "prefilling"
            plan = plan_memory(
                self.run.model.config,
                len(self.contexts[n]) + (0 if chunked else PREFIX + QUERY),
                prefix=PREFIX if chunked else 0, query=QUERY if chunked else 0, method=method,
                chunking=self.chunking, selection=SELECT, decode=decoding(method, tokens),
            )  # fmt: skip
            config = self.run.model.config
            needed = programs(config, plan.shapes, plan.selection, plan.decode, dtype=jnp.bfloat16)
            lowered += [program.lower() for program in needed]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda program: program.compile(), lowered))


def end_to_end(run: Run) -> None:
    """Times whole requests by each method; records how many times longer each baseline takes."""
    enable_compilation_cache()
    requests = Requests(run)
    for n in run.args.documents:
        if time.monotonic() - run.start > run.args.limit:
            run.record["left_out"].append(f"{n} chunks{on(run.model)}")
            continue
        cases = [(method, n, tokens) for tokens in run.args.tokens for method in METHODS]
        begun = time.perf_counter()
        if run.model.mesh is None:
            requests.compile(cases)
        for case in cases:
            requests.answer(*case)
        seconds = time.perf_counter() - begun
        run.record["compile_seconds"][f"{n} chunks, first calls{on(run.model)}"] = seconds
        run.say(f"first calls about {n} chunks: {seconds:.0f} s")
        ours: dict[int, float] = {}
        for method, _, tokens in cases:
            repeats = run.args.repeats if method == "prefilling" else 1  # baselines take longest
            answers = [requests.answer(method, n, tokens) for _ in range(repeats)]
            spent = [s for s, _ in answers]
            result = answers[-1][1]
            row = {
                **of_mesh(run.model), "method": method, "chunks": n,
                "prompt_tokens": PREFIX + len(requests.contexts[n]) + QUERY, "tokens": tokens,
                "seconds": float(np.median(spent)), "least": min(spent), "most": max(spent),
                "phases": result.timings, "paths": result.paths,
                "evaluations_timed": result.evaluations,
            }  # fmt: skip
            run.record["end_to_end"].append(row)
            run.say(f"{method:11} {n:3} chunks {tokens:4} tokens {row['seconds']:8.3f} s")
            if method == "prefilling":
                ours[tokens] = row["seconds"]
            else:
                name = f"{method} over prefilling, {n} chunks, {tokens} tokens{on(run.model)}"
                run.note(name, row["seconds"] / ours[tokens])
        jax.clear_caches()  # frees device memory


def stream(run: Run) -> None:
    """Times one request about each streamed document, compiling taken off; the device's peak."""
    requests, size = Requests(run), run.args.chunk_size
    select = dataclasses.replace(SELECT, encoding="independent")
    for chunks in run.args.stream:
        context = np.random.default_rng(0).integers(0, requests.words, chunks * (size - 1))
        begun = time.perf_counter()
        decode = decoding("prefilling", BLOCK)
        engine = Engine(run.model, selection=select, decoding=decode, chunking=requests.chunking)
        result = engine.answer(context, requests.query, prefix=requests.prefix)
        seconds = time.perf_counter() - begun - result.timings["compile"]
        row = {
            **of_mesh(run.model), "chunks": chunks, "document_tokens": len(context),
            "tokens": BLOCK, "seconds": seconds, "compile": result.timings["compile"],
            "phases": result.timings, "peak_bytes": peak(),
        }  # fmt: skip
        run.record["stream"].append(row)
        run.say(f"streamed {len(context):,} tokens: {seconds:.1f} s, peak {peak() / 1e9:.2f} GB")
