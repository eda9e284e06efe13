"""Step 2: what a question is worth to every chunk. Drafting, the rows that are scored, the scores.

The scored rows ride behind a chunk: R copies of query and draft, copy r with the slots s with
s % R == r masked. They attend to prefix, chunk and themselves, all copies on the same positions,
and no chunk row attends to them. So one pass over a document yields chunk KV that no question has
touched, with the pseudo-log-likelihood of every scored slot (`prefill`); and a later question
costs its own rows against that KV (`score_chunks`). R = number of slots is exactly leave-one-out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, Partial, chunk_attention, chunk_attention_mass, merge
from pdllm_jax.attention import attention
from pdllm_jax.cache import ChunkCache
from pdllm_jax.config import SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.rope import rotate, rotation
from pdllm_jax.sampling import log_probability
from pdllm_jax.selection import control_scores

# Scorers that need no pass of the network, and those whose rows ride through one.
CONTROLS = ("all", "first", "last", "random", "oracle")
RIDING = ("draft", "query", "confidence")


class Question(NamedTuple):
    """Prefix and query: all that a question brings, padded behind its lengths."""

    prefix: Int[Array, "P"]
    prefix_length: Int[Array, ""]
    query: Int[Array, "Q"]
    query_length: Int[Array, ""]


class HasQuestion(Protocol):
    """A `Question`, or a prompt that has one."""

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

    tokens: Int[Array, "d"]
    confirmed: Bool[Array, "d"]


def place(rows: Array, start: Array, values: Array) -> Array:
    """values written over rows from a run-time start on."""
    return lax.dynamic_update_slice_in_dim(rows, values.astype(rows.dtype), start, axis=0)


@functools.partial(jax.jit, static_argnames=("config",))
def draft_response(model: LLaDA, prompt: HasQuestion, config: SelectionConfig) -> Draft:
    """Guesses the response's first tokens from prefix and query alone, `draft_steps` evaluations.

    Slot 0 first, then each time the most confident of the slots that are still masked.
    prompt: a `ChunkedPrompt` or a `Question`.
    """
    mask_id = model.config.mask_token_id
    p, q, d = prompt.prefix_length, prompt.query_length, config.draft_length
    # Each part overwrites the padding of the one before it.
    rows = jnp.zeros(prompt.prefix.shape[0] + prompt.query.shape[0] + d, jnp.int32)
    rows = place(place(rows, jnp.int32(0), prompt.prefix), p, prompt.query)

    def step(i: Array, draft: Draft) -> Draft:
        ids = place(rows, p + q, draft.tokens)
        hidden = model.encode(ids[None], (p + q + d)[None])[0]
        logits = model.logits(lax.dynamic_slice_in_dim(hidden, p + q, d))
        guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = jnp.where(draft.confirmed, -jnp.inf, log_probability(logits, guess))
        slot = jnp.where(i == 0, 0, jnp.argmax(confidence))
        return Draft(draft.tokens.at[slot].set(guess[slot]), draft.confirmed.at[slot].set(True))

    empty = Draft(jnp.full((d,), mask_id, jnp.int32), jnp.zeros((d,), bool))
    return lax.fori_loop(0, config.draft_steps, step, empty)


class Riders(NamedTuple):
    """Masked copies of query and draft, and where their scored slots are read."""

    ids: Int[Array, "R T"]
    length: Int[Array, ""]
    read_copy: Int[Array, "S"]
    read_row: Int[Array, "S"]
    read_token: Int[Array, "S"] | None  # None: whatever is likeliest there
    read_valid: Bool[Array, "S"]


def _next_block(prompt: HasQuestion, config: SelectionConfig, mask_id: int) -> Riders:
    """The query with the next block's masks behind it, which are read."""
    d = config.draft_length
    ids = jnp.zeros(prompt.query.shape[0] + d, jnp.int32)
    ids = place(place(ids, jnp.int32(0), prompt.query), prompt.query_length, jnp.full(d, mask_id))
    return Riders(
        ids=ids[None],
        length=prompt.query_length + d,
        read_copy=jnp.zeros(d, jnp.int32),
        read_row=prompt.query_length + jnp.arange(d),
        read_token=None,
        read_valid=jnp.ones(d, bool),
    )


