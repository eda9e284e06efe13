"""Attention over chosen chunks of a KV pool, products of few rows and sums of them over devices.
Knows nothing of the model or the method.
"""

from pallas_kernels.all_reduce.api import Norm, SumImplementation, device_sum, resolve_sum
from pallas_kernels.all_reduce.peer_memory import exchange_problem, exchange_table
from pallas_kernels.chunk_attention.api import (
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
from pallas_kernels.chunk_attention.dense import attention
from pallas_kernels.common import EMPTY_LSE, OwnKV, Partial, merge
from pallas_kernels.matmul.api import matmul, resolve_matmul

__all__ = [
    "EMPTY_LSE",
    "ChunkAttention",
    "ChunkMass",
    "Implementation",
    "NamedImplementation",
    "Norm",
    "OwnKV",
    "Partial",
    "SumImplementation",
    "attention",
    "chunk_attention",
    "chunk_attention_mass",
    "device_sum",
    "exchange_problem",
    "exchange_table",
    "implementation_name",
    "matmul",
    "merge",
    "require_device",
    "resolve_implementation",
    "resolve_matmul",
    "resolve_sum",
]
