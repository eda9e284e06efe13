"""Measures what accuracy does not show: attention on anchors, denoising order, time by length."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.cache_methods.costs import measure_costs
from experiments.grids import Cell
from experiments.records import RecordError, read_json, write_json
from experiments.retrieval import Retrieval
from pallas_kernels import Implementation, Partial
from pdllm_jax import (
    DenoiseState,
    MaskPredictor,
    batch_prompts,
    chunk_prompt,
    denoise_step,
    init_denoise,
    prefill,
)
from pdllm_jax.method.cache import ChunkPool
from pdllm_jax.method.chunking import needle_chunks
from pdllm_jax.method.live_forward import (
    Context,
    live_forward,
    live_positions,
    query_rows,
    row_rotations,
)
from pdllm_jax.method.selection import select
from pdllm_jax.network.rope import rotate
from small_model.tasks import RESPONSE_LENGTH


class Shares(NamedTuple):
    """Attention of the masked response, the mean over its rows; the rest goes to live rows.

    first: to each kept chunk's first token (its anchor, if chunks have one). chunk: to the whole
    chunk. bos: to the prompt's first token.
    """

    first: Float[Array, "L B H K"]
    chunk: Float[Array, "L B H K"]
    bos: Float[Array, "L B H"]


@functools.partial(jax.jit, static_argnames=("implementation",))
def attention_shares(
    model: MaskPredictor,
    pool: ChunkPool,
    state: DenoiseState,
    implementation: Implementation | None = None,
) -> Shares:
    """Returns the attention of a state's next evaluation, layer by layer.

    One pass of query and response over the kept chunks gives the log-sum-exps; the weights are
    computed beside it, from the same queries and keys.
    """
    rows = query_rows(state).ids
    place = jnp.arange(rows.shape[1])
    after_query = place - state.query_length[:, None]
    in_response = (after_query >= 0) & (after_query < state.tokens.shape[1])
    weight = in_response / in_response.sum(axis=1, keepdims=True)  # [B, T]
    positions = live_positions(state.placement, state.prefix_length[:, None] + place)
    rotations = row_rotations(model.config, state.placement, positions)
    ids, lengths = pool.rows_of(state.chunk_ids)
    valid = jnp.arange(pool.k.shape[3]) < lengths[..., None]  # [B, K, C]
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    product = functools.partial(jnp.einsum, **precise)

    def hook(layer: int, q: Array, partial: Partial, layers: list[Shares]) -> list[Shares]:
        batch, t, heads, dim = q.shape
        groups = pool.k.shape[2]

        def mean_share(scores: Array) -> Array:
            """[B, T, G, R, ..] scores to shares, the mean over response rows, [B, H, ..]."""
            scores = scores.reshape(batch, t, heads, *scores.shape[4:]) * dim**-0.5
            lse = partial.lse.swapaxes(1, 2).reshape(batch, t, heads, *[1] * (scores.ndim - 3))
            return product("bth...,bt->bh...", jnp.exp(scores - lse), weight)

        chunk_q = rotate(q[:, None], rotations.per_chunk)[:, :-1]
        chunk_q = chunk_q.reshape(*chunk_q.shape[:3], groups, heads // groups, dim)
        scores = product("bktgrd,bkgcd->btgrkc", chunk_q, pool.k[layer, ids])
        tokens = jnp.where(valid[:, None], mean_share(scores), 0.0)  # [B, H, K, C]
        bos = jnp.zeros((batch, heads), jnp.float32)
        if state.live is not None:
            live_q = rotate(q, rotations.live).reshape(batch, t, groups, heads // groups, dim)
            bos = mean_share(product("btgrd,bgd->btgr", live_q, state.live.k[layer][:, 0]))
        return [*layers, Shares(tokens[..., 0], tokens.sum(axis=-1), bos)]

    context = Context(pool, state.placement, state.live, implementation)
    _, _, layers = live_forward(model, context, rows, hook=hook, hook_carry=[])
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def start(
    bench: Retrieval, cell: Cell, indices: list[int]
) -> tuple[Any, DenoiseState, list[list[int]]]:
    """Returns cache and state before the first step, and the ids of the kept chunks."""
    config, decoding = (
        cell.selection_config(bench.encode_batch),
        cell.decode_config(RESPONSE_LENGTH),
    )
    examples = [bench.example(cell, index) for index in indices]
    parts = [(e["prefix"], e["context"], e["query"]) for e in examples]
    prompt = batch_prompts([chunk_prompt(*part, cell.chunk_config()) for part in parts])
    cache, scores = prefill(bench.model, prompt, config)
    selection = select(scores, config)
    settings = {"settings": config, "implementation": bench.implementation}
    inputs = bench.model, cache, selection, prompt.query, decoding, jax.random.key(0)
    state = init_denoise(*inputs, query_length=prompt.query_length, **settings)
    return cache, state, selection.chunk_ids.tolist()


def attention_row(bench: Retrieval, cell: Cell, examples: int) -> dict[str, Any]:
    """Returns mean shares by layer and head."""
    size, sums = bench.batch_size(cell), defaultdict(list)
    for first in range(0, examples, size):
        indices = list(range(first, min(first + size, examples)))
        cache, state, kept = start(bench, cell, indices)
        pool = cache.pool if state.pool is None else state.pool
        shares = attention_shares(bench.model, pool, state, bench.implementation)
        for b, index in enumerate(indices):
            needle = needle_chunks(bench.example(cell, index)["needle_span"], cell.chunk_config())
            first_tokens, chunks, bos = (np.asarray(x)[:, b] for x in shares)
            held = chunks[..., np.isin(kept[b], sorted(needle))]
            parts = {"first_tokens": first_tokens, "chunks": chunks, "needle_chunks": held}
            for name, part in parts.items():
                sums[name].append(part.sum(axis=-1))
            sums["bos"].append(bos)
    means = {name: np.mean(x, axis=0).round(5).tolist() for name, x in sums.items()}
    return {"settings": cell.canonical().settings(), "examples": examples, **means}


def measure_attention(bench: Retrieval, cell: Cell, tiny: bool) -> dict[str, Any]:
    """Returns a row for each encoding, with and without anchors."""
    encodings, examples = (("joint",), 2) if tiny else (("joint", "independent"), 16)
    cells = [
        dataclasses.replace(cell, encoding=encoding, anchors=anchors)
        for encoding in encodings
        for anchors in (True, False)
    ]
    return {"rows": [attention_row(bench, cell, examples) for cell in cells]}


def measure_order(bench: Retrieval, cell: Cell, examples: int = 4) -> dict[str, Any]:
    """Returns which evaluation filled each slot of the response, at one token a step."""
    cell, decode = dataclasses.replace(cell, threshold=None), bench.tokenizer.backend.decode
    rows = []
    for index in range(examples):
        cache, state, _ = start(bench, cell, [index])
        steps, tokens = denoising_order(bench, cache, state, cell)
        text = [decode([token], skip_special_tokens=False) for token in tokens]
        task = cell.tasks[index % len(cell.tasks)]
        rows.append({"example": index, "task": task, "step": steps, "text": text})
    return {"settings": cell.canonical().settings(), "rows": rows}


def denoising_order(
    bench: Retrieval, cache: Any, state: DenoiseState, cell: Cell
) -> tuple[list[int], list[int]]:
    """Returns the evaluation (from 1) that filled each slot, 0 for none, and the tokens."""
    config = cell.decode_config(state.tokens.shape[1])
    step = functools.partial(denoise_step, config=config, implementation=bench.implementation)
    steps = np.zeros(state.tokens.shape[1], int)
    while int(state.block[0]) < config.n_blocks:
        state = step(bench.model, cache, state)
        filled = np.asarray(state.tokens[0]) != bench.model.config.mask_token_id
        steps[filled & (steps == 0)] = int(state.evaluations[0])
    return steps.tolist(), state.tokens[0].tolist()


LENGTHS, REPEATS = (1024, 2048, 4096, 8192, 16384, 32768), 5
LATER = "a later question, joint"
SPEED: dict[str, dict[str, Any]] = {
    "plain LLaDA": {"selection": "dense"},
    "dual cache": {"selection": "dual-cache"},
    "prefilling, joint": {"selection": "top-k"},
    "prefilling, independent": {"selection": "top-k", "encoding": "independent"},
    LATER: {},
}


def speed_row(bench: Retrieval, cell: Cell, method: str, repeats: int) -> dict[str, Any]:
    """Times one request at a time after a warm-up: 32 tokens, one a step."""
    alone, seconds, flops = dataclasses.replace(bench, batch_tokens=1), [], None
    for repeat in range(repeats + 1):
        if method == LATER:
            seconds.append(_later_question(alone, cell, repeat))
        else:
            (record,) = alone.records(cell, [repeat])
            seconds.append(record["seconds"]["total"])
            flops = record["flops"] and sum(record["flops"].values())
    timed = seconds[1:]
    times = {"seconds": float(np.median(timed)), "least": min(timed), "most": max(timed)}
    return {"method": method, "length": cell.length, **times, "repeats": repeats, "flops": flops}


def _later_question(bench: Retrieval, cell: Cell, index: int) -> float:
    """Returns the seconds of a question about a document that was encoded before."""
    example, engine = bench.example(cell, index), bench.engine(cell)
    document = engine.encode(example["context"], prefix=example["prefix"])
    (result,) = engine.ask(jax.block_until_ready(document), [example["query"]])
    return result.timings["total"] - result.timings["compile"]


def measure_speed(
    bench: Retrieval,
    cell: Cell,
    path: Path,
    record: dict[str, Any],
    deadline: float = float("inf"),
    lengths: tuple[int, ...] = LENGTHS,
    repeats: int = REPEATS,
) -> bool:
    """Writes every row when it is measured, and skips those that the record has.

    Returns False where the deadline (time.monotonic) came first.
    """
    rows = record.setdefault("rows", [])
    done = {(row["method"], row["length"]) for row in rows}
    # This task's text is long enough for every length; all documents are equally long.
    task = ("magic_number",) if "magic_number" in cell.tasks else cell.tasks[:1]
    for length, method in itertools.product(lengths, SPEED):
        if (method, length) in done:
            continue
        if time.monotonic() > deadline:
            return False
        settings = {"length": length, "threshold": None, "tasks": task, **SPEED[method]}
        variant = dataclasses.replace(cell, **settings).canonical()
        rows.append(speed_row(bench, variant, method, repeats))
        write_json(path, record)
    return True


def measure(
    bench: Retrieval,
    note: Mapping[str, Any],
    names: list[str],
    cell: Cell,
    folder: Path,
    deadline: float,
    tiny: bool,
    cells: Sequence[Cell] = (),
) -> None:
    """Makes the measurements that are missing, until the deadline.

    note: on where it runs. cells: that "costs" are measured of.
    """
    for name in names:
        path = folder / f"{name}.json"
        record = read_json(path) if path.exists() else {}
        if record and any(record.get(key) != value for key, value in bench.identity.items()):
            raise RecordError(f"{path} is of another model or other texts: give another folder")
        complete = record.get("complete") and name != "costs"  # of these cells
        if complete or time.monotonic() > deadline:
            continue
        record, complete = {**bench.identity, "run": dict(note), **record}, True
        if name == "attention":
            record |= measure_attention(bench, cell, tiny)
        elif name == "order":
            record |= measure_order(bench, cell)
        elif name == "costs":
            complete = measure_costs(bench, cells, path, record, deadline, 1 if tiny else 4)
        else:
            small = ((256, 512), 1) if tiny else ()
            complete = measure_speed(bench, cell, path, record, deadline, *small)
        write_json(path, {**record, "complete": complete})