def _masked_copies(
    prompt: HasQuestion, draft: Draft | None, config: SelectionConfig, mask_id: int
) -> Riders:
    q, q_rows = prompt.query_length, prompt.query.shape[0]
    if draft is None:
        draft = Draft(jnp.zeros((0,), jnp.int32), jnp.zeros((0,), bool))
    d = draft.tokens.shape[0]
    scored_rows = q_rows + (config.draft_steps if d else 0)
    copies = scored_rows if config.masked_copies is None else config.masked_copies
    row = jnp.arange(q_rows + d)
    ids = place(jnp.zeros(q_rows + d, jnp.int32), jnp.int32(0), prompt.query)
    ids = place(ids, q, draft.tokens)
    confirmed = place(jnp.zeros(q_rows + d, bool), q, draft.confirmed)
    scored = (row < q) | confirmed
    slot = jnp.where(scored, jnp.cumsum(scored) - 1, -1)
    masked = scored & (slot % copies == jnp.arange(copies)[:, None])
    read_row = jnp.argsort(~scored, stable=True)[:scored_rows]
    read_slot = jnp.arange(scored_rows)
    return Riders(
        ids=jnp.where(masked, mask_id, ids),
        length=q + d,
        read_copy=read_slot % copies,
        read_row=read_row,
        read_token=ids[read_row],
        read_valid=read_slot < scored.sum(),
    )


def read_scores(model: LLaDA, x: Float[Array, "g T M"], riders: Riders) -> Float[Array, "g"]:
    """Mean log-probability of the scored slots; only their rows reach the LM head."""
    n, t = riders.ids.shape
    x = x.reshape(x.shape[0], n, t, -1)[:, riders.read_copy, riders.read_row]
    logits = model.logits(model.final_norm(x))
    if riders.read_token is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = jnp.broadcast_to(riders.read_token, logits.shape[:-1])
    likelihood = jnp.where(riders.read_valid, log_probability(logits, tokens), 0.0)
    return likelihood.sum(axis=-1) / riders.read_valid.sum()


def make_riders(
    model: LLaDA, prompt: HasQuestion, config: SelectionConfig, draft: Draft | None
) -> Riders:
    """The rows that a scorer of RIDING sends through the network behind every chunk."""
    mask_id = model.config.mask_token_id
    if config.scorer == "confidence":
        return _next_block(prompt, config, mask_id)
    if config.scorer == "query":
        return _masked_copies(prompt, None, config, mask_id)
    draft = draft_response(model, prompt, config) if draft is None else draft
    return _masked_copies(prompt, draft, config, mask_id)


