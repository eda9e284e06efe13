"""The scorer "bm25": which words of the question a chunk has, by token ids alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.scorers.base import Scorer, ScoreRequest, Scores
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import AT_LEAST_0, UNIT, validate


@dataclasses.dataclass(frozen=True)
class BM25Scorer(Scorer):
    """Okapi BM25 of token ids, the chunks of the document as the collection.

      score_i = sum over the query's tokens w, each occurrence, of
                idf(w) tf(w, i) (k1 + 1) / (tf(w, i) + k1 (1 - b + b length_i / mean length))
      idf(w)  = ln(1 + (n - df(w) + 0.5) / (df(w) + 0.5))

    tf: occurrences of w in chunk i; df: chunks that have w, of n chunks. Anchors, padding and mask
    tokens are not words and do not count in a length. In re-selection the response's unmasked
    tokens are words of the query too. Source: Robertson and Zaragoza, The Probabilistic Relevance
    Framework: BM25 and Beyond (2009), equation 3.15; 1 is added in the logarithm, as Lucene does,
    so that no idf is negative.

    k1: from which number of occurrences on more of them add little. b: weight of the length.
    """

    name: ClassVar[str] = "bm25"

    k1: float = 1.2
    b: float = 0.75

    def __post_init__(self) -> None:
        validate(self, {"k1": AT_LEAST_0, "b": UNIT}, "bm25_")

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns the scores in nats, at least 0."""
        question, response, mask = request.question, request.response, model.config.mask_token_id
        asked = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
        if response is not None:
            start = question.query_length
            question, asked = question.with_tail(response)
            asked = dynamic_updates(asked, start, response.confirmed)
        row = jnp.arange(cache.tokens.shape[-1])
        is_word = (row >= int(cache.anchors)) & (row < cache.lengths[..., None])
        words = jnp.where(is_word & (cache.tokens != mask), cache.tokens, -1)  # [Z, N, C]
        count = jnp.count_nonzero(cache.lengths, axis=1)[:, None]  # [Z, 1]
        length = jnp.count_nonzero(words >= 0, axis=2)  # [Z, N]
        mean = jnp.maximum(length.sum(axis=1, keepdims=True), 1) / jnp.maximum(count, 1)
        asked &= question.query != mask
        terms = jnp.where(asked, question.query, -2)
        tf = (terms[:, None, :, None] == words[:, :, None]).sum(axis=3)  # [B, N, T]
        df = jnp.count_nonzero(tf, axis=1)  # [B, T]
        idf = jnp.log1p((count - df + 0.5) / (df + 0.5))
        scale = self.k1 * (1 - self.b + self.b * length / mean)
        saturated = tf * (self.k1 + 1) / jnp.maximum(tf + scale[..., None], 1e-30)
        return row_sum(idf[:, None] * saturated)
