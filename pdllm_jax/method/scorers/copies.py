"""Scorers by masked copies of the query that go through the network behind a chunk.

R copies of the query and its tail (a draft, or the response so far), copy r with the scored slots s
with s % R == r masked. They attend to prefix, chunk and themselves, all copies at the same
positions, and no chunk row attends to them. So one pass over a document yields chunk KV that does
not depend on the question, together with the pseudo-log-likelihood of every scored slot. A later
question costs its own rows against that KV. R = number of slots is exactly leave-one-out.

With a logit shift the row in front of a slot predicts it. For the query's first token this is the
chunk's last row: one more row in front of the copies computes it again. On such a model "causal"
needs no masks: it has one copy, in which a row attends to itself and the rows before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels import merge
from pdllm_jax.method.cache import ChunkCache, dynamic_updates
from pdllm_jax.method.live_forward import predicting_rows
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.method.scorers.base import (
    Draft,
    QueryCopies,
    Question,
    Scorer,
    ScoreRequest,
    Scores,
)
from pdllm_jax.method.scorers.prefix import prefix_attention
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import chunk_attention, whole_groups
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import SIZE, require, validate

Carry = TypeVar("Carry")


def for_groups(
    wanted: Bool[Array, "P"],
    group: int,
    body: Callable[[Int[Array, "g"], Bool[Array, "g"], Carry], Carry],
    carry: Carry,
) -> Carry:
    """Runs body(indices, valid, carry) for groups of the wanted indices, ascending.

    The last group may also hold indices that are not wanted, and places that are not valid.
    """
    indices, valid, steps = in_groups(wanted, group)
    return lax.fori_loop(0, steps, lambda i, carry: body(indices[i], valid[i], carry), carry)


def in_groups(
    wanted: Bool[Array, "P"], group: int
) -> tuple[Int[Array, "n g"], Bool[Array, "n g"], Int[Array, ""]]:
    """Returns indices and valid of the groups of `for_groups`, and how many groups have wanted."""
    at = jnp.arange(-(-wanted.size // group) * group).reshape(-1, group)
    order = jnp.argsort(~wanted, stable=True)[jnp.minimum(at, wanted.size - 1)]
    return order, at < wanted.size, -(-jnp.count_nonzero(wanted) // group)


def make_copies(
    model: MaskPredictor,
    rows: Question,
    scored: Bool[Array, "B T"],
    most: int,
    copies: int | None,
    *,
    causal: bool = False,
) -> QueryCopies:
    """Returns R = `copies` copies of the rows, in which every scored row is masked once.

    scored: at most `most` rows of a request. copies: None for `most`. causal: one copy, no masks.
    """
    copies = most if copies is None else copies
    ids, lead = rows.query[:, None], model.lookback
    if not causal:
        slot = jnp.where(scored, jnp.cumsum(scored, axis=1) - 1, -1)[:, None]
        masked = scored[:, None] & (slot % copies == jnp.arange(copies)[:, None])
        ids = jnp.where(masked, model.config.mask_token_id, ids)
    row = jnp.argsort(~scored, axis=1, stable=True)[:, :most]
    token = jnp.take_along_axis(rows.query, row, axis=1)
    read = jnp.broadcast_to(jnp.arange(most), row.shape)
    valid = read < scored.sum(axis=1)[:, None]
    # Of the sequence of lead row and copy: row 0 is the same in front of every copy.
    at = model.predicting_row(lead + row)
    at = jnp.where(at < lead, at, read % copies * ids.shape[2] + at)
    return QueryCopies(ids, rows.query_length, at, token, valid, lead, causal)


class CopyScorer(Scorer):
    """Base of scorers whose `query_copies` are scored behind every chunk."""

    in_pass: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = True

    def scores(self, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest) -> Scores:
        """Returns the mean log-probability of the scored rows, from the KV of every chunk.

        Chunks that are not wanted cost nothing and get 0.
        """
        copies, pool, wanted = self.query_copies(model, request), cache.pool, request.wanted
        assert copies is not None
        assert pool is not None
        (batch, n), chunk_size = wanted.shape, cache.tokens.shape[-1]
        # As many rows at once as an encoding pass has.
        group = min(batch * n, max(1, request.encode_batch * chunk_size // copies.rows))
        group, document = whole_groups(model.mesh, group), cache.document_of(batch)
        places = cache.places(jnp.where(wanted, jnp.arange(n), -1)).reshape(-1)
        path = request.implementation
        to_chunk = functools.partial(chunk_attention, model.mesh, implementation=path)

        def score_group(pair: Array, valid: Array, scores: Array) -> Array:
            chunk = jnp.where(valid, places[pair], -1)
            of_group, at = copies.of(pair // n), (document[pair // n], pair % n)
            ids, offset = of_group.behind(cache.tokens[at], cache.lengths[at])
            by = rotation(model.config, offset)
            to_prefix = prefix_attention(model, cache, at[0], offset)

            def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
                turned, turned_k = rotate(q, by), rotate(k, by)
                place = chunk[:, None], pool.lengths
                seen = to_chunk(turned, pool.k, pool.v, *place, layer=layer)
                seen = merge(*to_prefix(layer, q), seen)
                return of_group.attend(model.mesh, seen, turned, turned_k, v), None

            x, _ = model.run(ids, attend, None)
            # Rows of the last group beyond the end are dropped.
            target = jnp.where(chunk >= 0, pair, batch * n)
            return scores.at[target].set(of_group.read(model, x), mode="drop")

        zeros = jnp.zeros((batch * n,), jnp.float32)
        return for_groups(places >= 0, group, score_group, zeros).reshape(batch, n)


@dataclasses.dataclass(frozen=True)
class QueryScorer(CopyScorer):
    """Self-information of the query given the chunk.

    masked_copies: R, copies of the query; copy r has the slots s with s % R == r masked. None is
      leave-one-out, a copy for every scored slot.
    """

    name: ClassVar[str] = "query"

    masked_copies: int | None = 4

    def __post_init__(self) -> None:
        validate(self, {"masked_copies": SIZE})

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns copies in which the query alone is scored, the response behind it visible."""
        question = request.question
        rows, scored = question.with_tail(request.response or masks(model, question, 0))
        return make_copies(model, rows, scored, question.query.shape[1], self.masked_copies)


