"""An evaluation that recomputes any rows: what methods have in common that choose rows one by one.

The requests of a batch choose different numbers of rows. The pass has a static number of them, and
the places that a request does not need hold no row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pdllm_jax.method.cache import LiveCache
from pdllm_jax.method.caches.base import Prediction
from pdllm_jax.method.live_forward import LayerHook, live_forward

if TYPE_CHECKING:
    from pdllm_jax.method.step import Step


class RowsPass(NamedTuple):
    """What a pass over chosen rows gives.

    predicted: of the masked slots whose predicting row ran.
    rows: the number of each row of the pass, ascending; numbers of `LiveCache` rows and more where
      there is none.
    live: KV of the live rows. carry: of the hook.
    """

    predicted: Prediction
    rows: Int[Array, "B n"]
    live: LiveCache | None
    carry: Any


def true_numbers(chosen: Bool[Array, "B N"], size: int, none: int) -> Int[Array, "B size"]:
    """Returns the numbers of the true entries, ascending, then `none`; at most `size` are true."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :size]
    count = jnp.count_nonzero(chosen, axis=1)
    return jnp.where(jnp.arange(size) < count[:, None], order, none)


def slot_rows(step: Step) -> Int[Array, "B G"]:
    """Returns the rows that predict the slots."""
    slot = jnp.arange(step.state.tokens.shape[1])
    return step.model.predicting_row(step.state.query_length[:, None] + slot)


def rows_of_slots(step: Step, slots: Bool[Array, "B G"]) -> Bool[Array, "B R"]:
    """Returns which rows predict one of these slots."""
    batch, rows = step.rows.shape
    places = jnp.where(slots, slot_rows(step), rows)
    return (
        jnp.zeros((batch, rows), bool).at[jnp.arange(batch)[:, None], places].set(True, mode="drop")
    )


def run_rows(
    step: Step,
    chosen: Bool[Array, "B R"],
    size: int,
    hook: LayerHook | None = None,
    hook_carry: Any = None,
) -> RowsPass:
    """Recomputes the chosen rows, which attend to the live KV of all, and predicts masked slots.

    size: rows of the pass; no request has more.
    """
    model, context, slots = step.model, step.context, step.state.tokens.shape[1]
    assert context.live is not None
    ids = step.rows
    row = true_numbers(chosen, size, context.live.k[0].shape[1])
    ids = jnp.take_along_axis(ids, jnp.minimum(row, ids.shape[1] - 1), axis=1)
    x, live, carry = live_forward(model, context, ids, row, hook=hook, hook_carry=hook_carry)

    predicting = slot_rows(step)
    ran = jnp.take_along_axis(chosen, predicting, axis=1)
    slot = true_numbers(step.masked & ran, min(size, slots), slots)
    predicting = jnp.take_along_axis(predicting, jnp.minimum(slot, slots - 1), axis=1)
    place = jnp.take_along_axis(jnp.cumsum(chosen, axis=1) - 1, predicting, axis=1)
    x = jnp.take_along_axis(x, jnp.maximum(place, 0)[..., None], axis=1)
    predicted = step.predict_at(model.logits(model.final_norm(x)), slot)
    return RowsPass(predicted, row, live, carry)
