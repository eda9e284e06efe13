"""The rows that a chunk is scored by: drafting, masked copies, and what is read from them.

They ride behind a chunk: R copies of the query and what follows it (a draft, or the response so
far), copy r with the scored slots s % R == r masked. They attend to prefix, chunk and themselves,
all copies on the same positions, and no chunk row attends to them. So one pass over a document
yields chunk KV that no question has touched, with the pseudo-log-likelihood of every scored slot
(`prefill`); and a later question costs its own rows against that KV (`score_chunks`). R = number
of slots is exactly leave-one-out.

Inside, everything has an axis of requests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Partial, merge
from pallas_kernels.sums import row_sum
from pdllm_jax.config import SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.parallel import constrain
from pdllm_jax.rows import overlay, slices
from pdllm_jax.sampling import log_probability
from pdllm_jax.sharded import attention

# Scorers whose rows ride through the network behind every chunk.
RIDING = ("draft", "query", "confidence")


class Question(NamedTuple):
    """Prefix and query of each request: all that a question brings, padded behind its lengths."""

    prefix: Int[Array, "B P"]
    prefix_length: Int[Array, "B"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]


class HasQuestion(Protocol):
    """A `Question`, or a prompt that has one; with or without an axis of requests."""

    @property
    def prefix(self) -> Array: ...
    @property
    def prefix_length(self) -> Array: ...
    @property
    def query(self) -> Array: ...
    @property
    def query_length(self) -> Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """d tokens behind the query: guesses where `confirmed`, mask tokens elsewhere."""

    tokens: Int[Array, "*B d"]
    confirmed: Bool[Array, "*B d"]


def question_of(prompt: HasQuestion) -> Question:
    """Its question, with an axis of requests, if only of one."""
    found = Question(prompt.prefix, prompt.prefix_length, prompt.query, prompt.query_length)
    return found if prompt.query.ndim == 2 else jax.tree.map(lambda x: x[None], found)


@functools.partial(jax.jit, static_argnames=("config",))
def draft_response(model: LLaDA, prompt: HasQuestion, config: SelectionConfig) -> Draft:
    """Guesses the response's first tokens from prefix and query alone, `draft_steps` evaluations.

    Slot 0 first, then each time the most confident of the slots that are still masked.
    prompt: a `ChunkedPrompt` or a `Question`, of one request or a batch of them, [] or [B].
    Returns tokens [*B, d] int32, d being `draft_length`, and which of them are guesses, [*B, d].
    """
    draft = constrain(model.mesh, _draft(model, question_of(prompt), config))
    return draft if prompt.query.ndim == 2 else jax.tree.map(lambda x: x[0], draft)


def _draft(model: LLaDA, question: Question, config: SelectionConfig) -> Draft:
    d, batch = config.draft_length, question.query.shape[0]
    start = question.prefix_length + question.query_length
    # Each part overwrites the padding of the one before it.
    rows = jnp.pad(question.prefix, ((0, 0), (0, question.query.shape[1] + d)))
    rows = overlay(rows, question.prefix_length, question.query)

    def step(i: Array, draft: Draft) -> Draft:
        hidden = model.encode(overlay(rows, start, draft.tokens), start + d)
        logits = model.logits(slices(hidden, start, d))
        guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = jnp.where(draft.confirmed, -jnp.inf, log_probability(logits, guess))
        slot = jnp.where(i == 0, 0, jnp.argmax(confidence, axis=-1))
        chosen = jnp.arange(d) == slot[:, None]
        return Draft(jnp.where(chosen, guess, draft.tokens), draft.confirmed | chosen)

    return lax.fori_loop(0, config.draft_steps, step, _masks(model, batch, d))


def _masks(model: LLaDA, batch: int, d: int) -> Draft:
    """Nothing guessed yet."""
    tokens = jnp.full((batch, d), model.config.mask_token_id, jnp.int32)
    return Draft(tokens, jnp.zeros((batch, d), bool))


class Riders(NamedTuple):
    """Masked copies of query and what follows it, and where their scored slots are read."""

    ids: Int[Array, "B R T"]
    length: Int[Array, "B"]
    read_copy: Int[Array, "B S"]
    read_row: Int[Array, "B S"]
    read_token: Int[Array, "B S"] | None  # None: whatever is likeliest there
    read_valid: Bool[Array, "B S"]

    def of(self, request: Int[Array, "g"]) -> Riders:
        """Those of some requests."""
        return jax.tree.map(lambda x: x[request], self)


def make_riders(
    model: LLaDA, question: Question, config: SelectionConfig, draft: Draft | None
) -> Riders:
    """The rows that a scorer of RIDING sends through the network behind every chunk."""
    batch = question.query.shape[0]
    if config.scorer == "confidence":
        return riders_of(model, question, _masks(model, batch, config.draft_length), config, 0)
    if config.scorer == "query":
        return riders_of(model, question, _masks(model, batch, 0), config, 0)
    if draft is None:
        draft = _draft(model, question, config)
    elif draft.tokens.ndim == 1:
        draft = jax.tree.map(lambda x: x[None], draft)
    return riders_of(model, question, draft, config, min(config.draft_steps, draft.tokens.shape[1]))


def riders_of(
    model: LLaDA, question: Question, tail: Draft, config: SelectionConfig, most: int
) -> Riders:
    """The query with `tail` behind it, as the scorer reads them.

    "draft": every query token and every confirmed one of the tail (at most `most`) is scored;
    "query": query tokens alone, the tail is there to be seen; "confidence": the best token of every
    slot of the tail that is not confirmed, in one copy with nothing else masked.
    """
    mask_id, q_rows = model.config.mask_token_id, question.query.shape[1]
    d = tail.tokens.shape[1]
    confidence = config.scorer == "confidence"
    if config.scorer == "query":
        most = 0
    scored_rows = d if confidence else q_rows + most
    copies = config.masked_copies
    if confidence or copies is None:
        copies = 1 if confidence else scored_rows

    def one(query: Array, length: Array, tokens: Array, confirmed: Array) -> tuple[Array, ...]:
        row = jnp.arange(q_rows + d)
        place = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
        ids = place(jnp.pad(query, (0, d)), tokens, length)
        if confidence:
            ids_of_copy = ids[None]
            scored = place(jnp.zeros(q_rows + d, bool), ~confirmed, length)
        else:
            scored = row < length
            if most:
                scored |= place(jnp.zeros(q_rows + d, bool), confirmed, length)
            slot = jnp.where(scored, jnp.cumsum(scored) - 1, -1)
            masked = scored & (slot % copies == jnp.arange(copies)[:, None])
            ids_of_copy = jnp.where(masked, mask_id, ids)
        read_row = jnp.argsort(~scored, stable=True)[:scored_rows]
        read_slot = jnp.arange(scored_rows)
        return ids_of_copy, read_slot % copies, read_row, ids[read_row], read_slot < scored.sum()

    ids, copy, row, token, valid = jax.vmap(one)(
        question.query, question.query_length, tail.tokens, tail.confirmed
    )
    read_token = None if confidence else token
    return Riders(ids, question.query_length + d, copy, row, read_token, valid)


def read_scores(model: LLaDA, x: Float[Array, "g T M"], riders: Riders) -> Float[Array, "g"]:
    """Mean log-probability of the scored slots; only their rows reach the LM head."""
    group, n, t = riders.ids.shape
    each = jnp.arange(group)[:, None]
    x = x.reshape(group, n, t, -1)[each, riders.read_copy, riders.read_row]
    logits = model.logits(model.final_norm(x))
    tokens = jnp.argmax(logits, axis=-1) if riders.read_token is None else riders.read_token
    likelihood = jnp.where(riders.read_valid, log_probability(logits, tokens), 0.0)
    return row_sum(likelihood) / jnp.maximum(riders.read_valid.sum(axis=-1), 1)


def ride(mesh: Mesh | None, seen: Partial, q: Array, k: Array, v: Array, riders: Riders) -> Array:
    """Attention of riders [g, R T, H, D]: what they saw elsewhere, and each copy itself."""
    group, n, t = riders.ids.shape

    def split(x: Array) -> Array:
        return x.reshape(group * n, t, *x.shape[2:])

    lengths = jnp.repeat(riders.length, n)
    own = attention(mesh, split(q), split(k), split(v), lengths, need_lse=True)
    lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
    return merge(Partial(split(seen.out), lse), own).out.reshape(q.shape)
