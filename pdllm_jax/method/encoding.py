"""Steps 4 and 5: places and encodes the chosen chunks, and starts the denoising state."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, DenoiseState, LiveCache, init_live
from pdllm_jax.method.chunking import count_ids
from pdllm_jax.method.encodings import EncodeRequest, Encoding
from pdllm_jax.method.encodings.base import slot_ids
from pdllm_jax.method.live_forward import Context, query_rows
from pdllm_jax.method.selection import Selection
from pdllm_jax.method.token_selection import keep_tokens
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive
from pdllm_jax.rules import ConfigError, require


def encode_chosen(
    model: MaskPredictor, cache: ChunkCache, request: EncodeRequest, config: SelectionConfig
) -> Context:
    """Returns the KV of the chosen chunks and of the live rows, and where they lie.

    The pool is None where the cache's serves. request.placement indexes the cache's pool.
    request.live need not hold the prefix.
    """
    encoding, placement, path = config.encoding, request.placement, request.implementation
    if encoding.keeps_prefix:
        live = _with_prefix(model, cache, request.live, placement.prefix_length)
        request = request._replace(live=live)
    pool, live = encoding.encode(model, cache, request)
    in_slots = dataclasses.replace(placement, chunk_ids=slot_ids(request.selected))
    context = Context(pool, placement if pool is None else in_slots, live, path)
    source, count = cache.pool if pool is None else pool, config.keep_tokens
    if count is None or source is None or count >= source.k.shape[3]:
        return context
    context = context._replace(pool=source)
    rows, selected = request.rows, request.selected
    kept = keep_tokens(model, cache, context, rows, selected, count, config.keep_by)
    return context._replace(pool=kept, placement=in_slots)


def encode_state(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    selected: Int[Array, "B K"],
    config: SelectionConfig,
    implementation: Implementation | None = None,
    *,
    slots: Int[Array, "B K"] | None = None,
) -> DenoiseState:
    """Returns the state with these chunks chosen, placed and encoded.

    slots: their places in the cache's pool, where these do not follow from the ids.
    """
    total = state.placement.total
    placement = cache.place(selected, state.prefix_length, total, config.positions)
    if slots is not None:
        placement = dataclasses.replace(placement, chunk_ids=slots)
    rows, path = query_rows(state), implementation
    request = EncodeRequest(selected, placement, rows, state.live, path, config.kv_format)
    pool, placement, live, _ = encode_chosen(model, cache, request, config)
    return dataclasses.replace(
        state,
        selected=selected,
        chunk_ids=placement.chunk_ids,
        chunk_starts=placement.chunk_starts,
        query_start=placement.query_start,
        pool=pool,
        live=live,
        stale=jnp.full(state.stale.shape, not config.encoding.live_encoded),
    )


def _with_prefix(
    model: MaskPredictor, cache: ChunkCache, live: LiveCache | None, prefix_length: Int[Array, "B"]
) -> LiveCache | None:
    """Writes the prefix' KV into the live cache, if there are both."""
    if live is None or cache.prefix_k is None or cache.prefix_v is None:
        return live
    for layer, (k, v) in enumerate(zip(cache.prefix_k, cache.prefix_v, strict=True)):
        shape = (prefix_length.shape[0], *k.shape[1:])
        k, v = jnp.broadcast_to(k, shape), jnp.broadcast_to(v, shape)
        live = live.write(layer, k, v, jnp.zeros_like(prefix_length), mesh=model.mesh)
    return live


