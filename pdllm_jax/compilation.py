"""JAX's persistent compilation cache, on by default for the scripts."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where the scripts keep what can be made again: $PDLLM_CACHE, or the user's cache folder."""
    if folder := os.environ.get("PDLLM_CACHE"):
        return Path(folder)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pdllm_jax"


def enable_compilation_cache() -> None:
    """Keeps compiled functions between runs, in `cache_folder()`/compiled.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR (where), and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS (what is worth keeping; half a second here).
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compile_quickly_on_cpu() -> None:
    """Makes XLA skip LLVM's expensive passes where JAX runs on a CPU.

    Compiling the small model's programs then takes 55 to 85% of the processor time. Without any
    optimization (jax_disable_most_optimizations) they would run at half the speed. Has an effect
    only before the first use of a JAX device. Flags that XLA_FLAGS has are kept.
    """
    platforms = jax.config.values["jax_platforms"]
    accelerated = platforms != "cpu" if platforms else bool(entry_points(group="jax_plugins"))
    if accelerated:  # the flags apply to all of XLA's backends
        return
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in ("--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true"):
        if flag.partition("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags
