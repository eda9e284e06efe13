"""Attention over a part of the keys, and the exact merge of such parts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite, so that a part without any key merges to weight zero instead of NaN.
EMPTY_LSE = -1e30


class Partial(NamedTuple):
    """Softmax attention restricted to some keys.

    out [B, T, H, D]: weighted mean of those keys' values; zero where there is no key.
    lse [B, H, T] float32: natural log of the sum of exp(scores); EMPTY_LSE where there is no key.
      Heads come before rows, as attention kernels write it.
    """

    out: Float[Array, "B T H D"]
    lse: Float[Array, "B H T"]


class Near(NamedTuple):
    """Keys and values that each request has to itself, beside the chunks: prefix, query, response.

    k, v [B, S, G, D]: of one layer, whether or not the pool has an axis of layers.
    lengths [B] int32: valid keys of each request, clipped to [0, S]; what lies behind is never
      used, whatever it holds.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    lengths: Int[Array, "B"]


def merge(*parts: Partial) -> Partial:
    """Attention over the union of the parts' (disjoint) keys: weights exp(lse_i - max lse)."""
    if len(parts) == 1:
        return parts[0]
    # Elementwise over the parts, so that the compiler makes no stacked copy of them.
    top = functools.reduce(jnp.maximum, [part.lse for part in parts])
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = functools.reduce(jnp.add, weights)

    def weighted(part: Partial, weight: Array) -> Array:
        return part.out.astype(jnp.float32) * (weight / total).swapaxes(1, 2)[..., None]

    out = functools.reduce(jnp.add, map(weighted, parts, weights))
    return Partial(out.astype(parts[0].out.dtype), top + jnp.log(total))
