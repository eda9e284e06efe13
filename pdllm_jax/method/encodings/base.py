"""The extension point of step 4, and the encoding that changes nothing.

An encoding is a frozen dataclass, because it is a static argument of jitted functions.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, ChunkPool, KVFormat, LiveCache, Placement
from pdllm_jax.method.live_forward import QueryRows
from pdllm_jax.network.transformer import MaskPredictor


class EncodeRequest(NamedTuple):
    """What an encoding starts from.

    selected: document ids of the chosen chunks, negative for an empty slot.
    placement: where they lie in the cache's pool and in the prompt.
    rows: query and response.
    live: KV of the live rows, the prefix' written; None where no step reads it.
    implementation: of the attention over chunks, where the encoding has any.
    kv_format: of the KV that the encoding computes.
    """

    selected: Int[Array, "B K"]
    placement: Placement
    rows: QueryRows
    live: LiveCache | None
    implementation: Implementation | None = None
    kv_format: KVFormat = "full"


class Encoded(NamedTuple):
    """What an encoding computes.

    pool: KV of the chosen chunks, slot j of request b at b K + j, keys rotated at chunk-local
      positions; None where the cache's pool serves.
    live: KV of the live rows.
    """

    pool: ChunkPool | None
    live: LiveCache | None


@runtime_checkable
class Encoding(Protocol):
    """How the KV of the chosen chunks is obtained.

    name: in results, messages and on the command line.
    needs_pool: `encode` starts from the document's KV in the cache.
    keeps_prefix: the prefix' KV comes from the cache; otherwise `encode` computes it.
    live_encoded: `encode` computes the KV of query and response too, so that it is not stale.
    """

    name: ClassVar[str]
    needs_pool: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True
    live_encoded: ClassVar[bool] = False

    def encode(self, model: MaskPredictor, cache: ChunkCache, request: EncodeRequest) -> Encoded:
        """Returns the KV of the chosen chunks and of the live rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Independent(Encoding):
    """Prefix and the chunk alone: the KV of the pass over the document, unchanged."""

    name: ClassVar[str] = "independent"
    needs_pool: ClassVar[bool] = True

    def encode(self, model: MaskPredictor, cache: ChunkCache, request: EncodeRequest) -> Encoded:
        """Returns no pool: the chunks are in the cache's pool."""
        return Encoded(None, request.live)


def slot_ids(selected: Int[Array, "B K"]) -> Int[Array, "B K"]:
    """Returns the places of chosen chunks in a pool of slots; -1 for an empty slot."""
    ids = jnp.arange(selected.size, dtype=jnp.int32).reshape(selected.shape)
    return jnp.where(selected >= 0, ids, -1)
