"""The extension point of step 4: what a chunk's KV is computed from.

An encoding is a frozen dataclass, for it is a static argument of jitted functions.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import Implementation
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.network.transformer import MaskPredictor


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

    def encode(
        self,
        model: MaskPredictor,
        cache: ChunkCache,
        state: DenoiseState,
        implementation: Implementation | None,
    ) -> DenoiseState:
        """Returns the state, whose chunks are placed, with their KV.

        KV of the encoding's own goes into `state.pool`: slot j of request b at b K + j, keys
        rotated at chunk-local positions.
        """
        ...


def slot_ids(state: DenoiseState) -> Int[Array, "B K"]:
    """Returns the places of the slots in a pool of the state: slot j of request b at b K + j."""
    return jnp.arange(state.selected.size, dtype=jnp.int32).reshape(state.selected.shape)
