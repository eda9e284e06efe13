"""Controls: scorers that read neither document nor question."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest, Scores
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive


@dataclasses.dataclass(frozen=True)
class FirstScorer(Scorer):
    """Prefers early chunks, and is the base of the other controls."""

    name: ClassVar[str] = "first"
    reads_document: ClassVar[bool] = False

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns `rank` for every request."""
        n = request.wanted.shape[1]
        return jnp.broadcast_to(self.rank(jnp.arange(n), request), request.wanted.shape)

    def rank(self, chunk: Array, request: ScoreRequest) -> Float[Array, "*B N"]:
        """Returns the scores of chunks 0..N-1, -i for chunk i."""
        return -chunk.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class AllScorer(FirstScorer):
    """Keeps every chunk, regardless of `top_k`."""

    name: ClassVar[str] = "all"


@dataclasses.dataclass(frozen=True)
class LastScorer(FirstScorer):
    """Prefers late chunks."""

    name: ClassVar[str] = "last"

    def rank(self, chunk: Array, request: ScoreRequest) -> Float[Array, "N"]:
        """Returns i for chunk i."""
        return chunk.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class RandomScorer(FirstScorer):
    """Prefers chunks at random; raises ValueError for a request without a key."""

    name: ClassVar[str] = "random"

    def rank(self, chunk: Array, request: ScoreRequest) -> Float[Array, "B N"]:
        """Returns uniform numbers, which depend on key and chunk alone."""
        if request.keys is None:
            raise ValueError("scorer 'random' needs a key")

        def draw(key: Array) -> Array:
            return jax.vmap(jax.random.uniform)(derive(key, Use.CHUNK, chunk))

        return jax.vmap(draw)(jnp.broadcast_to(request.keys, request.wanted.shape[:1]))


@dataclasses.dataclass(frozen=True)
class OracleScorer(FirstScorer):
    """Keeps the chunks that the caller names; raises ValueError for a request without ids."""

    name: ClassVar[str] = "oracle"

    def rank(self, chunk: Array, request: ScoreRequest) -> Float[Array, "B N"]:
        """Returns 0 for the named chunks and -inf for all others."""
        if request.oracle is None:
            raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
        ids = jnp.asarray(request.oracle)
        return jnp.where((chunk[:, None] == ids[:, None]).any(axis=-1), 0.0, -jnp.inf)
