"""Public entry: attention of query rows over chosen chunks of a KV pool, where they lie."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.chunk_attention import hopper as mosaic_gpu
from pallas_kernels.chunk_attention.cudnn import chunk_attention_cudnn
from pallas_kernels.chunk_attention.dense import attention
from pallas_kernels.chunk_attention.reference import chunk_attention_reference
from pallas_kernels.chunk_attention.xla import chunk_attention_xla
from pallas_kernels.common import EMPTY_LSE, OwnKV, Partial, merge


class ChunkAttention(Protocol):
    """An implementation of one's own: a function, given wherever a name of one may stand.

    Traced under jit and static there, so that it must be hashable (a function at a module's head
    is; one made anew for each call compiles anew). Arguments are checked and complete: q
    [B, K, T, H, D], rows for each slot; k, v [L, N, G, C, D], of which `layer` is wanted; chunk_ids
    [B, K], outside [0, N) where a slot is empty; chunk_lengths [N], perhaps outside [0, C]; scale
    of the scores. Near keys are attended to elsewhere. Returns what `chunk_attention` does.
    """

    def __call__(
        self,
        q: Float[Array, "B K T H D"],
        k: Float[Array, "L N G C D"],
        v: Float[Array, "L N G C D"],
        layer: int | Int[Array, ""],
        chunk_ids: Int[Array, "B K"],
        chunk_lengths: Int[Array, "N"],
        scale: float,
        /,
    ) -> Partial:
        """Attention of q over the chosen chunks."""


NamedImplementation = Literal["mosaic_gpu", "cudnn", "xla", "interpret", "reference"]
Implementation = NamedImplementation | ChunkAttention


def implementation_name(implementation: Implementation) -> str:
    """Its name; that of the function for one of one's own."""
    if isinstance(implementation, str):
        return implementation
    return getattr(implementation, "__name__", type(implementation).__name__)


class ChunkMass(NamedTuple):
    """Attention over chosen chunks, and how it was shared out among them.

    attention: as without. mass [B, H, T, K] float32: each slot's share of a row's attention; the
    shares sum to 1 over the slots, or are all 0 where there is no key.
    """

    attention: Partial
    mass: Float[Array, "B H T K"]


def resolve_implementation(
    implementation: Implementation | None,
    *,
    dtype: jnp.dtype,
    head_size: int,
    chunk_size: int,
) -> Implementation:
    """The implementation that a call with such inputs will use on JAX's default device.

    The named or given one; where none is named, "mosaic_gpu" if the kernel takes the inputs and the
    device has compute capability 9.0, else "xla".

    Raises:
      ValueError: the name is not known, or that implementation does not take the inputs or this
        GPU, with the reason. Where there is no GPU the kernel may still be lowered for one.
    """
    if callable(implementation):
        return implementation
    problem = mosaic_gpu.input_problem(dtype, head_size, chunk_size)
    if implementation is None:
        return "xla" if problem or mosaic_gpu.device_problem() else "mosaic_gpu"
    if implementation not in get_args(NamedImplementation):
        known = ", ".join(get_args(NamedImplementation))
        raise ValueError(f"implementation {implementation!r} is not known ({known})")
    if implementation in ("mosaic_gpu", "interpret") and problem:
        raise ValueError(f"implementation {implementation!r}: {problem}")
    if implementation == "mosaic_gpu" and compat.compute_capability() not in (None, "9.0"):
        raise ValueError(f"implementation 'mosaic_gpu': {mosaic_gpu.device_problem()}")
    if implementation == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        raise ValueError(
            f"implementation 'cudnn': it takes bfloat16 and float16, got {jnp.dtype(dtype).name}"
        )
    return implementation


def require_device(implementation: Implementation) -> None:
    """Raises ValueError where JAX's default device cannot run the implementation."""
    if implementation == "mosaic_gpu" and (problem := mosaic_gpu.device_problem()):
        raise ValueError(f"implementation 'mosaic_gpu': {problem}")
    if implementation == "cudnn" and compat.compute_capability() is None:
        raise ValueError("implementation 'cudnn': it runs on NVIDIA GPUs")


