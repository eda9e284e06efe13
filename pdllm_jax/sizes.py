"""Shapes of an answer, and bytes of arrays on one device; `footprint.py` adds them up."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dense import BLOCK_SCORES, DenseImplementation
from pdllm_jax.cache import ChunkCache
from pdllm_jax.chunking import ChunkedPrompt
from pdllm_jax.config import ModelConfig


class Shapes(NamedTuple):
    """What is padded how far; the prompt's arrays have an axis of `batch` requests, if not None.

    chunks: places of chunks a document; 0: no document, the query is the whole prompt.
    pooled: one document's KV is held already, and `batch` questions are asked about it.
    """

    batch: int | None
    prefix: int
    query: int
    chunks: int
    chunk_size: int
    pooled: bool = False

    @property
    def requests(self) -> int:
        return 1 if self.batch is None else self.batch

    @classmethod
    def of(cls, prompt: ChunkedPrompt, cache: ChunkCache | None = None) -> Shapes:
        """Those of a prompt, or of questions about the document of a cache."""
        chunks = prompt.chunks if cache is None else cache.tokens
        return cls(
            batch=prompt.query.shape[0] if prompt.query.ndim == 2 else None,
            prefix=prompt.prefix.shape[-1],
            query=prompt.query.shape[-1],
            chunks=chunks.shape[-2],
            chunk_size=prompt.chunk_size,
            pooled=cache is not None,
        )


class Sizes:
    """Bytes of arrays and sets of them, of one device of a mesh."""

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, attention: DenseImplementation, tensor: int
    ):
        self.config, self.attention, self.tensor = config, attention, tensor
        self.gpu = attention == "cudnn" or jax.default_backend() == "gpu"
        self.itemsize = jnp.dtype(dtype).itemsize
        self.kv_size = config.n_kv_heads * config.head_dim // tensor

    def weights(self) -> int:
        """As `LLaDA` holds them; norms on every device."""
        c = self.config
        kv = c.n_kv_heads * c.head_dim
        matrices = 2 * c.d_model**2 + 2 * c.d_model * kv + 3 * c.d_model * c.mlp_hidden_size
        tables = (1 if c.weight_tying else 2) * c.embedding_size * c.d_model
        norms = (2 * c.n_layers + 1) * c.d_model
        return self.itemsize * ((c.n_layers * matrices + tables) // self.tensor + norms)

    def kv(self, rows: int) -> int:
        """Keys and values of rows, in all layers."""
        return 2 * self.config.n_layers * rows * self.kv_size * self.itemsize

    def layer(self, rows: int, merging: bool = False) -> int:
        """The widest moment of one layer. merging: its rows' KV with what the live cache holds."""
        c = self.config
        heads = c.d_model // self.tensor
        mlp = 2 * c.d_model + 2 * c.mlp_hidden_size // self.tensor
        attention = c.d_model + 4 * heads + 2 * self.kv_size
        if merging:
            attention = c.d_model + 2 * heads + 8 * self.kv_size
        return rows * max(mlp, attention) * self.itemsize

    def stream(self, rows: int) -> int:
        """The residual stream."""
        return rows * self.config.d_model * self.itemsize

    def scores(self, batch: int, rows: int, keys: int) -> int:
        """Of the portable attention: one block of query rows, float32 scores and weights."""
        if self.attention == "cudnn":
            return 0
        heads = self.config.n_heads // self.tensor
        size = max(16, BLOCK_SCORES // (batch * heads * keys))
        return 2 * 4 * batch * heads * min(rows, size) * keys

    def logits(self, rows: int) -> int:
        """Logits of rows, float32: a device's share and, gathered, all of them."""
        whole = 4 * rows * self.config.embedding_size
        return whole if self.tensor == 1 else whole + whole // self.tensor
