"""How fast at LLaDA-8B shapes: the denoising step, the scoring pass, and whole requests.

Random weights, bfloat16; joint encoding of K = 4 chunks of 1,024, a query of 32 tokens, draft and
scores counted. Whole requests are timed as `generate_ids` is called, host time included, after a
first call that compiles; the baselines run in the same process. With several meshes, or several
ways to make their sums, the sections run on one after the other, rows name theirs, and ratios to
the first are noted.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bench.record import copy_bandwidth, write
from bench.requests import BLOCK, PREFIX, QUERY, SELECT, end_to_end, stream
from bench.run import Run, begin, of_mesh, on
from pallas_kernels import AllReduceImplementation
from pdllm_jax import (
    DecodeConfig,
    MaskPredictor,
    ModelConfig,
    denoise,
    denoise_step,
    draft_response,
    init_denoise,
    make_mesh,
    prefill,
    select_top_k,
    shard_model,
)
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.network.sharding import TENSOR, parse_mesh, place

SECTIONS = ("step", "prefill", "end-to-end", "stream")


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
    parser.add_argument(
        "--mesh", nargs="+", metavar="DATAxTENSOR",
        help="meshes to run on, e.g. 1x1 1x2 2x1; by default one device without any",
    )  # fmt: skip
    parser.add_argument(
        "--sums", nargs="+", choices=get_args(AllReduceImplementation), default=[None],
        help="what adds up a few rows over TENSOR; by default what a model takes by itself",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the sections in order, as far as the limit lets them."""
    copied = copy_bandwidth(0.01 if args.tiny else 2.0, 2 if args.tiny else 50)
    run = begin(args)
    run.record["copy_bandwidth"] = copied
    run.record["step"], run.record["end_to_end"], run.record["stream"] = [], [], []
    sections = {"step": step, "prefill": score_document, "end-to-end": end_to_end, "stream": stream}
    plain = run.model
    for mesh, sums in meshes(args):
        if mesh is not None:
            run.model = plain  # lets the last mesh's weights go
            run.model = shard_model(plain, mesh, sums=sums)
        for name in args.sections:
            if time.monotonic() - run.begun > args.limit:
                run.record["left_out"].append(name + on(run.model))
            else:
                sections[name](run)
    if args.mesh:
        compare_meshes(run)
    write(args.out, run.record)
    return 0


def meshes(
    args: argparse.Namespace,
) -> Iterator[tuple[Mesh | None, AllReduceImplementation | None]]:
    """Meshes to run on, and what makes their sums, where there are any."""
    for name in args.mesh or [None]:
        mesh = None if name is None else make_mesh(*parse_mesh(name))
        alone = mesh is None or mesh.shape[TENSOR] == 1
        yield from ((mesh, sums) for sums in ((None,) if alone else args.sums))


def threads_on(model: MaskPredictor, most: int | None = None) -> int | None:
    """How many may run programs: one on a mesh, where collectives must come in one order."""
    return most if model.mesh is None else 1


def compare_meshes(run: Run) -> None:
    """Time on each mesh over that on the first."""
    times: dict[str, dict[str, float]] = {}
    for row in run.record["step"]:
        times.setdefault(f"step, {row['cached_tokens']} cached", {})[row["mesh"]] = row["ms"]
    for name, row in run.record["seconds"].items():
        what, mesh = name.split(", mesh ", 1)
        times.setdefault(what, {})[mesh] = row["median"]
    for row in run.record["end_to_end"]:
        what = f"{row['method']}, {row['chunks']} chunks, {row['tokens']} tokens"
        times.setdefault(what, {})[row["mesh"]] = row["seconds"]
    for what, found in times.items():
        first, *others = found
        for mesh in others:
            run.note(f"{what}: {mesh} over {first}", found[mesh] / found[first])


def weight_bytes(run: Run) -> int:
    """Bytes of weights that an evaluation reads: all but the embedding, of which it reads rows."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(run.model, nnx.Param)))
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
    prefix = jnp.zeros(
        (config.n_layers, 1, PREFIX, config.n_kv_heads, config.head_dim), jnp.bfloat16
    )
    cache = ChunkCache(
        pool, prompt.chunks[:, :most], prompt.chunk_lengths[:, :most], prompt.prefix,
        prompt.prefix_length, prefix, prefix,
    )  # fmt: skip
    cache = place(run.model.mesh, cache)
    parts = 1 if run.model.mesh is None else run.model.mesh.shape[TENSOR]

    def start(k: int):
        """As after joint encoding: live KV that is fresh."""
        chosen = select_top_k(-jnp.arange(most, dtype=jnp.float32)[None], k)
        state = init_denoise(
            run.model, cache, chosen, prompt.query, decode, jax.random.key(0),
            query_length=prompt.query_length, encoding="independent",
        )  # fmt: skip
        state = dataclasses.replace(state, stale=jnp.zeros((1,), bool), live_encoded=True)
        return place(run.model.mesh, state)

    states = {k: start(k) for k in run.args.cached}
    with ThreadPoolExecutor(threads_on(run.model)) as threads:  # compiles side by side
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
        floor = (weight_bytes(run) + k * chunk_bytes) / parts / run.record["copy_bandwidth"]
        median = float(np.median(spent[1:]))
        row = {
            **of_mesh(run.model), "chunks": k, "cached_tokens": k * size, "rows": BLOCK,
            "ms": 1e3 * median, "ms_least": 1e3 * min(spent[1:]), "ms_most": 1e3 * max(spent[1:]),
            "ms_floor": 1e3 * floor, "times_floor": median / floor,
            "ms_from_python": 1e3 * np.median(python),
            "python_over_loop": np.median(python) / median,
        }  # fmt: skip
        run.record["step"].append(row)
        print(
            f"step, {k * size} cached{on(run.model)}: {row['ms']:.3f} ms [{row['ms_least']:.3f}, "
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
    draft = run.timed(f"draft{on(run.model)}", lambda: draft_response(run.model, prompt, passing))
    name = f"score {chunks} chunks{on(run.model)}"
    run.timed(name, lambda: prefill(run.model, prompt, SELECT, draft=draft)[1])
    work = pass_flops(
        run.model.config, chunks, run.args.chunk_size, QUERY + SELECT.scorer.draft_length,
        SELECT.scorer.masked_copies or 0, QUERY + SELECT.scorer.draft_steps,
    )  # fmt: skip
    run.note(f"TFLOP/s, {name}", work / run.median(name) / 1e12)
