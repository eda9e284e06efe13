"""Step 3: which chunks are kept. Scores in, ascending chunk ids out; pure and jitted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pdllm_jax.config import SelectionConfig

EMPTY_SLOT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Chunks kept, in document order.

    chunk_ids [*B, K] int32: ascending; EMPTY_SLOT behind them where fewer than K chunks exist.
    scores [*B, K] float32: the scores of those chunks, -inf for empty slots.
    slots [*B, K] int32: their places in the cache's pool, where these are not the chunk ids
      (`prefill_top_k`).
    """

    chunk_ids: Int[Array, "*B K"]
    scores: Float[Array, "*B K"]
    slots: Int[Array, "*B K"] | None = None


def ranking(
    scores: Float[Array, "*B N"], ids: Int[Array, "*B N"], keep_first: bool
) -> Float[Array, "*B N"]:
    """What chunks are ranked by: NaN below every number but above -inf, which is no chunk at all.

    keep_first: chunk 0, if it exists, comes first.
    """
    rank_by = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).min, scores)
    if keep_first:
        rank_by = jnp.where((ids == 0) & (rank_by > -jnp.inf), jnp.inf, rank_by)
    return rank_by


@functools.partial(jax.jit, static_argnames=("k", "keep_first"))
def select_top_k(scores: Float[Array, "*B N"], k: int, *, keep_first: bool = False) -> Selection:
    """The k chunks with the highest scores, ties to the lower index.

    Args:
      scores: -inf marks a chunk that is empty or padding; such a chunk is never chosen. NaN ranks
        below every number.
      k: chunks to keep; at least N keeps everything. Static: a new value compiles anew.
      keep_first: chunk 0 is among them, whatever its score.

    Raises:
      ValueError: k is not positive.
    """
    if k <= 0:
        raise ValueError(f"k must be positive, got {k}")
    n = scores.shape[-1]
    found, ids = jax.lax.top_k(ranking(scores, jnp.arange(n), keep_first), min(k, n))
    found = found > -jnp.inf
    ids = jnp.sort(jnp.where(found, ids, n), axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scores, jnp.minimum(ids, n - 1), axis=-1)
    return Selection(jnp.where(ids == n, EMPTY_SLOT, ids), jnp.where(ids == n, -jnp.inf, chosen))


def control_scores(
    config: SelectionConfig,
    exists: Bool[Array, "N"],
    key: Array | None,
    oracle: Int[Array, "M"] | None = None,
) -> Float[Array, "N"]:
    """Scores of the controls, which read neither document nor question.

    "all" and "first" prefer early chunks, "last" late ones, "random" takes them at random by key;
    "oracle" gives 0 to the chunks named and -inf to all others.

    Raises:
      ValueError: "random" without a key, "oracle" without ids.
    """
    index = jnp.arange(exists.shape[0], dtype=jnp.float32)
    if config.scorer == "random":
        if key is None:
            raise ValueError("scorer 'random' needs a key")
        # One draw per chunk, so that padding the document to a larger bucket changes none of them.
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(exists.shape[0]))
        scores = jax.vmap(jax.random.uniform)(keys)
    elif config.scorer == "oracle":
        if oracle is None:
            raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
        named = (jnp.arange(exists.shape[0])[:, None] == oracle).any(axis=-1)
        scores = jnp.where(named, 0.0, -jnp.inf)
    else:
        scores = index if config.scorer == "last" else -index
    return jnp.where(exists, scores, -jnp.inf)
