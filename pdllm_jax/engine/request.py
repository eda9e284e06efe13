"""The phases of a batch of requests before decoding, and what each phase hands to the next.

    select_chunks    draft, score, select                   PreparedRequest -> SelectedRequest
    start_decoding   place and encode the chosen chunks     SelectedRequest -> StartedRequest

Every array has a batch axis B. Rows after the first `requests` are padding. SelectedRequest and
StartedRequest are pytrees that another process can go on from (`storage.snapshot`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.inputs import map_named
from pdllm_jax.method.cache import ChunkCache, ChunkPool, DenoiseState
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    TokenIds,
    batch_size,
    bucket,
    bucket_rows,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill, prefill_top_k
from pdllm_jax.method.scorers import AllScorer, OracleScorer
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import EMPTY_SLOT, Selection, select
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import random_key
from pdllm_jax.rules import require

_COMPILE_EVENTS = "/jax/core/compile/"


class Timer:
    """Seconds of each phase; what this thread traces and compiles counts under "compile"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of a `with` block, which must wait for its own results, to `name`."""
        thread, spans = threading.get_ident(), list[tuple[float, float]]()

        def record(event: str, duration_secs: float, **_: str | int) -> None:
            if event.startswith(_COMPILE_EVENTS) and threading.get_ident() == thread:
                end = time.perf_counter()
                while spans and spans[-1][0] >= end - duration_secs:
                    spans.pop()  # nested in this one
                spans.append((end - duration_secs, end))

        jax.monitoring.register_event_duration_secs_listener(record)
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            jax.monitoring.unregister_event_duration_listener(record)
            compiling = min(sum(end - start for start, end in spans), elapsed)
            self.seconds["compile"] += compiling
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - compiling


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A batch of B requests before any computation.

    prompt: [B]; with a `cache` its chunks are not read.
    settings: of the selection, for any documents.
    keys: PRNG keys [B], from which all randomness follows (`request_keys`).
    requests: rows that were asked for; the rest of the batch is padding.
    cache: documents encoded before, with the KV of every chunk.
    oracle: ids of the chunks to keep, [B, M], EMPTY_SLOT behind them, for the scorer "oracle".
    """

    prompt: ChunkedPrompt
    settings: SelectionConfig
    keys: Array
    requests: int = 1
    cache: ChunkCache | None = None
    oracle: np.ndarray | None = None

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Chunks of each document, [B]."""
        lengths = self.prompt.chunk_lengths if self.cache is None else self.cache.lengths
        counts = np.count_nonzero(np.asarray(lengths), axis=-1)
        return np.broadcast_to(counts, (self.prompt.query.shape[0],))

    @functools.cached_property
    def config(self) -> SelectionConfig:
        """The settings for these documents: K is at most their number of chunks."""
        return self.settings.for_document(int(self.counts.max()), named=self.oracle is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedRequest:
    """A batch of requests whose chunks are selected, before they are encoded.

    cache: the documents, or the document that all questions share.
    selection: the chosen chunks; scores: of every chunk, None where nothing was scored.
    query, query_length, keys: the remaining inputs of `init_denoise`.
    counts, config, requests: as in `PreparedRequest`.
    decoding: the settings of the response; None where the decoder's own are to be used.
    """

    cache: ChunkCache
    selection: Selection
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    keys: Array
    counts: Int[Array, "B"]
    scores: Float[Array, "B N"] | None
    config: SelectionConfig = dataclasses.field(metadata={"static": True})
    requests: int = dataclasses.field(default=1, metadata={"static": True})
    decoding: DecodeConfig | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StartedRequest:
    """A batch of requests whose response is masked and whose chunks are encoded.

    cache: the documents; None where the state holds all KV that decoding reads.
    state: the state that denoising starts from; decoding: the settings that it was made for.
    The other fields are as in `SelectedRequest`.
    """

    cache: ChunkCache | None
    selection: Selection
    counts: Int[Array, "B"]
    scores: Float[Array, "B N"] | None
    state: DenoiseState
    config: SelectionConfig = dataclasses.field(metadata={"static": True})
    decoding: DecodeConfig = dataclasses.field(metadata={"static": True})
    requests: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def pool(self) -> ChunkPool:
        """The chunk KV that decoding reads: the state's, or else the document's."""
        pool = self.state.pool
        if pool is None and self.cache is not None:
            pool = self.cache.pool
        assert pool is not None
        return pool


class WholePrompts(NamedTuple):
    """Prompts [B, Q] without chunks, padded behind their lengths; the first `requests` count."""

    ids: Int[Array, "B Q"]
    lengths: Int[Array, "B"]
    keys: Array
    requests: int

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> WholePrompts:
        """Pads prompts of one token or more to a batch."""
        size, rows = batch_size(len(prompts)), bucket(max(x.size for x in prompts), 8)
        ids = [*prompts, *[np.zeros((0,), np.int32)] * (size - len(prompts))]
        table, lengths = np.stack([pad_to(x, rows) for x in ids]), [x.size for x in ids]
        keys = request_keys(seeds, size)
        return cls(jnp.asarray(table), jnp.asarray(lengths, jnp.int32), keys, len(prompts))

    def start(self, model: MaskPredictor, decoding: DecodeConfig) -> DenoiseState:
        """Returns the state before the first step."""
        inputs = None, None, self.ids, decoding, self.keys
        state = init_denoise(model, *inputs, query_length=self.lengths)
        return _without_padding(state, self.requests, decoding)


def _without_padding(state: DenoiseState, requests: int, decoding: DecodeConfig) -> DenoiseState:
    """Returns the state in which the requests that pad the batch are done."""
    padding = jnp.arange(state.block.shape[0]) >= requests
    block = jnp.where(padding, decoding.n_blocks, state.block)
    return dataclasses.replace(state, block=block)


def select_chunks(
    model: MaskPredictor,
    request: PreparedRequest,
    *,
    implementation: Implementation | None = None,
    timer: Timer | None = None,
    score: Callable[..., Array] | None = None,
) -> SelectedRequest:
    """Drafts, scores and selects.

    Args:
      implementation: of the attention over chunks, by default the device's.
      timer: gets the seconds of "draft" and "score".
      score: takes the place of `score_chunks` for a request with a cache.

    Raises:
      ValueError: the scorer lacks an input (a key, ids); the cache has no KV to score with.
    """
    timer = timer or Timer()
    prompt, cache, config = request.prompt, request.cache, request.config
    with timer.phase("draft"):
        draft = jax.block_until_ready(draft_response(model, prompt, config.scoring()))
    with timer.phase("score"):
        inputs: dict[str, Any] = {"draft": draft, "key": request.keys, "oracle": request.oracle}
        streaming = cache is None and config.streams(documents=len(request.counts))
        passing = config.for_prefill(streaming=streaming)
        if streaming:
            cache, selection, scores = prefill_top_k(model, prompt, passing, **inputs)
        else:
            if cache is None:
                cache, scores = prefill(model, prompt, passing, **inputs)
            else:
                inputs |= {"query_length": prompt.query_length, "implementation": implementation}
                score = score or score_chunks
                scores = score(model, cache, prompt.query, config.scoring(), **inputs)
            selection = select(scores, config)
        if config.max_k is not None and not config.reselects:  # which may need every slot
            selection = trimmed(selection)
        jax.block_until_ready((cache, selection))
    return SelectedRequest(
        cache=cache,
        selection=selection,
        query=prompt.query,
        query_length=prompt.query_length,
        keys=request.keys,
        counts=jnp.asarray(request.counts, jnp.int32),
        scores=None if isinstance(config.scorer, AllScorer | OracleScorer) else scores,
        config=config,
        requests=request.requests,
    )


def start_decoding(
    model: MaskPredictor,
    request: SelectedRequest,
    decoding: DecodeConfig,
    *,
    implementation: Implementation | None = None,
    timer: Timer | None = None,
) -> StartedRequest:
    """Places and encodes the chosen chunks; drops the document where nothing reads it any more.

    Args:
      decoding: the settings of the response.
      timer: gets the seconds of "encode".

    Raises:
      ValueError: as `init_denoise`.
    """
    inputs = request.cache, request.selection, request.query, decoding, request.keys
    with (timer or Timer()).phase("encode"):
        state = init_denoise(
            model,
            *inputs,
            query_length=request.query_length,
            settings=request.config,
            implementation=implementation,
        )
        state = jax.block_until_ready(_without_padding(state, request.requests, decoding))
    unread = state.pool is not None and not request.config.reselects
    selection = request.selection
    if unread:  # places in the pool of the cache go with it
        selection = dataclasses.replace(selection, slots=None)
    return StartedRequest(
        cache=None if unread else request.cache,
        selection=selection,
        counts=request.counts,
        scores=request.scores,
        state=state,
        config=request.config,
        decoding=decoding,
        requests=request.requests,
    )


def drop_other_chunks(
    request: SelectedRequest | StartedRequest,
) -> SelectedRequest | StartedRequest:
    """Returns the request without the KV of chunks that were not chosen; tokens stay the same.

    Returns the input unchanged if there is no such KV or if re-selection may read it.
    """
    cache, selection = request.cache, request.selection
    if cache is None or cache.pool is None or request.config.reselects:
        return request
    if isinstance(request, StartedRequest):
        pool, places = _gathered(cache.pool, request.state.chunk_ids)
        state = dataclasses.replace(request.state, pool=pool, chunk_ids=places)
        selection = dataclasses.replace(selection, slots=None)
        return dataclasses.replace(request, cache=None, state=state, selection=selection)
    if not request.config.encoding.needs_pool:
        return dataclasses.replace(request, cache=cache.without_pool())
    ids = cache.places(selection.chunk_ids) if selection.slots is None else selection.slots
    return with_pool(request, *_gathered(cache.pool, ids))


def with_pool(
    request: SelectedRequest, pool: ChunkPool, slots: Int[Array, "B K"]
) -> SelectedRequest:
    """Returns the request with the KV of its chosen chunks alone, which lie at these places."""
    cache = dataclasses.replace(request.cache, pool=pool, streamed=True)
    selection = dataclasses.replace(request.selection, slots=slots)
    return dataclasses.replace(request, cache=cache, selection=selection)


def _gathered(pool: ChunkPool, ids: Int[Array, "B K"]) -> tuple[ChunkPool, Int[Array, "B K"]]:
    """A pool of the chunks at these places, in this order, and their places in it."""
    at = jnp.maximum(ids, 0).reshape(-1)
    lengths = jnp.where(ids.reshape(-1) >= 0, pool.lengths[at], 0)
    places = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
    return pool.take(at, lengths), jnp.where(ids >= 0, places, EMPTY_SLOT)


def trimmed(selection: Selection) -> Selection:
    """Removes the slots that are empty in every request: later phases would pay for them."""
    kept = np.count_nonzero(np.asarray(selection.chunk_ids) != EMPTY_SLOT, axis=-1)
    return jax.tree.map(lambda x: x[..., : max(1, int(kept.max()))], selection)


def request_keys(seeds: Sequence[int], size: int, kind: str = "request") -> Array:
    """PRNG keys of a batch, [size]: each from its own seed, independent of its place.

    Raises:
      ConfigError: a seed is not an integer in [0, 2**64); of several, its `kind` and number.
    """
    keys = map_named(kind, random_key, seeds)
    return jnp.stack([*keys, *[random_key(0)] * (size - len(keys))])


def document_prompt(
    prefix_ids: TokenIds, context_ids: TokenIds, config: ChunkConfig, bos_id: int | None
) -> ChunkedPrompt:
    """A document without a question, for `encode_document`: as `chunk_prompt` with tight=True."""
    prompt = chunk_prompt(prefix_ids, context_ids, [0], config, bos_id=bos_id, tight=True)
    query = jnp.zeros((1, 0), jnp.int32)
    return dataclasses.replace(prompt, query=query, query_length=jnp.zeros((1,), jnp.int32))


def require_kv_format(pool: Any, config: SelectionConfig) -> None:
    """Raises ConfigError where a document's KV has another format than the settings say.

    pool: a `ChunkPool`, or what has its `kv_format`.
    """
    has, wanted = pool.kv_format, config.kv_format
    message = f"the document's KV is in format {has!r}, the selection's kv_format is {wanted!r}"
    require(has == wanted, f"{message}: encode the document again, or set kv_format={has!r}")


def question_prompt(
    document: ChunkCache, questions: Sequence[np.ndarray], size: int
) -> ChunkedPrompt:
    """Questions about one encoded document, padded to a batch of `size`, without its chunks."""
    ids = [*questions, *[np.zeros((0,), np.int32)] * (size - len(questions))]
    rows = bucket_rows(max(x.size for x in ids))
    return ChunkedPrompt(
        prefix=jnp.broadcast_to(document.prefix_ids, (size, document.prefix_ids.shape[-1])),
        prefix_length=jnp.broadcast_to(document.prefix_length, (size,)),
        chunks=jnp.zeros((size, 0, document.tokens.shape[2]), jnp.int32),
        chunk_lengths=jnp.zeros((size, 0), jnp.int32),
        query=jnp.asarray(np.stack([pad_to(x, rows, -1) for x in ids])),
        query_length=jnp.asarray([x.size for x in ids], jnp.int32),
        anchors=document.anchors,
    )
