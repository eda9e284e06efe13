"""The oracle: attention over chosen chunks of a pool, from the definition, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.common import EMPTY_LSE, Partial
from pallas_kernels.scaled import Scaled, restored


def chunk_attention_reference(q, k, v, layer, chunk_ids, chunk_lengths, scale) -> Partial:
    """Gathers the chunks, masks the padding, and takes one softmax. Slow; for comparisons."""
    _, n, g, c, d = k.shape
    b, _, t, h, _ = q.shape
    inside = (chunk_ids >= 0) & (chunk_ids < n)
    ids = jnp.where(inside, chunk_ids, 0)
    lengths = jnp.where(inside, jnp.clip(chunk_lengths[ids], 0, c), 0)
    valid = jnp.arange(c) < lengths[..., None]  # [B, K, C]

    def read(pool: Array | Scaled) -> Array:
        """Returns the chunks [B, K, G, C, D] in float32, zeros behind the valid keys."""
        chunks = restored(jax.tree.map(lambda x: x[layer, ids], pool), jnp.float32)
        return jnp.where(valid[:, :, None, :, None], chunks.astype(jnp.float32), 0.0)

    keys, values = read(k), read(v)
    queries = q.astype(jnp.float32).reshape(b, -1, t, g, h // g, d)
    scores = jnp.einsum("bktgrd,bkgcd->btgrkc", queries, keys, precision="highest") * scale
    scores = jnp.where(valid[:, None, None, None], scores, -jnp.inf)
    flat = scores.reshape(*scores.shape[:4], -1)
    lse = jax.nn.logsumexp(flat, axis=-1)
    weights = jnp.where(jnp.isneginf(lse)[..., None], 0.0, jnp.exp(flat - lse[..., None]))
    weights = weights.reshape(scores.shape)
    out = jnp.einsum("btgrkc,bkgcd->btgrd", weights, values, precision="highest")
    lse = jnp.where(jnp.isneginf(lse), EMPTY_LSE, lse)
    lse = lse.reshape(b, t, h).swapaxes(1, 2)
    return Partial(out.reshape(b, t, h, d).astype(q.dtype), lse)
