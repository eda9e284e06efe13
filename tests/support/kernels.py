"""What the tests of the kernels share: shapes, and lowering for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import compat

OLD_JAX = pytest.mark.skipif(
    compat.mosaic_gpu_problem() is not None, reason=str(compat.mosaic_gpu_problem())
)
MESH = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def implementations(*plain: str, gpu: tuple[str, ...] = ("mosaic_gpu",)) -> pytest.MarkDecorator:
    """All run the same cases, those in `gpu` on a GPU; "interpret" is "mosaic_gpu" on the CPU."""
    names = [*plain, pytest.param("interpret", marks=OLD_JAX)]
    names += [pytest.param(name, marks=pytest.mark.gpu) for name in gpu]
    return pytest.mark.parametrize("implementation", names)


def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return spec(*shape, dtype=jnp.int32)


def lowered(f: Callable[..., Any], *args: Any) -> str:
    """What a GPU is given. Shared memory, tiles and layouts are checked on the way."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def launches(text: str) -> list[str]:
    return [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
