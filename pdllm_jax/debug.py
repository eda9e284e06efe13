"""Where NaN or infinity first appears: in a weight, a cache, or a layer's tensor.

Nothing here is on the way of an answer. A NaN there shows as slots that stay masked, for a
confidence that is no number is no candidate; `find_nonfinite` then says where it comes from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.chunk_attention.dense import attention
from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.answer import Answer
from pdllm_jax.method.chunking import TokenIds, check_token_ids, split_context
from pdllm_jax.network.rope import Rotation, rotate, rotation
from pdllm_jax.network.transformer import Block, MaskPredictor, swiglu

# What a block computes, in order; the last is the residual stream that leaves it.
_TENSORS = (
    "attn_norm", "q_proj", "k_proj", "v_proj", "attention", "attn_out", "ff_norm", "swiglu",
    "down_proj", "output",
)  # fmt: skip
# Rows that go through the LM head at a time: logits of a long prompt would take gigabytes.
_LOGIT_ROWS = 256


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first tensor with a NaN or an infinity.

    where: a weight's or a leaf's path ("blocks.3.down_proj.weight"), or what a layer computed
      ("blocks.3.attention").
    layer: number of the block, None outside of one.
    nan, infinite: how many values are such; size: of how many.
    """

    where: str
    layer: int | None
    nan: int
    infinite: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.where} is the first tensor that is not finite: {self.nan} NaN and "
            f"{self.infinite} infinite of {self.size} values"
        )


class NonFiniteError(ValueError):
    """An answer whose computation met NaN or infinity; the message is `NonFinite`'s."""


@jax.jit
def _count(x: Array) -> Int[Array, "2"]:
    return jnp.stack([jnp.isnan(x).sum(), jnp.isinf(x).sum()])


def find_nonfinite_leaf(tree: Any) -> NonFinite | None:
    """The first leaf of a pytree (a cache, a state, a model) that is not finite; None where all
    are. Leaves that are no floats always are.
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            nan, infinite = np.asarray(_count(leaf)).tolist()
            if nan or infinite:
                keys = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
                layer = int(keys[1]) if keys[0] == "blocks" else None
                return NonFinite(".".join(keys), layer, nan, infinite, leaf.size)
    return None


def find_nonfinite(
    model: MaskPredictor, token_ids: Int[Array, "B T"] | TokenIds
) -> NonFinite | None:
    """Goes through the weights, then forward through the model layer by layer.

    Args:
      token_ids: [B, T] or [T]; what the answer was computed from, response included. The forward is
        a plain one, every row seeing every other: what only a cache holds is for
        `find_nonfinite_leaf`.

    Returns:
      The first tensor that is not finite, in the order of computation; None where all are.

    Raises:
      ValueError: no ids, or ids outside the vocabulary.
    """
    given = np.asarray(token_ids)
    if not given.size:
        raise ValueError("token_ids is empty")
    check_token_ids("token_ids", given.reshape(-1), model.config.embedding_size)
    found = find_nonfinite_leaf(model)
    if found is not None:
        return found
    ids = jnp.atleast_2d(jnp.asarray(token_ids, jnp.int32))
    by = rotation(model.config, jnp.arange(ids.shape[1]))
    x = model.embedding(ids)
    for layer, block in enumerate(model.blocks):
        x, tensors = _look_into(block, x, by)
        for name, counts, size in zip(_TENSORS, *map(np.asarray, tensors), strict=True):
            if counts.any():
                nan, infinite = counts.tolist()
                return NonFinite(f"blocks.{layer}.{name}", layer, nan, infinite, int(size))
    hidden = model.final_norm(x)
    nan, infinite = np.asarray(_count(hidden)).tolist()
    if nan or infinite:
        return NonFinite("final_norm", None, nan, infinite, hidden.size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    for start in range(0, len(rows), _LOGIT_ROWS):
        logits = model.logits(rows[start : start + _LOGIT_ROWS])
        nan, infinite = np.asarray(_count(logits)).tolist()
        if nan or infinite:
            return NonFinite("logits", None, nan, infinite, logits.size)
    return None


@jax.jit
def _look_into(
    block: Block, x: Float[Array, "B T M"], by: Rotation
) -> tuple[Float[Array, "B T M"], tuple[Int[Array, "tensors 2"], Int[Array, "tensors"]]]:
    """The block's output; of each of _TENSORS the counts, and the size."""
    seen = [block.attn_norm(x)]

    def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
        out = attention(rotate(q, by), rotate(k, by), v).out
        seen.extend([q, k, v, out])
        return out, None

    out, _, _ = block(0, x, seen[0], attend, None)
    # What the block does behind its attention, once more: its own tensors do not come out.
    attended = block.attn_out(seen[-1].reshape(x.shape))
    normed = block.ff_norm(x + attended)
    gated = swiglu(normed, block.gate_proj, block.up_proj)
    seen += [attended, normed, gated, block.down_proj(gated), out]
    return out, (jnp.stack([_count(y) for y in seen]), jnp.array([y.size for y in seen]))


def check_answer(
    model: MaskPredictor,
    prefix_ids: TokenIds,
    context_ids: TokenIds,
    query_ids: TokenIds,
    chunking: ChunkConfig,
    result: Answer,
    bos_id: int | None = None,
) -> None:
    """Runs `find_nonfinite` on what an answer was computed from: prefix, the chunks that were kept
    (all of the context for a baseline), query and response. Raises NonFiniteError.
    """
    context = [np.asarray(context_ids, np.int32)]
    if result.selection is not None:
        first = bos_id if bos_id is not None else next(iter(prefix_ids), None)
        chunks, lengths = split_context(context_ids, chunking, first)
        context = [chunks[i, : lengths[i]] for i in result.selection["chunks"]]
    parts = [prefix_ids, *context, query_ids, result.tokens]
    found = find_nonfinite(model, np.concatenate([np.asarray(part, np.int32) for part in parts]))
    if found is not None:
        raise NonFiniteError(str(found))
