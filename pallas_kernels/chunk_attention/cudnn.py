"""cuDNN's attention with its float32 log-sum-exp, and chosen chunks gathered for it."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import compat
from pallas_kernels.common import Partial, merge, valid_chunks, zero_without_keys
from pallas_kernels.scaled import restored

Layout = Literal["BTNH", "BNTH"]


def input_problem(
    dtype: jnp.dtype, head_size: int, chunk_size: int, pool_dtype: Any = None
) -> str | None:
    """Returns why `chunk_attention_cudnn` does not take such inputs; None if it does."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"it takes bfloat16 and float16, got {jnp.dtype(dtype).name}"
    return None


def device_problem() -> str | None:
    """Returns why JAX's default device cannot run cuDNN; None if it can."""
    return "it runs on NVIDIA GPUs" if compat.compute_capability() is None else None


def zero_padding(x: Array, lengths: Array, layout: Layout = "BTNH") -> Array:
    """Returns keys or values with zeros behind `lengths`: cuDNN multiplies it; 0 * NaN is NaN."""
    axis = layout.index("T")
    valid = jnp.arange(x.shape[axis]) < lengths[:, None]
    return jnp.where(jnp.expand_dims(valid, {1: (2, 3), 2: (1, 3)}[axis]), x, 0)


def at_least_one_key(lengths: Array) -> Array:
    """Returns the lengths for cuDNN, which is undefined without keys; drop what it gives then."""
    return jnp.maximum(lengths, 1).astype(jnp.int32)


def attention_with_lse(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    scale: float,
    layout: Layout = "BTNH",
    *,
    causal: bool = False,
) -> Partial:
    """Returns `dense.attention` with its log-sum-exp; keys behind `lengths` are finite.

    With layout "BNTH" the inputs' heads come before their rows; the result is [B, T, H, D] in
    either layout. jax.nn.dot_product_attention(return_residual=True) rounds the residual to q's
    dtype, which in bfloat16 costs some percent in a merge. The private function that it calls does
    not round, and is used here.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    batch, (rows, heads) = len(q), q.shape[1:3] if layout == "BTNH" else q.shape[2:0:-1]
    q_lengths = kv_lengths = None
    if lengths is not None:
        q_lengths = jnp.full((batch,), rows, jnp.int32)
        kv_lengths = at_least_one_key(lengths)
    mask = "_".join(["PADDING"] * (lengths is not None) + ["CAUSAL"] * causal) or "NO_MASK"
    out, lse = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=q_lengths,
        kv_seqlen=kv_lengths,
        scale=scale,
        mask_type=cudnn.MaskType[mask],
        qkv_layout=layout,
        return_residual=True,
    )
    if layout == "BNTH":
        out = out.swapaxes(1, 2)
    lse = lse.reshape(batch, heads, rows).astype(jnp.float32)
    return zero_without_keys(Partial(out, lse), lengths)


def chunk_attention_cudnn(q, k, v, layer, chunk_ids, chunk_lengths, scale) -> Partial:
    """Gathers the chosen chunks into a copy; every slot is a row of cuDNN's batch."""
    c = k.shape[3]
    b, slots = chunk_ids.shape
    ids, lengths = (x.reshape(-1) for x in valid_chunks(chunk_ids, chunk_lengths, c))
    rows = q.reshape(b * slots, *q.shape[2:]).swapaxes(1, 2)  # [B K, H, T, D]
    k, v = (restored(jax.tree.map(lambda x: x[layer, ids], x), q.dtype) for x in (k, v))
    k, v = (zero_padding(x, lengths, "BNTH") for x in (k, v))
    part = attention_with_lse(rows, k, v, lengths, scale, "BNTH")
    out = part.out.reshape(b, slots, *part.out.shape[1:])
    lse = part.lse.reshape(b, slots, *part.lse.shape[1:])
    return merge(*(Partial(out[:, i], lse[:, i]) for i in range(slots)))
