"""Public entry: attention of query rows over chosen chunks of a KV pool, where they lie."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.partial import Partial
from pallas_kernels.reference import chunk_attention_reference
from pallas_kernels.xla import chunk_attention_xla

Implementation = Literal["xla", "reference"]


def resolve_implementation(implementation: Implementation | None) -> Implementation:
    """The implementation that a call will use: the named one, or the best where none is named."""
    if implementation is None:
        return "xla"
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation {implementation!r} is not known ({known})")
    return implementation


def chunk_attention(
    q: Float[Array, "B T H D"] | Float[Array, "B K T H D"],
    k: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    v: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Softmax attention of every query row over the union of its request's chunks.

    Args:
      q: query rows. With a K axis, rows[b, j] meet chunk chunk_ids[b, j]: rotated by the row's
        position minus that chunk's offset, they let keys stay rotated at chunk-local positions.
        Without it the same rows meet every chunk.
      k, v: the pool, N chunks of C keys for G KV heads (H a multiple of G); with a leading axis
        of layers where `layer` is given. Read in place: no copy of the chosen chunks is made.
      chunk_ids: chunks of each request, in any order, repeats allowed. An id outside [0, N) marks
        an empty slot: it contributes nothing, and nothing outside the pool is read.
      chunk_lengths: valid keys of each chunk, clipped to [0, C]. What lies behind is never used,
        whatever it holds.
      layer: index into the leading axis of a stacked pool; may be traced.
      scale: of the scores, 1/sqrt(D) by default.
      implementation: "xla" (online log-sum-exp, any backend), "reference" (the float32 oracle);
        None chooses. A named implementation is used or the call fails.

    Returns:
      Partial(out [B, T, H, D] in q's dtype, lse [B, T, H] float32), to be merged with attention
      over other keys (`pallas_kernels.merge`). Rows without any key give zeros and EMPTY_LSE.

    Raises:
      ValueError: ranks, sizes, dtypes or head counts that do not fit, named; K = 0.
    """
    implementation = resolve_implementation(implementation)
    _check(q, k, v, chunk_ids, chunk_lengths, layer)
    if layer is None:
        k, v, layer = k[None], v[None], 0
    if q.ndim == 4:
        q = jnp.broadcast_to(q[:, None], (q.shape[0], chunk_ids.shape[1], *q.shape[1:]))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if implementation == "reference":
        return chunk_attention_reference(q, k[layer], v[layer], chunk_ids, chunk_lengths, scale)
    return chunk_attention_xla(q, k, v, layer, chunk_ids, chunk_lengths, scale)


def _check(q, k, v, chunk_ids, chunk_lengths, layer) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    ndim = 4 if layer is None else 5
    require(q.ndim in (4, 5), f"q must be [B, T, H, D] or [B, K, T, H, D], got shape {q.shape}")
    require(
        k.ndim == ndim,
        f"k must have {ndim} axes {'without' if layer is None else 'with'} a layer index, "
        f"got shape {k.shape}",
    )
    require(k.shape == v.shape, f"k {k.shape} and v {v.shape} differ in shape")
    require(
        q.dtype == k.dtype == v.dtype,
        f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    require(
        jnp.issubdtype(q.dtype, jnp.floating), f"q, k and v must be floating point, got {q.dtype}"
    )
    n, g, _, d = k.shape[-4:]
    require(q.shape[-1] == d, f"head size of q {q.shape[-1]} differs from the pool's {d}")
    require(q.shape[-2] % g == 0, f"{q.shape[-2]} query heads are no multiple of {g} KV heads")
    for name, ids in (("chunk_ids", chunk_ids), ("chunk_lengths", chunk_lengths)):
        require(jnp.issubdtype(ids.dtype, jnp.integer), f"{name} must be integers, got {ids.dtype}")
    require(
        chunk_ids.ndim == 2 and chunk_ids.shape[0] == q.shape[0],
        f"chunk_ids must be [B, K] with B = {q.shape[0]}, got shape {chunk_ids.shape}",
    )
    require(chunk_ids.shape[1] > 0, "chunk_ids is empty: attention over no chunk has no meaning")
    require(
        q.ndim == 4 or q.shape[1] == chunk_ids.shape[1],
        f"q has {q.shape[1]} chunk slots, chunk_ids {chunk_ids.shape[1]}",
    )
    require(
        chunk_lengths.shape == (n,),
        f"chunk_lengths must be [{n}], one for each chunk of the pool, got {chunk_lengths.shape}",
    )
