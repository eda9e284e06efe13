"""Arrays in 8 bits: values, and the factors that turn them into numbers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

EightBits = Literal["fp8", "int8"]
_DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
_LARGEST = {"fp8": 448.0, "int8": 127.0}


class Scaled(NamedTuple):
    """An array in 8 bits: values times scale, which has the leading axes of `values`.

    Attributes:
      values: float8_e4m3fn or int8. A weight is [O, I], a pool of KV [L, N, G, C, D].
      scale: float32, of a weight [O], of a pool [L, N, G].
    """

    values: Num[Array, "*axes"]
    scale: Float[Array, "*leading"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the values."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """The number of values."""
        return self.values.size

    @property
    def nbytes(self) -> int:
        """The bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def restore(self, dtype: DTypeLike) -> Float[Array, "*axes"]:
        """Returns values times scale, computed in float32 and rounded once."""
        scale = self.scale.reshape(*self.scale.shape, *[1] * (self.values.ndim - self.scale.ndim))
        return (self.values.astype(jnp.float32) * scale).astype(dtype)


def restored(x: Array | Scaled, dtype: DTypeLike) -> Array:
    """Returns an array as it is, and one in 8 bits restored to `dtype`."""
    return x.restore(dtype) if isinstance(x, Scaled) else x


def quantise(x: Float[Array, "*axes"], bits: EightBits, trailing: int = 1) -> Scaled:
    """Returns x in 8 bits; a scale is the largest magnitude over the trailing axes, 1 for zeros.

    Rounds to the nearest value. Pure.

    Args:
      x: floating point, finite.
      bits: "fp8" is float8_e4m3fn, whose largest value is 448; "int8" uses -127 to 127.
      trailing: how many of the last axes share a scale.

    Raises:
      ValueError: another name of `bits`.
    """
    if bits not in get_args(EightBits):
        raise ValueError(f"bits {bits!r} is not known ({', '.join(get_args(EightBits))})")
    scale, inverse = factors(magnitude(x, trailing), bits)
    return Scaled(divided(x, inverse, bits), scale)


def magnitude(x: Float[Array, "*axes"], trailing: int = 1) -> Float[Array, "*leading"]:
    """Returns the largest magnitude over the trailing axes, in float32."""
    return jnp.abs(x.astype(jnp.float32)).max(axis=tuple(range(-trailing, 0)))


def factors(largest: Any, bits: EightBits) -> tuple[Any, Any]:
    """Returns the scale of this largest magnitude and its inverse, for NumPy or JAX arrays.

    GPUs do not round quotients of float32 correctly, NumPy does. All else of `quantise` has the
    same bits everywhere, for it only multiplies.
    """
    scale = largest * np.float32(1 / _LARGEST[bits])
    small = scale < np.finfo(np.float32).tiny  # the inverse would be infinite
    scale = scale * ~small + small
    return scale, np.float32(1) / scale


def divided(x: Float[Array, "*axes"], inverse: Float[Array, "*leading"], bits: EightBits) -> Array:
    """Returns the values of x with the inverse of its scale."""
    inverse = inverse.reshape(*inverse.shape, *[1] * (x.ndim - inverse.ndim))
    most = _LARGEST[bits]
    values = jnp.clip(x.astype(jnp.float32) * inverse, -most, most)
    if bits == "int8":
        values = jnp.round(values)
    return values.astype(_DTYPES[bits])
