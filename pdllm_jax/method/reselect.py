"""Re-selection: scores the chunks again from the denoising state.

At step t, with x_t the response so far, U the response slots that hold a token and Q the query's:

  score_i(t) = mean over s in Q + U of log p(token_s | prefix, chunk_i, x_t and query without s)

This is the draft score of step 2 with the response in place of the draft, by R masked copies
against the cached KV of every chunk. "query" scores the query alone, which attends to the response
so far. "causal" and "chunk-draft" score Q and U under their causal mask. "confidence" reads the
masked slots of the current block. "attention" and "heads" count the rows of Q and U, "bm25" their
words.

Where the K best chunks change, they are placed and encoded with the current response. Live KV that
has not attended to them is stale. A request whose selection stays keeps its KV bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.encoding import encode_state
from pdllm_jax.method.scorers import Question, Response, ScoreRequest
from pdllm_jax.method.scoring import check_scorable, run_scorer
from pdllm_jax.method.selection import select
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor


@functools.partial(
    jax.jit,
    static_argnames=("settings", "config", "implementation"),
    donate_argnames=("state",),
)
def reselect(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    *,
    settings: SelectionConfig,
    config: DecodeConfig,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Scores all chunks for the current state and keeps the best; donates `state`.

    For custom loops around `denoise_step`; `denoise` calls it as settings.reselect says. Finished
    requests, and requests whose response is all masks, do not change. Costs the scoring of Q + G
    rows in R copies against every chunk, and an encoding where the selection changes.

    Args:
      cache: with the KV of every chunk (`prefill` with keep_pool).
      settings: scorer, K and encoding that made the state.
      config: the settings that made the state.

    Raises:
      ValueError: the cache does not hold every chunk's KV; the scorer does not read the document;
        the state's selection has other slots than `select` gives with these settings.
    """
    active = state.block < config.n_blocks
    state = reselect_due(model, cache, state, settings, config, implementation, active)
    return constrain(model.mesh, state)


def reselect_due(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    settings: SelectionConfig,
    config: DecodeConfig,
    implementation: Implementation | None,
    due: Bool[Array, "B"],
) -> DenoiseState:
    """Runs `reselect` for the requests that are due; costs nothing if none is."""
    check_scorable(cache)
    dataclasses.replace(settings, reselect="step")  # raises for scorers that do not read
    due &= (state.tokens != model.config.mask_token_id).any(axis=1)

    def rescore(state: DenoiseState) -> DenoiseState:
        document = cache.document_of(due.size)
        block = jnp.arange(config.gen_length) // config.block_length
        prefix_ids, length = cache.prefix_ids[document], state.prefix_length
        unmasked = state.tokens != model.config.mask_token_id
        request = ScoreRequest(
            Question(prefix_ids, length, state.query, state.query_length),
            (cache.lengths[document] > 0) & due[:, None],
            response=Response(state.tokens, unmasked, block == state.block[:, None]),
            encode_batch=settings.encode_batch,
            implementation=implementation,
        )
        scores = run_scorer(settings.scorer, model, cache, request)
        chosen = select(scores, settings).chunk_ids
        slots, most = state.selected.shape[1], chosen.shape[1]
        if slots != most:
            raise ValueError(f"the state has {slots} slots for chunks, settings keep up to {most}")
        chosen = jnp.where(due[:, None], chosen, state.selected)
        changed = (chosen != state.selected).any(axis=1)
        state = dataclasses.replace(state, rescored=state.rescored + due)

        def renew(state: DenoiseState) -> DenoiseState:
            moved = encode_state(model, cache, state, chosen, settings, implementation)
            return _of_changed(changed, moved, state)

        return lax.cond(changed.any(), renew, lambda state: state, state)

    return lax.cond(due.any(), rescore, lambda state: state, state)


def _of_changed(changed: Bool[Array, "B"], new: DenoiseState, old: DenoiseState) -> DenoiseState:
    """Returns the new state for changed requests, the old one for others."""

    def pick(a: Array, b: Array, axis: int = 0) -> Array:
        rows = jnp.repeat(changed, a.shape[axis] // changed.size)
        return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - axis - 1)), a, b)

    names = ("selected", "chunk_ids", "chunk_starts", "query_start", "stale", "live", "pool")
    changes = {name: (getattr(new, name), getattr(old, name)) for name in names}
    # In a pool, requests divide the axis behind the layers of KV, and the first one of lengths.
    pool = jax.tree.map(lambda a, b: pick(a, b, min(a.ndim, 2) - 1), *changes.pop("pool"))
    picked = {name: jax.tree.map(pick, *pair) for name, pair in changes.items()}
    return dataclasses.replace(old, pool=pool, **picked)
