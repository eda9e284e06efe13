"""What workers are forked with: the imports, and nothing begun in JAX."""

from campaigns import checkpoint_kinds, snapshot_kinds, text_kinds  # noqa: F401
