"""Moved to pdllm_jax.cli.flags."""

from pdllm_jax.cli.flags import DTYPES, add_chunking, add_placement, mesh_of  # noqa: F401