@functools.partial(jax.jit, static_argnames=("config", "encoding", "settings", "implementation"))
def init_denoise(
    model: MaskPredictor,
    cache: ChunkCache | None,
    selection: Selection | None,
    query_ids: Int[Array, "B Q"],
    config: DecodeConfig,
    key: Array,
    *,
    query_length: Int[Array, "B"] | None = None,
    encoding: str | Encoding | None = None,
    settings: SelectionConfig | None = None,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Returns the state before the first step: all masked, the chosen chunks placed and encoded.

    Compiles once for each (shapes, config, encoding, settings, implementation).

    Args:
      cache, selection: from `prefill` and `select_top_k`. Both None for generation without a
        document's cache, where query_ids is the whole prompt. A cache has one document for all
        requests or one for each.
      query_ids: padded with -1, or with any ids behind query_length where that is given.
      config: lengths and sampling rule.
      key: PRNG key, from which each request derives its own. Or a key for each request, [B].
      encoding: what the chunks' KV is computed from (see `SelectionConfig`). By default
        "independent" where the cache has their KV, else "joint".
      settings: of encoding, positions and kept tokens, instead of `encoding`.
      implementation: of the attention over chunks, where the encoding has any.

    Raises:
      ValueError: the encoding needs a pool and the cache has none; cache without selection;
        guidance, or a method for whole prompts, with a cache; no EOT for confidence_eos_eot_inf;
        both encoding and settings.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    batch, q_rows = query_ids.shape
    if query_length is None:
        query_length = count_ids(query_ids)
    if (cache is None) != (selection is None):
        raise ValueError("cache and selection go together: give both or neither")
    if encoding is not None and settings is not None:
        raise ValueError("settings names an encoding already: give one of the two")
    if cache is not None and config.guidance > 0:
        raise ConfigError("guidance is implemented for generation without a document's cache")
    if cache is not None and not isinstance(config.recompute, str):
        raise ConfigError(f"method {config.cache_method.name!r} takes no document's cache")
    if config.confidence_eos_eot_inf:
        words, eot = model.config.vocab_size, config.eot_token_id
        message = f"confidence_eos_eot_inf needs eot_token_id, inside the vocabulary of {words}"
        require(eot is not None and eot < words, f"{message}, got {eot}")
    mask_id = model.config.mask_token_id
    zeros = jnp.zeros((batch,), jnp.int32)
    none = jnp.zeros((batch, 0), jnp.int32)
    state = DenoiseState(
        tokens=jnp.full((batch, config.gen_length), mask_id, jnp.int32),
        query=jnp.maximum(query_ids, 0),
        query_length=jnp.asarray(query_length, jnp.int32),
        prefix_length=zeros,
        selected=none,
        chunk_ids=none,
        chunk_starts=none,
        query_start=zeros,
        live=None,
        pool=None,
        block=zeros,
        step=zeros,
        text_blocks=jnp.full((batch,), config.n_blocks, jnp.int32),
        stale=jnp.ones((batch,), bool),
        evaluations=zeros,
        rescored=zeros,
        keys=key if key.ndim else derive(key, Use.REQUEST, jnp.arange(batch)),
        probability=jnp.full((batch, config.gen_length), -1.0, jnp.float32),
        rows=jnp.zeros((batch,), jnp.float32),
    )
    prefix_rows = 0 if cache is None else cache.prefix_ids.shape[-1]
    method, rows = config.cache_method, prefix_rows + q_rows + config.gen_length
    method.check(model.config, config, rows)
    if method.keeps_live or prefix_rows:
        live = init_live(model.config, batch, rows, model.dtype, model.mesh)
        state = dataclasses.replace(state, live=live)
    rule = config.unmasking
    rule.check(model.config)
    kept = rule.start(config.gen_length, config.block_length, model.config.embedding_size)
    kept = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), kept)
    memory = method.start(model, state, config)
    state = dataclasses.replace(state, memory=memory, rule_memory=kept)
    if cache is None or selection is None:
        return constrain(model.mesh, state)

    if settings is None:
        default = "joint" if cache.pool is None else "independent"
        settings = SelectionConfig(encoding=default if encoding is None else encoding)
    _check_cache(cache, selection, settings.encoding, batch)
    prefix_length = cache.prefix_length[cache.document_of(batch)]
    live_encoded = settings.encoding.live_encoded
    state = dataclasses.replace(state, prefix_length=prefix_length, live_encoded=live_encoded)
    slots = selection.slots if settings.encoding.needs_pool else None
    state = encode_state(
        model, cache, state, selection.chunk_ids, settings, implementation, slots=slots
    )
    return constrain(model.mesh, state)


def _check_cache(cache: ChunkCache, selection: Selection, encoding: Encoding, batch: int) -> None:
    """Raises ValueError where the encoding cannot start from the cache."""
    if selection.chunk_ids.shape[0] != batch:
        raise ValueError(f"{batch} questions for {selection.chunk_ids.shape[0]} selections")
    if encoding.needs_pool and cache.pool is None:
        raise ValueError(f"the cache holds no chunk KV: prefill with encoding={encoding.name!r}")
    if encoding.keeps_prefix and cache.prefix_ids.shape[-1] and cache.prefix_k is None:
        raise ValueError("the cache holds no KV of the prefix: prefill with this encoding")
    if encoding.needs_pool and (selection.slots is not None) != cache.streamed:
        raise ValueError("cache and selection are not from the same call of prefill_top_k")
