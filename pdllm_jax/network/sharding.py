"""A model on several devices: the mesh, where each array lies on it, and what runs on its parts.

    mesh = make_mesh(data=2, tensor=4)
    model = load_model(folder, mesh=mesh)      each device reads its part

"tensor" divides heads, MLP and vocabulary (Megatron-LM, arXiv 1909.08053): projections into a layer
by their columns, projections out of it by their rows, and KV by heads. "data" divides the leading
axis of the network's inputs (chunks of a document, or requests) if it divides evenly. Weights and
chunk pools are replicated on it.

XLA partitions what is elementwise or a small gather. Kernels, cuDNN, products, embedding and LM
head run here, under `jax.shard_map`; without a mesh each function is the plain one. All collectives
are in this module. docs/parallel.md says what is communicated, and when.
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
from pallas_kernels import Implementation, Norm, OwnKV, Partial, Scaled
from pallas_kernels.chunk_attention.api import Rows
from pallas_kernels.matmul.api import Weight, matmul_xla
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.rules import ConfigError

DATA, TENSOR = "data", "tensor"
Tree = TypeVar("Tree")

# The axis, from the end, that "tensor" divides, by the end of an array's name: parameters as in a
# checkpoint, KV as in a snapshot. All other arrays are replicated.
_TENSOR_AXIS = {
    **{f"{name}_proj.weight": -2 for name in ("q", "k", "v", "gate", "up")},  # [O, I]
    **{f"{name}_proj.bias": -1 for name in ("q", "k", "v")},  # [O]
    **{f"{name}_proj.scale": -1 for name in ("q", "k", "v", "gate", "up")},  # [O]
    **dict.fromkeys(("attn_out.weight", "down_proj.weight"), -1),  # [O, I]
    **dict.fromkeys(("embedding.weight", "lm_head.weight"), -2),  # [V, M]
    **dict.fromkeys(("pool.k", "pool.v", "k.values", "v.values"), -3),  # [L, N, G, C, D]
    **dict.fromkeys(("k.scale", "v.scale"), -1),  # of a pool in 8 bits, [L, N, G]
    **dict.fromkeys(("prefix_k", "prefix_v"), -2),  # [L, B, P, G, D]
    **dict.fromkeys(("live.k", "live.v"), -2),  # [B, S, G, D], or all layers stacked
}


def make_mesh(
    data: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes the mesh of data x tensor devices; neighbours in "tensor" are neighbours in `devices`.

    The first data x tensor `devices` are used; by default of all devices of all processes.

    Raises:
      ValueError: sizes under 1; too few devices; unused devices with several processes.
    """
    available = jax.devices() if devices is None else list(devices)
    if data < 1 or tensor < 1:
        raise ValueError(f"a mesh has sizes from 1 on, got {data} x {tensor}")
    size, count, processes = f"a mesh of {data} x {tensor}", len(available), jax.process_count()
    if data * tensor > count:
        raise ValueError(f"{size} needs {data * tensor} devices, there are {count}")
    if processes > 1 and data * tensor != count:
        raise ValueError(f"{size} leaves out some of the {count} devices of {processes} processes")
    types, used = (AxisType.Auto, AxisType.Auto), available[: data * tensor]
    return jax.make_mesh((data, tensor), (DATA, TENSOR), axis_types=types, devices=used)


