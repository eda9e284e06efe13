"""A model on several devices: one mesh, where each array lies on it, and what runs on its parts.

    mesh = make_mesh(data=2, tensor=4)
    model = load_model(folder, mesh=mesh)      each device reads its part

"tensor" divides heads, MLP and vocabulary (Megatron-LM, arXiv 1909.08053): projections into a layer
by their columns, those back by their rows, whose partial sums are added up; KV by heads. "data"
divides the leading axis of what goes through the network, chunks of a document or requests, where
it divides evenly; weights and chunk pools lie whole on it.

A model knows its mesh, and everything follows from that: the same functions under the same jit.
XLA partitions what is elementwise or a small gather. What it can't look into or should not choose
for itself (kernels, cuDNN, products, embedding, LM head) runs under `jax.shard_map` (`sharded.py`).
docs/parallel.md says what is communicated, and when.

The network's parts on each device's share of a mesh (`parallel`), under `jax.shard_map`.

Without a mesh each is the plain function. Collectives are written out here, and nowhere else: a sum
behind attention and MLP of every layer and behind the embedding, and a gather of logits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import (
    ChunkMass,
    Implementation,
    Norm,
    OwnKV,
    Partial,
)
from pallas_kernels.common import rms_norm
from pdllm_jax.network.config import ConfigError, ModelConfig

DATA, TENSOR = "data", "tensor"
Tree = TypeVar("Tree")

# Which axis, from the end, "tensor" divides, by the end of an array's name: parameters as in a
# checkpoint, KV as in a snapshot. Everything else lies whole on every device.
_TENSOR_AXIS = [
    (r"(q|k|v|gate|up)_proj\.weight", -2),
    (r"(attn_out|down_proj)\.weight", -1),
    (r"(embedding|lm_head)\.weight", -2),
    (r"pool\.[kv]", -3),  # [L, N, G, C, D]
    (r"prefix_[kv]", -2),  # [L, *B, P, G, D]
    (r"live\.[kv](\.\d+)?", -2),  # [B, S, G, D] of a layer, or all of them stacked
]


def make_mesh(
    data: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of data x tensor devices; neighbours in "tensor" are neighbours in `devices`.

    devices: all of all processes, by default; the first data x tensor of them are used.

    Raises:
      ValueError: sizes under 1; too few devices; several processes, and devices left over.
    """
    found = jax.devices() if devices is None else list(devices)
    if data < 1 or tensor < 1:
        raise ValueError(f"a mesh has sizes from 1 on, got {data} x {tensor}")
    if data * tensor > len(found):
        raise ValueError(
            f"a mesh of {data} x {tensor} needs {data * tensor} devices, there are {len(found)}"
        )
    if jax.process_count() > 1 and data * tensor != len(found):
        raise ValueError(
            f"a mesh of {data} x {tensor} leaves out some of the {len(found)} devices of "
            f"{jax.process_count()} processes"
        )
    return jax.make_mesh(
        (data, tensor),
        (DATA, TENSOR),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=found[: data * tensor],
    )


def parse_mesh(text: str) -> tuple[int, int]:
    """(data, tensor) of "DATAxTENSOR", as command lines take it; ValueError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise ValueError(f"a mesh is DATAxTENSOR, such as 1x2, got {text!r}")
    return int(found[1]), int(found[2])


def mesh_name(mesh: Mesh) -> str:
    """As command lines and results write it: DATAxTENSOR."""
    return f"{mesh.shape[DATA]}x{mesh.shape[TENSOR]}"


def mesh_sizes(config: ModelConfig, sizes: Mapping[str, int] | Mesh | None) -> tuple[int, int]:
    """(data, tensor) of a mesh, or of the sizes of its axes; 1 where there is none.

    Raises:
      ConfigError: other axes, sizes under 1; names whatever of the model "tensor" does not divide.
    """
    given = dict(sizes.shape if isinstance(sizes, Mesh) else sizes or {})
    left = dict(given)
    data, tensor = left.pop(DATA, 1), left.pop(TENSOR, 1)
    if left or data < 1 or tensor < 1:
        raise ConfigError(f"mesh {given}: axes are {TENSOR} and {DATA}, sizes from 1 on")
    names = ("n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size")
    odd = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) % tensor]
    if odd:
        raise ConfigError(f"mesh axis tensor {tensor} does not divide {', '.join(odd)}")
    return data, tensor


def rows_axis(mesh: Mesh | None, rows: int) -> str | None:
    """The mesh axis that divides so many chunks or requests: "data", or none if it can't evenly."""
    return DATA if mesh is not None and rows % mesh.shape[DATA] == 0 else None


