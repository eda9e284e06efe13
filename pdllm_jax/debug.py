"""Finds where NaN or infinity first appears: in a weight, a cache, or a layer's output.

A NaN in an answer shows as slots that stay masked: NaN confidences are never candidates.
`find_nonfinite` names the layer; `jax_debug_nans` and `jax_debug_infs` name the operation inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine
from pdllm_jax.method.chunking import TokenIds, check_token_ids, split_context
from pdllm_jax.network.transformer import MaskPredictor

# Rows that go through the LM head at a time: logits of a long prompt would take gigabytes.
_LOGIT_ROWS = 256


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first tensor with a NaN or an infinity.

    where: the path of a weight or leaf ("blocks.3.down_proj.weight"), the layer after which the
      residual stream is not finite ("blocks.3"), "final_norm" or "logits".
    nan, infinite, size: numbers of NaN, of infinite and of all values.
    """

    where: str
    nan: int
    infinite: int
    size: int

    @property
    def layer(self) -> int | None:
        """Number of the layer, None outside of the layers."""
        keys = self.where.split(".")
        return int(keys[1]) if keys[0] == "blocks" else None

    def __str__(self) -> str:
        message = (
            f"{self.where} is the first tensor that is not finite: {self.nan} NaN and "
            f"{self.infinite} infinite of {self.size} values"
        )
        if self.where == f"blocks.{self.layer}":
            message += "; jax_debug_nans and jax_debug_infs name the operation inside the layer"
        return message


class NonFiniteError(ValueError):
    """An answer whose computation met NaN or infinity; the message is `NonFinite`'s."""


@jax.jit
def _count(x: Array) -> Int[Array, "2"]:
    return jnp.stack([jnp.isnan(x).sum(), jnp.isinf(x).sum()])


def _first(counts: Iterable[tuple[str, Array, int]]) -> NonFinite | None:
    for where, values, size in counts:
        nan, infinite = np.asarray(values).tolist()
        if nan or infinite:
            return NonFinite(where, nan, infinite, size)
    return None


def find_nonfinite_leaf(tree: Any) -> NonFinite | None:
    """Returns the first leaf of a pytree (a cache, a state, a model) that is not finite, or None.

    Leaves of other dtypes than floats are skipped.
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree))
    return _first(
        (jax.tree_util.keystr(path, simple=True, separator="."), _count(leaf), leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    )


@jax.jit
def _forward(model: MaskPredictor, ids: Int[Array, "B T"]) -> tuple[Array, list[Array]]:
    """Returns the hidden rows, and counts of the residual stream after each layer and of them."""
    counts: list[Array] = []
    hidden = model.encode(ids, hook=lambda layer, stream: counts.append(_count(stream)))
    return hidden, [*counts, _count(hidden)]


def find_nonfinite(
    model: MaskPredictor, token_ids: Int[Array, "B T"] | TokenIds
) -> NonFinite | None:
    """Returns the first tensor that is not finite, in the order of computation, or None.

    Searches the weights, then the residual stream after each layer of a plain forward, where every
    row attends to all, then the logits. A cache is for `find_nonfinite_leaf`.

    Args:
      token_ids: [B, T] or [T]; what the answer was computed from, response included.

    Raises:
      ValueError: no ids, or ids outside the vocabulary.
    """
    ids = np.asarray(token_ids)
    if not ids.size:
        raise ValueError("token_ids is empty")
    check_token_ids("token_ids", ids.reshape(-1), model.config.embedding_size)
    if (weight := find_nonfinite_leaf(model)) is not None:
        return weight
    hidden, counts = _forward(model, jnp.atleast_2d(jnp.asarray(ids, jnp.int32)))
    names = [*(f"blocks.{layer}" for layer in range(len(model.blocks))), "final_norm"]
    layers = _first((name, count, hidden.size) for name, count in zip(names, counts, strict=True))
    if layers is not None:
        return layers
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = (model.logits(rows[i : i + _LOGIT_ROWS]) for i in range(0, len(rows), _LOGIT_ROWS))
    return _first(("logits", _count(logits), logits.size) for logits in parts)


def check_answer(
    engine: Engine, prefix: TokenIds, context: TokenIds, query: TokenIds, answer: Answer
) -> None:
    """Runs `find_nonfinite` on prefix, kept chunks (a baseline: the context), query and response.

    Raises NonFiniteError.
    """
    kept = [context]
    if answer.selection is not None:
        bos_id = next(iter(prefix), None) if engine.bos_id is None else engine.bos_id
        chunks, lengths = split_context(context, engine.chunking, bos_id)
        kept = [chunks[i, : lengths[i]] for i in answer.selection["chunks"]]
    parts = [prefix, *kept, query, answer.tokens]
    ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
    if (problem := find_nonfinite(engine.model, ids)) is not None:
        raise NonFiniteError(str(problem))
