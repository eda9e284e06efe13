"""Independent encoding: prefix and the chunk alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.encodings.base import Encoding
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class Independent(Encoding):
    """The KV of the pass over the document, as it is."""

    name: ClassVar[str] = "independent"
    needs_pool: ClassVar[bool] = True

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        state: DenoiseState,
        implementation: Implementation | None,
    ) -> DenoiseState:
        """Returns the state: its chunks are in the cache's pool."""
        return state
