"""The jitted functions of an answer, traced on shapes: nothing is allocated or compiled.

`memory.plan_memory` adds up their arrays. `scripts/bench/memory.py` lowers them, for the
compiler's own figures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import Implementation, Partial
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.chunking import ChunkedPrompt, batch_size, bucket_chunks, bucket_rows
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import select
from pdllm_jax.network.transformer import Attend, Carry, MaskPredictor, StreamHook


class Shapes(NamedTuple):
    """Padded sizes of a batch of requests.

    requests: B; 0 where a document is encoded and no question is asked. chunks: of each document; 0
    for a baseline, whose query is the whole prompt. encoded: the requests are questions about one
    document that was encoded before.
    """

    requests: int
    prefix: int
    query: int
    chunks: int
    chunk_size: int
    encoded: bool = False

    @classmethod
    def of(cls, prompt: ChunkedPrompt, cache: ChunkCache | None = None) -> Shapes:
        """Returns the shapes of a prompt, or of questions about the document of a cache."""
        chunks = prompt.chunks if cache is None else cache.tokens
        (batch, prefix), query = prompt.prefix.shape, prompt.query.shape[1]
        n, size = chunks.shape[1:]
        return cls(batch, prefix, query, n, size, encoded=cache is not None)

    @classmethod
    def padded(
        cls,
        requests: int,
        prefix: int,
        query: int,
        chunks: int,
        chunk_size: int,
        *,
        tight: bool,
        encoded: bool = False,
    ) -> Shapes:
        """Returns the shapes that a batch of these sizes is padded to. tight: as `chunk_prompt`."""
        rows = bucket_rows(prefix), bucket_rows(query)
        n = bucket_chunks(chunks, tight)
        return cls(batch_size(requests), *rows, n, chunk_size, encoded)

    def prompt(self) -> ChunkedPrompt:
        """Returns the arrays of the requests; for questions the document's chunks are in it."""
        batch, documents = self.requests, 1 if self.encoded else self.requests
        return ChunkedPrompt(
            prefix=_ids(batch, self.prefix),
            prefix_length=_ids(batch),
            chunks=_ids(documents, self.chunks, self.chunk_size),
            chunk_lengths=_ids(documents, self.chunks),
            query=_ids(batch, self.query),
            query_length=_ids(batch),
        )


class Program(NamedTuple):
    """One jitted function of an answer: `function(*args, **settings)`.

    phase: of the answer. result: what the function returns. held: pytrees on the device before it
    runs, its arguments among them, by name. Arrays are `jax.ShapeDtypeStruct`s.
    """

    phase: str
    function: Any
    args: tuple[Any, ...]
    settings: Mapping[str, Any]
    held: Mapping[str, Any]
    result: Any

    @property
    def made(self) -> dict[str, Any]:
        """The result's pytrees by name, without the state that takes the place of its argument."""
        parts: dict[str, Any] = {}
        for value in self.result if type(self.result) is tuple else (self.result,):
            if isinstance(value, ChunkCache):
                kv = {name: getattr(value, name) for name in ("pool", "prefix_k", "prefix_v")}
                parts["KV of the document"] = kv
            elif isinstance(value, DenoiseState):
                parts["live KV"] = {"live": value.live}
                parts["KV of the chosen chunks"] = {"pool": value.pool}
                parts["response"] = dataclasses.replace(value, live=None, pool=None)
            else:
                parts.setdefault(f"results of {self.phase}", []).append(value)
        return {name: part for name, part in parts.items() if name not in self.held}


class Recorder:
    """What the trace of one program contains.

    forwards: [B, T, rows that get logits] of each forward pass; over_chunks: (B, K, T) of each
    attention over chunks, of one device.
    """

    def __init__(self) -> None:
        self.forwards: list[list[int]] = []
        self.over_chunks: list[tuple[int, int, int]] = []

    def chunk_attention(self, q: Array, *_: Any) -> Partial:
        """Stands for an implementation of `chunk_attention`."""
        batch, slots, rows, heads, size = q.shape
        self.over_chunks.append((batch, slots, rows))
        out = jnp.zeros((batch, rows, heads, size), q.dtype)
        return Partial(out, jnp.zeros((batch, heads, rows), jnp.float32))


