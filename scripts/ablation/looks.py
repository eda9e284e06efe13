"""What accuracy does not show: attention on anchors, the denoising order, time against length."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ablation.bench import Bench, needle_chunks
from ablation.grid import Cell
from ablation.records import write_json
from pallas_kernels import Implementation, Partial
from pdllm_jax import (
    DenoiseState,
    MaskPredictor,
    ask_ids,
    batch_prompts,
    chunk_prompt,
    denoise_step,
    encode_document,
    init_denoise,
    prefill,
)
from pdllm_jax.method.cache import ChunkPool
from pdllm_jax.method.live_forward import live_forward, live_positions, response_rows, row_rotations
from pdllm_jax.method.selection import select
from pdllm_jax.network.rope import rotate
from small_model.tasks import RESPONSE_LENGTH


class Shares(NamedTuple):
    """Where the masked response's attention goes, the mean over its rows; the rest is live rows.

    first: to each kept chunk's first token (its anchor, where there are anchors); chunk: to the
    whole chunk; bos: to the prompt's first token.
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
    """Attention of a state's next evaluation, layer by layer.

    One pass of query and response over the chosen chunks, whose KV nobody keeps. Its attention
    gives the log-sum-exps; weights are computed beside it, from the same queries and keys.
    """
    rows = response_rows(state)
    place = jnp.arange(rows.shape[1])
    counted = (place >= state.query_length[:, None]) & (
        place < state.query_length[:, None] + state.tokens.shape[1]
    )
    weight = counted / counted.sum(axis=1, keepdims=True)  # [B, T]
    where = live_positions(state.placement, state.prefix_length[:, None] + place)
    view = row_rotations(model.config, state.placement, where)
    ids = jnp.maximum(state.chunk_ids, 0)
    lengths = jnp.where(state.chunk_ids >= 0, pool.lengths[ids], 0)
    valid = jnp.arange(pool.k.shape[3]) < lengths[..., None]  # [B, K, C]
    product = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    def hook(layer: int, q: Array, seen: Partial, found: list[Shares]) -> list[Shares]:
        batch, t, heads, dim = q.shape
        groups = pool.k.shape[2]

        def shared(scores: Array) -> Array:
            """[B, T, G, R, ..] scores to the share of each, the mean over rows, [B, H, ..]."""
            scores = scores.reshape(batch, t, heads, *scores.shape[4:]) * dim**-0.5
            lse = seen.lse.swapaxes(1, 2).reshape(batch, t, heads, *[1] * (scores.ndim - 3))
            return product("bth...,bt->bh...", jnp.exp(scores - lse), weight)

        turned = rotate(q[:, None], view.per_chunk)[:, :-1]
        turned = turned.reshape(*turned.shape[:3], groups, heads // groups, dim)
        scores = product("bktgrd,bkgcd->btgrkc", turned, pool.k[layer, ids])
        tokens = jnp.where(valid[:, None], shared(scores), 0.0)  # [B, H, K, C]
        bos = jnp.zeros((batch, heads), jnp.float32)
        if state.live is not None:
            own = rotate(q, view.live).reshape(batch, t, groups, heads // groups, dim)
            bos = shared(product("btgrd,bgd->btgr", own, state.live.k[layer][:, 0]))
        return [*found, Shares(tokens[..., 0], tokens.sum(axis=-1), bos)]

    _, _, found = live_forward(
        model,
        pool,
        state.placement,
        state.live,
        rows,
        state.prefix_length,
        None,
        implementation,
        hook=hook,
        hook_carry=[],
    )
    return jax.tree.map(lambda *layers: jnp.stack(layers), *found)


def begun(
    bench: Bench, cell: Cell, indices: list[int]
) -> tuple[Any, DenoiseState, list[list[int]]]:
    """Cache and state before the first step, and the ids of the kept chunks."""
    config = cell.selecting(bench.encode_batch)
    examples = [bench.example(cell, index) for index in indices]
    prompt = batch_prompts([
        chunk_prompt(e["prefix"], e["context"], e["query"], cell.chunking()) for e in examples
    ])  # fmt: skip
    cache, scores = prefill(bench.model, prompt, config)
    chosen = select(scores, config)
    state = init_denoise(
        bench.model, cache, chosen, prompt.query, cell.decoding(RESPONSE_LENGTH),
        jax.random.key(0), query_length=prompt.query_length, selecting=config,
        implementation=bench.implementation,
    )  # fmt: skip
    return cache, state, np.asarray(chosen.chunk_ids).tolist()


def look_at_attention(
    bench: Bench,
    cell: Cell,
    examples: int = 16,
    encodings: tuple[str, ...] = ("joint", "independent"),
) -> dict[str, Any]:
    """Mean shares by layer and head of every encoding, with and without anchors."""
    rows = []
    for encoding in encodings:
        for anchors in (True, False):
            now = dataclasses.replace(cell, encoding=encoding, anchors=anchors)
            size = bench.batch_size(now)
            parts = []
            for start in range(0, examples, size):
                indices = list(range(start, min(start + size, examples)))
                cache, state, kept = begun(bench, now, indices)
                pool = cache.pool if state.pool is None else state.pool
                found = attention_shares(bench.model, pool, state, bench.implementation)
                parts.append((kept, indices, jax.tree.map(np.asarray, found)))
            first, chunk, needle, bos = [], [], [], []
            for kept, indices, shares in parts:
                for b, index in enumerate(indices):
                    span = bench.example(now, index)["needle_span"]
                    holds = np.isin(kept[b], sorted(needle_chunks(span, now.chunking())))
                    first.append(shares.first[:, b].sum(axis=-1))
                    chunk.append(shares.chunk[:, b].sum(axis=-1))
                    needle.append(shares.chunk[:, b][..., holds].sum(axis=-1))
                    bos.append(shares.bos[:, b])
            rows.append({
                "settings": now.canonical().settings(),
                "examples": examples,
                **{
                    name: np.mean(values, axis=0).round(5).tolist()
                    for name, values in (
                        ("first_tokens", first), ("chunks", chunk),
                        ("needle_chunks", needle), ("bos", bos),
                    )
                },
            })  # fmt: skip
    return {"rows": rows}


def look_at_order(bench: Bench, cell: Cell, examples: int = 4) -> dict[str, Any]:
    """In which evaluation each slot of the response was filled: one token a step."""
    cell, decode = dataclasses.replace(cell, threshold=None), bench.tokenizer.backend.decode
    rows = []
    for index in range(examples):
        cache, state, _ = begun(bench, cell, [index])
        filled, tokens = denoising_order(bench, cache, state, cell)
        rows.append({
            "example": index,
            "task": cell.tasks[index % len(cell.tasks)],
            "step": filled,
            "text": [decode([token], skip_special_tokens=False) for token in tokens],
        })  # fmt: skip
    return {"settings": cell.canonical().settings(), "rows": rows}


def denoising_order(
    bench: Bench, cache: Any, state: DenoiseState, cell: Cell
) -> tuple[list[int], list[int]]:
    """Evaluation (from 1) that filled each slot, 0 where none did, and the tokens."""
    config = cell.decoding(state.tokens.shape[1])
    filled = np.zeros(state.tokens.shape[1], int)
    while int(state.block[0]) < config.n_blocks:
        state = denoise_step(
            bench.model, cache, state, config=config, implementation=bench.implementation
        )
        there = np.asarray(state.tokens[0]) != bench.model.config.mask_token_id
        filled[there & (filled == 0)] = int(state.evaluations[0])
    return filled.tolist(), np.asarray(state.tokens[0]).tolist()


SPEED_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SPEED = {
    "plain LLaDA": {"selection": "dense"},
    "dual cache": {"selection": "dual-cache"},
    "prefilling, joint": {"selection": "top-k"},
    "prefilling, independent": {"selection": "top-k", "encoding": "independent"},
}
LATER = "a later question, joint"


def speed_rows(
    bench: Bench, cell: Cell, lengths: tuple[int, ...], repeats: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Measurements to make, one request at a time: 32 tokens, one a step, after a warm-up."""
    alone = dataclasses.replace(bench, batch_tokens=1)

    def measured(name: str, length: int, cell: Cell) -> dict[str, Any]:
        seconds, flops = [], None
        for repeat in range(repeats + 1):
            if name == LATER:
                seconds.append(_later_question(alone, cell, repeat))
            else:
                (record,) = alone.records(cell, [repeat])
                seconds.append(record["seconds"]["total"])
                flops = record["flops"] and sum(record["flops"].values())
        return {
            "method": name, "length": length, "seconds": float(np.median(seconds[1:])),
            "least": min(seconds[1:]), "most": max(seconds[1:]), "repeats": repeats, "flops": flops,
        }  # fmt: skip

    # Its text is long enough for every length; the documents are of equal length in any case.
    task = ("magic_number",) if "magic_number" in cell.tasks else cell.tasks[:1]
    for length in lengths:
        for name, change in (*SPEED.items(), (LATER, {})):
            settings = {"length": length, "threshold": None, "tasks": task, **change}
            yield functools.partial(
                measured, name, length, dataclasses.replace(cell, **settings).canonical()
            )


def _later_question(bench: Bench, cell: Cell, index: int) -> float:
    """Seconds of a question about a document that was encoded before it came."""
    example = bench.example(cell, index)
    prompt = chunk_prompt(
        example["prefix"], example["context"], example["query"], cell.chunking(), tight=True
    )
    cache = jax.block_until_ready(
        encode_document(bench.model, prompt, encode_batch=bench.encode_batch)
    )
    (result,) = ask_ids(
        bench.model, cache, [example["query"]], selection=cell.selecting(bench.encode_batch),
        decode=cell.decoding(RESPONSE_LENGTH), implementation=bench.implementation,
    )  # fmt: skip
    return result.timings["total"] - result.timings["compile"]


def look_at_speed(
    bench: Bench,
    cell: Cell,
    path: Path,
    known: dict[str, Any],
    *,
    lengths: tuple[int, ...] = SPEED_LENGTHS,
    repeats: int = 5,
    deadline: float = float("inf"),
) -> bool:
    """Writes every row as soon as it is measured; goes on behind those that `known` has.

    False where the deadline (time.monotonic) came first.
    """
    rows = known.setdefault("rows", [])
    done = {(row["method"], row["length"]) for row in rows}
    for measure in speed_rows(bench, cell, lengths, repeats):
        name, length, _ = measure.args
        if (name, length) in done:
            continue
        if time.monotonic() > deadline:
            return False
        rows.append(measure())
        write_json(path, known)
    return True