def ride(seen: Partial, q: Array, k: Array, v: Array, riders: Riders) -> Array:
    """Attention of riders [g, R T, H, D]: what they saw elsewhere, and each copy itself."""
    group, rows, heads, dim = q.shape
    n, t = riders.ids.shape

    def split(x: Array) -> Array:
        return x.reshape(group * n, t, *x.shape[2:])

    lengths = jnp.broadcast_to(riders.length, (group * n,))
    own = attention(split(q), split(k), split(v), lengths, need_lse=True)
    lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
    both = merge(Partial(split(seen.out), lse), own).out
    return both.reshape(group, rows, heads, dim)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def score_chunks(
    model: LLaDA,
    cache: ChunkCache,
    query_ids: Int[Array, "*B Q"],
    config: SelectionConfig = SelectionConfig(),
    *,
    query_length: Int[Array, "*B"] | None = None,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "M"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
    """Scores of a document's chunks for another question, from the KV that `prefill` has kept.

    The scores that `prefill` gives for the same question and scorer, at the cost of the question's
    own rows. Pure; compiles once for each (shapes, config, implementation).

    Args:
      cache: of `prefill` or `encode_document`; its pool is needed by all scorers but the controls.
      query_ids: [Q], or [B, Q] for several questions, scored one after another; padded behind
        query_length where that is given.
      draft: from `draft_response`, for a single question; made here where none is given.
      key, oracle: as `prefill` takes them.
      implementation: of the attention over chunks, as `chunk_attention` names them.

    Returns:
      Natural log, float32 ("attention": a share of one), -inf for chunks that are padding.

    Raises:
      ValueError: the cache holds no pool, or that of a streamed document.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    rows = query_ids.shape[-1]
    if query_length is None:
        query_length = jnp.full(query_ids.shape[:-1], rows, jnp.int32)
    query_length = jnp.asarray(query_length, jnp.int32)
    if config.scorer in CONTROLS:
        scores = control_scores(config, cache.lengths > 0, key, oracle)
        return jnp.broadcast_to(scores, (*query_ids.shape[:-1], *scores.shape))
    if cache.pool is None:
        raise ValueError("the cache holds no chunk KV to score with: prefill with keep_pool=True")
    if cache.streamed:
        raise ValueError("the cache holds the kept chunks alone: no other chunk can be scored")

    def one(query: Array, length: Array, draft: Draft | None) -> Array:
        question = Question(cache.prefix_ids, cache.prefix_length, query, length)
        if config.scorer == "attention":
            return _attention_mass(model, cache, question, implementation)
        riders = make_riders(model, question, config, draft)
        return _score_riders(model, cache, riders, config, implementation)

    if query_ids.ndim == 1:
        return one(query_ids, query_length, draft)
    return lax.map(lambda x: one(x[0], x[1], None), (query_ids, query_length))


def _score_riders(
    model: LLaDA,
    cache: ChunkCache,
    riders: Riders,
    config: SelectionConfig,
    implementation: Implementation | None,
) -> Float[Array, "N"]:
    pool = cache.pool
    assert pool is not None
    n, size = cache.tokens.shape
    copies, t = riders.ids.shape
    # As many rows at once as an encoding pass has.
    group = min(n, max(1, config.encode_batch * size // (copies * t)))
    place_in = jnp.tile(jnp.arange(t), copies)
    local = rotation(model.config, size + place_in)
    behind_prefix = rotation(model.config, cache.prefix_length + size + place_in)

    def score_group(i: Array, scores: Array) -> Array:
        ids = i * group + jnp.arange(group)

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            turned, own_k = rotate(q, local), rotate(k, local)
            before = None
            if cache.prefix_k is not None and cache.prefix_v is not None:
                part = attention(
                    rotate(q, behind_prefix).reshape(1, -1, *q.shape[2:]),
                    cache.prefix_k[layer][None],
                    cache.prefix_v[layer][None],
                    cache.prefix_length[None],
                    need_lse=True,
                )
                lse = part.lse.reshape(q.shape[2], group, -1).swapaxes(0, 1)
                before = Partial(part.out.reshape(q.shape), lse)
            seen = chunk_attention(
                turned, pool.k, pool.v, ids[:, None], pool.lengths,
                layer=layer, other=before, implementation=implementation,
            )  # fmt: skip
            return ride(seen, turned, own_k, v, riders), None

        rows = jnp.broadcast_to(riders.ids.reshape(-1), (group, copies * t))
        x, _ = model.run(rows, attend, None)
        found = read_scores(model, x, riders)
        # The last group may hang over the end; those rows are dropped.
        return scores.at[ids].set(found, mode="drop")

    groups = -(-jnp.count_nonzero(cache.lengths) // group)
    scores = lax.fori_loop(0, groups, score_group, jnp.zeros((n,), jnp.float32))
    return jnp.where(cache.lengths > 0, scores, -jnp.inf)


def _attention_mass(
    model: LLaDA, cache: ChunkCache, question: Question, implementation: Implementation | None
) -> Float[Array, "N"]:
    """Each chunk's share of the attention that the query's rows pay to the document.

    The query goes through the network once, behind the prefix, and sees every chunk as if it lay
    just before it. The mean over layers, heads and the query's rows.
    """
    pool = cache.pool
    assert pool is not None
    n, size = cache.tokens.shape
    row = jnp.arange(question.query.shape[0])
    local = rotation(model.config, size + row)
    behind_prefix = rotation(model.config, cache.prefix_length + size + row)
    counts = (row < question.query_length).astype(jnp.float32)

    def attend(layer: int, q: Array, k: Array, v: Array, total: Array) -> tuple[Array, Array]:
        turned = rotate(q, local)
        parts = [attention(turned, rotate(k, local), v, question.query_length[None], need_lse=True)]
        if cache.prefix_k is not None and cache.prefix_v is not None:
            parts.append(
                attention(
                    rotate(q, behind_prefix),
                    cache.prefix_k[layer][None],
                    cache.prefix_v[layer][None],
                    cache.prefix_length[None],
                    need_lse=True,
                )
            )
        every = jnp.where(cache.lengths > 0, jnp.arange(n), -1)[None]
        document, mass = chunk_attention_mass(
            turned, pool.k, pool.v, every, pool.lengths, layer=layer, implementation=implementation
        )
        share = jnp.einsum("htn,t->n", mass[0], counts) / (counts.sum() * q.shape[2])
        return merge(document, *parts).out, total + share

    _, total = model.run(question.query[None], attend, jnp.zeros((n,), jnp.float32))
    return jnp.where(cache.lengths > 0, total / model.config.n_layers, -jnp.inf)
