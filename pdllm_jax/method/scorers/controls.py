"""Controls: scorers that read neither document nor question."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class FirstScorer(Scorer):
    """Prefers early chunks."""

    name: ClassVar[str] = "first"
    reads_document: ClassVar[bool] = False

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns -i for chunk i."""
        batch, n = request.wanted.shape
        return jnp.broadcast_to(-jnp.arange(n, dtype=jnp.float32), (batch, n))


@dataclasses.dataclass(frozen=True)
class AllScorer(FirstScorer):
    """Keeps every chunk, regardless of `top_k`."""

    name: ClassVar[str] = "all"


@dataclasses.dataclass(frozen=True)
class LastScorer(FirstScorer):
    """Prefers late chunks."""

    name: ClassVar[str] = "last"

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns i for chunk i."""
        return -super().scores(model, cache, request)


@dataclasses.dataclass(frozen=True)
class RandomScorer(FirstScorer):
    """Prefers chunks at random, by the request's key."""

    name: ClassVar[str] = "random"

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns uniform numbers, which depend on key and chunk alone.

        Raises:
          ValueError: the request has no key.
        """
        if request.keys is None:
            raise ValueError("scorer 'random' needs a key")
        batch, n = request.wanted.shape

        def draw(key: Array) -> Array:
            return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.arange(n))

        return jax.vmap(draw)(jnp.broadcast_to(request.keys, (batch,)))


@dataclasses.dataclass(frozen=True)
class OracleScorer(FirstScorer):
    """Keeps the chunks that the caller names."""

    name: ClassVar[str] = "oracle"

    def scores(
        self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
    ) -> Float[Array, "B N"]:
        """Returns 0 for the named chunks and -inf for all others.

        Raises:
          ValueError: no ids are given.
        """
        if request.oracle is None:
            raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
        chunk, ids = jnp.arange(request.wanted.shape[1]), jnp.asarray(request.oracle)
        return jnp.where((chunk[:, None] == ids[:, None]).any(axis=-1), 0.0, -jnp.inf)
