"""Re-selection: relevance computed anew from the denoising state.

At step t, with x_t the response so far, U the response slots that hold a token and Q the query's:

  score_i(t) = mean over s in Q + U of log p(token_s | prefix, chunk_i, x_t and query without s)

the draft score of step 2 with the response in the draft's place, its masked slots riding as masks,
by R masked copies against the cached KV of every chunk. The other scorers in the same way: "query"
scores the query alone, which now sees the response so far; "confidence" reads the slots of the
current block that are still masked; "attention" counts the query's rows and those of U.

Where the K best are others than before, they are placed and encoded as at the start, with the
response as it is; live KV that has not seen them is stale. A request whose selection stays keeps
every bit of its KV.
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
from pdllm_jax.method.question import Question
from pdllm_jax.method.scorers import Response, ScoreRequest
from pdllm_jax.method.scoring import check_scorable, run_scorer
from pdllm_jax.method.selection import select
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor


@functools.partial(
    jax.jit,
    static_argnames=("selecting", "config", "implementation"),
    donate_argnames=("state",),
)
def reselect(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    *,
    selecting: SelectionConfig,
    config: DecodeConfig,
    implementation: Implementation | None = None,
) -> DenoiseState:
    """Scores all chunks for the state as it is and goes on with the best; `state` is consumed.

    For loops of one's own around `denoise_step`; `denoise` does it where selecting.reselect says.
    Requests that are done, or of whose response nothing is there yet, stay as they are. Costs the
    scoring of Q + G rows in R copies against every chunk, and an encoding where the selection
    changes.

    Args:
      cache: with the KV of every chunk (`prefill` with keep_pool).
      selecting: scorer, K, encoding: those that the state was made with.
      config: that the state was made with.

    Raises:
      ValueError: the cache does not hold every chunk's KV; a scorer that reads nothing.
    """
    active = state.block < config.n_blocks
    state = reselect_due(model, cache, state, selecting, config, implementation, active)
    return constrain(model.mesh, state)


def reselect_due(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    selecting: SelectionConfig,
    config: DecodeConfig,
    implementation: Implementation | None,
    due: Bool[Array, "B"],
) -> DenoiseState:
    """`reselect` for some requests; costs nothing where there are none."""
    check_scorable(cache)
    dataclasses.replace(selecting, reselect="step")  # refuses scorers that read nothing
    due &= (state.tokens != model.config.mask_token_id).any(axis=1)

    def again(state: DenoiseState) -> DenoiseState:
        scores = _scores(model, cache, state, selecting, config, implementation, due)
        chosen = select(scores, selecting).chunk_ids
        chosen = jnp.where(due[:, None], chosen, state.selected)
        changed = (chosen != state.selected).any(axis=1)
        state = dataclasses.replace(state, rescored=state.rescored + due)

        def renew(state: DenoiseState) -> DenoiseState:
            moved = encode_state(model, cache, state, chosen, selecting, implementation)
            return _of_changed(changed, moved, state)

        return lax.cond(changed.any(), renew, lambda state: state, state)

    return lax.cond(due.any(), again, lambda state: state, state)


def _scores(
    model: MaskPredictor,
    cache: ChunkCache,
    state: DenoiseState,
    selecting: SelectionConfig,
    config: DecodeConfig,
    implementation: Implementation | None,
    due: Bool[Array, "B"],
) -> Array:
    document = cache.document_of(state.tokens.shape[0])
    block = jnp.arange(config.gen_length) // config.block_length
    request = ScoreRequest(
        Question(cache.prefix_ids[document], state.prefix_length, state.query, state.query_length),
        (cache.lengths[document] > 0) & due[:, None],
        response=Response(
            state.tokens,
            state.tokens != model.config.mask_token_id,
            block == state.block[:, None],
        ),
        encode_batch=selecting.encode_batch,
        implementation=implementation,
    )
    return run_scorer(selecting.scorer, model, cache, request)


def _of_changed(changed: Bool[Array, "B"], new: DenoiseState, old: DenoiseState) -> DenoiseState:
    """Each request's part of the one state or the other."""

    def pick(axis: int):
        def one(a: Array, b: Array) -> Array:
            rows = jnp.repeat(changed, a.shape[axis] // changed.shape[0])
            return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - axis - 1)), a, b)

        return one

    def of_pool(a: Array, b: Array) -> Array:
        """KV, whose chunks are behind the axis of layers; and lengths."""
        return pick(0 if a.ndim == 1 else 1)(a, b)

    changes = {
        name: pick(0)(getattr(new, name), getattr(old, name))
        for name in ("selected", "chunk_ids", "chunk_starts", "query_start", "stale")
    }
    live = jax.tree.map(pick(0), new.live, old.live)
    pool = jax.tree.map(of_pool, new.pool, old.pool)
    return dataclasses.replace(old, live=live, pool=pool, **changes)
