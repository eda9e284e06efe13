"""Device memory of an answer, predicted before anything is allocated or compiled; and the refusal.

`footprint.py` says what is counted and what is assumed of XLA.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import Implementation, resolve_implementation
from pallas_kernels.dense import DenseImplementation, dense_implementation
from pdllm_jax.cache import ChunkCache
from pdllm_jax.chunking import (
    ChunkedPrompt,
    batch_size,
    bucket,
    bucket_chunks,
    bucket_rows,
    count_chunks,
)
from pdllm_jax.config import ChunkConfig, DecodeConfig, ModelConfig, SelectionConfig
from pdllm_jax.footprint import plan_shapes
from pdllm_jax.model import LLaDA
from pdllm_jax.passes import Method, decode_config, keeps_pool, settled
from pdllm_jax.plan import Plan
from pdllm_jax.prefill import needs_pool
from pdllm_jax.sizes import Shapes


def plan_memory(
    config: ModelConfig,
    document: int,
    *,
    prefix: int = 16,
    query: int = 32,
    batch: int | None = None,
    questions: int | None = None,
    method: Method = "prefilling",
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
    attention: DenseImplementation | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Predicts the device memory of an answer; allocates and compiles nothing.

    Args:
      config: the model's architecture.
      document, prefix, query: tokens of the document, before and behind it; of a batch the most.
      batch: requests of `generate_batch_ids`; None: `generate`.
      questions: questions of `ask` about one encoded document instead; excludes batch.
      method, chunking, selection, decode: as `generate` takes them.
      dtype: of weights and activations.
      implementation: of attention over chunks; attention: over other rows, "cudnn" or "xla". By
        default what this process' device would use.
      mesh: sizes of the axes "tensor", which divides heads, MLP and vocabulary, and "data", which
        divides requests and the chunks of a pass (`parallel`); the plan is of one device.

    Returns:
      The plan: phases load, encode document (of questions), draft, score, select, encode, decode.

    Raises:
      ConfigError, ValueError: settings that do not go together or with the mesh.
    """
    shapes, selection, decode = shapes_of(
        document, prefix=prefix, query=query, batch=batch, questions=questions, method=method,
        chunking=chunking, selection=selection, decode=decode,
    )  # fmt: skip
    implementation, attention = _paths(
        config, selection, chunking.chunk_size, jnp.dtype(dtype), implementation, attention
    )
    return plan_shapes(
        config, shapes, selection, decode,
        dtype=dtype, implementation=implementation, attention=attention, mesh=mesh,
    )  # fmt: skip


def shapes_of(
    document: int,
    *,
    prefix: int = 16,
    query: int = 32,
    batch: int | None = None,
    questions: int | None = None,
    method: Method = "prefilling",
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
) -> tuple[Shapes, SelectionConfig, DecodeConfig]:
    """The bucketed shapes of an answer, and its settings as they apply to them.

    Arguments and errors as `plan_memory`.
    """
    least = {
        "document": int(method == "prefilling"),
        "prefix": 0,
        "query": 0,
        "batch": 1,
        "questions": 1,
    }
    given = {"document": document, "prefix": prefix, "query": query}
    for name, count in {**given, "batch": batch, "questions": questions}.items():
        if count is not None and (count != int(count) or count < least[name]):
            raise ValueError(f"{name} must be a number of at least {least[name]}, got {count!r}")
    if batch is not None and questions is not None:
        raise ValueError("batch and questions exclude each other")
    decode = decode_config(method, decode)
    if method != "prefilling":
        if batch is not None or questions is not None:
            raise ValueError(f"method {method!r} answers one request at a time")
        rows = bucket(prefix + document + query, 8)
        return Shapes(None, 0, rows, 0, chunking.chunk_size), selection, decode
    n = count_chunks(document, chunking)
    several = batch if questions is None else questions
    tight = questions is not None or keeps_pool(selection, batched=batch is not None)
    shapes = Shapes(
        batch=None if several is None else batch_size(several),
        prefix=bucket_rows(prefix),
        query=bucket_rows(query),
        chunks=bucket_chunks(n, tight),
        chunk_size=chunking.chunk_size,
        pooled=questions is not None,
    )
    return shapes, settled(selection, n, named=selection.scorer == "oracle"), decode


def _paths(
    config: ModelConfig,
    selecting: SelectionConfig,
    chunk_size: int,
    dtype: jnp.dtype,
    implementation: Implementation | None,
    attention: DenseImplementation | None,
) -> tuple[Implementation, DenseImplementation]:
    keep = selecting.keep_tokens
    size = chunk_size if keep is None else min(keep, chunk_size)
    found = resolve_implementation(
        implementation, dtype=dtype, head_size=config.head_dim, chunk_size=size
    )
    return found, attention or dense_implementation(dtype, config.head_dim)


