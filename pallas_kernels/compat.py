"""Differences between versions of jax that the kernels meet, in one place.

The GPU kernel is written for Pallas' Mosaic GPU backend as it is from jax 0.11 on. On older
versions everything else of this package works, and asking for the kernel says why it does not.
"""

from __future__ import annotations

from typing import Any

import jax

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
OLDEST = (0, 11)


def mosaic_gpu_problem() -> str | None:
    """Why this version of jax cannot build the kernel, None where it can."""
    if JAX_VERSION < OLDEST:
        return f"the Mosaic GPU kernel needs jax 0.11 or newer, this is {jax.__version__}"
    return None


def default_device() -> Any:
    """Where jit runs what is not placed: `jax.default_device`, else the backend's first device."""
    config: Any = jax.config
    chosen = config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def compute_capability() -> str | None:
    """Of the default device, like "9.0"; None where that is no NVIDIA GPU."""
    device = default_device()
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def processors() -> int:
    """Multiprocessors of the default device; an H100's where there is no GPU."""
    return getattr(default_device(), "core_count", None) or 132


def interpreter(*, detect_races: bool = False) -> Any:
    """What `interpret=` of a Mosaic GPU kernel takes to run it on the CPU.

    Its barriers block threads of XLA's pool, up to five with our kernels, and a pool without a free
    one never goes on. It has as many as there are processors: where these are fewer than six, set
    PJRT_NPROC=6 in the environment before JAX starts.
    """
    return _mosaic_gpu().InterpretGPUParams(detect_races=detect_races)


def load(ref: Any, layout: Any) -> jax.Array:
    """A reference's values in registers, in that layout (older jax has one argument more)."""
    return _mosaic_gpu().load(ref, layout=layout)


def _mosaic_gpu() -> Any:
    """The module, untyped: its names differ between the versions that the types are checked on."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def races_found() -> bool:
    """Whether the last interpreted kernel with race detection had a race (newer jax raises)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(gpu_callbacks.get_races().races_found)
