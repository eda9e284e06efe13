"""The scorer "chunk-draft": every chunk drafts a response of its own, which is scored after it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pdllm_jax.method.cache import ChunkCache, init_live
from pdllm_jax.method.encodings.base import EncodeRequest
from pdllm_jax.method.encodings.joint import encode_rows
from pdllm_jax.method.live_forward import QueryRows, predicting_rows
from pdllm_jax.method.sampling import log_probability, rank
from pdllm_jax.method.scorers.base import Draft, Question, ScoreRequest, Scores
from pdllm_jax.method.scorers.copies import CausalScorer, for_groups, masks
from pdllm_jax.network.sharding import whole_groups
from pdllm_jax.network.transformer import MaskPredictor


@dataclasses.dataclass(frozen=True)
class ChunkDraftScorer(CausalScorer):
    """Log-probability of the query and of the chunk's own draft, under a causal mask.

    Each chunk goes through the network with prefix, query and `draft_length` masks in full
    attention, the query behind the chunk's full slot. The chunk's draft comes from the logits of
    this pass. Query and draft are then scored as by `CausalScorer`, against the KV that prefix and
    chunk have in this pass.

    This is the authors' run with the highest score. They leave open how many tokens of the draft
    are filled in, whether the network runs again between them, and what re-selection does. Here
    `draft_steps` tokens are filled in, all from one pass: slot 0, then the most confident ones.
    Re-selection scores the response in place of a draft; its pass has a mask for each slot of the
    response. The query's first token is predicted by the chunk's last row, computed again with
    attention to prefix and chunk alone. The KV has seen the query, so it serves no other question.
    None of it is kept: the document can be streamed.
    """

    name: ClassVar[str] = "chunk-draft"
    in_pass: ClassVar[bool] = False
    needs_pool: ClassVar[bool] = False

    def draft(self, model: MaskPredictor, question: Question) -> Draft | None:
        """Returns None: a draft needs its chunk."""
        return None

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns the mean log-probabilities; `encode_batch` chunks go through together."""
        self.check(model.config)
        (batch, n), document = request.wanted.shape, cache.document_of(len(request.wanted))
        group = whole_groups(model.mesh, min(request.encode_batch, batch * n))

        def score_group(pair: Array, valid: Array, scores: Array) -> Array:
            at = document[pair // n], pair % n
            question, response = jax.tree.map(
                lambda x: x[pair // n], (request.question, request.response)
            )
            tokens, lengths = cache.tokens[at][:, None], cache.lengths[at][:, None]
            prefix = question.prefix, question.prefix_length
            chunks = ChunkCache(None, tokens, lengths, *prefix, None, None, anchors=cache.anchors)
            of_group = request._replace(
                question=question, wanted=lengths > 0, draft=None, response=response
            )
            encoded, draft = self._encode(model, chunks, of_group)
            of_group = of_group._replace(draft=draft)
            values = super(ChunkDraftScorer, self).scores(model, encoded, of_group)[:, 0]
            return scores.at[jnp.where(valid, pair, batch * n)].set(values, mode="drop")

        zeros = jnp.zeros((batch * n,), jnp.float32)
        wanted = request.wanted.reshape(-1)
        return for_groups(wanted, group, score_group, zeros).reshape(batch, n)

    def _encode(
        self, model: MaskPredictor, chunks: ChunkCache, request: ScoreRequest
    ) -> tuple[ChunkCache, Draft]:
        """Returns the KV of documents of one chunk that have seen the question, and their drafts.

        chunks: a document for each request, without KV.
        """
        question, response = request.question, request.response
        prefix_rows = chunks.prefix_ids.shape[1]
        slots = self.draft_length if response is None else response.tokens.shape[1]
        open_slots = masks(model, question, slots)
        rows, _ = question.with_tail(open_slots)
        selected = jnp.zeros(chunks.lengths.shape, jnp.int32)
        total = question.prefix_length + rows.query_length
        placement = chunks.place(selected, question.prefix_length, total, "continuous")
        count = prefix_rows + rows.query.shape[1]
        live = init_live(model.config, len(selected), count, model.dtype, model.mesh)
        of_query = QueryRows(question.query, question.query_length, rows.query)
        encode = EncodeRequest(selected, placement, of_query, live, request.implementation)
        encoded, x, joint = encode_rows(model, chunks, encode, rows.query)
        chunks = dataclasses.replace(chunks, pool=encoded.pool)
        if prefix_rows:
            assert encoded.live is not None
            k, v = (jnp.stack(kv)[:, :, :prefix_rows] for kv in (encoded.live.k, encoded.live.v))
            chunks = dataclasses.replace(chunks, prefix_k=k, prefix_v=v)
        if response is not None:
            return chunks, open_slots
        hidden = predicting_rows(model, x, joint.own_start + question.query_length, slots)
        logits = model.logits(model.final_norm(hidden))
        guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = log_probability(logits, guess).at[:, 0].set(jnp.inf)
        chosen = rank(confidence) < self.draft_steps
        return chunks, Draft(jnp.where(chosen, guess, open_slots.tokens), chosen)
