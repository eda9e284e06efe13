"""Wall-clock time of phases, with compilation apart.

What follows from the settings of an answer: rows recomputed, and what its pass must keep.

What the phases before decoding leave for it: chosen chunks, then a state to start from.

`choose` drafts, scores and selects, `begin` places and encodes. What either returns is a pytree
that another process can go on from (`snapshot`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, ChunkPool, DenoiseState
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill, prefill_top_k
from pdllm_jax.method.scorers import AllScorer, OracleScorer
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import EMPTY_SLOT, Selection, select
from pdllm_jax.network.transformer import MaskPredictor

_COMPILE_EVENTS = "/jax/core/compile/"


class _Active(threading.local):
    """Of the phases that a thread is in: the spans in which it traced or compiled."""

    def __init__(self) -> None:
        self.phases: list[list[tuple[float, float]]] = []


_active = _Active()


def _record(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_COMPILE_EVENTS):
        now = time.perf_counter()
        for spans in _active.phases:
            spans.append((now - duration_secs, now))


jax.monitoring.register_event_duration_secs_listener(_record)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: tracing events nest."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Stopwatch:
    """Seconds by phase. Time spent tracing and compiling is added up under "compile" instead.

    Threads count what they compile themselves.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}
        self.compilations = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to `name`. The block must wait for its own results."""
        spans: list[tuple[float, float]] = []
        _active.phases.append(spans)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            _active.phases.pop()
            compiling = min(_covered(spans), elapsed)
            self.compilations += bool(spans)
            self.seconds["compile"] += compiling
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - compiling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A request, or a batch of them, between prefill and decode.

    cache: the document(s); None where nothing that follows reads it.
    selection: the chunks that were chosen; scores: of every chunk, None where nothing was scored.
    query [B, Q], query_length [B], keys [B]: what else `init_denoise` takes.
    counts: chunks of each document, [B], or [1] where there is one for all.
    state: that denoising starts from; None before `begin`.
    selecting: the settings as they are for these documents: K is at most their number of chunks.
    requests: those that were asked for; the rest of the batch is filling.
    decode: what the state was made for; before `begin`, what it is meant to be, or None.
    """

    cache: ChunkCache | None
    selection: Selection
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    keys: Array
    counts: Int[Array, "B"]
    scores: Float[Array, "B N"] | None
    state: DenoiseState | None
    selecting: SelectionConfig = dataclasses.field(metadata={"static": True})
    requests: int = dataclasses.field(default=1, metadata={"static": True})
    decode: DecodeConfig | None = dataclasses.field(default=None, metadata={"static": True})


def chunk_counts(prompt: ChunkedPrompt, cache: ChunkCache | None) -> np.ndarray:
    """Chunks of each document, [B]: of the prompt's, or of the cache that is asked about."""
    lengths = prompt.chunk_lengths if cache is None else cache.lengths
    return np.count_nonzero(np.asarray(lengths), axis=-1)


def choose(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    keys: Array,
    *,
    cache: ChunkCache | None = None,
    requests: int = 1,
    oracle: np.ndarray | None = None,
    implementation: Implementation | None = None,
    watch: Stopwatch | None = None,
) -> Prefilled:
    """Draft, score, select.

    Args:
      prompt: of one request or a batch; those behind the first `requests` are filling.
      keys: PRNG keys, one for each request, [B]: all that is random follows from them.
      cache: document(s) encoded before, with the KV of every chunk; the prompt's chunks are then
        not read.
      oracle: ids of the chunks to keep, [B, M] int32, for the scorer "oracle".
      implementation: of attention over chunks, by default what the device runs.
      watch: gets the times of "draft" and "score".

    Returns:
      What was chosen and what it was chosen from, without a state.

    Raises:
      ValueError: the scorer lacks what it needs (a key, ids); the cache has no KV to score with.
    """
    watch = watch or Stopwatch()
    counts = chunk_counts(prompt, cache)
    selecting = selecting.for_document(int(counts.max()), named=oracle is not None)
    passing = selecting.scoring()
    scoring_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    with watch.phase("draft"):
        draft = jax.block_until_ready(draft_response(model, prompt.question, passing))
    with watch.phase("score"):
        shared = {"draft": draft, "key": scoring_keys, "oracle": oracle}
        if cache is not None:
            scores = score_chunks(
                model, cache, prompt.query, passing, query_length=prompt.query_length,
                implementation=implementation, **shared,
            )  # fmt: skip
            chosen = select(scores, selecting)
        elif selecting.streams(documents=prompt.query.shape[0]):
            kept = selecting.for_prefill(streaming=True)
            cache, chosen, scores = prefill_top_k(model, prompt, kept, **shared)
        else:
            passing = selecting.for_prefill(streaming=False)
            cache, scores = prefill(model, prompt, passing, **shared)
            chosen = select(scores, selecting)
        if selecting.max_k is not None:
            chosen = trimmed(chosen)
        jax.block_until_ready((cache, chosen))
    return Prefilled(
        cache=cache,
        selection=chosen,
        query=prompt.query,
        query_length=prompt.query_length,
        keys=keys,
        counts=jnp.asarray(counts, jnp.int32),
        scores=None if isinstance(selecting.scorer, AllScorer | OracleScorer) else scores,
        state=None,
        selecting=selecting,
        requests=requests,
    )


