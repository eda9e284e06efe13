"""Times the denoising step, the scoring pass and whole requests at the shapes of --model.

Random weights, bfloat16, joint encoding of K = 4 chunks of 1,024, a query of 32 tokens; draft and
scores are counted. Whole requests are timed as a user calls them, host time included, after a first
call that compiles; the baselines run in the same process. With several meshes, or several ways to
make their sums, the sections run on each in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import pdllm_jax as pdllm
from bench.record import clock, copy_bandwidth, peak, spread
from bench.run import BLOCK, MODEL_OPTIONS, PREFIX, QUERY, Run, draw, random_layers
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.network.sharding import TENSOR, parse_mesh, place

METHODS = ("prefilling", "dual-cache", "plain")
# Evaluations of "plain" that are timed, at least one a block. All are the same work: the others
# count as much as these.
PLAIN_EVALUATIONS = 2


def main(args: argparse.Namespace) -> None:
    """Runs the sections on every mesh."""
    copied = copy_bandwidth(0.01 if args.tiny else 2.0, 2 if args.tiny else 50)
    run = Run(args)
    run.record |= {"copy_bandwidth": copied, "step": [], "end_to_end": [], "stream": []}
    plain = run.model
    for mesh, sums in meshes(args):
        if mesh is not None:
            run.model = plain  # frees the weights on the mesh before
            run.model = pdllm.shard_model(plain, mesh, sums=sums)
        run.sections(SECTIONS, args.sections)


def meshes(args: argparse.Namespace) -> Iterator[tuple[Mesh | None, Any]]:
    """Yields the meshes to run on with the ways to make their sums, where there are several."""
    for name in args.mesh or [None]:
        mesh = None if name is None else pdllm.make_mesh(*parse_mesh(name))
        alone = mesh is None or mesh.shape[TENSOR] == 1
        yield from ((mesh, sums) for sums in ((None,) if alone else args.sums or (None,)))


def weight_bytes(run: Run) -> int:
    """Returns the bytes of weights that an evaluation reads: of the embedding only single rows."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(run.model, nnx.Param)))
    total = sum(leaf.nbytes for leaf in leaves)
    tied = run.model.config.weight_tying
    return total if tied else total - run.model.embedding.weight[...].nbytes


def random_document(run: Run, chunks: int) -> ChunkCache:
    """Returns a cache of that many full chunks, its KV random."""
    config, size, prompt = run.model.config, run.args.chunk_size, run.prompt(chunks)
    shape = (config.n_layers, chunks, config.n_kv_heads, size, config.head_dim)

    k, v = (random_layers(shape, jax.random.key(side)) for side in (1, 2))
    pool = ChunkPool(k, v, jnp.full((chunks,), size))
    prefix_shape = (config.n_layers, 1, PREFIX, config.n_kv_heads, config.head_dim)
    prefix = jnp.zeros(prefix_shape, jnp.bfloat16)
    ids = (prompt.chunks[:, :chunks], prompt.chunk_lengths[:, :chunks])
    ids += (prompt.prefix, prompt.prefix_length)
    return place(run.model.mesh, ChunkCache(pool, *ids, prefix, prefix))


