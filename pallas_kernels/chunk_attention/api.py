"""Public entry: attention of query rows over chosen chunks of a KV pool, read in place.

A new implementation is a file with a function as `ChunkAttention` describes, and a line in
`IMPLEMENTATIONS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.chunk_attention import cudnn, hopper
from pallas_kernels.chunk_attention.dense import attention
from pallas_kernels.chunk_attention.reference import chunk_attention_reference
from pallas_kernels.chunk_attention.xla import chunk_attention_xla
from pallas_kernels.common import (
    OwnKV,
    Partial,
    merge,
    merge_slots,
    resolve,
    valid_chunks,
    zero_without_keys,
)
from pallas_kernels.scaled import Scaled

Layer = int | Int[Array, ""]
Rows = Float[Array, "B T H D"] | Float[Array, "B K T H D"]
# In 8 bits the scales are [N, G], or [L, N, G].
Pool = Float[Array, "N G C D"] | Float[Array, "L N G C D"] | Scaled


class ChunkAttention(Protocol):
    """A custom implementation: a function that is accepted in place of a name.

    It is traced under jit as a static argument, so it must be hashable. Use a function at module
    level; one that is made for each call compiles anew for each call.

    Arguments and result are as in `chunk_attention`, always with all axes: q [B, K, T, H, D], k and
    v [L, N, G, C, D], layer, ids [B, K], lengths [N], scale. k and v are `Scaled` where the pool is
    in 8 bits (`restored` reads both). Own keys are attended to elsewhere.
    What it returns for a request without keys is not used.
    """

    def __call__(
        self, q: Array, k: Any, v: Any, layer: Layer, ids: Array, lengths: Array, scale: Any, /
    ) -> Partial:
        """Returns attention of q over the chosen chunks."""


Implementation = str | ChunkAttention


class ChunkMass(NamedTuple):
    """Attention over chosen chunks, and each chunk's share of it.

    Attributes:
      attention: the result of `chunk_attention`.
      mass: [B, H, T, K] float32, each slot's share of a row's attention. The shares sum to 1 over
        the slots, or are all 0 without keys.
    """

    attention: Partial
    mass: Float[Array, "B H T K"]


def _beside_own_kv(run: ChunkAttention) -> Callable[..., Partial]:
    """Adds own keys to an implementation: dense attention, merged with the implementation's.

    Requests whose chunks have no keys get zeros; what the implementation gives is dropped.
    """

    def attend(q, k, v, layer, chunk_ids, chunk_lengths, scale, own_kv):
        slots, parts = chunk_ids.shape[1], []
        if own_kv is not None:
            lengths = jnp.clip(own_kv.lengths, 0, own_kv.k.shape[1])
            own_k, own_v, _ = own_kv
            parts = [attention(q[:, slots], own_k, own_v, lengths, need_lse=True, scale=scale)]
            q = q[:, :slots]
        q = jnp.broadcast_to(q, (q.shape[0], slots, *q.shape[2:]))
        part = run(q, k, v, layer, chunk_ids, chunk_lengths, scale)
        keys = valid_chunks(chunk_ids, chunk_lengths, k.shape[3])[1].sum(axis=1)
        return merge(*parts, zero_without_keys(part, keys))

    return attend


class _Entry(NamedTuple):
    """An implementation: its function, and what it cannot take or run on.

    run takes a `ChunkAttention`'s arguments with q [B, Q, T, H, D], Q = 1 for rows that all slots
    share and K + 1 with own keys, and own_kv. The others return a reason or None.
    """

    run: Callable[..., Partial]
    input_problem: Callable[[jnp.dtype, int, int, Any], str | None] = lambda *inputs: None
    device_problem: Callable[[], str | None] = lambda: None


IMPLEMENTATIONS = {
    "mosaic_gpu": _Entry(
        hopper.chunk_attention_hopper, hopper.input_problem, compat.hopper_problem
    ),
    "cudnn": _Entry(
        _beside_own_kv(cudnn.chunk_attention_cudnn), cudnn.input_problem, cudnn.device_problem
    ),
    "xla": _Entry(_beside_own_kv(chunk_attention_xla)),
    "interpret": _Entry(
        lambda *args: hopper.chunk_attention_hopper(*args, interpret=compat.interpreter()),
        hopper.input_problem,
    ),
    "reference": _Entry(_beside_own_kv(chunk_attention_reference)),
}


def implementation_name(implementation: Implementation) -> str:
    """Returns the name, or the `__name__` of a custom implementation."""
    if isinstance(implementation, str):
        return implementation
    return getattr(implementation, "__name__", type(implementation).__name__)


def resolve_implementation(
    implementation: Implementation | None,
    *,
    dtype: jnp.dtype,
    head_size: int,
    chunk_size: int,
    pool_dtype: DTypeLike | None = None,
) -> Implementation:
    """Returns the implementation that a call with such inputs uses on JAX's default device.

    A name or function is returned as it is. None gives "mosaic_gpu" if the kernel takes the inputs
    and the device has compute capability 9.0, else "xla".

    Args:
      implementation: a name, a function, or None.
      dtype: of the query rows.
      head_size, chunk_size: D and C.
      pool_dtype: of K and V if they are in 8 bits, float8_e4m3fn or int8; None for `dtype`.

    Raises:
      ValueError: the name is not known, or that implementation does not take the inputs or this
        GPU, with the reason. Without a GPU the kernel may still be lowered for one.
    """
    if callable(implementation):
        return implementation
    entry = IMPLEMENTATIONS.get(implementation or "mosaic_gpu", _Entry(chunk_attention_xla))
    problem = entry.input_problem(dtype, head_size, chunk_size, pool_dtype)
    if problem is None and (implementation is None or compat.compute_capability() is not None):
        problem = entry.device_problem()
    return resolve(implementation, IMPLEMENTATIONS, problem)


def require_device(implementation: Implementation) -> None:
    """Raises ValueError if JAX's default device cannot run the implementation."""
    entry = IMPLEMENTATIONS[implementation] if isinstance(implementation, str) else None
    if entry is not None and (problem := entry.device_problem()):
        raise ValueError(f"implementation {implementation!r}: {problem}")


