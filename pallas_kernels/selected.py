"""Run-time ids and lengths as the implementations may use them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def selected_chunks(
    chunk_ids: Int[Array, "B K"], chunk_lengths: Int[Array, "N"], chunk_size: int
) -> tuple[Int[Array, "B K"], Int[Array, "B K"]]:
    """Ids inside the pool and the valid keys of each, 0 to chunk_size.

    An id outside the pool becomes chunk 0 with no keys: nothing outside is read.
    """
    inside = (chunk_ids >= 0) & (chunk_ids < chunk_lengths.shape[0])
    ids = jnp.where(inside, chunk_ids, 0)
    return ids, jnp.where(inside, jnp.clip(chunk_lengths[ids], 0, chunk_size), 0)