def step(run: Run) -> None:
    """Times one evaluation of 32 rows against K chunks: in the loop on the device, from Python."""
    decode = pdllm.DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
    most, mesh = max(run.args.cached), run.model.mesh
    cache, prompt = random_document(run, most), run.prompt(most)
    one = functools.partial(pdllm.denoise_step, run.model, cache, config=decode)

    def start(k: int) -> Any:
        """Returns the state after joint encoding: the KV of the live rows is fresh."""
        chosen = pdllm.select_top_k(-jnp.arange(most, dtype=jnp.float32)[None], k)
        settings: Any = {"query_length": prompt.query_length, "encoding": "independent"}
        state = pdllm.init_denoise(
            run.model, cache, chosen, prompt.query, decode, jax.random.key(0), **settings
        )
        state = dataclasses.replace(state, stale=jnp.zeros((1,), bool), live_encoded=True)
        return jax.block_until_ready(place(mesh, state))

    def loop(state: Any) -> float:
        run_all = functools.partial(pdllm.denoise, run.model, cache, config=decode)
        return clock(lambda: run_all(state).tokens)[0] / BLOCK

    def from_python(state: Any) -> float:
        state = jax.block_until_ready(one(state))

        def others() -> Any:
            nonlocal state
            for _ in range(BLOCK - 1):
                state = one(state)
            return state.tokens

        return clock(others)[0] / (BLOCK - 1)

    parts = 1 if mesh is None else mesh.shape[TENSOR]
    chunk_bytes = (cache.pool.k.nbytes + cache.pool.v.nbytes) // most
    for k in run.args.cached:
        loop(start(k))  # compiles
        spent = [1e3 * loop(start(k)) for _ in range(run.args.repeats + 1)][1:]
        python = float(np.median([1e3 * from_python(start(k)) for _ in range(run.args.repeats)]))
        floor = (weight_bytes(run) + k * chunk_bytes) / parts / run.record["copy_bandwidth"] * 1e3
        row = {**run.of_mesh, "chunks": k, "cached_tokens": k * run.args.chunk_size, "rows": BLOCK}
        row |= spread(spent, ("ms", "ms_least", "ms_most"))
        row |= {"ms_floor": floor, "times_floor": row["ms"] / floor, "ms_from_python": python}
        run.record["step"].append({**row, "python_over_loop": python / row["ms"]})
        run.say(
            f"step, {row['cached_tokens']} cached{run.on}: {row['ms']:.3f} ms "
            f"[{row['ms_least']:.3f}, {row['ms_most']:.3f}], {row['times_floor']:.3f} times the "
            f"floor; from Python {row['ms_from_python']:.3f}"
        )


def pass_flops(run: Run, chunks: int) -> float:
    """Returns the floating-point operations of encoding and scoring, padding not counted.

    Products of every row with the layers' weights, attention of chunk rows over prefix and chunk
    and of each copy of the question over prefix, chunk and itself, and the LM head over its rows.
    """
    config, size, scorer = run.model.config, run.args.chunk_size, run.select.scorer
    model, kv = config.d_model, config.n_kv_heads * config.head_dim
    layer = 2 * model * (2 * model + 2 * kv + 3 * config.mlp_hidden_size)
    copy = QUERY + scorer.draft_length
    copies = getattr(scorer, "masked_copies", 1) * copy
    rows = PREFIX + chunks * (size + copies)
    pairs = PREFIX**2 + chunks * (size * (PREFIX + size) + copies * (PREFIX + size + copy))
    head = 2 * model * config.vocab_size * chunks * (QUERY + scorer.draft_steps)
    return config.n_layers * (rows * layer + 4 * model * pairs) + head


def score_document(run: Run) -> None:
    """Times the scoring of a document as joint encoding needs it, the draft apart; TFLOP/s."""
    chunks = max(run.args.documents)
    prompt, name = run.prompt(chunks), f"score {chunks} chunks{run.on}"
    draft = functools.partial(draft_response, run.model, prompt.question, run.select.scoring())
    drafted = run.timed(f"draft{run.on}", draft)
    run.timed(name, lambda: pdllm.prefill(run.model, prompt, run.select, draft=drafted)[1])
    work = pass_flops(run, chunks)
    run.note(f"TFLOP/s, {name}", work / run.median(name) / 1e12)