def chunk_attention(
    q: Float[Array, "B T H D"] | Float[Array, "B K T H D"],
    k: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    v: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    near: OwnKV | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Softmax attention of every query row over the union of its request's chunks and near keys.

    Pure, made to be called under jit; compiles anew for other shapes, not for other ids, lengths or
    layers. Head counts H and G, rows T and slots K are free.

    Args:
      q: query rows. With a K axis, rows[b, j] meet chunk chunk_ids[b, j]: rotated by the row's
        position minus that chunk's offset, they let keys stay rotated at chunk-local positions.
        Without it the same rows meet every chunk. With near keys the axis has K + 1 places, the
        last for the rows that meet those.
      k, v: the pool, N chunks of C keys for G KV heads (H a multiple of G); with a leading axis
        of layers where `layer` is given. Read in place: no copy of the chosen chunks is made.
      chunk_ids: chunks of each request, in any order, repeats allowed. An id outside [0, N) marks
        an empty slot: it contributes nothing, and nothing outside the pool is read.
      chunk_lengths: valid keys of each chunk, clipped to [0, C]. What lies behind is never used,
        whatever it holds.
      layer: index into the leading axis of a stacked pool; may be traced.
      scale: of the scores, a positive number, 1/sqrt(D) by default.
      near: keys and values that a request has to itself (live KV), attended to on the way. For the
        kernel, S should be a multiple of 128, or they are copied.
      implementation: which code runs; a named one is used or the call fails.
        "mosaic_gpu"  the Hopper kernel: bfloat16 or float16, head size 64 or 128, C a multiple of
                      64, compute capability 9.0, jax 0.11 or newer; float32 accumulation.
        "interpret"   the same kernel, interpreted on the CPU; very slow, for tests.
        "cudnn"       gathers the chunks into a copy for cuDNN.
        "xla"         any backend and dtype; one chunk at a time, online log-sum-exp.
        "reference"   the float32 oracle.
        a function    one's own: see `ChunkAttention`.
        None          see `resolve_implementation`.

    Returns:
      Partial(out [B, T, H, D] in q's dtype, lse [B, H, T] float32), to be merged with attention
      over other keys (`pallas_kernels.merge`). Rows without any key give zeros and EMPTY_LSE.

    Raises:
      ValueError: ranks, sizes, dtypes, head counts or a scale that do not fit, named; K = 0.
    """
    _check(q, k, v, chunk_ids, chunk_lengths, layer, near)
    implementation = resolve_implementation(
        implementation, dtype=q.dtype, head_size=q.shape[-1], chunk_size=k.shape[-2]
    )
    if layer is None:
        k, v, layer = k[None], v[None], 0
    if q.ndim == 4:
        q = q[:, None]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")
    if implementation in ("mosaic_gpu", "interpret"):
        interpret = compat.interpreter() if implementation == "interpret" else None
        return mosaic_gpu.chunk_attention_mosaic_gpu(
            q, k, v, layer, chunk_ids, chunk_lengths, scale, near, interpret=interpret
        )
    slots = chunk_ids.shape[1]
    own = None
    if near is not None:
        lengths = jnp.clip(near.lengths, 0, near.k.shape[1])
        # What is no key is zero, for cuDNN multiplies it all the same.
        valid = (jnp.arange(near.k.shape[1]) < lengths[:, None])[..., None, None]
        near_k, near_v = (jnp.where(valid, x, 0) for x in near[:2])
        own = attention(q[:, slots], near_k, near_v, lengths, need_lse=True, scale=scale)
        q = q[:, :slots]
    q = jnp.broadcast_to(q, (q.shape[0], slots, *q.shape[2:]))
    if implementation == "reference":
        found = chunk_attention_reference(q, k[layer], v[layer], chunk_ids, chunk_lengths, scale)
    else:
        run: ChunkAttention = chunk_attention_xla
        if not isinstance(implementation, str):
            run = implementation
        elif implementation == "cudnn":
            run = chunk_attention_cudnn
        found = run(q, k, v, layer, chunk_ids, chunk_lengths, scale)
    return found if own is None else merge(own, found)


def chunk_attention_mass(
    q: Float[Array, "B T H D"] | Float[Array, "B K T H D"],
    k: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    v: Float[Array, "N G C D"] | Float[Array, "L N G C D"],
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> ChunkMass:
    """`chunk_attention` with every chunk's share of the attention; the same arguments and errors.

    Every slot is attended to as a request of its own; the log-sum-exps say what each is worth.
    """
    _check(q, k, v, chunk_ids, chunk_lengths, layer)
    batch, slots = chunk_ids.shape
    if q.ndim == 4:
        q = jnp.broadcast_to(q[:, None], (batch, slots, *q.shape[1:]))
    parts = chunk_attention(
        q.reshape(batch * slots, *q.shape[2:]),
        k,
        v,
        chunk_ids.reshape(-1, 1),
        chunk_lengths,
        layer=layer,
        scale=scale,
        implementation=implementation,
    )
    out, lse = (x.reshape(batch, slots, *x.shape[1:]) for x in parts)
    whole = merge(*(Partial(out[:, i], lse[:, i]) for i in range(slots)))
    mass = jnp.where(lse > EMPTY_LSE / 2, jnp.exp(lse - whole.lse[:, None]), 0.0)
    return ChunkMass(whole, mass.transpose(0, 2, 3, 1))


def _check(q, k, v, chunk_ids, chunk_lengths, layer, near=None) -> None:
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
    places = chunk_ids.shape[1] + (near is not None)
    require(
        q.ndim == 5 or near is None, "with near keys q must be [B, K + 1, T, H, D], rows for each"
    )
    require(
        q.ndim == 4 or q.shape[1] == places,
        f"q has {q.shape[1]} chunk slots, chunk_ids {chunk_ids.shape[1]}"
        + (" and one for near keys" if near is not None else ""),
    )
    require(
        chunk_lengths.shape == (n,),
        f"chunk_lengths must be [{n}], one for each chunk of the pool, got {chunk_lengths.shape}",
    )
    if near is None:
        return
    shape = near.k.shape
    require(
        near.k.ndim == 4 and shape == near.v.shape == (q.shape[0], shape[1], g, d) and shape[1] > 0,
        f"near k and v must be [B, S, G, D] with B = {q.shape[0]}, G = {g}, D = {d}, "
        f"got {shape} and {near.v.shape}",
    )
    require(
        near.k.dtype == near.v.dtype == k.dtype,
        f"near k and v must have the pool's dtype {k.dtype}, got {near.k.dtype}, {near.v.dtype}",
    )
    require(
        near.lengths.shape == (q.shape[0],) and jnp.issubdtype(near.lengths.dtype, jnp.integer),
        f"near lengths must be [{q.shape[0]}] integers, got {near.lengths.shape}",
    )
