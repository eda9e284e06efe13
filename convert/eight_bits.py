"""The layers' weights in 8 bits, made and restored on the host.

The bits are those of `pallas_kernels.quantise`, which tests compare.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert import orbax_stream
from convert.sources import BLOCK, SourceTensor
from pallas_kernels.scaled import EightBits, factors
from pdllm_jax.network.config import WeightFormat

Arrays = dict[str, NDArray[Any]]
_SCALE_BYTES = 4


def scale_path(path: str) -> str:
    """Returns the parameter path of the scales of a weight, float32 [O]."""
    return f"{path.removesuffix('weight')}scale"


def is_quantised(path: str, shape: tuple[int, ...], weights: WeightFormat) -> bool:
    """Returns whether a checkpoint in this format holds a parameter in 8 bits."""
    return weights != "full" and path.startswith("blocks.") and len(shape) == 2


def parts(path: str, tensor: SourceTensor, dtype: str, weights: WeightFormat) -> dict[str, int]:
    """Returns the bytes of the arrays of a tensor, by parameter path."""
    shape, size = tensor.shape, int(np.prod(tensor.shape))
    if not is_quantised(path, shape, weights):
        return {path: size * np.dtype(dtype).itemsize}
    return {path: size, scale_path(path): _SCALE_BYTES * shape[0]}


def read(path: str, tensor: SourceTensor, dtype: str, weights: WeightFormat) -> Arrays:
    """Reads the arrays of a tensor: itself in `dtype`; or 8 bits, made of it as it is stored."""
    if weights == "full" or not is_quantised(path, tensor.shape, weights):
        return {path: tensor.read(dtype)}
    values, scales = quantise(tensor.read(tensor.dtype), weights)
    return {path: values, scale_path(path): scales}


def restore(
    params: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, weights: WeightFormat
) -> Arrays:
    """Reads parameters of a checkpoint in the format `weights`: 8 bits as values * scale."""
    quantised = [path for path, shape in shapes.items() if is_quantised(path, shape, weights)]
    scales = {path: scale_path(path) for path in quantised}
    arrays = orbax_stream.restore(params, [*shapes, *scales.values()])
    for path, scale in scales.items():
        arrays[path] = multiply(arrays[path], arrays.pop(scale), dtype)
    return arrays


def quantise(x: NDArray[Any], bits: EightBits) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Returns the values [O, I] and scales [O] of a finite weight."""
    values = np.empty(x.shape, ml_dtypes.float8_e4m3fn if bits == "fp8" else np.int8)
    scales = np.empty(len(x), np.float32)
    for rows in _blocks(x):
        block = x[rows].astype(np.float32)
        scales[rows], inverse = factors(np.maximum(block.max(1), -block.min(1)), bits)
        block *= inverse[:, None]
        values[rows] = _to_fp8(block) if bits == "fp8" else np.rint(block, out=block)
    return values, scales


def multiply(values: NDArray[Any], scales: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Returns values * scale, computed in float32 and rounded once."""
    result = np.empty(values.shape, dtype)
    for rows in _blocks(values):
        result[rows] = values[rows].astype(np.float32) * scales[rows, None]
    return result


def _blocks(x: NDArray[Any]) -> Iterable[slice]:
    rows = max(1, BLOCK // x.shape[1])
    return (slice(start, start + rows) for start in range(0, len(x), rows))


@functools.cache
def _table() -> NDArray[Any]:
    """Returns the float8_e4m3fn of every bfloat16, by its bits."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _to_fp8(x: NDArray[np.float32]) -> NDArray[Any]:
    """Rounds to nearest even; three times as fast as ml_dtypes.

    A number is cut to 16 bits, whose last one tells whether anything was cut off. Rounding that
    to 8 bits is the same as rounding the number ("round to odd").
    """
    halves = x.view(np.uint16).reshape(*x.shape, 2)  # little-endian
    return _table().take(halves[..., 1] | (halves[..., 0] != 0)).view(ml_dtypes.float8_e4m3fn)
