"""Times the denoising step, the scoring pass and whole requests at the shapes of LLaDA-8B.

Random weights, bfloat16, joint encoding of K = 4 chunks of 1,024, a query of 32 tokens; draft and
scores are counted. Whole requests are timed as a user calls them, host time included, after a first
call that compiles; the baselines run in the same process. With several meshes, or several ways to
make their sums, the sections run on each in turn, and the record holds ratios to the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bench.record import copy_bandwidth, times, write
from bench.requests import end_to_end, stream
from bench.run import BLOCK, PREFIX, QUERY, SELECT, Run, add_model_arguments, begin, of_mesh, on
from pallas_kernels import AllReduceImplementation
from pdllm_jax import (
    DecodeConfig,
    ModelConfig,
    denoise,
    denoise_step,
    init_denoise,
    make_mesh,
    prefill,
    select_top_k,
    shard_model,
)
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.network.sharding import TENSOR, parse_mesh, place

SECTIONS = ("step", "prefill", "end-to-end", "stream")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py speed`."""
    add_model_arguments(parser)
    option = parser.add_argument
    option("--out", type=Path, default=Path("benchmarks/speed.json"))
    option("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    option("--cached", nargs="+", type=int, default=[4, 8, 32], help="step: chunks attended to")
    option("--documents", nargs="+", type=int, default=[8, 16, 32], help="chunks of documents")
    option("--stream", nargs="+", type=int, default=[128, 1024], help="chunks of streamed ones")
    option("--tokens", nargs="+", type=int, default=[32, 128], help="of a response")
    option("--mesh", nargs="+", metavar="DATAxTENSOR", help="meshes, e.g. 1x1 1x2 2x1")
    option(
        "--sums", nargs="+", choices=get_args(AllReduceImplementation), default=[None],
        help="what adds up a few rows over TENSOR (default: the model's choice)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the sections on every mesh."""
    copied = copy_bandwidth(0.01 if args.tiny else 2.0, 2 if args.tiny else 50)
    run = begin(args)
    run.record |= {"copy_bandwidth": copied, "step": [], "end_to_end": [], "stream": []}
    table = {"step": step, "prefill": score_document, "end-to-end": end_to_end, "stream": stream}
    plain = run.model
    for mesh, sums in meshes(args):
        if mesh is not None:
            run.model = plain  # frees the weights on the mesh before
            run.model = shard_model(plain, mesh, sums=sums)
        run.sections(table, args.sections)
    if args.mesh:
        compare_meshes(run)
    write(args.out, run.record)
    return 0


def meshes(
    args: argparse.Namespace,
) -> Iterator[tuple[Mesh | None, AllReduceImplementation | None]]:
    """Yields the meshes to run on with the ways to make their sums, where there are several."""
    for name in args.mesh or [None]:
        mesh = None if name is None else make_mesh(*parse_mesh(name))
        alone = mesh is None or mesh.shape[TENSOR] == 1
        yield from ((mesh, sums) for sums in ((None,) if alone else args.sums))


def compare_meshes(run: Run) -> None:
    """Records every time over the same time on the first mesh."""
    by_name: dict[str, dict[str, float]] = {}
    for name, seconds in times(run.record).items():
        what, mesh = name.split(", mesh ", 1)
        by_name.setdefault(what, {})[mesh] = seconds
    for what, on_mesh in by_name.items():
        first, *others = on_mesh
        for mesh in others:
            run.note(f"{what}: {mesh} over {first}", on_mesh[mesh] / on_mesh[first])


def weight_bytes(run: Run) -> int:
    """Returns the bytes of weights that an evaluation reads: of the embedding only single rows."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(run.model, nnx.Param)))
    total = sum(leaf.nbytes for leaf in leaves)
    tied = run.model.config.weight_tying
    return total if tied else total - run.model.embedding.weight[...].nbytes


def random_document(run: Run, chunks: int) -> ChunkCache:
    """Returns a cache of that many full chunks, its KV random."""
    config, size = run.model.config, run.args.chunk_size
    shape = (config.n_layers, chunks, config.n_kv_heads, size, config.head_dim)

    @jax.jit
    def fill(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda k: jax.random.normal(k, shape[1:], jnp.bfloat16), keys)

    pool = ChunkPool(fill(jax.random.key(1)), fill(jax.random.key(2)), jnp.full((chunks,), size))
    prompt = run.prompt(chunks)
    prefix = jnp.zeros(
        (config.n_layers, 1, PREFIX, config.n_kv_heads, config.head_dim), jnp.bfloat16
    )
    cache = ChunkCache(
        pool, prompt.chunks[:, :chunks], prompt.chunk_lengths[:, :chunks], prompt.prefix,
        prompt.prefix_length, prefix, prefix,
    )  # fmt: skip
    return place(run.model.mesh, cache)


def step(run: Run) -> None:
    """Times one evaluation of 32 rows against K chunks: in the loop on the device, from Python."""
    decode = DecodeConfig(gen_length=BLOCK, block_length=BLOCK)
    most, mesh = max(run.args.cached), run.model.mesh
    cache, prompt = random_document(run, most), run.prompt(most)

    def start(k: int) -> Any:
        """Returns the state after joint encoding: the KV of the live rows is fresh."""
        chosen = select_top_k(-jnp.arange(most, dtype=jnp.float32)[None], k)
        state = init_denoise(
            run.model, cache, chosen, prompt.query, decode, jax.random.key(0),
            query_length=prompt.query_length, encoding="independent",
        )  # fmt: skip
        state = dataclasses.replace(state, stale=jnp.zeros((1,), bool), live_encoded=True)
        return jax.block_until_ready(place(mesh, state))

    def loop(state: Any) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(denoise(run.model, cache, state, config=decode).tokens)
        return (time.perf_counter() - begun) / BLOCK

    def from_python(state: Any) -> float:
        state = denoise_step(run.model, cache, state, config=decode)
        jax.block_until_ready(state.tokens)
        begun = time.perf_counter()
        for _ in range(BLOCK - 1):
            state = denoise_step(run.model, cache, state, config=decode)
        jax.block_until_ready(state.tokens)
        return (time.perf_counter() - begun) / (BLOCK - 1)

    parts = 1 if mesh is None else mesh.shape[TENSOR]
    chunk_bytes = (cache.pool.k.nbytes + cache.pool.v.nbytes) // most
    for k in run.args.cached:
        loop(start(k))  # compiles
        spent = [loop(start(k)) for _ in range(run.args.repeats + 1)][1:]
        python = float(np.median([from_python(start(k)) for _ in range(run.args.repeats)]))
        floor = (weight_bytes(run) + k * chunk_bytes) / parts / run.record["copy_bandwidth"]
        median = float(np.median(spent))
        row = {
            **of_mesh(run.model), "chunks": k, "cached_tokens": k * run.args.chunk_size,
            "rows": BLOCK, "ms": 1e3 * median, "ms_least": 1e3 * min(spent),
            "ms_most": 1e3 * max(spent), "ms_floor": 1e3 * floor, "times_floor": median / floor,
            "ms_from_python": 1e3 * python, "python_over_loop": python / median,
        }  # fmt: skip
        run.record["step"].append(row)
        run.say(
            f"step, {row['cached_tokens']} cached{on(run.model)}: {row['ms']:.3f} ms "
            f"[{row['ms_least']:.3f}, {row['ms_most']:.3f}], {row['times_floor']:.3f} times the "
            f"floor; from Python {row['ms_from_python']:.3f}"
        )


def pass_flops(config: ModelConfig, chunks: int, size: int) -> float:
    """Returns the floating-point operations of encoding and scoring, padding not counted.

    Products of every row with the layers' weights, attention of chunk rows over prefix and chunk
    and of each masked copy over prefix, chunk and itself, and the LM head over scored rows.
    """
    model, kv = config.d_model, config.n_kv_heads * config.head_dim
    layer = 2 * model * (2 * model + 2 * kv + 3 * config.mlp_hidden_size)
    copy = QUERY + SELECT.scorer.draft_length
    copies = (SELECT.scorer.masked_copies or 0) * copy
    rows = PREFIX + chunks * (size + copies)
    pairs = PREFIX**2 + chunks * (size * (PREFIX + size) + copies * (PREFIX + size + copy))
    head = 2 * model * config.vocab_size * chunks * (QUERY + SELECT.scorer.draft_steps)
    return config.n_layers * (rows * layer + 4 * model * pairs) + head


def score_document(run: Run) -> None:
    """Times the scoring of a document as joint encoding needs it, the draft apart; TFLOP/s."""
    chunks = max(run.args.documents)
    prompt, passing = run.prompt(chunks), SELECT.scoring()
    draft = run.timed(
        f"draft{on(run.model)}", lambda: draft_response(run.model, prompt.question, passing)
    )
    name = f"score {chunks} chunks{on(run.model)}"
    run.timed(name, lambda: prefill(run.model, prompt, SELECT, draft=draft)[1])
    work = pass_flops(run.model.config, chunks, run.args.chunk_size)
    run.note(f"TFLOP/s, {name}", work / run.median(name) / 1e12)
