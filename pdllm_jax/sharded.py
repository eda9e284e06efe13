"""The network's parts on each device's share of a mesh (`parallel`), under `jax.shard_map`.

Without a mesh each is the plain function. Collectives are written out here, and nowhere else: a sum
behind attention and MLP of every layer and behind the embedding, and a gather of logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import ChunkMass, Implementation, Near, Norm, Partial
from pallas_kernels.sums import rms_norm
from pdllm_jax.parallel import DATA, TENSOR, by_heads, local, rows_axis


def attention(
    mesh: Mesh | None,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    lengths: Int[Array, "B"] | None = None,
    *,
    need_lse: bool = False,
) -> Partial:
    """`pallas_kernels.attention`, each device on its own heads."""
    run = functools.partial(pallas_kernels.attention, need_lse=need_lse)
    if mesh is None:
        return run(q, k, v, lengths)
    rows = by_heads(mesh, q.shape[0], 2)
    each = PartitionSpec(rows[0])
    return local(mesh, run, (rows, rows, rows, each), _partial(mesh, q.shape[0]))(q, k, v, lengths)


def _partial(mesh: Mesh, batch: int) -> Any:
    """Specs of a `Partial`."""
    specs: Any = Partial
    return specs(by_heads(mesh, batch, 2), by_heads(mesh, batch, 1))


def _over_pool(mesh: Mesh, run: Any, q: Array, found: Any, *arguments: Any) -> Any:
    """A function of query rows, pool, ids, lengths, perhaps near keys, on each device's heads."""
    batch = q.shape[0]
    pool, each = PartitionSpec(None, None, TENSOR), PartitionSpec(rows_axis(mesh, batch))
    near_specs: Any = Near
    near = near_specs(by_heads(mesh, batch, 2), by_heads(mesh, batch, 2), each)
    specs = (by_heads(mesh, batch, q.ndim - 2), pool, pool, each, PartitionSpec(), near)
    return local(mesh, run, specs[: 1 + len(arguments)], found)(q, *arguments)


def chunk_attention(
    mesh: Mesh | None,
    q: Array,
    k: Float[Array, "L N G C D"],
    v: Float[Array, "L N G C D"],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int,
    near: Near | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`pallas_kernels.chunk_attention` over a stacked pool, each device on its own heads."""

    def run(q: Array, k: Array, v: Array, ids: Array, lengths: Array, *near: Near) -> Partial:
        return pallas_kernels.chunk_attention(
            q, k, v, ids, lengths,
            layer=layer, near=near[0] if near else None, implementation=implementation,
        )  # fmt: skip

    arguments = (k, v, chunk_ids, chunk_lengths, *(() if near is None else (near,)))
    if mesh is None:
        return run(q, *arguments)
    return _over_pool(mesh, run, q, _partial(mesh, q.shape[0]), *arguments)


def chunk_attention_mass(
    mesh: Mesh | None,
    q: Array,
    k: Float[Array, "L N G C D"],
    v: Float[Array, "L N G C D"],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int,
    implementation: Implementation | None = None,
) -> ChunkMass:
    """`pallas_kernels.chunk_attention_mass` over a stacked pool, each device on its own heads."""
    run = functools.partial(
        pallas_kernels.chunk_attention_mass, layer=layer, implementation=implementation
    )
    arguments = (k, v, chunk_ids, chunk_lengths)
    if mesh is None:
        return run(q, *arguments)
    specs: Any = ChunkMass
    found = specs(_partial(mesh, q.shape[0]), by_heads(mesh, q.shape[0], 1))
    return _over_pool(mesh, run, q, found, *arguments)


def project_columns(
    mesh: Mesh | None, x: Float[Array, "B *rows I"], *weights: Array, activation: Any = "none"
) -> tuple[Float[Array, "B *rows O"], ...]:
    """`pallas_kernels.matmul` into a layer: each device makes its columns, nothing is sent."""
    run = functools.partial(pallas_kernels.matmul, activation=activation)
    if mesh is None:
        return run(x, *weights)
    rows = PartitionSpec(rows_axis(mesh, x.shape[0]))
    made = by_heads(mesh, x.shape[0], x.ndim - 1)
    return local(mesh, run, (rows, *[PartitionSpec(TENSOR)] * len(weights)), made)(x, *weights)


def add_projected(
    mesh: Mesh | None,
    stream: Float[Array, "B *rows O"],
    x: Float[Array, "B *rows I"],
    weight: Float[Array, "O I"],
    norm: Norm | None,
    links: Array | None = None,
) -> tuple[Float[Array, "B *rows O"], ...]:
    """stream + x W^T, back from a layer: the devices' partial sums are added up. With a norm, the
    norm of that as well.
    """
    if mesh is None:
        total = stream + pallas_kernels.matmul(x, weight)[0]
        return (total,) if norm is None else (total, rms_norm(total, *norm))
    eps, scales = (None, ()) if norm is None else (norm.eps, (norm.weight,))

    def run(stream: Array, x: Array, weight: Array, *more: Array) -> tuple[Array, ...]:
        return pallas_kernels.device_sum(
            pallas_kernels.matmul(x, weight)[0], TENSOR, residual=stream,
            norm=None if eps is None else Norm(more[0], eps),
            table=more[-1] if links is not None else None,
        )  # fmt: skip

    rows = PartitionSpec(rows_axis(mesh, x.shape[0]))
    tables = () if links is None else (links,)
    specs = (
        rows, by_heads(mesh, x.shape[0], x.ndim - 1), PartitionSpec(None, TENSOR),
        *[PartitionSpec()] * len(scales), *[PartitionSpec(DATA, TENSOR)] * len(tables),
    )  # fmt: skip
    return local(mesh, run, specs, rows)(stream, x, weight, *scales, *tables)


def look_up(
    mesh: Mesh | None,
    table: Float[Array, "E M"],
    ids: Int[Array, "B *rows"],
) -> Float[Array, "B *rows M"]:
    """Rows of an embedding: from the device that has them, zeros of the others added.

    By XLA, whatever makes the sums of the layers: a program with a collective of XLA holds its
    devices' locks while it is put on their streams, so that no other comes between (`device_sum`).
    """
    if mesh is None:
        return table[ids]

    def run(table: Array, ids: Array) -> Array:
        own = ids - lax.axis_index(TENSOR) * table.shape[0]
        there = (own >= 0) & (own < table.shape[0])
        found = jnp.where(there[..., None], table[jnp.where(there, own, 0)], 0)
        return lax.psum(found, TENSOR)

    rows = PartitionSpec(rows_axis(mesh, ids.shape[0]))
    return local(mesh, run, (PartitionSpec(TENSOR), rows), rows)(table, ids)


def project_whole(
    mesh: Mesh | None,
    x: Float[Array, "B *rows M"],
    run: Callable[[Array, Array], Array],
    weight: Any,
) -> Float[Array, "B *rows V"]:
    """run(x, weight), the LM head: each device makes the logits of its words and gets all others'.

    So that sampling and scores are computed from the same whole rows as on one device.
    """
    if mesh is None:
        return run(x, weight)

    def gathered(x: Array, weight: Array) -> Array:
        return lax.all_gather(run(x, weight), TENSOR, axis=x.ndim - 1, tiled=True)

    rows = PartitionSpec(rows_axis(mesh, x.shape[0]))
    return local(mesh, gathered, (rows, PartitionSpec(TENSOR)), rows)(x, weight)
