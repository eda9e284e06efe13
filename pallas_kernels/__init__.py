"""Attention over chosen chunks of a KV pool. Knows nothing of the model or the method."""

from pallas_kernels.api import (
    ChunkMass,
    Implementation,
    chunk_attention,
    chunk_attention_mass,
    require_device,
    resolve_implementation,
)
from pallas_kernels.partial import EMPTY_LSE, Partial, merge

__all__ = [
    "EMPTY_LSE",
    "ChunkMass",
    "Implementation",
    "Partial",
    "chunk_attention",
    "chunk_attention_mass",
    "merge",
    "require_device",
    "resolve_implementation",
]
