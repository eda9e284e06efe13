"""What workers are forked with: the imports, and nothing begun in JAX."""

import evaluate  # noqa: F401

from campaigns import checkpoint_kinds, converted_kinds, snapshot_kinds, text_kinds, torch_kinds  # noqa: F401
