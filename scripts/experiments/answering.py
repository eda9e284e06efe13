"""Answers of the library: all calls that experiments make to it, but for measurements.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    Engine,
    MaskPredictor,
    Request,
    SelectionConfig,
    denoise,
    init_denoise,
)
from pdllm_jax.engine.request import Timer, request_keys
from pdllm_jax.method.cache_methods import Method, cache_method
from pdllm_jax.method.chunking import TokenIds, bucket

METHODS: tuple[Method, ...] = ("plain", "prefix-cache", "dual-cache", "prefilling")
Prompt = tuple[TokenIds, TokenIds, TokenIds]  # token ids of prefix, context and query


def answer(
    model: MaskPredictor,
    prompts: Sequence[Prompt],
    *,
    method: Method,
    chunking: ChunkConfig,
    selection: SelectionConfig,
    decoding: DecodeConfig,
    bos_id: int,
    seeds: Sequence[int],
    oracles: Sequence[Sequence[int]] | None = None,
    implementation: Implementation | None = None,
    together: bool = True,
) -> list[dict[str, Any]]:
    """Answers prompts by one method.

    Args:
        oracles: ids of the chunks that each prompt keeps, for scorer "oracle".
        together: in one batch; False answers one by one and streams documents that allow it.

    Returns:
        For each prompt tokens, evaluations, seconds by phase (compiling left out), and the kept
        chunks with the scores of all chunks, both None for a baseline.
    """
    if together and method != "prefilling":
        return _dense(model, prompts, cache_method(method).decode_config(decoding), seeds)
    engine = Engine(
        model, chunking=chunking, selection=selection, decoding=decoding, method=method,
        bos_id=bos_id, implementation=implementation,
    )  # fmt: skip
    requests = [
        Request(context, query, prefix, oracles and oracles[i], seed)
        for i, ((prefix, context, query), seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if together:
        results, share = engine.answer_batch(requests), len(requests)
    else:
        results, share = [engine.answer(**request._asdict()) for request in requests], 1
    return [
        {
            "tokens": result.tokens,
            "evaluations": result.evaluations,
            "seconds": _seconds(result.timings, share),
            "chunks": result.selection and result.selection["chunks"],
            "scores": result.selection and result.selection["scores"],
        }
        for result in results
    ]


def _dense(
    model: MaskPredictor, prompts: Sequence[Prompt], config: DecodeConfig, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Answers whole prompts in one batch; the tokens are the same as one by one."""
    timer = Timer()
    joined = [[*prefix, *context, *query] for prefix, context, query in prompts]
    rows = np.zeros((len(prompts), bucket(max(map(len, joined)), 8)), np.int32)
    for row, prompt in zip(rows, joined, strict=True):
        row[: len(prompt)] = prompt
    with timer.phase("decode"):
        state = init_denoise(
            model, None, None, jnp.asarray(rows), config, request_keys(seeds, len(prompts)),
            query_length=jnp.asarray([len(prompt) for prompt in joined]),
        )  # fmt: skip
        state = jax.block_until_ready(denoise(model, None, state, config=config))
    tokens, evaluations = (np.asarray(x).tolist() for x in (state.tokens, state.evaluations))
    seconds = _seconds(timer.seconds, len(prompts))
    return [
        {"tokens": row, "evaluations": n, "seconds": seconds, "chunks": None, "scores": None}
        for row, n in zip(tokens, evaluations, strict=True)
    ]


def _seconds(timings: dict[str, float], requests: int) -> dict[str, float]:
    """Returns one request's share of a batch's seconds by phase, compiling left out."""
    shares = {
        name: round(seconds / requests, 6)
        for name, seconds in timings.items()
        if name not in ("compile", "total")
    }
    return {**shares, "total": round(sum(shares.values()), 6)}
