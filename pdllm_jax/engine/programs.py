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
from flax import nnx
from jaxtyping import Array

from pallas_kernels import Implementation, Partial
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import select
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import Attend, Carry, LayerParts, MaskPredictor


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
        (batch, prefix), (_, n, size) = prompt.prefix.shape, chunks.shape
        return cls(batch, prefix, prompt.query.shape[1], n, size, cache is not None)

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


MEMORY = "memory of the method"  # `DenoiseState.memory`


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
                parts[MEMORY] = {"memory": value.memory}
                parts["response"] = dataclasses.replace(value, live=None, pool=None, memory=None)
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

    def clear(self) -> None:
        """Forgets the program, for the next one."""
        self.forwards.clear()
        self.over_chunks.clear()

    def chunk_attention(self, q: Array, *_: Any) -> Partial:
        """Stands for an implementation of `chunk_attention`."""
        batch, slots, rows, heads, size = q.shape
        self.over_chunks.append((batch, slots, rows))
        out = jnp.zeros((batch, rows, heads, size), q.dtype)
        return Partial(out, jnp.zeros((batch, heads, rows), jnp.float32))


class RecordedModel(MaskPredictor):
    """Reports its forward passes. The recorder is static under jit, so that no trace is reused."""

    recorder: Recorder

    @classmethod
    def of(cls, config: ModelConfig, dtype: Any, mesh: Any) -> RecordedModel:
        """Returns a model whose weights are shapes alone."""
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype))
        model.recorder, model.mesh = Recorder(), mesh
        return model

    def run(
        self, token_ids: Array, attend: Attend, carry: Carry, **settings: Any
    ) -> tuple[Array, Carry]:
        self.recorder.forwards.append([*token_ids.shape, 0])
        return super().run(token_ids, attend, carry, **settings)

    def advance(
        self, layer: int, stream: Array, attend: Attend, carry: Carry
    ) -> tuple[Array, Carry]:
        self.recorder.forwards.append([*stream.shape[:2], 0])
        return super().advance(layer, stream, attend, carry)

    def parts(self, layer: int, stream: Array) -> tuple[LayerParts, Array]:
        self.recorder.forwards.append([*stream.shape[:2], 0])
        return super().parts(layer, stream)

    def logits(self, hidden: Array) -> Array:
        last = self.recorder.forwards[-1]
        last[2] = max(last[2], hidden.size // hidden.shape[-1])
        return super().logits(hidden)


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
    cache = chosen = None

    def program(phase: str, function: Any, *args: Any, **settings: Any) -> Program:
        result = function.eval_shape(*args, **settings)
        step = Program(phase, function, args, settings, dict(held), result)
        held.update(step.made)
        return step

    if shapes.encoded:
        document = shapes._replace(requests=1, query=1).prompt()
        how = {name: getattr(selection, name) for name in ("encode_batch", "kv_format")}
        step = program("encode document", encode_document, model, document, **how)
        cache = step.result
        yield step
    if not batch:
        return
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    reading = {"query_length": prompt.query_length, "implementation": implementation}
    if shapes.chunks:
        scoring = selection.scoring()
        step = program("draft", draft_response, model, prompt.question, config=scoring)
        inputs = {"draft": step.result, "key": keys, "oracle": _ids(batch, 1)}
        if step.result is not None:
            yield step
        over_pool = {"config": scoring, **inputs, **reading}
        streaming = cache is None and selection.streams(documents=batch)
        passing = selection.for_prefill(streaming=streaming)
        if cache is not None:
            step = program("score", score_chunks, model, cache, prompt.query, **over_pool)
            scores = step.result
        elif streaming:
            step = program("score", prefill_top_k, model, prompt, config=passing, **inputs)
            cache, chosen, scores = step.result
        else:
            step = program("score", prefill, model, prompt, config=passing, **inputs)
            cache, scores = step.result
            if selection.scorer.reads_document and not selection.scorer.in_pass:
                # `prefill` does not take the implementation.
                score_chunks.eval_shape(model, cache, prompt.query, **over_pool)
        yield step
        if chosen is None:
            chosen = jax.eval_shape(functools.partial(select, config=selection), scores)
    reselecting = {"settings": selection if cache else None}
    inputs = {"config": decode, "key": keys, **reading, **reselecting}
    step = program("encode", init_denoise, model, cache, chosen, prompt.query, **inputs)
    yield step
    if not selection.reselects:
        reselecting = {}
        if step.result.pool is not None:  # it serves instead of the document's
            cache = None
            if not shapes.encoded:
                held.pop("KV of the document")
    settings = {"config": decode, "implementation": implementation, **reselecting}
    yield program("decode", denoise, model, cache, step.result, **settings)


def method_memory(model: MaskPredictor, shapes: Shapes, decode: DecodeConfig) -> Any:
    """Returns the arrays that the cache method keeps for requests of whole prompts."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shapes.requests))
    query = _ids(shapes.requests, shapes.query)
    return init_denoise.eval_shape(model, None, None, query, decode, keys).memory


def _ids(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
