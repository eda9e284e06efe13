"""The extension point of step 2: what a scorer is given and what it returns.

A scorer is a frozen dataclass, because it is a static argument of jitted functions. A scorer
implements one of two methods:

  query_copies  rows that go through the network behind every chunk, in the pass that encodes the
                document, or later against the KV of that pass. `CopyScorer` is their base class.
  scores        a function of the document (its tokens, and its KV where `needs_pool`) and the
                question. Where it needs no KV it runs before the pass, so that the document can be
                streamed.

A scorer's extra pass goes through `model.run` with the attention that it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, constrain
from pdllm_jax.network.transformer import MaskPredictor

Scores = Float[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """d tokens behind the query: guesses where `confirmed`, mask tokens elsewhere."""

    tokens: Int[Array, "B d"]
    confirmed: Bool[Array, "B d"]


@dataclasses.dataclass(frozen=True)
class Response(Draft):
    """A response that is being denoised; in_block [B, G]: slots of the current block."""

    in_block: Bool[Array, "B G"]


class Question(NamedTuple):
    """Prefix and query of each request, padded behind their lengths."""

    prefix: Int[Array, "B P"]
    prefix_length: Int[Array, "B"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]

    def with_tail(self, tail: Draft) -> tuple[Question, Bool[Array, "B T"]]:
        """Returns the question with the tail behind its query, and which rows are the query's."""
        slots = tail.tokens.shape[1]
        rows = jnp.pad(self.query, ((0, 0), (0, slots)))
        in_query = jnp.arange(rows.shape[1]) < self.query_length[:, None]
        rows = dynamic_updates(rows, self.query_length, tail.tokens)
        return self._replace(query=rows, query_length=self.query_length + slots), in_query


class ScoreRequest(NamedTuple):
    """What scores depend on besides the document.

    wanted [B, N]: chunks to score; the scores of others are ignored.
    draft: from `draft_response`; None where the scorer computes it if needed.
    response: the response so far, None before the first step.
    keys: a PRNG key for each request [B], or one for all of them. oracle [B, M]: chunk ids.
    encode_batch: chunks that go through the network together.
    implementation: of attention over chunks.
    """

    question: Question
    wanted: Bool[Array, "B N"]
    draft: Draft | None = None
    response: Response | None = None
    keys: Array | None = None
    oracle: Int[Array, "B M"] | None = None
    encode_batch: int = 8
    implementation: Implementation | None = None


class QueryCopies(NamedTuple):
    """Copies of query and tail that go through the network behind a chunk; see `copies.py`.

    ids [B, R, T]; length [B]: valid rows of a copy.
    read_copy, read_row, read_valid [B, S]: the scored rows; read_token [B, S]: the token whose
      probability is the score, None for the likeliest one.
    """

    ids: Int[Array, "B R T"]
    length: Int[Array, "B"]
    read_copy: Int[Array, "B S"]
    read_row: Int[Array, "B S"]
    read_token: Int[Array, "B S"] | None
    read_valid: Bool[Array, "B S"]

    def of(self, request: Int[Array, "g"]) -> QueryCopies:
        """Returns the copies of some requests."""
        return jax.tree.map(lambda x: x[request], self)

    def attend(self, mesh: Mesh | None, seen: Partial, q: Array, k: Array, v: Array) -> Array:
        """Returns attention of copies' rows [B, R T, H, D]: `seen`, merged with the copy itself."""
        batch, copies, t = self.ids.shape

        def split(x: Array) -> Array:
            return x.reshape(batch * copies, t, *x.shape[2:])

        lengths = jnp.repeat(self.length, copies)
        itself = attention(mesh, split(q), split(k), split(v), lengths, need_lse=True)
        lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
        return merge(Partial(split(seen.out), lse), itself).out.reshape(q.shape)

    def read(self, model: MaskPredictor, x: Float[Array, "B T M"]) -> Float[Array, "B"]:
        """Returns the mean log-probability of the scored rows; only they reach the LM head."""
        index = jnp.arange(len(x))[:, None], self.read_copy, self.read_row
        logits = model.logits(model.final_norm(x.reshape(*self.ids.shape, -1)[index]))
        tokens = jnp.argmax(logits, axis=-1) if self.read_token is None else self.read_token
        likelihood = jnp.where(self.read_valid, log_probability(logits, tokens), 0.0)
        scores = row_sum(likelihood) / jnp.maximum(self.read_valid.sum(axis=-1), 1)
        return constrain(model.mesh, scores)


@runtime_checkable
class Scorer(Protocol):
    """How relevant each chunk is to the question.

    name: in results, messages and on the command line.
    in_pass: `query_copies` gives the scores in the pass that encodes the document.
    needs_pool: `scores` reads the KV of every chunk. Without `in_pass` all of it must be kept, and
      the document cannot be streamed.
    reads_document: the scores depend on document and question; re-selection requires it.
    """

    name: ClassVar[str]
    in_pass: ClassVar[bool] = False
    needs_pool: ClassVar[bool] = False
    reads_document: ClassVar[bool] = True

    def draft(self, model: MaskPredictor, question: Question) -> Draft | None:
        """Returns a draft of the response, computed before the pass; None where none is needed."""
        return None

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies | None:
        """Returns the rows that go behind every chunk; None where `in_pass` is false."""
        return None

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns a score for each chunk, float32; higher is better."""
        ...


def prefix_attention(
    model: MaskPredictor, cache: ChunkCache, document: Int[Array, "B"], offset: Int[Array, "T"]
) -> Callable[[int, Array], tuple[Partial, ...]]:
    """Returns a function (layer, unrotated queries) -> attention to the prefix; () without one.

    document: of each request. offset: positions of the rows behind the prefix.
    """
    k, v = cache.prefix_k, cache.prefix_v
    if k is None or v is None:
        return lambda layer, q: ()
    length = cache.prefix_length[document]
    by = rotation(model.config, length[:, None] + offset)

    def attend(layer: int, q: Array) -> tuple[Partial, ...]:
        kv = k[layer][document], v[layer][document]
        return (attention(model.mesh, rotate(q, by), *kv, length, need_lse=True),)

    return attend
