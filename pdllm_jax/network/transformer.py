"""The mask predictor of every family as Flax NNX modules: plain pytrees for jax.jit.

The network has one form. A full forward, the encoding of chunks, the scoring of masked query copies
and a denoising step differ only in where attention reads its keys and values. So
`MaskPredictor.run` takes attention as a function, and hands a carry (a cache, say) from layer to
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    AllReduceImplementation,
    Norm,
    Scaled,
    peer_problem,
    peer_table,
    quantise,
)
from pallas_kernels.common import rms_norm
from pallas_kernels.matmul.api import Weight
from pdllm_jax.network.config import ModelConfig, WeightFormat
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import (
    TENSOR,
    add_projected,
    attention,
    divide_rows,
    look_up,
    mesh_sizes,
    place,
    project_columns,
    project_logits,
)

Carry = TypeVar("Carry")
# (layer, q [B, T, H, D], k [B, T, G, D], v [B, T, G, D], carry) -> (out [B, T, H, D], carry).
# q and k arrive unrotated.
Attend = Callable[[int, Array, Array, Array, Any], tuple[Array, Any]]
# (layer, the residual stream after it [B, T, M]); called while the network is traced.
StreamHook = Callable[[int, Array], None]


# One operation of a trace: tracing a model takes the square of their number.
_quantise = jax.jit(quantise, static_argnums=1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 inside, cast back, then scaled by the weight [M]."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        return rms_norm(x, self.weight[...], self.eps)


class Matrix(nnx.Module):
    """A weight [rows, columns]: of x W^T, or a row for every token id; perhaps a bias [rows].

    With `weight_format` "fp8" or "int8" the weight has 8 bits, and a scale [rows], float32.
    """

    bias: nnx.Param | None = None
    scale: nnx.Param | None = None

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        bias: bool = False,
        weight_format: WeightFormat = "full",
    ):
        values = jax.random.normal(rngs.params(), (rows, columns), jnp.float32) * columns**-0.5
        if weight_format == "full":
            self.weight = nnx.Param(values.astype(dtype))
        else:
            scaled = _quantise(values, weight_format)
            self.weight, self.scale = nnx.Param(scaled.values), nnx.Param(scaled.scale)
        if bias:
            self.bias = nnx.Param(jnp.zeros((rows,), dtype))

    @property
    def operand(self) -> Weight:
        """The weight as `pallas_kernels.matmul` takes it."""
        weight = self.weight[...]
        return weight if self.scale is None else Scaled(weight, self.scale[...])


class Residual(NamedTuple):
    """The residual stream, and an input and its projection that is not yet added to it.

    The sum waits for the norm that reads it: on several GPUs one kernel adds up the devices' parts
    and the stream, and makes the norm.

    stream: [B, T, M]. mesh, links: see `MaskPredictor`.
    """

    stream: Array
    mesh: Mesh | None
    links: Array | None
    pending: tuple[Array | Scaled, Matrix] | None = None

    def add(self, norm: RMSNorm | None = None) -> tuple[Array, ...]:
        """Returns the stream with the projection added and, if there is a norm, the norm of it."""
        if self.pending is None:
            return (self.stream,) if norm is None else (self.stream, norm(self.stream))
        x, matrix = self.pending
        by = None if norm is None else Norm(norm.weight[...], norm.eps)
        return add_projected(self.mesh, self.stream, x, matrix.operand, by, self.links)


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        model, hidden = config.d_model, config.mlp_hidden_size
        kv = config.n_kv_heads * config.head_dim
        matrix = functools.partial(Matrix, dtype=dtype, rngs=rngs)
        matrix = functools.partial(matrix, weight_format=config.weight_format)
        norm = functools.partial(RMSNorm, model, config.rms_norm_eps, dtype=dtype)
        self.attn_norm = norm()
        q, k, v = (matrix(size, model, bias=config.qkv_bias) for size in (model, kv, kv))
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.attn_out = matrix(model, model)
        self.ff_norm = norm()
        self.gate_proj, self.up_proj = matrix(hidden, model), matrix(hidden, model)
        self.down_proj = matrix(model, hidden)
        self.head_dim = config.head_dim

    def __call__(
        self,
        layer: int,
        residual: Residual,
        attend: Attend,
        carry: Carry,
        read: slice | None = None,
    ) -> tuple[Residual, Carry]:
        """Returns the residual stream behind the layer, and the carry of its attention.

        read: the rows that have queries and go on, all by default.
        """
        x, normed = residual.add(self.attn_norm)
        if read is None:
            q, k, v = self._heads(residual.mesh, normed, self.q_proj, self.k_proj, self.v_proj)
        else:
            k, v = self._heads(residual.mesh, normed, self.k_proj, self.v_proj)
            normed, x = jax.tree.map(lambda x: x[:, read], (normed, x))
            (q,) = self._heads(residual.mesh, normed, self.q_proj)
        out, carry = attend(layer, q, k, v, carry)

        residual = residual._replace(stream=x, pending=(out.reshape(x.shape), self.attn_out))
        x, normed = residual.add(self.ff_norm)
        matrices = self.gate_proj, self.up_proj
        (hidden,) = _project(residual.mesh, normed, *matrices, activation="swiglu", narrow=True)
        return residual._replace(stream=x, pending=(hidden, self.down_proj)), carry

    def _heads(self, mesh: Mesh | None, x: Array, *matrices: Matrix) -> list[Array]:
        projected = _project(mesh, x, *matrices)
        return [rows.reshape(*x.shape[:-1], -1, self.head_dim) for rows in projected]


class LayerParts(NamedTuple):
    """A layer in parts, for methods that keep some of its results: of any rows, alone.

    The layer is x += attention_output(attention), then x += mlp_output(x).

    mesh, links: see `MaskPredictor`.
    """

    block: Block
    mesh: Mesh | None
    links: Array | None

    def heads(
        self, normed: Float[Array, "B T M"], names: str
    ) -> tuple[Float[Array, "B T heads D"], ...]:
        """Returns q, k, v or some of them, unrotated; names: letters of "qkv"."""
        matrices = (getattr(self.block, f"{name}_proj") for name in names)
        return tuple(self.block._heads(self.mesh, normed, *matrices))

    def attention_output(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T M"]:
        """Returns what attention adds to the residual stream."""
        return self._added(out.reshape(*out.shape[:-2], -1), self.block.attn_out)

    def mlp_output(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """Returns what the MLP adds to the residual stream x behind attention."""
        matrices, normed = (self.block.gate_proj, self.block.up_proj), self.block.ff_norm(x)
        (hidden,) = _project(self.mesh, normed, *matrices, activation="swiglu")
        return self._added(hidden, self.block.down_proj)

    def _added(self, x: Array, matrix: Matrix) -> Array:
        return add_projected(self.mesh, None, x, matrix.operand, None, self.links)[0]


def _project(mesh: Mesh | None, x: Array, *matrices: Matrix, **settings: Any) -> tuple[Any, ...]:
    weights = [matrix.operand for matrix in matrices]
    biases = tuple(matrix.bias[...] for matrix in matrices if matrix.bias is not None)
    return project_columns(mesh, x, *weights, biases=biases, **settings)


class Links(nnx.Variable):
    """`pallas_kernels.peer_table`: not a weight, but an array that jax.jit has to be handed."""


class MaskPredictor(nnx.Module):
    """Predicts the masked tokens of a sequence: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487).

    Weights are random until a checkpoint is restored over them. `dtype` is the dtype of weights and
    activations; norms, softmax and rotations are computed in float32. No call changes a module.

    `load_model` and `shard_model` set two attributes after construction:
      mesh: the devices that hold the weights, None for one device.
      links: int32 table of the addresses at which the devices of the mesh reach each other's
        memory; None if XLA makes their sums.
    """

    mesh: Mesh | None = None
    links: Links | None = None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        rows, model = config.embedding_size, config.d_model
        self.embedding = Matrix(rows, model, dtype=dtype, rngs=rngs)
        blocks = [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.n_layers)]
        self.blocks = nnx.List(blocks)
        self.final_norm = RMSNorm(model, config.rms_norm_eps, dtype=dtype)
        if not config.weight_tying:
            self.lm_head = Matrix(rows, model, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embedding.weight[...].dtype

    def run(
        self,
        token_ids: Int[Array, "B T"],
        attend: Attend,
        carry: Carry,
        *,
        hook: StreamHook | None = None,
        layers: int | None = None,
        read: slice | None = None,
    ) -> tuple[Float[Array, "B T M"], Carry]:
        """Returns the residual stream after the last layer, before the final norm, and the carry.

        `attend` gets the carry and returns it, layer by layer; `hook` gets the residual stream.

        Args:
          layers: the first layers that run, all of them by default.
          read: the rows that are returned, all by default. In the last layer only they have
            queries; all rows have keys and values.
        """
        residual, blocks = self._residual(self.embed(token_ids)), list(self.blocks)[:layers]
        for layer, block in enumerate(blocks):
            last = layer == len(blocks) - 1
            residual, carry = block(layer, residual, attend, carry, read if last else None)
            if hook is not None:
                residual = residual._replace(stream=residual.add()[0], pending=None)
                hook(layer, residual.stream)
        return residual.add()[0], carry

    def embed(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        """Returns the residual stream in front of the first layer."""
        ids = divide_rows(self.mesh, token_ids)
        return look_up(self.mesh, self.embedding.weight[...], ids)

    def advance(
        self, layer: int, stream: Float[Array, "B T M"], attend: Attend, carry: Carry
    ) -> tuple[Float[Array, "B T M"], Carry]:
        """Runs one layer of `run`: returns the stream behind it, and the carry of its attention."""
        residual, carry = self.blocks[layer](layer, self._residual(stream), attend, carry)
        return residual.add()[0], carry

    def parts(
        self, layer: int, stream: Float[Array, "B T M"]
    ) -> tuple[LayerParts, Float[Array, "B T M"]]:
        """Returns a layer in parts, and the norm of the stream in front of it."""
        block, links = self.blocks[layer], None if self.links is None else self.links[...]
        return LayerParts(block, self.mesh, links), block.attn_norm(stream)

    def _residual(self, stream: Array) -> Residual:
        return Residual(stream, self.mesh, None if self.links is None else self.links[...])

    @property
    def lookback(self) -> int:
        """How far in front of a row its prediction lies, 0 or 1; see `ModelConfig.logit_shift`."""
        return int(self.config.logit_shift)

    def predicting_row(self, row: Int[Array, "*rows"]) -> Int[Array, "*rows"]:
        """Returns the rows whose logits predict the tokens of these rows of a sequence.

        Row 0 predicts itself.
        """
        return jnp.maximum(row - self.lookback, 0)

    def logits(self, hidden: Float[Array, "*rows M"]) -> Float[Array, "*rows V"]:
        """Returns the LM head's float32 logits of rows that went through the final norm."""
        head = self.embedding if self.config.weight_tying else self.lm_head
        return project_logits(self.mesh, hidden, head.weight[...])

    def encode(
        self,
        token_ids: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None = None,
        *,
        hook: StreamHook | None = None,
    ) -> Float[Array, "B T M"]:
        """Returns the full bidirectional forward without cache, final norm included.

        lengths: valid tokens of each row, all by default; no row attends to the padding.
        """
        by = rotation(self.config, jnp.arange(token_ids.shape[1]))

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            return attention(self.mesh, rotate(q, by), rotate(k, by), v, lengths).out, None

        x, _ = self.run(token_ids, attend, None, hook=hook)
        return self.final_norm(x)

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Returns the float32 logits of all positions: B T V values, so not for long rows."""
        return self.logits(self.encode(token_ids))


def put_on(model: MaskPredictor, mesh: Mesh, sums: AllReduceImplementation | None) -> MaskPredictor:
    """Sets the mesh that the model's weights are on, and `links`; see `shard_model`."""
    if sums is None:
        sums = "xla" if peer_problem(mesh, TENSOR) else "mosaic_gpu"
    if sums not in (names := get_args(AllReduceImplementation)):
        raise ValueError(f"sums {sums!r} is not known ({', '.join(names)})")
    nnx.pop(model, Links)
    model.mesh = mesh
    if sums == "mosaic_gpu" and mesh.shape[TENSOR] > 1:
        model.links = Links(peer_table(mesh, TENSOR))
    return model


def shard_model(
    model: MaskPredictor, mesh: Mesh, *, sums: AllReduceImplementation | None = None
) -> MaskPredictor:
    """Returns a model with the same weights on a mesh.

    `load_model` reads weights to a mesh directly, without one device holding all of them.

    sums: how the devices of "tensor" add up a few rows. "mosaic_gpu": by the kernel, on Hopper GPUs
      of one process that can access each other's memory. "xla": anywhere. None: by the kernel if it
      can run, else by XLA. XLA adds up many rows in every case.

    Raises:
      ConfigError: "tensor" does not divide heads, MLP or vocabulary.
      ValueError: the kernel is named but cannot run; the message says why.
    """
    mesh_sizes(model.config, mesh)
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, place(mesh, nnx.to_pure_dict(state)))
    return put_on(nnx.merge(graph, state), mesh, sums)
