"""JAX's persistent compilation cache, on by default for the scripts."""

from __future__ import annotations

import os
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
