"""How denoising begins: everything masked, the chosen chunks placed and encoded."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.cache import ChunkCache, init_live
from pdllm_jax.config import ConfigError, DecodeConfig, Encoding, SelectionConfig
from pdllm_jax.encoding import encode_chosen
from pdllm_jax.model import LLaDA
from pdllm_jax.parallel import constrain
from pdllm_jax.selection import Selection
from pdllm_jax.state import DenoiseState, placed


@functools.partial(jax.jit, static_argnames=("config", "encoding", "selecting", "implementation"))
def init_denoise(
    model: LLaDA,
    cache: ChunkCache | None,
    selection: Selection | None,
    query_ids: Int[Array, "*B Q"],
    config: DecodeConfig,
    key: Array,
    *,
    query_length: Int[Array, "*B"] | None = None,
    encoding: Encoding | None = None,
    selecting: SelectionConfig | None = None,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """The state before the first step: everything masked, the chosen chunks placed and encoded.

    Compiles once for each (shapes, config, encoding, selecting, implementation).

    Args:
      cache, selection: from `prefill` and `select_top_k`; selection.chunk_ids [K] or [B, K]. Both
        None for generation without a document's cache, where query_ids is the whole prompt. A
        cache of one document serves all requests, one of a batch of them a request each.
      query_ids: [Q] or [B, Q], padded behind query_length where that is given.
      config: lengths and sampling rule.
      key: PRNG key, of which request b uses fold_in(key, b); or a key for each request, [B].
      encoding: what the chunks' KV is computed from (see `SelectionConfig`). By default
        "independent" where the cache has their KV, else "joint".
      selecting: settings of encoding, positions and kept tokens, instead of `encoding`.
      implementation: of the attention over chunks, where the encoding has any.

    Raises:
      ValueError: an encoding that needs a pool asked of a cache without; cache without selection;
        guidance with a cache; both encoding and selecting.
    """
    query_ids = jnp.atleast_2d(query_ids).astype(jnp.int32)
    batch, q_rows = query_ids.shape
    if query_length is None:
        query_length = jnp.full((batch,), q_rows, jnp.int32)
    query_length = jnp.broadcast_to(jnp.atleast_1d(query_length), (batch,)).astype(jnp.int32)
    if (cache is None) != (selection is None):
        raise ValueError("cache and selection go together: give both or neither")
    if encoding is not None and selecting is not None:
        raise ValueError("selecting names an encoding already: give one of the two")
    if cache is not None and config.guidance > 0:
        raise ConfigError("guidance is implemented for generation without a document's cache")
    mask_id = model.config.mask_token_id
    zeros = jnp.zeros((batch,), jnp.int32)
    none = jnp.zeros((batch, 0), jnp.int32)
    state = DenoiseState(
        tokens=jnp.full((batch, config.gen_length), mask_id, jnp.int32),
        query=query_ids,
        query_length=query_length,
        prefix_length=zeros,
        selected=none,
        chunk_ids=none,
        chunk_starts=none,
        query_start=zeros,
        live=None,
        pool=None,
        block=zeros,
        step=zeros,
        stale=jnp.ones((batch,), bool),
        evaluations=zeros,
        rescored=zeros,
        keys=key if key.ndim else jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)),
    )
    prefix_rows = 0 if cache is None else cache.prefix_ids.shape[-1]
    if config.recompute != "response" or prefix_rows:
        rows = prefix_rows + q_rows + config.gen_length
        state = dataclasses.replace(
            state, live=init_live(model.config, batch, rows, model.dtype, model.mesh)
        )
    if cache is None or selection is None:
        return constrain(model.mesh, state)

    if selecting is None:
        default: Encoding = "joint" if cache.pool is None else "independent"
        selecting = SelectionConfig(encoding=encoding or default)
    if cache.batched and cache.tokens.shape[0] != batch:
        raise ValueError(f"{batch} questions for a cache of {cache.tokens.shape[0]} documents")
    starts_from_pool = selecting.encoding in ("independent", "bridge")
    if starts_from_pool and cache.pool is None:
        raise ValueError(
            f"the cache holds no chunk KV: prefill with encoding={selecting.encoding!r}"
        )
    if selecting.encoding == "query-conditioned" and prefix_rows and cache.prefix_k is None:
        raise ValueError("the cache holds no KV of the prefix: prefill with this encoding")
    if starts_from_pool and (selection.slots is not None) != cache.streamed:
        raise ValueError("cache and selection are not from the same call of prefill_top_k")

    def each(ids: Array) -> Array:
        return jnp.broadcast_to(jnp.atleast_2d(ids), (batch, ids.shape[-1])).astype(jnp.int32)

    prefix_length = jnp.broadcast_to(cache.prefix_length, (batch,))
    state = dataclasses.replace(
        state,
        prefix_length=prefix_length,
        live_encoded=selecting.encoding in ("joint", "bridge"),
    )
    state = placed(state, cache, each(selection.chunk_ids), selecting.positions)
    if starts_from_pool and selection.slots is not None:
        state = dataclasses.replace(state, chunk_ids=each(selection.slots))
    state = encode_chosen(model, cache, state, selecting, implementation)
    return constrain(model.mesh, state)