def whole_groups(mesh: Mesh | None, rows: int) -> int:
    """rows, filled up so that "data" divides them."""
    return rows if mesh is None else -(-rows // mesh.shape[DATA]) * mesh.shape[DATA]


def spec_of(mesh: Mesh, name: str, shape: Sequence[int]) -> PartitionSpec:
    """Where an array lies. name: of a parameter or of an array of a snapshot, path and all."""
    for pattern, axis in _TENSOR_AXIS:
        if re.search(rf"(^|\.){pattern}$", name):
            axes: list[str | None] = [None] * len(shape)
            axes[axis] = TENSOR
            if pattern.startswith("live"):
                axes[-4] = rows_axis(mesh, shape[-4])
            return PartitionSpec(*axes)
    return PartitionSpec()


def sharding_of(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """As `spec_of`."""
    return NamedSharding(mesh, spec_of(mesh, name, shape))


def shardings(mesh: Mesh, tree: Tree, name: str = "") -> Tree:
    """The sharding of every array of a model's state, `ChunkCache`, `DenoiseState` or `Prefilled`.

    name: of the tree itself, where that is what tells: "pool", "live".
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
        return sharding_of(mesh, ".".join([name, *keys]), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(mesh: Mesh | None, tree: Tree, name: str = "") -> Tree:
    """The tree, under jit, laid as `shardings` says."""
    if mesh is None:
        return tree
    return lax.with_sharding_constraint(tree, shardings(mesh, tree, name))


def place(mesh: Mesh | None, tree: Tree, name: str = "") -> Tree:
    """The tree, outside of jit, on the mesh as `shardings` says; as it is without one."""
    return tree if mesh is None else jax.device_put(tree, shardings(mesh, tree, name))


def divide_rows(mesh: Mesh | None, x: Array) -> Array:
    """x with its leading axis over "data", where that divides it, and whole on "tensor"."""
    if mesh is None:
        return x
    spec = PartitionSpec(rows_axis(mesh, x.shape[0]))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def local(
    mesh: Mesh | None, f: Callable[..., Any], inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """f on each device's part of its arguments (`jax.shard_map`); f itself without a mesh."""
    if mesh is None:
        return f
    # What the kernels return carries no word of the axes that it varies over.
    return jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def heads_spec(mesh: Mesh | None, rows: int, axis: int) -> PartitionSpec:
    """Of arrays [rows, ..] with heads at `axis`."""
    return PartitionSpec(rows_axis(mesh, rows), *[None] * (axis - 1), TENSOR)


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
    rows = heads_spec(mesh, q.shape[0], 2)
    each = PartitionSpec(rows[0])
    return local(mesh, run, (rows, rows, rows, each), _partial(mesh, q.shape[0]))(q, k, v, lengths)


def _partial(mesh: Mesh, batch: int) -> Any:
    """Specs of a `Partial`."""
    specs: Any = Partial
    return specs(heads_spec(mesh, batch, 2), heads_spec(mesh, batch, 1))


def _over_pool(mesh: Mesh, run: Any, q: Array, found: Any, *arguments: Any) -> Any:
    """A function of query rows, pool, ids, lengths, perhaps near keys, on each device's heads."""
    batch = q.shape[0]
    pool, each = PartitionSpec(None, None, TENSOR), PartitionSpec(rows_axis(mesh, batch))
    near_specs: Any = OwnKV
    near = near_specs(heads_spec(mesh, batch, 2), heads_spec(mesh, batch, 2), each)
    specs = (heads_spec(mesh, batch, q.ndim - 2), pool, pool, each, PartitionSpec(), near)
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
    near: OwnKV | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """`pallas_kernels.chunk_attention` over a stacked pool, each device on its own heads."""

    def run(q: Array, k: Array, v: Array, ids: Array, lengths: Array, *near: OwnKV) -> Partial:
        return pallas_kernels.chunk_attention(
            q, k, v, ids, lengths,
            layer=layer, own_kv=near[0] if near else None, implementation=implementation,
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
    found = specs(_partial(mesh, q.shape[0]), heads_spec(mesh, q.shape[0], 1))
    return _over_pool(mesh, run, q, found, *arguments)


def project_columns(
    mesh: Mesh | None, x: Float[Array, "B *rows I"], *weights: Array, activation: Any = "none"
) -> tuple[Float[Array, "B *rows O"], ...]:
    """`pallas_kernels.matmul` into a layer: each device makes its columns, nothing is sent."""
    run = functools.partial(pallas_kernels.matmul, activation=activation)
    if mesh is None:
        return run(x, *weights)
    rows = PartitionSpec(rows_axis(mesh, x.shape[0]))
    made = heads_spec(mesh, x.shape[0], x.ndim - 1)
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
        return pallas_kernels.all_reduce(
            pallas_kernels.matmul(x, weight)[0], TENSOR, residual=stream,
            norm=None if eps is None else Norm(more[0], eps),
            table=more[-1] if links is not None else None,
        )  # fmt: skip

    rows = PartitionSpec(rows_axis(mesh, x.shape[0]))
    tables = () if links is None else (links,)
    specs = (
        rows, heads_spec(mesh, x.shape[0], x.ndim - 1), PartitionSpec(None, TENSOR),
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
    devices' locks while it is put on their streams, so that no other comes between (`all_reduce`).
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
