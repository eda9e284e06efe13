"""Step 3: selects the chunks to keep. Takes scores, returns ascending chunk ids."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pdllm_jax.config import SelectionConfig

EMPTY_SLOT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Chunks kept, in document order.

    chunk_ids [B, K] int32: ascending; EMPTY_SLOT behind them where fewer than K chunks exist.
    scores [B, K] float32: of these chunks, -inf for empty slots.
    slots [B, K] int32: their places in the pool of `prefill_top_k`; None where the chunk ids give
      them.
    """

    chunk_ids: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    slots: Int[Array, "B K"] | None = None


def ranking(
    scores: Float[Array, "B N"], ids: Int[Array, "B N"], keep_first: bool
) -> Float[Array, "B N"]:
    """Returns the ranking key: NaN is the lowest finite number, above -inf (an empty chunk).

    keep_first: chunk 0, if it exists, comes first.
    """
    # top_k puts -0.0 below 0.0, argsort does not.
    rank_by = jnp.where(scores == 0, 0.0, scores)
    rank_by = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).min, rank_by)
    if keep_first:
        rank_by = jnp.where((ids == 0) & (rank_by > -jnp.inf), jnp.inf, rank_by)
    return rank_by


@functools.partial(jax.jit, static_argnames=("k", "keep_first", "max_k", "margin"))
def select_top_k(
    scores: Float[Array, "B N"],
    k: int,
    *,
    keep_first: bool = False,
    max_k: int | None = None,
    margin: float = 0.0,
) -> Selection:
    """Selects the k chunks with the highest scores, ties to the lower index.

    Compiles for each value of all arguments but the scores.

    Args:
      scores: -inf marks an empty chunk, which is never chosen. -0.0 equals 0.0. NaN ranks as the
        lowest finite number.
      k: chunks to keep; k >= N keeps all.
      keep_first: includes chunk 0 for any score. With k = 1 no other chunk is within the margin.
      max_k, margin: adaptive K. Also keeps chunks whose score lies at most `margin` under the
        k-th score, up to max_k in all. The selection then has max_k slots.

    Raises:
      ValueError: k is below 1, or max_k below k.
    """
    if k <= 0:
        raise ValueError(f"k must be positive, got {k}")
    if max_k is not None and max_k < k:
        raise ValueError(f"max_k {max_k} is less than k {k}")
    n = scores.shape[-1]
    best, ids = jax.lax.top_k(
        ranking(scores, jnp.arange(n), keep_first), min(k if max_k is None else max_k, n)
    )
    chosen = best > -jnp.inf
    if max_k is not None:
        close = best[..., min(k, n) - 1, None] - best <= margin
        chosen &= (jnp.arange(best.shape[-1]) < k) | close
    ids = jnp.sort(jnp.where(chosen, ids, n), axis=-1).astype(jnp.int32)
    values = jnp.take_along_axis(scores, jnp.minimum(ids, n - 1), axis=-1)
    return Selection(jnp.where(ids == n, EMPTY_SLOT, ids), jnp.where(ids == n, -jnp.inf, values))


def select(scores: Float[Array, "B N"], config: SelectionConfig) -> Selection:
    """Runs `select_top_k` with a configuration's settings."""
    adaptive = {"max_k": config.max_k, "margin": float(config.margin)}
    return select_top_k(scores, config.top_k, keep_first=config.keep_first, **adaptive)
