"""What several operations share: partial attention and its exact merge, chunk ids, RMSNorm."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The log-sum-exp of a part without keys. Finite, so that differences of two are never NaN.
EMPTY_LSE = -1e30


class Partial(NamedTuple):
    """Softmax attention restricted to a part of the keys.

    Attributes:
      out: [B, T, H, D], weighted mean of the values; zero without keys.
      lse: [B, H, T] float32, natural log of the sum of exp(scores); EMPTY_LSE without keys. Heads
        come before rows, as attention kernels write it.
    """

    out: Float[Array, "B T H D"]
    lse: Float[Array, "B H T"]


class OwnKV(NamedTuple):
    """Keys and values that belong to one request each, beside the chunks: prefix, query, response.

    Attributes:
      k, v: [B, S, G, D] of one layer, also if the pool has a layer axis.
      lengths: [B] int32, valid keys of each request, clipped to [0, S]. Keys behind it are never
        used; they may hold NaN.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    lengths: Int[Array, "B"]


def merge(*parts: Partial) -> Partial:
    """Returns attention over the union of the parts' keys, which must be disjoint.

    Exact: part i has weight exp(lse_i - max lse), divided by the sum of the weights. A part without
    keys (EMPTY_LSE or -inf) adds zeros, also if its output is NaN. Without any keys the result is
    zeros and EMPTY_LSE.
    """
    # Elementwise over the parts, so that the compiler makes no stacked copy of them.
    top = functools.reduce(jnp.maximum, [part.lse for part in parts], jnp.float32(EMPTY_LSE))
    weights = [jnp.where(part.lse <= EMPTY_LSE / 2, 0, jnp.exp(part.lse - top)) for part in parts]
    total = functools.reduce(jnp.add, weights)
    divisor = jnp.where(total == 0, 1, total)

    def weighted(part: Partial, weight: Array) -> Array:
        share = (weight / divisor).swapaxes(1, 2)[..., None]
        # Not a product alone: 0 * NaN is NaN.
        return jnp.where(share == 0, 0, part.out.astype(jnp.float32) * share)

    out = functools.reduce(jnp.add, map(weighted, parts, weights))
    lse = jnp.where(total == 0, EMPTY_LSE, top + jnp.log(divisor))
    return Partial(out.astype(parts[0].out.dtype), lse)


def merge_slots(parts: Partial) -> tuple[Partial, Float[Array, "B K H T"]]:
    """Returns `merge` of K parts with the axes [B, K, T, H, D] and [B, K, H, T], and their weights.

    The weights are float32. They sum to 1 over the parts, or are all 0 without keys.
    """
    top = jnp.maximum(parts.lse.max(axis=1), EMPTY_LSE)
    weights = jnp.where(parts.lse <= EMPTY_LSE / 2, 0, jnp.exp(parts.lse - top[:, None]))
    total = row_sum(jnp.moveaxis(weights, 1, -1))
    divisor = jnp.where(total == 0, 1, total)
    weights /= divisor[:, None]
    share = weights.swapaxes(2, 3)[..., None]
    out = jnp.where(share == 0, 0, parts.out.astype(jnp.float32) * share)
    out = row_sum(jnp.moveaxis(out, 1, -1)).astype(parts.out.dtype)
    return Partial(out, jnp.where(total == 0, EMPTY_LSE, top + jnp.log(divisor))), weights


def zero_without_keys(part: Partial, lengths: Int[Array, "B"] | None) -> Partial:
    """Returns the part with zeros and EMPTY_LSE for requests that have no keys.

    What an implementation computes for them is undefined. lengths: keys of each; None: all have.
    """
    if lengths is None:
        return part
    has_keys = lengths[:, None, None] > 0
    out = jnp.where(has_keys[..., None], part.out, 0)
    return Partial(out, jnp.where(has_keys, part.lse, EMPTY_LSE))


def valid_chunks(
    chunk_ids: Int[Array, "B K"], chunk_lengths: Int[Array, "N"], chunk_size: int
) -> tuple[Int[Array, "B K"], Int[Array, "B K"]]:
    """Returns ids inside the pool and the number of valid keys of each, 0 to chunk_size.

    An id outside the pool becomes chunk 0 with no valid keys, so nothing outside is read.
    """
    inside = (chunk_ids >= 0) & (chunk_ids < chunk_lengths.shape[0])
    ids = jnp.where(inside, chunk_ids, 0)
    return ids, jnp.where(inside, jnp.clip(chunk_lengths[ids], 0, chunk_size), 0)


def resolve(implementation: str | None, names: Iterable[str], problem: str | None) -> Any:
    """Returns the implementation to run, which `problem` keeps from being the kernel.

    Raises:
      ValueError: the name is not among `names`; `problem` of another one than "xla".
    """
    if implementation is None:
        return "xla" if problem else "mosaic_gpu"
    if implementation not in names:
        raise ValueError(f"implementation {implementation!r} is not known ({', '.join(names)})")
    if problem is not None and implementation != "xla":
        raise ValueError(f"implementation {implementation!r}: {problem}")
    return implementation


def _sum_by_halves(x: Float[Array, "*rows M"]) -> Float[Array, "*rows"]:
    size = 1 << (x.shape[-1] - 1).bit_length()
    # Behind a barrier, so that no product is fused with the first additions.
    x = jax.lax.optimization_barrier(x)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def row_sum(x: Float[Array, "*rows M"]) -> Float[Array, "*rows"]:
    """Sums over the last axis, on the CPU in an order that depends on the row alone.

    XLA's reductions on the CPU choose their order by the size of the whole array, so a row's last
    bit would depend on its neighbours. Here a row, padded with zeros to a power of two, is halved
    until one element is left.
    """
    return jax.lax.platform_dependent(x, cpu=_sum_by_halves, default=lambda x: x.sum(axis=-1))


def rms_norm(
    x: Float[Array, "*rows M"], weight: Float[Array, "M"], eps: float
) -> Float[Array, "*rows M"]:
    """Returns the root-mean-square norm: float32 inside, cast back, then scaled by the weight."""
    wide = x.astype(jnp.float32)
    mean = row_sum(wide * wide) / x.shape[-1]
    return (wide * jax.lax.rsqrt(mean[..., None] + eps)).astype(x.dtype) * weight
