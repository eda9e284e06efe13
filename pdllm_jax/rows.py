"""Runs of rows at run-time places, request by request."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jaxtyping import Array, Int


def slices(x: Array, start: Int[Array, "B"], size: int) -> Array:
    """x[b, start[b] : start[b] + size] for every request."""
    return jax.vmap(lambda row, s: lax.dynamic_slice_in_dim(row, s, size))(x, start)


def overlay(x: Array, start: Int[Array, "B"], values: Array) -> Array:
    """x with values[b] written from start[b] on."""
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(lambda row, s, v: put(row, v.astype(row.dtype), s))(x, start, values)
