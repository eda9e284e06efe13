"""Attention over chosen chunks of a KV pool, products of few rows, and their sums over devices.

This package does not depend on the model or the method.
"""

from pallas_kernels.all_reduce.api import (
    AllReduceImplementation,
    Norm,
    all_reduce,
    resolve_all_reduce,
)
from pallas_kernels.all_reduce.peer_memory import peer_problem, peer_table
from pallas_kernels.chunk_attention.api import (
    ChunkAttention,
    ChunkMass,
    Implementation,
    chunk_attention,
    chunk_attention_mass,
    implementation_name,
    require_device,
    resolve_implementation,
)
from pallas_kernels.chunk_attention.dense import attention
from pallas_kernels.common import EMPTY_LSE, OwnKV, Partial, merge
from pallas_kernels.matmul.api import add_product, matmul, matmul_xla, resolve_matmul
from pallas_kernels.scaled import EightBits, Scaled, quantise, restored

__all__ = [
    "EMPTY_LSE",
    "AllReduceImplementation",
    "ChunkAttention",
    "ChunkMass",
    "EightBits",
    "Implementation",
    "Norm",
    "OwnKV",
    "Partial",
    "Scaled",
    "add_product",
    "all_reduce",
    "attention",
    "chunk_attention",
    "chunk_attention_mass",
    "implementation_name",
    "matmul",
    "matmul_xla",
    "merge",
    "peer_problem",
    "peer_table",
    "quantise",
    "require_device",
    "resolve_all_reduce",
    "resolve_implementation",
    "resolve_matmul",
    "restored",
]