def chunk_attention(
    q: Rows,
    k: Pool,
    v: Pool,
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: Layer | None = None,
    scale: float | None = None,
    own_kv: OwnKV | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Attends with every query row to the union of its request's chunks and own keys.

    Pure; call it under jit. It compiles anew for other shapes, but not for other ids, lengths or
    layers. Head counts H and G, rows T and slots K are free.

    Args:
      q: query rows. With a K axis, q[b, j] attends to chunk chunk_ids[b, j]: rows rotated by their
        position minus that chunk's offset let keys stay rotated at chunk-local positions. Without
        it the same rows attend to every chunk. With own_kv the axis has K + 1 places, the last for
        the rows that attend to own keys.
      k, v: the pool, N chunks of C keys for G KV heads (H a multiple of G), with a leading layer
        axis if `layer` is given. Read in place: the chosen chunks are not copied. Both may be in 8
        bits: `Scaled`, a scale for each layer, chunk and KV head (`quantise(k, "fp8", 2)`).
      chunk_ids: in any order, repeats allowed. An id outside [0, N) marks an empty slot: it
        contributes nothing, and nothing outside the pool is read.
      chunk_lengths: valid keys of each chunk, clipped to [0, C]. The keys behind may hold NaN.
      layer: index into the leading axis of a stacked pool; may be traced.
      scale: factor of the scores, positive, 1/sqrt(D) by default.
      own_kv: live KV. For the kernel, S should be a multiple of 128; else they are copied.
      implementation: the code to run. A named one runs or the call fails.
        "mosaic_gpu"  the Hopper kernel: bfloat16 or float16, head size 64 or 128, C a multiple of
                      64, compute capability 9.0, jax 0.11 or newer; float32 accumulation.
        "interpret"   the same kernel, interpreted on the CPU; very slow, for tests.
        "cudnn"       gathers the chunks into a copy for cuDNN.
        "xla"         any backend and dtype; one chunk at a time, online log-sum-exp.
        "reference"   the float32 oracle.
        a function    a custom implementation, see `ChunkAttention`.
        None          see `resolve_implementation`.

    Returns:
      `Partial` in q's dtype, for `merge` with attention over other keys.

    Raises:
      ValueError: ranks, sizes, dtypes, head counts or a scale that do not fit; K = 0.
    """
    _check(q, k, v, chunk_ids, chunk_lengths, layer, scale, own_kv)
    implementation = resolve_implementation(
        implementation,
        dtype=q.dtype,
        head_size=q.shape[-1],
        chunk_size=k.shape[-2],
        pool_dtype=k.dtype if isinstance(k, Scaled) else None,
    )
    if layer is None:
        (k, v), layer = jax.tree.map(lambda x: x[None], (k, v)), 0
    q = q[:, None] if q.ndim == 4 else q
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(implementation, str):
        run = IMPLEMENTATIONS[implementation].run
    else:
        run = _beside_own_kv(implementation)
    return run(q, k, v, layer, chunk_ids, chunk_lengths, scale, own_kv)


def chunk_attention_mass(
    q: Rows,
    k: Pool,
    v: Pool,
    chunk_ids: Int[Array, "B K"],
    chunk_lengths: Int[Array, "N"],
    *,
    layer: Layer | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> ChunkMass:
    """Returns `chunk_attention` and every chunk's share of it; arguments and errors are the same.

    Every slot is attended to as a request by itself; the log-sum-exps give the shares.
    """
    _check(q, k, v, chunk_ids, chunk_lengths, layer, scale)
    batch, slots = chunk_ids.shape
    if q.ndim == 4:
        q = jnp.broadcast_to(q[:, None], (batch, slots, *q.shape[1:]))
    rows, ids = q.reshape(batch * slots, *q.shape[2:]), chunk_ids.reshape(-1, 1)
    attend = functools.partial(chunk_attention, layer=layer, scale=scale)
    parts = attend(rows, k, v, ids, chunk_lengths, implementation=implementation)
    union, mass = merge_slots(Partial(*(x.reshape(batch, slots, *x.shape[1:]) for x in parts)))
    return ChunkMass(union, mass.transpose(0, 2, 3, 1))


def _check(q, k, v, chunk_ids, chunk_lengths, layer, scale, own_kv=None) -> None:
    """Raises ValueError, in one line that names the argument."""
    sizes: dict[str, int] = {}

    def match(name, array, layout):
        """Compares the shape with the sizes of the axis letters so far, and adds its own."""
        axes, shape = layout.split(", "), array.shape
        bound = {axis: sizes[axis] for axis in axes if axis in sizes}
        new = dict(zip(axes, shape, strict=False))
        if len(axes) != len(shape) or bound != {axis: new[axis] for axis in bound}:
            wanted = ", ".join(f"{axis} = {size}" for axis, size in bound.items())
            layout = f"[{layout}]" + f" with {wanted}" * bool(wanted)
            raise ValueError(f"{name} must be {layout}, got shape {shape}")
        sizes.update(new)

    pool = "N, G, C, D" if layer is None else "L, N, G, C, D"
    match("k without layer" if layer is None else "k with layer", k, pool)
    match("v", v, pool)
    for name, x in {"k": k, "v": v}.items():
        if isinstance(x, Scaled):
            match(f"{name}.scale", x.scale, pool.removesuffix(", C, D"))
    match("chunk_ids", chunk_ids, "B, K")
    match("chunk_lengths", chunk_lengths, "N")
    if not sizes["K"]:
        raise ValueError("chunk_ids must hold at least one chunk, got K = 0")
    narrow = isinstance(k, Scaled) and isinstance(v, Scaled) and k.dtype == v.dtype
    operands = [q] if narrow else [q, k, v]
    integers = {"chunk_ids": chunk_ids, "chunk_lengths": chunk_lengths}
    if own_kv is None:
        match("q", q, "B, T, H, D" if q.ndim == 4 else "B, K, T, H, D")
    else:
        sizes["K + 1"] = sizes["K"] + 1
        match("q with own_kv", q, "B, K + 1, T, H, D")
        for name, layout in {"k": "B, S, G, D", "v": "B, S, G, D", "lengths": "B"}.items():
            match(f"own_kv.{name}", getattr(own_kv, name), layout)
        if not sizes["S"]:
            raise ValueError("own_kv must have room for at least one key, got S = 0")
        operands += own_kv[:2]
        integers["own_kv.lengths"] = own_kv.lengths
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"q must have a multiple of the pool's {sizes['G']} KV heads, got H = {sizes['H']}"
        )
    dtypes = [str(x.dtype) for x in operands]
    if len(set(dtypes)) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        others = [] if narrow else ["k", "v"]
        others += [] if own_kv is None else ["own_kv"]
        names = ", ".join(["q", *others[:-1]]) + "".join(f" and {x}" for x in others[-1:])
        raise ValueError(f"{names} must share a floating dtype, got {', '.join(dtypes)}")
    for name, array in integers.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")
