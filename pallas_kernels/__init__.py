"""Attention over chosen chunks of a KV pool. Knows nothing of the model or the method."""

from pallas_kernels.api import Implementation, chunk_attention, resolve_implementation
from pallas_kernels.partial import EMPTY_LSE, Partial, merge

__all__ = [
    "EMPTY_LSE",
    "Implementation",
    "Partial",
    "chunk_attention",
    "merge",
    "resolve_implementation",
]