class RecordedModel(MaskPredictor):
    """Reports its forward passes. The recorder is static under jit, so that no trace is reused."""

    recorder: Recorder

    def run(
        self, token_ids: Array, attend: Attend, carry: Carry, *, hook: StreamHook | None = None
    ) -> tuple[Array, Carry]:
        self.recorder.forwards.append([*token_ids.shape, 0])
        return super().run(token_ids, attend, carry, hook=hook)

    def logits(self, hidden: Array) -> Array:
        last = self.recorder.forwards[-1]
        last[2] = max(last[2], hidden.size // hidden.shape[-1])
        return super().logits(hidden)


def trace(function: Any, *args: Any, **settings: Any) -> Any:
    """Returns the shapes of function(*args, **settings); settings are arrays or static values."""

    def is_array(value: Any) -> bool:
        return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))

    arrays = {name: value for name, value in settings.items() if is_array(value)}
    static = {name: value for name, value in settings.items() if name not in arrays}
    call = functools.partial(function, **static)
    return jax.eval_shape(lambda args, arrays: call(*args, **arrays), args, arrays)


def programs(
    model: MaskPredictor,
    shapes: Shapes,
    selection: SelectionConfig,
    decode: DecodeConfig,
    implementation: Implementation | None = None,
) -> Iterator[Program]:
    """Traces the jitted functions of an answer, in the order in which it runs them.

    Args:
      model: weights, or shapes in their place.
      shapes, selection, decode: of a plan.
      implementation: of attention over chunks.
    """
    prompt, batch = shapes.prompt(), shapes.requests
    held: dict[str, Any] = {"weights": model, "token ids": prompt}
    result: Any = None

    def program(phase: str, function: Any, *args: Any, **settings: Any) -> Program:
        nonlocal result
        result = trace(function, *args, **settings)
        traced = Program(phase, function, args, settings, dict(held), result)
        held.update(traced.made)
        return traced

    cache = chosen = draft = None
    if shapes.encoded:
        document = shapes._replace(requests=1, query=1).prompt()
        group = {"encode_batch": selection.encode_batch}
        yield program("encode document", encode_document, model, document, **group)
        cache = result
    if not batch:
        return
    keys = trace(lambda: jax.random.split(jax.random.key(0), batch))
    lengths, path = {"query_length": prompt.query_length}, {"implementation": implementation}
    if shapes.chunks:
        scoring = {"config": selection.scoring()}
        step = program("draft", draft_response, model, prompt.question, **scoring)
        draft = result
        if draft is not None:
            yield step
        inputs = {"draft": draft, "key": keys, "oracle": _ids(batch, 1)}
        over_cache = {**inputs, **lengths, **scoring, **path}
        if cache is not None:
            yield program("score", score_chunks, model, cache, prompt.query, **over_cache)
            scores = result
        elif selection.streams(documents=batch):
            config = selection.for_prefill(streaming=True)
            yield program("score", prefill_top_k, model, prompt, config=config, **inputs)
            cache, chosen, scores = result
        else:
            config = selection.for_prefill(streaming=False)
            step = program("score", prefill, model, prompt, config=config, **inputs)
            cache, scores = result
            if selection.scorer.needs_pool and not selection.scorer.in_pass:
                # `prefill` does not take the implementation.
                trace(score_chunks, model, cache, prompt.query, **over_cache)
            yield step
        if chosen is None:
            chosen = trace(select, scores, config=selection)
    selecting = {"selecting": selection if cache else None}
    inputs = {"config": decode, "key": keys, **lengths, **selecting, **path}
    yield program("encode", init_denoise, model, cache, chosen, prompt.query, **inputs)
    state = result
    if not selection.reselects:
        selecting = {}
        if state.pool is not None:  # it serves instead of the document's
            cache = None
            if not shapes.encoded:
                held.pop("KV of the document")
    yield program("decode", denoise, model, cache, state, config=decode, **selecting, **path)


def _ids(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
