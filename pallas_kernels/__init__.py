"""Attention over chosen chunks of a KV pool, and products of few rows. Knows nothing of the model
or the method.
"""

from pallas_kernels.api import (
    ChunkMass,
    Implementation,
    chunk_attention,
    chunk_attention_mass,
    require_device,
    resolve_implementation,
)
from pallas_kernels.dense import attention
from pallas_kernels.matmul import matmul, resolve_matmul
from pallas_kernels.partial import EMPTY_LSE, Near, Partial, merge

__all__ = [
    "EMPTY_LSE",
    "ChunkMass",
    "Implementation",
    "Near",
    "Partial",
    "attention",
    "chunk_attention",
    "chunk_attention_mass",
    "matmul",
    "merge",
    "require_device",
    "resolve_implementation",
    "resolve_matmul",
]
