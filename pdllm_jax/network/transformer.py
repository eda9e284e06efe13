"""The network's small parts: linear maps in PyTorch layout, RMSNorm, SwiGLU.

LLaDA as a Flax NNX module: stateless, a plain pytree for jax.jit.

The network has one form. What differs between a full forward, the encoding of chunks, the scoring
of masked query copies and a denoising step is only where attention reads its keys and values, so
`LLaDA.run` takes that as a function and threads a carry (a cache, say) through the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import AllReduceImplementation, Norm, matmul, peer_problem, peer_table
from pallas_kernels.common import rms_norm
from pdllm_jax.network.config import ModelConfig
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
    project_whole,
)


def project(
    x: Float[Array, "*rows I"], weight: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """x W^T with float32 accumulation; `dtype` of the result, x's by default.

    float32 weights ask for true float32 products: the default on GPUs would be tf32.
    """
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=x.dtype if dtype is None else dtype,
    )


class Linear(nnx.Module):
    """y = x W^T without bias; W is [out, in] as in the checkpoints, so nothing is transposed."""

    def __init__(self, size_in: int, size_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        scale = size_in**-0.5
        values = jax.random.normal(rngs.params(), (size_out, size_in), jnp.float32) * scale
        self.weight = nnx.Param(values.astype(dtype))

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        return matmul(x, self.weight[...])[0]


def project_all(
    x: Float[Array, "*rows I"], *linears: Linear, mesh: Mesh | None = None
) -> tuple[Float[Array, "*rows O"], ...]:
    """x through each of them; where rows are few, in one launch."""
    return project_columns(mesh, x, *(linear.weight[...] for linear in linears))


def swiglu(
    x: Float[Array, "*rows I"], gate: Linear, up: Linear, mesh: Mesh | None = None
) -> Float[Array, "*rows O"]:
    """silu(gate(x)) * up(x)."""
    weights = gate.weight[...], up.weight[...]
    return project_columns(mesh, x, *weights, activation="swiglu")[0]


def add_to_stream(
    stream: Float[Array, "*rows M"],
    x: Float[Array, "*rows I"],
    linear: Linear,
    norm: RMSNorm | None,
    mesh: Mesh | None = None,
    links: Array | None = None,
) -> tuple[Float[Array, "*rows M"], Float[Array, "*rows M"]]:
    """stream + linear(x), and its norm, by default itself."""
    by = None if norm is None else Norm(norm.weight[...], norm.eps)
    found = add_projected(mesh, stream, x, linear.weight[...], by, links)
    return found[0], found[-1]


class Embedding(nnx.Module):
    """Token embedding [E, M]."""

    def __init__(self, rows: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        values = jax.random.normal(rngs.params(), (rows, size), jnp.float32) * size**-0.5
        self.weight = nnx.Param(values.astype(dtype))

    def __call__(self, token_ids: Array, mesh: Mesh | None = None) -> Float[Array, "*rows M"]:
        return look_up(mesh, self.weight[...], token_ids)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 inside, cast back, then scaled by the weight."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        return rms_norm(x, self.weight[...], self.eps)


Carry = TypeVar("Carry")
# (layer, q [B, T, H, D], k [B, T, G, D], v [B, T, G, D], carry) -> (out [B, T, H, D], carry).
# q and k arrive unrotated.
Attend = Callable[[int, Array, Array, Array, Any], tuple[Array, Any]]


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        model, kv = config.d_model, config.n_kv_heads * config.head_dim

        def linear(size_in: int, size_out: int) -> Linear:
            return Linear(size_in, size_out, dtype=dtype, rngs=rngs)

        self.attn_norm = RMSNorm(model, config.rms_norm_eps, dtype=dtype)
        self.q_proj = linear(model, model)
        self.k_proj = linear(model, kv)
        self.v_proj = linear(model, kv)
        self.attn_out = linear(model, model)
        self.ff_norm = RMSNorm(model, config.rms_norm_eps, dtype=dtype)
        self.gate_proj = linear(model, config.mlp_hidden_size)
        self.up_proj = linear(model, config.mlp_hidden_size)
        self.down_proj = linear(config.mlp_hidden_size, model)
        self.head_dim = config.head_dim

    def __call__(
        self,
        layer: int,
        x: Float[Array, "B T M"],
        normed: Float[Array, "B T M"],
        attend: Attend,
        carry: Carry,
        after: RMSNorm | None = None,
        mesh: Mesh | None = None,
        links: Array | None = None,
    ) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"], Carry]:
        """x and its `attn_norm` -> the block's output, its norm `after` (or itself), the carry."""

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        into = self.q_proj, self.k_proj, self.v_proj
        q, k, v = project_all(normed, *into, mesh=mesh)
        out, carry = attend(layer, heads(q), heads(k), heads(v), carry)
        out = out.reshape(x.shape)
        x, normed = add_to_stream(x, out, self.attn_out, self.ff_norm, mesh, links)
        h = swiglu(normed, self.gate_proj, self.up_proj, mesh)
        return *add_to_stream(x, h, self.down_proj, after, mesh, links), carry


