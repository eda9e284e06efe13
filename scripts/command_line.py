"""Moved to pdllm_jax.cli.errors."""

from pdllm_jax.cli.errors import Parser, guarded, leave, out_of_memory, status  # noqa: F401