def begin(
    model: MaskPredictor,
    chosen: Prefilled,
    config: DecodeConfig,
    *,
    implementation: Implementation | None = None,
    watch: Stopwatch | None = None,
) -> Prefilled:
    """Places and encodes what was chosen; lets the document go where nothing reads it any more.

    chosen: of `choose`, or restored. config: for which the state is made, as `init_denoise`, whose
    errors it raises. watch: gets the time of "encode". Returns the same with a state.
    """
    watch = watch or Stopwatch()
    with watch.phase("encode"):
        state = init_denoise(
            model, chosen.cache, chosen.selection, chosen.query, config, chosen.keys,
            query_length=chosen.query_length, selecting=chosen.selecting,
            implementation=implementation,
        )  # fmt: skip
        if chosen.requests < state.block.shape[0]:
            filling = jnp.arange(state.block.shape[0]) >= chosen.requests
            state = dataclasses.replace(
                state, block=jnp.where(filling, config.n_blocks, state.block)
            )
        jax.block_until_ready(state)
    begun = dataclasses.replace(chosen, state=state, decode=config)
    done_with = state.pool is not None and chosen.selecting.reselect == "never"
    return _without_cache(begun) if done_with else begun


def without_other_chunks(prefilled: Prefilled) -> Prefilled:
    """Of the KV of a document's chunks, that of the chosen ones alone; tokens stay the same.

    As it is where there is none, or where re-selection may want any of it. A state then has a pool
    of its own; before `begin` the cache is as `prefill_top_k` leaves it.
    """
    cache, state = prefilled.cache, prefilled.state
    if cache is None or cache.pool is None or prefilled.selecting.reselect != "never":
        return prefilled
    if state is not None:
        pool, places = _gathered(cache.pool, state.chunk_ids)
        state = dataclasses.replace(state, pool=pool, chunk_ids=places)
        return _without_cache(dataclasses.replace(prefilled, state=state))
    if not prefilled.selecting.encoding.needs_pool:
        return dataclasses.replace(prefilled, cache=cache.without_pool())
    selection = prefilled.selection
    ids = selection.slots
    if ids is None:
        ids = cache.places(selection.chunk_ids)
    pool, places = _gathered(cache.pool, ids)
    return dataclasses.replace(
        prefilled,
        cache=dataclasses.replace(cache, pool=pool, streamed=True),
        selection=dataclasses.replace(selection, slots=places),
    )


def _without_cache(prefilled: Prefilled) -> Prefilled:
    """The places in the cache's pool go with it."""
    selection = dataclasses.replace(prefilled.selection, slots=None)
    return dataclasses.replace(prefilled, cache=None, selection=selection)


def _gathered(pool: ChunkPool, ids: Int[Array, "B K"]) -> tuple[ChunkPool, Int[Array, "B K"]]:
    """The chunks at these places, in this order, and where each is then."""
    at = jnp.maximum(ids, 0).reshape(-1)
    lengths = jnp.where(ids.reshape(-1) >= 0, pool.lengths[at], 0)
    own = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
    return ChunkPool(pool.k[:, at], pool.v[:, at], lengths), jnp.where(ids >= 0, own, EMPTY_SLOT)


def trimmed(chosen: Selection) -> Selection:
    """Without slots that are empty in every request, so that they cost nothing further on."""
    most = max(1, int((np.asarray(chosen.chunk_ids) != EMPTY_SLOT).sum(axis=-1).max()))
    return jax.tree.map(lambda x: x[..., :most], chosen)
