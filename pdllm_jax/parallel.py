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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import jax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels import SumImplementation, exchange_problem, exchange_table
from pdllm_jax.model_config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from pdllm_jax.model import LLaDA

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


class Links(nnx.Variable):
    """`pallas_kernels.exchange_table`: no weight, but an argument of whatever takes the model."""


def put_on(model: LLaDA, mesh: Mesh, sums: SumImplementation | None) -> LLaDA:
    """The model, told of the mesh that its weights lie on. sums: see `shard_model`."""
    if sums is None:
        sums = "xla" if exchange_problem(mesh, TENSOR) else "mosaic_gpu"
    if sums not in get_args(SumImplementation):
        known = ", ".join(get_args(SumImplementation))
        raise ValueError(f"sums {sums!r} is not known ({known})")
    nnx.pop(model, Links)
    model.mesh = mesh
    if sums == "mosaic_gpu" and mesh.shape[TENSOR] > 1:
        model.links = Links(exchange_table(mesh, TENSOR))
    return model


def shard_model(model: LLaDA, mesh: Mesh, *, sums: SumImplementation | None = None) -> LLaDA:
    """The same weights on a mesh; `load_model` puts them there without going through one device.

    sums: how the devices of "tensor" add up a few rows: "mosaic_gpu", the kernel, on Hopper GPUs of
      one process that can access each other's memory; "xla", anywhere; None, the kernel where it
      can run, else XLA. Many rows are added up by XLA in any case.

    Raises:
      ConfigError: "tensor" does not divide heads, MLP or vocabulary.
      ValueError: the kernel is asked for and can't run, with the reason.
    """
    mesh_sizes(model.config, mesh)
    graph, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, place(mesh, pure))
    return put_on(nnx.merge(graph, state), mesh, sums)


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


def by_heads(mesh: Mesh | None, rows: int, axis: int) -> PartitionSpec:
    """Of arrays [rows, ..] with heads at `axis`."""
    return PartitionSpec(rows_axis(mesh, rows), *[None] * (axis - 1), TENSOR)
