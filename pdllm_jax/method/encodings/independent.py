"""Independent encoding: prefix and the chunk alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class Independent(Encoding):
    """The KV of the pass over the document, unchanged."""

    name: ClassVar[str] = "independent"
    needs_pool: ClassVar[bool] = True

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        request: EncodeRequest,
        implementation: Implementation | None,
    ) -> Encoded:
        """Returns no pool: the chunks are in the cache's pool."""
        return Encoded(None, request.live)