def require_memory(
    model: LLaDA,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    *,
    cache: ChunkCache | None = None,
    implementation: Implementation,
    limit: int | None = None,
) -> None:
    """Refuses what `answer` is about to do where the device would run out.

    selecting: as `passes.settled` leaves it. limit: bytes, by default what the device reports, with
    what it holds already; where it reports nothing (the CPU), nothing is refused.

    Raises:
      MemoryLimitError: names the phase, its bytes, the limit, and what would fit.
    """
    found = _limit(model, limit)
    if found is not None:
        shapes = Shapes.of(prompt, cache)
        _require(model, shapes, selecting, decode, implementation, *found)


def require_document_memory(
    model: LLaDA, prompt: ChunkedPrompt, encode_batch: int, *, limit: int | None = None
) -> None:
    """`require_memory` of `encode_document` alone."""
    found = _limit(model, limit)
    if found is None:
        return
    shapes = Shapes.of(prompt)._replace(pooled=True)
    select = SelectionConfig(scorer="first", encoding="independent", encode_batch=encode_batch)
    attention = dense_implementation(model.dtype, model.config.head_dim)
    whole = plan_shapes(
        model.config, shapes, select, DecodeConfig(),
        dtype=model.dtype, implementation="xla", attention=attention, mesh=_sizes(model),
    )  # fmt: skip
    weights = whole["load"].nbytes
    plan = Plan((whole["load"], whole["encode document"]), weights)
    plan.require(found[0], in_use=found[1], advice="a smaller encode_batch or document takes less")


def require_baseline_memory(
    model: LLaDA, rows: int, decode: DecodeConfig, *, limit: int | None = None
) -> None:
    """`require_memory` of a baseline, whose whole prompt has so many rows."""
    found = _limit(model, limit)
    if found is not None:
        shapes = Shapes(None, 0, rows, 0, 1)
        _require(model, shapes, SelectionConfig(), decode, "xla", *found)


def device_stats(model: LLaDA) -> dict[str, int]:
    """What the model's device, or the first of a mesh, says of its memory; nothing on the CPU."""
    device = model.embedding.weight[...].addressable_shards[0].device
    return device.memory_stats() or {}


def _sizes(model: LLaDA) -> Mapping[str, int] | None:
    return None if model.mesh is None else model.mesh.shape


def _limit(model: LLaDA, limit: int | None) -> tuple[int, int | None] | None:
    """Bytes that the model's device gives, and those that it holds where it says so."""
    stats = device_stats(model)
    if limit is None:
        limit = stats.get("bytes_limit")
    return None if limit is None else (limit, stats.get("bytes_in_use"))


def _require(
    model: LLaDA,
    shapes: Shapes,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    implementation: Implementation,
    limit: int,
    in_use: int | None,
) -> None:
    attention = dense_implementation(model.dtype, model.config.head_dim)

    def plan(shapes: Shapes, selecting: SelectionConfig, decode: DecodeConfig) -> Plan:
        return plan_shapes(
            model.config, shapes, selecting, decode,
            dtype=model.dtype, implementation=implementation, attention=attention,
            mesh=_sizes(model),
        )  # fmt: skip

    wanted = plan(shapes, selecting, decode)
    beside = 0 if in_use is None else max(0, in_use - wanted.resident)
    if wanted.peak + beside <= limit:
        return
    fitting: list[str] = []
    for kind in _changes(shapes, selecting, decode):
        fits = (words for words, others in kind if plan(*others).peak + beside <= limit)
        fitting += itertools.islice(fits, 1)
    advice = "no one setting makes it fit" if not fitting else f"fits with {', or '.join(fitting)}"
    if not shapes.chunks:
        advice = "a shorter prompt takes less, and so does method 'prefilling'"
    wanted.require(limit, in_use=in_use, advice=advice)


_Settings = tuple[Shapes, SelectionConfig, DecodeConfig]


def _changes(
    shapes: Shapes, selecting: SelectionConfig, decode: DecodeConfig
) -> Iterator[list[tuple[str, _Settings]]]:
    """Settings that differ in one thing and take less memory, in words; least change first."""

    def select(words: str, **changes: Any) -> tuple[str, _Settings]:
        return words, (shapes, dataclasses.replace(selecting, **changes), decode)

    def halves(n: int) -> list[int]:
        return [n >> i for i in range(1, n.bit_length())]

    if shapes.chunks:
        group = min(selecting.encode_batch, shapes.chunks * shapes.requests)
        yield [select(f"encode_batch={n}", encode_batch=n) for n in halves(group)]
        if selecting.max_k is None and selecting.scorer != "all":
            yield [select(f"top_k={n}", top_k=n) for n in halves(selecting.top_k)]
        if selecting.reselect != "never":
            yield [select("reselect='never'", reselect="never")]
        if selecting.encoding != "independent" and shapes.batch is None:
            words = "encoding='independent', which streams the document"
            yield [select(words, encoding="independent")]
        if needs_pool(selecting) and shapes.batch is not None and not shapes.pooled:
            words = "encoding='joint', which keeps no KV of the document"
            yield [select(words, encoding="joint")]
    if shapes.batch is not None:
        yield [
            (f"{n} requests at a time", (shapes._replace(batch=n), selecting, decode))
            for n in halves(shapes.batch)
        ]
