"""Attention over contiguous keys: cuDNN on GPUs, XLA in row blocks elsewhere.

Nothing here builds a T x S mask: each row of the batch has a number of valid keys, and a causal
mask is a comparison inside a block.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.chunk_attention.cudnn import (
    at_least_one_key,
    attention_with_lse,
    zero_padding,
)
from pallas_kernels.common import EMPTY_LSE, Partial, row_sum, zero_without_keys

DenseImplementation = Literal["cudnn", "xla"]

# Scores of one block of query rows, in elements. Bounds memory, and helps the caches.
BLOCK_SCORES = 1 << 24
# Keys are padded to a multiple of this: on the CPU, XLA's products take a remainder of 1 to 8 keys
# in a narrower loop, and a score's last bit would depend on the number of keys.
_KEYS_MULTIPLE = 16


def dense_implementation(dtype: jnp.dtype, head_dim: int) -> DenseImplementation:
    """Returns what `attention` uses on the default backend for a dtype and head size."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if jax.default_backend() == "gpu" and half and fits else "xla"


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    lengths: Int[Array, "B"] | None = None,
    *,
    need_lse: bool = False,
    scale: float | None = None,
    causal: bool = False,
    finite: bool = False,
) -> Partial:
    """Attends with every query row to the first lengths[b] keys. Softmax in float32.

    Args:
      q, k, v: rows, keys and values; H a multiple of G.
      lengths: valid keys; None for all. Keys behind may hold NaN; 0 gives zeros and EMPTY_LSE.
      need_lse: whether `lse` is needed. If not, it may be zeros, because cuDNN's public,
        differentiable function is used.
      scale: factor of the scores, 1/sqrt(D) by default.
      causal: row t attends to keys 0 to t alone; T = S.
      finite: keys and values behind the lengths are finite, so that they need not be zeroed.
    """
    if dense_implementation(q.dtype, q.shape[-1]) == "xla":
        return attention_xla(q, k, v, lengths, scale, causal)
    if lengths is not None and not finite:
        k, v = zero_padding(k, lengths), zero_padding(v, lengths)
    if need_lse or causal:
        return attention_with_lse(q, k, v, lengths, scale or q.shape[-1] ** -0.5, causal=causal)
    given = None if lengths is None else at_least_one_key(lengths)
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=given, implementation="cudnn", scale=scale
    )
    batch, rows, heads, _ = q.shape
    part = Partial(out, jnp.zeros((batch, heads, rows), jnp.float32))
    return zero_without_keys(part, lengths)


def attention_xla(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    scale: float | None = None,
    causal: bool = False,
) -> Partial:
    """Plain softmax attention, a block of query rows at a time; arguments as of `attention`."""
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    valid = None if lengths is None else jnp.arange(k.shape[1]) < lengths[:, None]  # [B, S]
    if padding := -k.shape[1] % _KEYS_MULTIPLE:
        if valid is None:
            valid = jnp.ones((batch, k.shape[1]), bool)
        valid = jnp.pad(valid, ((0, 0), (0, padding)))
        k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (k, v))
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, G, S, D]
    if valid is not None:
        values = jnp.where(valid[:, None, :, None], values, 0)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def block(query: Array, first: Array | int = 0) -> tuple[Array, Array]:
        """Rows [B, t, H, D], of which `first` is the first -> out [B, t, H, D], lse [B, H, t]."""
        t = query.shape[1]
        query = query.reshape(batch, t, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
        query = query.reshape(batch, groups, -1, dim)
        scores = product("bgmd,bgsd->bgms", query, keys) * (scale or dim**-0.5)
        if valid is not None:
            scores = jnp.where(valid[:, None, None], scores, EMPTY_LSE)
        if causal:
            row = jnp.tile(first + jnp.arange(t), heads // groups)
            scores = jnp.where(jnp.arange(k.shape[1]) <= row[:, None], scores, EMPTY_LSE)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = row_sum(weights)[..., None]
        out = product("bgms,bgsd->bgmd", weights.astype(v.dtype), values) / total
        lse = (peak + jnp.log(total))[..., 0]
        out = out.reshape(batch, groups, heads // groups, t, dim).transpose(0, 3, 1, 2, 4)
        return out.reshape(batch, t, heads, dim).astype(q.dtype), lse.reshape(batch, heads, t)

    size = max(16, BLOCK_SCORES // (batch * heads * k.shape[1]))
    if rows <= size:
        out, lse = block(q)
    else:
        n = -(-rows // size)
        padded = jnp.pad(q, ((0, 0), (0, -rows % n), (0, 0), (0, 0)))
        blocks = padded.reshape(batch, n, -1, heads, dim).swapaxes(0, 1)
        firsts = jnp.arange(n) * blocks.shape[2]
        # [n, B, t, H, D] and [n, B, H, t]
        out, lse = lax.map(lambda rows: block(*rows), (blocks, firsts))
        out = out.swapaxes(0, 1).reshape(padded.shape)[:, :rows]
        lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, -1)[..., :rows]
    return zero_without_keys(Partial(out, lse), lengths)