class Requests:
    """Random requests. Whole prompts have n times C tokens: baselines compute no padding."""

    def __init__(self, run: Run):
        self.run, self.rng = run, np.random.default_rng(0)
        self.prefix, self.query = self.draw(PREFIX), self.draw(QUERY)

    def draw(self, length: int) -> np.ndarray:
        return draw(self.rng, self.run.model.config, length)

    def answer(self, method: str, context: np.ndarray, tokens: int, **select: Any):
        """Answers once; returns the seconds of all its evaluations, and the result.

        One token a step; for "plain" the fewest steps. select: changes of run.select.
        """
        steps = max(PLAIN_EVALUATIONS, tokens // BLOCK) if method == "plain" else tokens
        decode = pdllm.DecodeConfig(gen_length=tokens, block_length=BLOCK, steps=steps)
        settings: dict[str, Any] = {"decoding": decode, "method": method}
        request = [[], np.concatenate([self.prefix, context, self.query])]
        prefix = self.prefix[:0]
        if method == "prefilling":
            chunking = pdllm.ChunkConfig(self.run.args.chunk_size)
            settings |= {
                "selection": dataclasses.replace(self.run.select, **select),
                "chunking": chunking,
            }
            request, prefix = [context, self.query], self.prefix
        seconds, result = clock(
            lambda: pdllm.Engine(self.run.model, **settings).answer(*request, prefix=prefix)
        )
        if result.evaluations != steps:
            raise AssertionError(f"{result.evaluations} evaluations instead of {steps}")
        return seconds + result.timings["decode"] * (tokens / steps - 1), result


def end_to_end(run: Run) -> None:
    """Times whole requests by each method; records how many times longer each baseline takes."""
    enable_compilation_cache()
    requests = Requests(run)
    for n in run.args.documents:
        if run.late(f"{n} chunks"):
            continue
        context = requests.draw(n * run.args.chunk_size - PREFIX - QUERY)
        cases = [(method, context, tokens) for tokens in run.args.tokens for method in METHODS]
        seconds, _ = clock(lambda cases=cases: [requests.answer(*case) for case in cases])
        run.record["compile_seconds"][f"{n} chunks, first calls{run.on}"] = seconds
        run.say(f"first calls about {n} chunks: {seconds:.0f} s")
        ours: dict[int, float] = {}
        for method, _, tokens in cases:
            repeats = run.args.repeats if method == "prefilling" else 1  # baselines take longest
            answers = [requests.answer(method, context, tokens) for _ in range(repeats)]
            result, length = answers[-1][1], PREFIX + len(context) + QUERY
            row = {**run.of_mesh, "method": method, "chunks": n, "prompt_tokens": length}
            row |= spread([spent for spent, _ in answers], ("seconds", "least", "most"))
            row |= {"tokens": tokens, "phases": result.timings, "paths": result.paths}
            run.record["end_to_end"].append({**row, "evaluations_timed": result.evaluations})
            run.say(f"{method:11} {n:3} chunks {tokens:4} tokens {row['seconds']:8.3f} s")
            ours.setdefault(tokens, row["seconds"])  # "prefilling" is the first method
            if method != "prefilling":
                name = f"{method} over prefilling, {n} chunks, {tokens} tokens{run.on}"
                run.note(name, row["seconds"] / ours[tokens])
        jax.clear_caches()  # frees device memory


def stream(run: Run) -> None:
    """Times one request about each streamed document, compiling taken off; the device's peak."""
    requests = Requests(run)
    for chunks in run.args.stream:
        context = requests.draw(chunks * (run.args.chunk_size - 1))
        seconds, result = requests.answer("prefilling", context, BLOCK, encoding="independent")
        spent = {"seconds": seconds - result.timings["compile"], "phases": result.timings}
        row = {**run.of_mesh, "chunks": chunks, "document_tokens": len(context), "tokens": BLOCK}
        run.record["stream"].append({**row, **spent, "peak_bytes": peak()})
        gigabytes = f"{peak() / 1e9:.2f} GB"
        run.say(f"streamed {len(context):,} tokens: {spent['seconds']:.1f} s, peak {gigabytes}")


SECTIONS = {"step": step, "prefill": score_document, "end-to-end": end_to_end, "stream": stream}
OPTIONS = MODEL_OPTIONS | {
    "--sections": (tuple(SECTIONS), ""),
    "--cached": ([4, 8, 32], "step: chunks attended to"),
    "--documents": ([8, 16, 32], "chunks of documents"),
    "--stream": ([128, 1024], "chunks of streamed ones"),
    "--tokens": ([32, 128], "of a response"),
    "--mesh": ([str], "meshes DATAxTENSOR, e.g. 1x1 1x2 2x1"),
    "--sums": ([str], "what adds up a few rows over TENSOR (default: the model's choice)"),
}
