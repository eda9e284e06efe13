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
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import attention, constrain
from pdllm_jax.network.transformer import MaskPredictor

Scores = Float[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """d tokens behind the query: guesses where `confirmed`, mask tokens elsewhere."""

    tokens: Int[Array, "B d"]
    confirmed: Bool[Array, "B d"]


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryCopies:
    """Copies of query and tail that go through the network behind a chunk; see `copies.py`.

    ids [B, R, T]; length [B]: valid rows of a copy.
    read_row, read_valid [B, S]: rows behind the chunk that predict the scored tokens; read_token
      [B, S]: the token whose probability is the score, None for the likeliest one.
    lead: rows in front of the copies, `MaskPredictor.lookback`. The chunk's last row goes through
      the network again and predicts the query's first token. No copy attends to it.
    causal: a row of a copy attends to the copy's rows up to itself, not to all of them.
    """

    ids: Int[Array, "B R T"]
    length: Int[Array, "B"]
    read_row: Int[Array, "B S"]
    read_token: Int[Array, "B S"] | None
    read_valid: Bool[Array, "B S"]
    lead: int = dataclasses.field(default=0, metadata={"static": True})
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rows(self) -> int:
        """Rows that go behind a chunk."""
        return self.lead + self.ids.shape[1] * self.ids.shape[2]

    def of(self, request: Int[Array, "g"]) -> QueryCopies:
        """Returns the copies of some requests."""
        return jax.tree.map(lambda x: x[request], self)

    def behind(
        self, chunk: Int[Array, "B C"], length: Int[Array, "B"]
    ) -> tuple[Int[Array, "B rows"], Int[Array, "*B rows"]]:
        """Returns the rows' tokens and their positions from the chunk's first row on.

        chunk, length: the chunk of each request, and its valid rows.
        """
        batch, copies, t = self.ids.shape
        ids, offset = self.ids.reshape(batch, -1), chunk.shape[1] + jnp.tile(jnp.arange(t), copies)
        if not self.lead:
            return ids, offset
        last = jnp.maximum(length - 1, 0)[:, None]
        ids = jnp.concatenate([jnp.take_along_axis(chunk, last, axis=1), ids], axis=1)
        return ids, jnp.concatenate([last, jnp.broadcast_to(offset, (batch, offset.size))], axis=1)

    def attend(self, mesh: Mesh | None, seen: Partial, q: Array, k: Array, v: Array) -> Array:
        """Returns attention of the rows [B, rows, H, D]: `seen`, merged with the copy itself."""
        batch, copies, t = self.ids.shape

        def split(x: Array) -> Array:
            return x[:, self.lead :].reshape(batch * copies, t, *x.shape[2:])

        # A causal row sees no padding, which lies behind it.
        lengths = None if self.causal else jnp.repeat(self.length, copies)
        own = split(q), split(k), split(v), lengths
        itself = attention(mesh, *own, need_lse=True, causal=self.causal)
        lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
        out = merge(Partial(split(seen.out), lse), itself).out.reshape(batch, -1, *q.shape[2:])
        return jnp.concatenate([seen.out[:, : self.lead], out], axis=1) if self.lead else out

    def read(self, model: MaskPredictor, x: Float[Array, "B rows M"]) -> Float[Array, "B"]:
        """Returns the mean log-probability of the scored tokens.

        Only the rows that predict them reach the LM head.
        """
        index = jnp.arange(len(x))[:, None], self.read_row
        logits = model.logits(model.final_norm(x[index]))
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

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for a model that the scorer cannot score with."""
        return None

    def calibrated(self, checkpoint: Path) -> Scorer:
        """Returns the scorer with what a calibration has saved in a checkpoint's folder, if any.

        Called wherever a model is read from a folder together with settings.
        """
        return self

    def draft(self, model: MaskPredictor, question: Question) -> Draft | None:
        """Returns a draft of the response, computed before the pass; None where none is needed."""
        return None

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies | None:
        """Returns the rows that go behind every chunk; None where `in_pass` is false."""
        return None

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns a score for each chunk, float32; higher is better."""
        ...
