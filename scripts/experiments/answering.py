"""Answers of the library: all calls that experiments make to it, but for measurements.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pdllm_jax import Engine, Request
from pdllm_jax.engine.request import PreparedRequest, Timer, request_keys, select_chunks
from pdllm_jax.method.chunking import batch_prompts, batch_size, chunk_prompt
from pdllm_jax.method.selection import EMPTY_SLOT


def answer(
    engine: Engine, requests: Sequence[Request], together: bool = True
) -> list[dict[str, Any]]:
    """Answers requests of token ids.

    Args:
        together: in one batch; False answers one by one and streams documents that allow it.

    Returns:
        For each request tokens, evaluations and their network rows, seconds by phase (compiling
        left out), and the kept chunks with the scores of all chunks, both None for a baseline.
    """
    if together:
        results = engine.answer_batch(requests)
    else:
        results = [engine.answer(**request._asdict()) for request in requests]
    share = len(requests) if together else 1
    return [
        {
            "tokens": result.tokens,
            "evaluations": result.evaluations,
            "rows": result.rows,
            "seconds": _seconds(result.timings, share),
            "chunks": result.selection and result.selection["chunks"],
            "scores": result.selection and result.selection["scores"],
        }
        for result in results
    ]


def select_alone(engine: Engine, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Selects chunks for requests of token ids in one batch, and decodes nothing.

    Returns:
        What `answer` returns, of answers without tokens.
    """
    count, size, timer = len(requests), batch_size(len(requests)), Timer()
    tight = engine.selection.keeps_pool(documents=size)
    cut = {"bos_id": engine.bos_id, "tight": tight}
    parts = [engine.token_ids(request) for request in requests]
    prompt = batch_prompts([chunk_prompt(*x, engine.chunking, **cut) for x in parts], size)
    keys = request_keys([request.seed for request in requests], size)
    prepared = PreparedRequest(prompt, engine.selection, keys, count)
    path = engine.implementation
    selected = select_chunks(engine.model, prepared, implementation=path, timer=timer)
    ids, seconds = np.asarray(selected.selection.chunk_ids), _seconds(timer.seconds, count)
    scores = None if selected.scores is None else np.asarray(selected.scores)
    return [
        {
            "tokens": [],
            "evaluations": 0,
            "rows": 0.0,
            "seconds": seconds,
            "chunks": ids[b][ids[b] != EMPTY_SLOT].tolist(),
            "scores": None if scores is None else scores[b, : prepared.counts[b]].tolist(),
        }
        for b in range(count)
    ]


def _seconds(timings: dict[str, float], requests: int) -> dict[str, float]:
    """Returns one request's share of a batch's seconds by phase, compiling left out."""
    phases = {
        name: seconds for name, seconds in timings.items() if name not in ("compile", "total")
    }
    shares = {name: round(seconds / requests, 6) for name, seconds in phases.items()}
    return {**shares, "total": round(sum(shares.values()), 6)}
