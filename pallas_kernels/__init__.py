"""Attention over chosen chunks of a KV pool, and products of few rows. Knows nothing of the model
or the method.
"""

from pallas_kernels.api import (
    ChunkAttention,
    ChunkMass,
    Implementation,
    NamedImplementation,
    chunk_attention,
    chunk_attention_mass,
    implementation_name,
    require_device,
    resolve_implementation,
)
from pallas_kernels.dense import attention
from pallas_kernels.matmul import matmul, resolve_matmul
from pallas_kernels.partial import EMPTY_LSE, Near, Partial, merge

__all__ = [
    "EMPTY_LSE",
    "ChunkAttention",
    "ChunkMass",
    "Implementation",
    "NamedImplementation",
    "Near",
    "Partial",
    "attention",
    "chunk_attention",
    "chunk_attention_mass",
    "implementation_name",
    "matmul",
    "merge",
    "require_device",
    "resolve_implementation",
    "resolve_matmul",
]
