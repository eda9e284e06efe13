"""The query's attention to a document whose KV is not kept: layer by layer, all chunks at a time.

Between two layers there is the residual stream of the document's chunks. Inside a layer, groups of
chunks go through it one after another, and the query attends to the keys that they have there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import EMPTY_LSE, Partial
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.scorers.copies import in_groups
from pdllm_jax.method.scorers.prefix import prefix_keys, rotated_keys
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, divide_rows, whole_groups
from pdllm_jax.network.transformer import MaskPredictor

# (layer, q [B, T, H, D] rotated behind a chunk, streams) -> (attention to each chunk, streams).
OverChunks = Callable[[int, Array, Array], tuple[Partial, Array]]


def layer_major(
    model: MaskPredictor,
    cache: ChunkCache,
    wanted: Bool[Array, "B N"],
    encode_batch: int,
    last: int,
) -> tuple[OverChunks, Float[Array, "g n C M"]]:
    """Returns a function that takes the chunks through a layer, and room for their streams.

    The function is to be called for the layers 0 to `last`, in order. It returns parts
    [B, N, T, H, D] and [B, N, H, T]; of the last layer, in which chunks are keys alone, `out` is
    not computed.

    Args:
      cache: with the prefix' KV of these layers, if there is a prefix.
      encode_batch: half the chunks that go through a layer together.
    """
    (batch, n), size = wanted.shape, cache.tokens.shape[-1]
    # Twice the chunks: between two groups the GPU waits for the host, in every layer.
    group = whole_groups(model.mesh, min(2 * encode_batch, batch * n))
    pairs, inside, steps = in_groups(wanted.reshape(-1), group)
    request = pairs // n
    at = cache.document_of(batch)[request], pairs % n
    tokens = cache.tokens[at]
    lengths = jnp.where(inside & wanted.reshape(-1)[pairs], cache.lengths[at], 0)
    target = jnp.where(lengths > 0, pairs, batch * n)
    offset = jnp.arange(size)
    by = rotation(model.config, offset)

    def over_chunks(layer: int, q: Array, streams: Array) -> tuple[Partial, Array]:
        rows, heads = q.shape[1:3]
        parts = Partial(
            jnp.zeros((batch * n, *q.shape[1:]), q.dtype),
            jnp.full((batch * n, heads, rows), EMPTY_LSE, jnp.float32),
        )

        def step(i: Array, carry: tuple[Partial, Array]) -> tuple[Partial, Array]:
            (out, lse), streams = carry
            far = prefix_keys(model, cache, at[0][i])

            def attend(layer: int, q: Array, k: Array, v: Array, of_query: Any):
                keys = rotated_keys(k, v, lengths[i], by, None if far is None else far(layer))
                out = attention(model.mesh, rotate(q, by), *keys, finite=True).out
                chunk = keys._replace(lengths=lengths[i])
                return out, attention(model.mesh, of_query, *chunk, need_lse=True, finite=True)

            stream = model.embed(tokens[i]) if layer == 0 else streams[:, i]
            if layer < last:
                of_query: Any = q[request[i]]
                stream, part = model.advance(layer, stream, attend, of_query)
                streams = divide_rows(model.mesh, streams.at[:, i].set(stream))
                out = out.at[target[i]].set(part.out, mode="drop")
            else:
                k = rotate(model.keys(layer, stream), by)
                settings = {"need_lse": True, "finite": True}
                part = attention(model.mesh, q[request[i]], k, k, lengths[i], **settings)
            return Partial(out, lse.at[target[i]].set(part.lse, mode="drop")), streams

        parts, streams = lax.fori_loop(0, steps, step, (parts, streams))
        return Partial(*(x.reshape(batch, n, *x.shape[1:]) for x in parts)), streams

    return over_chunks, model.streams(group, len(pairs), size)
