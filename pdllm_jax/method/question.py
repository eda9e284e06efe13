"""What is asked about a document: prefix and query of each request."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Question(NamedTuple):
    """Prefix and query of each request, padded behind their lengths."""

    prefix: Int[Array, "B P"]
    prefix_length: Int[Array, "B"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]


def count_ids(query_ids: Int[Array, "B Q"]) -> Int[Array, "B"]:
    """Counts the ids of each row that are not padding (-1)."""
    return jnp.count_nonzero(query_ids >= 0, axis=1).astype(jnp.int32)
