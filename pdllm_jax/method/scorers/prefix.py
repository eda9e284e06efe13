"""KV of the prefixes, and attention of rows behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import Partial
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.sharding import attention
from pdllm_jax.network.transformer import MaskPredictor


class Prefix(NamedTuple):
    """KV of the prefixes, layer by layer, keys unrotated; no layer where they are empty."""

    k: tuple[Float[Array, "B P G D"], ...] = ()
    v: tuple[Float[Array, "B P G D"], ...] = ()

    def placed_in(self, model: MaskPredictor, cache: ChunkCache) -> ChunkCache:
        """Returns the cache with this KV, keys rotated at 0..P-1; as it is without layers."""
        if not self.k:
            return cache
        by = rotation(model.config, jnp.arange(self.k[0].shape[1]))
        k, v = rotate(jnp.stack(self.k), by), jnp.stack(self.v)
        return dataclasses.replace(cache, prefix_k=k, prefix_v=v)


def encode_prefix(
    model: MaskPredictor,
    ids: Int[Array, "B P"],
    length: Int[Array, "B"],
    layers: int | None = None,
) -> Prefix:
    """Returns the KV of prefixes in the first layers, all of them by default."""
    if ids.shape[1] == 0:
        return Prefix()
    by = rotation(model.config, jnp.arange(ids.shape[1]))

    def attend(layer: int, q: Array, k: Array, v: Array, carry: Prefix) -> tuple[Array, Prefix]:
        turned = rotate(q, by), rotate(k, by)
        out = attention(model.mesh, *turned, v, length).out
        return out, Prefix((*carry.k, k), (*carry.v, v))

    _, prefix = model.run(ids, attend, Prefix(), layers=layers)
    return prefix


class Keys(NamedTuple):
    """Keys and values of rows, the first `lengths` of them valid."""

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    lengths: Int[Array, "B"]


def rotated_keys(
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    lengths: Int[Array, "B"],
    by: Rotation,
    prefix: Keys | None,
) -> Keys:
    """Returns rows' keys, which are not rotated, with the valid ones of a prefix behind them.

    Attention does not depend on the order of keys. The first `lengths` are the rows' own.
    """
    if prefix is None:
        return Keys(rotate(k, by), v, lengths)
    batch, count = prefix.k.shape[:2]
    place = jnp.arange(batch)[:, None], lengths[:, None] + jnp.arange(count)

    def join(x: Array, rows: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))
        return x.at[place].set(rows, mode="promise_in_bounds", unique_indices=True)

    # XLA writes a rotation at the memory's speed, but not a padded one.
    k = lax.optimization_barrier(rotate(k, by))
    return Keys(join(k, prefix.k), join(v, prefix.v), lengths + prefix.lengths)


def prefix_keys(
    model: MaskPredictor, cache: ChunkCache, document: Int[Array, "B"]
) -> Callable[[int], Keys] | None:
    """Returns a function of the layer -> the prefixes' keys as chunks see them; None without one.

    They end at position -1: the first row of a chunk is at 0.
    """
    k, v = cache.prefix_k, cache.prefix_v
    if k is None or v is None:
        return None
    length = cache.prefix_length[document]
    by = rotation(model.config, -length[:, None])
    return lambda layer: Keys(rotate(k[layer][document], by), v[layer][document], length)


def prefix_attention(
    model: MaskPredictor, cache: ChunkCache, document: Int[Array, "B"], offset: Int[Array, "*B T"]
) -> Callable[[int, Array], tuple[Partial, ...]]:
    """Returns a function (layer, unrotated queries) -> attention to the prefix; () without one.

    document: of each request. offset: positions of the rows behind the prefix.
    """
    k, v = cache.prefix_k, cache.prefix_v
    if k is None or v is None:
        return lambda layer, q: ()
    length = cache.prefix_length[document]
    by = rotation(model.config, length[:, None] + offset)

    def attend(layer: int, q: Array) -> tuple[Partial, ...]:
        kv = k[layer][document], v[layer][document]
        return (attention(model.mesh, rotate(q, by), *kv, length, need_lse=True),)

    return attend