class Links(nnx.Variable):
    """`pallas_kernels.peer_table`: no weight, but an argument of whatever takes the model."""


class MaskPredictor(nnx.Module):
    """LLaDA (arXiv 2502.09992): predicts every masked token at its own position.

    Weights are random until a checkpoint is restored over them. `dtype` is that of weights and
    activations; norms, softmax and rotations are computed in float32.

    mesh: that the weights lie on (`load_model`, `parallel.shard_model`), None for one device.
    links: where the devices of a mesh find each other's memory, None where XLA makes their sums.
    """

    mesh: Mesh | None = None
    links: Links | None = None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embedding = Embedding(config.embedding_size, config.d_model, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.n_layers)]
        )
        self.final_norm = RMSNorm(config.d_model, config.rms_norm_eps, dtype=dtype)
        if not config.weight_tying:
            self.lm_head = Linear(config.d_model, config.embedding_size, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.embedding.weight[...].dtype

    def run(
        self, token_ids: Int[Array, "B T"], attend: Attend, carry: Carry
    ) -> tuple[Float[Array, "B T M"], Carry]:
        """The residual stream after the last layer (before the final norm), and the carry."""
        links = None if self.links is None else self.links[...]
        x = self.embedding(divide_rows(self.mesh, token_ids), self.mesh)
        norms: list[RMSNorm | None] = [block.attn_norm for block in self.blocks]
        normed = self.blocks[0].attn_norm(x)
        for layer, (block, after) in enumerate(zip(self.blocks, [*norms[1:], None], strict=True)):
            x, normed, carry = block(layer, x, normed, attend, carry, after, self.mesh, links)
        return x, carry

    def logits(self, hidden: Float[Array, "*rows M"]) -> Float[Array, "*rows V"]:
        """LM head over rows that went through the final norm; float32."""
        head = self.embedding if self.config.weight_tying else self.lm_head
        run = functools.partial(project, dtype=jnp.float32)
        return project_whole(self.mesh, hidden, run, head.weight[...])

    def encode(
        self, token_ids: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T M"]:
        """Full bidirectional forward without cache, final norm included.

        lengths: tokens that count in each row; what follows is padding that nobody attends to.
        """
        by = rotation(self.config, jnp.arange(token_ids.shape[1]))

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            turned = rotate(q, by), rotate(k, by)
            return attention(self.mesh, *turned, v, lengths).out, None

        x, _ = self.run(token_ids, attend, None)
        return self.final_norm(x)

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of every position, float32; for T rows by V words, so not on any hot path."""
        return self.logits(self.encode(token_ids))


def put_on(model: MaskPredictor, mesh: Mesh, sums: AllReduceImplementation | None) -> MaskPredictor:
    """The model, told of the mesh that its weights lie on. sums: see `shard_model`."""
    if sums is None:
        sums = "xla" if peer_problem(mesh, TENSOR) else "mosaic_gpu"
    if sums not in get_args(AllReduceImplementation):
        known = ", ".join(get_args(AllReduceImplementation))
        raise ValueError(f"sums {sums!r} is not known ({known})")
    nnx.pop(model, Links)
    model.mesh = mesh
    if sums == "mosaic_gpu" and mesh.shape[TENSOR] > 1:
        model.links = Links(peer_table(mesh, TENSOR))
    return model


def shard_model(
    model: MaskPredictor, mesh: Mesh, *, sums: AllReduceImplementation | None = None
) -> MaskPredictor:
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
