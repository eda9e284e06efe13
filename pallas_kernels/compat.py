"""What the Hopper kernels need of the device and of jax.

The kernels are written for Pallas' Mosaic GPU backend as of jax 0.11. With an older jax the rest of
this package works, and a kernel that is asked for by name raises an error with the reason.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
OLDEST = (0, 11)

DTYPES = (jnp.bfloat16, jnp.float16)  # of the operands of attention and products
ROWS = 64  # rows of a tile: what one warpgroup multiplies at once
# Shared memory that a CTA may ask for on sm_90, less what the compiler takes for itself.
SHARED_MEMORY = 227 * 1024 - 1024


def mosaic_gpu_problem() -> str | None:
    """Returns why this version of jax cannot build the kernels; None if it can."""
    if JAX_VERSION < OLDEST:
        return f"the Mosaic GPU kernel needs jax 0.11 or newer, this is {jax.__version__}"
    return None


def dtype_problem(dtype: jnp.dtype) -> str | None:
    """Returns why the kernels cannot take operands of this dtype; None if they can."""
    if (problem := mosaic_gpu_problem()) is not None:
        return problem
    if dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float16, got {jnp.dtype(dtype).name}"
    return None


def hopper_problem() -> str | None:
    """Returns why JAX's default device cannot run the kernels; None if it can."""
    capability = compute_capability()
    if capability is None:
        return f"the kernel runs on NVIDIA GPUs, the default device is {default_device()}"
    if capability != "9.0":
        return f"the kernel needs compute capability 9.0, this device has {capability}"
    return None


def default_device() -> Any:
    """Returns `jax.default_device` if it is set, else the backend's first device."""
    config: Any = jax.config
    chosen = config.jax_default_device
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def compute_capability() -> str | None:
    """Returns the default device's compute capability, such as "9.0"; None without NVIDIA GPU."""
    device = default_device()
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def sm_count() -> int:
    """Returns the number of SMs of the default device; an H100's 132 without a GPU."""
    return getattr(default_device(), "core_count", None) or 132


def padded_rows(rows: int) -> int:
    """Returns rows as the kernels' tiles can hold them: 32, or a multiple of 64."""
    return 32 if rows <= 32 else -(-rows // ROWS) * ROWS


def interpreter(*, detect_races: bool = False) -> Any:
    """Returns the `interpret=` setting that runs a Mosaic GPU kernel on the CPU.

    The kernel's barriers block up to six threads of XLA's pool, which has one for each core, and
    the interpreter hangs if none is left. With fewer than seven cores, set PJRT_NPROC=7 in the
    environment before JAX starts.
    """
    return _mosaic_gpu().InterpretGPUParams(detect_races=detect_races)


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Returns float32 zeros in registers."""
    return _mosaic_gpu().layout_cast(jnp.zeros(shape, jnp.float32), layout)


def product(a: Any, b: Any, columns: int) -> jax.Array:
    """Returns the float32 product of a tile of rows and a matrix, both in shared memory."""
    from jax.experimental import pallas as pl

    plgpu = _mosaic_gpu()

    def multiply(ref: Any) -> jax.Array:
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads a reference's values into registers in the given layout."""
    return _mosaic_gpu().load(ref, layout=layout)


def copy_layout() -> Any:
    """Returns the layout in registers in which a tile of 8 bits becomes one of 16 bits.

    A thread has 8 values of a row, and neighbouring threads have neighbouring rows: reads of 8 and
    writes of 16 bytes then meet no bank twice in tiles whose rows of 128 bytes are swizzled.
    """
    plgpu = _mosaic_gpu()
    tiling = plgpu.Tiling(((ROWS, 32), (16, 32), (8, 32), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-2, -3), vector_dim=-1)


def smem_transforms(columns: int, itemsize: int = 2) -> tuple[Any, ...]:
    """Returns the tiling and swizzle of a shared memory tile: rows of at most 128 bytes.

    Rows of 16 bytes have no swizzle: (), which leaves whole rows one behind the other.
    """
    width = math.gcd(columns, 128 // itemsize)
    if width * itemsize < 32:
        return ()
    plgpu = _mosaic_gpu()
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * itemsize)


def compiler_params() -> Any:
    """Returns the compiler settings of the kernels that multiply: warpgroup semantics."""
    plgpu = _mosaic_gpu()
    return plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    )


def _mosaic_gpu() -> Any:
    """Returns the module, untyped: its names differ between the versions that mypy checks."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def races_found() -> bool:
    """Returns whether the last interpreted kernel had a race (a newer jax raises instead)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(gpu_callbacks.get_races().races_found)