@dataclasses.dataclass(frozen=True)
class Drafting(CopyScorer):
    """Base of scorers of query and draft, or of query and the response so far.

    draft_length: masks behind prefix and query, d. draft_steps: how many of them are denoised.
    """

    draft_length: int = 4
    draft_steps: int = 2

    def __post_init__(self) -> None:
        validate(self, dict.fromkeys(("draft_length", "draft_steps"), SIZE))
        require(
            self.draft_steps <= self.draft_length,
            f"draft_steps must be at most draft_length {self.draft_length}, got {self.draft_steps}",
        )

    def draft(self, model: MaskPredictor, question: Question) -> Draft | None:
        """Returns guesses of the response's first tokens, from prefix and query alone.

        Denoises `draft_steps` of d masks: slot 0, then the most confident of those still masked.
        """
        d, start = self.draft_length, question.prefix_length + question.query_length
        # Each part overwrites the padding of the one before it.
        rows = jnp.pad(question.prefix, ((0, 0), (0, question.query.shape[1] + d)))
        rows = dynamic_updates(rows, question.prefix_length, question.query)

        def step(i: Array, draft: Draft) -> Draft:
            hidden = model.encode(dynamic_updates(rows, start, draft.tokens), start + d)
            logits = model.logits(predicting_rows(model, hidden, start, d))
            guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            confidence = jnp.where(draft.confirmed, -jnp.inf, log_probability(logits, guess))
            slot = jnp.where(i == 0, 0, jnp.argmax(confidence, axis=-1))
            chosen = jnp.arange(d) == slot[:, None]
            return Draft(jnp.where(chosen, guess, draft.tokens), draft.confirmed | chosen)

        return lax.fori_loop(0, self.draft_steps, step, masks(model, question, d))

    def drafted(
        self, model: MaskPredictor, request: ScoreRequest, copies: int | None, **options: bool
    ) -> QueryCopies:
        """Returns `make_copies` in which query and draft, or the response so far, are scored."""
        question = request.question
        tail = request.response or request.draft or self.draft(model, question)
        assert tail is not None
        rows, in_query = question.with_tail(tail)
        scored = dynamic_updates(in_query, question.query_length, tail.confirmed)
        most = rows.query.shape[1]
        if request.response is None:
            most = min(question.query.shape[1] + self.draft_steps, most)
        return make_copies(model, rows, scored, most, copies, **options)


@dataclasses.dataclass(frozen=True)
class DraftScorer(Drafting):
    """Self-information of query and draft given the chunk.

    masked_copies: as of `QueryScorer`.
    """

    name: ClassVar[str] = "draft"

    masked_copies: int | None = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, {"masked_copies": SIZE})

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns copies in which the query and the draft, or the response so far, are scored."""
        return self.drafted(model, request, self.masked_copies)


@dataclasses.dataclass(frozen=True)
class CausalScorer(Drafting):
    """Log-probability of query and draft given the chunk, in one pass under a causal mask.

    Each token is predicted from prefix, chunk and the tokens in front of it, as by the
    autoregressive model that a model with a logit shift was adapted from.
    """

    name: ClassVar[str] = "causal"

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for a model without a logit shift."""
        needs = f"scorer {self.name!r} needs a model with a logit shift"
        require(config.logit_shift, f"{needs}, got the family {config.family!r}; use 'draft'")

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns one copy without masks in place of tokens, whose rows see what is before them."""
        self.check(model.config)
        return self.drafted(model, request, 1, causal=True)


@dataclasses.dataclass(frozen=True)
class ConfidenceScorer(CopyScorer):
    """Mean log-probability of the likeliest token in each mask behind the query.

    draft_length: masks behind the query.
    """

    name: ClassVar[str] = "confidence"

    draft_length: int = 4

    def __post_init__(self) -> None:
        validate(self, {"draft_length": SIZE})

    def query_copies(self, model: MaskPredictor, request: ScoreRequest) -> QueryCopies:
        """Returns one copy with its masks scored; of a response, the masks of the current block."""
        question, response = request.question, request.response
        tail = response or masks(model, question, self.draft_length)
        open_slots = ~tail.confirmed if response is None else ~tail.confirmed & response.in_block
        rows, in_query = question.with_tail(tail)
        scored = dynamic_updates(jnp.zeros_like(in_query), question.query_length, open_slots)
        copies = make_copies(model, rows, scored, open_slots.shape[1], 1)
        return dataclasses.replace(copies, read_token=None)


def masks(model: MaskPredictor, question: Question, d: int) -> Draft:
    """Returns a draft of d masks."""
    tokens = jnp.full((question.query.shape[0], d), model.config.mask_token_id, jnp.int32)
    return Draft(tokens, jnp.zeros(tokens.shape, bool))