def parse_mesh(text: str) -> tuple[int, int]:
    """Returns (data, tensor) of "DATAxTENSOR"; raises ValueError for other texts."""
    sizes = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if sizes is None:
        raise ValueError(f"a mesh is DATAxTENSOR, such as 1x2, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def mesh_name(mesh: Mesh) -> str:
    """Returns DATAxTENSOR, as in command lines and results."""
    return f"{mesh.shape[DATA]}x{mesh.shape[TENSOR]}"


def mesh_sizes(config: ModelConfig, sizes: Mapping[str, int] | Mesh | None) -> tuple[int, int]:
    """Returns (data, tensor) of a mesh or of the sizes of its axes; 1 for an absent axis.

    Raises:
      ConfigError: other axes; sizes under 1; sizes of the model that "tensor" does not divide.
    """
    axes = dict(sizes.shape if isinstance(sizes, Mesh) else sizes or {})
    data, tensor = axes.get(DATA, 1), axes.get(TENSOR, 1)
    if axes.keys() - {DATA, TENSOR} or data < 1 or tensor < 1:
        raise ConfigError(f"mesh {axes}: axes are {TENSOR} and {DATA}, sizes from 1 on")
    names = ("n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size")
    counts = {name: getattr(config, name) for name in names}
    undivided = ", ".join(f"{name} {n}" for name, n in counts.items() if n % tensor)
    if undivided:
        raise ConfigError(f"mesh axis tensor {tensor} does not divide {undivided}")
    return data, tensor


def rows_axis(mesh: Mesh | None, rows: int) -> str | None:
    """Returns "data" if it divides this number of chunks or requests evenly, else None.

    None if "data" is 1: jax.jit omits axes of size 1 from the specs of its results, and these are
    the arguments of the next call, which must look like the first ones.
    """
    parts = 1 if mesh is None else mesh.shape[DATA]
    return DATA if parts > 1 and rows % parts == 0 else None


def whole_groups(mesh: Mesh | None, rows: int) -> int:
    """Returns the least multiple of the size of "data" that is at least `rows`."""
    return rows if mesh is None else -(-rows // mesh.shape[DATA]) * mesh.shape[DATA]


def spec_of(mesh: Mesh, name: str, shape: Sequence[int]) -> PartitionSpec:
    """Returns where an array lies, by its name: the path of a parameter or in a snapshot."""
    keys = [key for key in name.split(".") if not key.isdigit()]
    pair = ".".join(keys[-2:])
    axis = _TENSOR_AXIS.get(pair, _TENSOR_AXIS.get(keys[-1]))
    if axis is None:
        return PartitionSpec()
    front: list[str | None] = [None] * (len(shape) + axis)
    if pair.startswith("live."):
        front[len(shape) - 4] = rows_axis(mesh, shape[-4])
    return PartitionSpec(*front, TENSOR)


def sharding_of(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of an array, see `spec_of`."""
    return NamedSharding(mesh, spec_of(mesh, name, shape))


def shardings(mesh: Mesh, tree: Tree, name: str = "") -> Tree:
    """Returns the sharding of every array of a model's state, a cache or a state of decoding.

    name: of the tree itself, if the names inside do not say where an array lies: "pool", "live".
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        inside = jax.tree_util.keystr(path, simple=True, separator=".")
        return sharding_of(mesh, f"{name}.{inside}", leaf.shape)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def constrain(mesh: Mesh | None, tree: Tree, name: str = "") -> Tree:
    """Lays a tree, under jit, as `shardings` says; returns it as it is without a mesh."""
    if mesh is None:
        return tree
    return lax.with_sharding_constraint(tree, shardings(mesh, tree, name))


def place(mesh: Mesh | None, tree: Tree, name: str = "") -> Tree:
    """Lays a tree, outside of jit, as `shardings` says; returns it as it is without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shardings(mesh, tree, name))


def divide_rows(mesh: Mesh | None, x: Array) -> Array:
    """Returns x with its leading axis over "data", if that divides it, replicated on "tensor"."""
    if mesh is None:
        return x
    spec = PartitionSpec(rows_axis(mesh, len(x)))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def local(
    mesh: Mesh | None, f: Callable[..., Any], inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """Returns f on each device's part of its arguments (`jax.shard_map`); f without a mesh."""
    if mesh is None:
        return f
    # The outputs of kernels do not say over which axes they vary.
    return jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def heads_spec(mesh: Mesh | None, rows: int, axis: int) -> PartitionSpec:
    """Returns the spec of arrays [rows, ...] that "tensor" divides at `axis`."""
    return PartitionSpec(rows_axis(mesh, rows), *[None] * (axis - 1), TENSOR)


def _partial_specs(mesh: Mesh | None, rows: int) -> Any:
    return Partial._make([heads_spec(mesh, rows, 2), heads_spec(mesh, rows, 1)])


def attention(
    mesh: Mesh | None,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    lengths: Int[Array, "B"] | None = None,
    **settings: Any,
) -> Partial:
    """Returns `pallas_kernels.attention`, made by each device for its own heads.

    settings: need_lse, causal, finite.
    """
    run = functools.partial(pallas_kernels.attention, **settings)
    heads, rows = heads_spec(mesh, len(q), 2), PartitionSpec(rows_axis(mesh, len(q)))
    sharded = local(mesh, run, (heads, heads, heads, rows), _partial_specs(mesh, len(q)))
    return sharded(q, k, v, lengths)


def _over_chunks(mesh: Mesh | None, run: Callable[..., Any], outputs: Any, q: Array, *rest: Any):
    """Runs on rows [B, K, T, H, D] or [B, T, H, D], a stacked pool, ids and lengths, own keys."""
    heads, rows = heads_spec(mesh, len(q), 2), PartitionSpec(rows_axis(mesh, len(q)))
    pool = PartitionSpec(None, None, TENSOR)
    inputs = (heads_spec(mesh, len(q), q.ndim - 2), pool, pool, rows, PartitionSpec())
    own_kv = [OwnKV._make([heads, heads, rows])] * (len(rest) - 4)
    return local(mesh, run, (*inputs, *own_kv), outputs)(q, *rest)


def chunk_attention(
    mesh: Mesh | None,
    q: Rows,
    k: Float[Array, "L N G C D"] | Scaled,
    v: Float[Array, "L N G C D"] | Scaled,
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int | Int[Array, ""],
    own_kv: OwnKV | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Returns `pallas_kernels.chunk_attention`, made by each device for its own heads.

    mesh: of q and the pool; the other arguments as there, always with a layer axis.
    """
    attend = functools.partial(
        pallas_kernels.chunk_attention, layer=layer, implementation=implementation
    )

    def run(*arrays: Any) -> Partial:
        return attend(*arrays[:5], own_kv=arrays[5] if len(arrays) > 5 else None)

    given: Any = (q, k, v, chunk_ids, chunk_lengths, *([] if own_kv is None else [own_kv]))
    return _over_chunks(mesh, run, _partial_specs(mesh, len(q)), *given)


def project_columns(
    mesh: Mesh | None,
    x: Float[Array, "B *rows I"],
    *weights: Weight,
    biases: tuple[Float[Array, "O"], ...] = (),
    activation: Any = "none",
    narrow: bool = False,
) -> tuple[Float[Array, "B *rows O"] | Scaled, ...]:
    """Runs `pallas_kernels.matmul` into a layer: each device makes its columns, nothing is sent.

    x: from elementwise operations. biases: one for each weight, or none. narrow: as there; without
    effect on a mesh.
    """
    settings: Any = {"activation": activation, "recast": True}
    if mesh is None:
        return pallas_kernels.matmul(x, *weights, biases=biases, narrow=narrow, **settings)
    count = len(weights)

    def run(x: Array, *arrays: Array) -> tuple[Array, ...]:
        weights, biases = arrays[:count], arrays[count:]
        return pallas_kernels.matmul(x, *weights, biases=biases, **settings)

    rows = PartitionSpec(rows_axis(mesh, len(x)))
    inputs = (rows, *[PartitionSpec(TENSOR)] * (count + len(biases)))
    outputs = heads_spec(mesh, len(x), x.ndim - 1)
    return local(mesh, run, inputs, outputs)(x, *weights, *biases)


def add_projected(
    mesh: Mesh | None,
    stream: Float[Array, "B *rows O"] | None,
    x: Float[Array, "B *rows I"] | Scaled,
    weight: Weight,
    norm: Norm | None,
    links: Int[Array, "data tensor A"] | None = None,
) -> tuple[Float[Array, "B *rows O"], ...]:
    """Returns `pallas_kernels.add_product`: a projection out of a layer.

    stream: None for the projection alone, without a norm. x may be scaled rows without a mesh.
    Each device multiplies its columns of x, and an all-reduce adds up the products: the kernel's
    with `links` (`pallas_kernels.peer_table`), XLA's without.
    """
    if mesh is None:
        if stream is None:
            return pallas_kernels.matmul(x, weight)
        return pallas_kernels.add_product(stream, x, weight, norm)

    def run(stream: Array | None, x: Array, weight: Array, scale: Array | None, table: Any):
        (part,) = pallas_kernels.matmul(x, weight)
        by = None if norm is None else Norm._make([scale, norm.eps])
        return pallas_kernels.all_reduce(part, TENSOR, table=table, residual=stream, norm=by)

    rows, columns = PartitionSpec(rows_axis(mesh, len(x))), heads_spec(mesh, len(x), x.ndim - 1)
    weights: Any = PartitionSpec(None, TENSOR)
    if isinstance(weight, Scaled):
        weights = Scaled._make([weights, PartitionSpec()])
    table = PartitionSpec(DATA, TENSOR)
    sharded = local(mesh, run, (rows, columns, weights, PartitionSpec(), table), rows)
    return sharded(stream, x, weight, None if norm is None else norm.weight, links)


def look_up(
    mesh: Mesh | None, table: Float[Array, "V M"], ids: Int[Array, "B *rows"]
) -> Float[Array, "B *rows M"]:
    """Returns rows of an embedding: each device reads its ids, and the parts are added up.

    Always uses lax.psum. A program with a collective of XLA holds its devices' locks while it is
    put on their streams, so no other program comes between its kernels (see `all_reduce`).
    """
    if mesh is None:
        return table[ids]

    def run(table: Array, ids: Array) -> Array:
        row = ids - lax.axis_index(TENSOR) * table.shape[0]
        inside = (row >= 0) & (row < table.shape[0])
        return lax.psum(jnp.where(inside[..., None], table[jnp.where(inside, row, 0)], 0), TENSOR)

    rows = PartitionSpec(rows_axis(mesh, ids.shape[0]))
    return local(mesh, run, (PartitionSpec(TENSOR), rows), rows)(table, ids)


def project_logits(
    mesh: Mesh | None, x: Float[Array, "B *rows M"], weight: Float[Array, "V M"]
) -> Float[Array, "B *rows V"]:
    """Returns x W^T in float32: each device makes the logits of its words and gets all others.

    Sampling and scores then read the same rows as on one device.
    """

    def run(x: Array, weight: Array) -> Array:
        (part,) = matmul_xla(x, weight, dtype=jnp.float32)
        gather = functools.partial(lax.all_gather, axis=x.ndim - 1, tiled=True)
        return part if mesh is None else gather(part, TENSOR)

    rows = PartitionSpec(rows_axis(mesh, len(x)))
    return local(mesh, run, (rows, PartitionSpec(TENSOR)), rows)(x, weight)
