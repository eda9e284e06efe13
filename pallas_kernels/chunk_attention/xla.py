"""Portable implementation: one chunk at a time, a running log-sum-exp, no copy of the KV."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.common import EMPTY_LSE, Partial, valid_chunks
from pallas_kernels.scaled import Scaled, restored


def chunk_attention_xla(q, k, v, layer, chunk_ids, chunk_lengths, scale) -> Partial:
    """Scans over the K slots; a step reads one chunk of each request in place."""
    _, _, g, c, d = k.shape
    b, _, t, h, _ = q.shape
    ids, lengths = valid_chunks(chunk_ids, chunk_lengths, c)
    # Batch and head come first, as dot_general takes them.
    queries = q.reshape(b, -1, t, g, h // g, d).transpose(1, 0, 3, 4, 2, 5)  # [K, B, G, R, T, D]
    queries = queries.reshape(-1, b, g, (h // g) * t, d)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def read(pool: Array | Scaled, chunk: Array) -> Array:
        """Returns a chunk [G, C, D]: a slice of the pool that XLA fuses into its use."""

        def cut(x: Array) -> Array:
            start = (layer, chunk, *[0] * (x.ndim - 2))
            return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]

        return restored(jax.tree.map(cut, pool), q.dtype)

    def step(carry, slot):
        peak, total, acc = carry
        query, chunk, length = slot
        keys, values = (jax.vmap(lambda i, p=pool: read(p, i))(chunk) for pool in (k, v))
        valid = jnp.arange(c) < length[:, None]  # [B, C]
        scores = product("bgmd,bgcd->bgmc", query, keys)
        scores = jnp.where(valid[:, None, None], scores * scale, EMPTY_LSE)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.where(valid[:, None, None], jnp.exp(scores - new_peak[..., None]), 0.0)
        fade = jnp.exp(peak - new_peak)
        # Zero the padding: its weight is 0, and 0 * NaN is NaN.
        values = jnp.where(valid[:, None, :, None], values, 0)
        added = product("bgmc,bgcd->bgmd", weights.astype(values.dtype), values)
        return (new_peak, total * fade + weights.sum(axis=-1), acc * fade[..., None] + added), None

    rows = queries.shape[1:-1]
    start = (
        jnp.full(rows, EMPTY_LSE, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, d), jnp.float32),
    )
    (peak, total, acc), _ = lax.scan(step, start, (queries, ids.T, lengths.T))
    safe = jnp.maximum(total, 1e-30)
    out = (acc / safe[..., None]).reshape(b, g, h // g, t, d).transpose(0, 3, 1, 2, 4)
    lse = jnp.where(total > 0, peak + jnp.log(safe), EMPTY_LSE)
    return Partial(out.reshape(b, t, h, d).astype(q.dtype), lse.reshape(b, h, t))
