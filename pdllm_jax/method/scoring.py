"""The rows that a chunk is scored by: drafting, masked copies, and what is read from them.

They ride behind a chunk: R copies of the query and what follows it (a draft, or the response so
far), copy r with the scored slots s % R == r masked. They attend to prefix, chunk and themselves,
all copies on the same positions, and no chunk row attends to them. So one pass over a document
yields chunk KV that no question has touched, with the pseudo-log-likelihood of every scored slot
(`prefill`); and a later question costs its own rows against that KV (`score_chunks`). R = number
of slots is exactly leave-one-out.

Inside, everything has an axis of requests.

Step 2: what a question is worth to every chunk, from the KV that a document's pass has kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.config import CONTROLS, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, dynamic_slices, dynamic_updates
from pdllm_jax.method.chunking import ChunkedPrompt, Question, count_ids
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.method.selection import control_scores
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import (
    attention,
    chunk_attention,
    chunk_attention_mass,
    constrain,
    whole_groups,
)
from pdllm_jax.network.transformer import MaskPredictor

# Scorers whose rows ride through the network behind every chunk.
QUERY_COPY_SCORERS = ("draft", "query", "confidence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """d tokens behind the query: guesses where `confirmed`, mask tokens elsewhere."""

    tokens: Int[Array, "B d"]
    confirmed: Bool[Array, "B d"]


@functools.partial(jax.jit, static_argnames=("config",))
def draft_response(
    model: MaskPredictor, prompt: ChunkedPrompt | Question, config: SelectionConfig
) -> Draft:
    """Guesses the response's first tokens from prefix and query alone, `draft_steps` evaluations.

    Slot 0 first, then each time the most confident of the slots that are still masked.
    Returns tokens [B, d] int32, d = `draft_length`, and which of them are guesses, [B, d] bool.
    """
    question = prompt.question if isinstance(prompt, ChunkedPrompt) else prompt
    return constrain(model.mesh, _draft(model, question, config))


def _draft(model: MaskPredictor, question: Question, config: SelectionConfig) -> Draft:
    d, batch = config.draft_length, question.query.shape[0]
    start = question.prefix_length + question.query_length
    # Each part overwrites the padding of the one before it.
    rows = jnp.pad(question.prefix, ((0, 0), (0, question.query.shape[1] + d)))
    rows = dynamic_updates(rows, question.prefix_length, question.query)

    def step(i: Array, draft: Draft) -> Draft:
        hidden = model.encode(dynamic_updates(rows, start, draft.tokens), start + d)
        logits = model.logits(dynamic_slices(hidden, start, d))
        guess = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = jnp.where(draft.confirmed, -jnp.inf, log_probability(logits, guess))
        slot = jnp.where(i == 0, 0, jnp.argmax(confidence, axis=-1))
        chosen = jnp.arange(d) == slot[:, None]
        return Draft(jnp.where(chosen, guess, draft.tokens), draft.confirmed | chosen)

    return lax.fori_loop(0, config.draft_steps, step, _masks(model, batch, d))


def _masks(model: MaskPredictor, batch: int, d: int) -> Draft:
    """Nothing guessed yet."""
    tokens = jnp.full((batch, d), model.config.mask_token_id, jnp.int32)
    return Draft(tokens, jnp.zeros((batch, d), bool))


class QueryCopies(NamedTuple):
    """Masked copies of query and what follows it, and where their scored slots are read."""

    ids: Int[Array, "B R T"]
    length: Int[Array, "B"]
    read_copy: Int[Array, "B S"]
    read_row: Int[Array, "B S"]
    read_token: Int[Array, "B S"] | None  # None: whatever is likeliest there
    read_valid: Bool[Array, "B S"]

    def of(self, request: Int[Array, "g"]) -> QueryCopies:
        """Those of some requests."""
        return jax.tree.map(lambda x: x[request], self)


def make_query_copies(
    model: MaskPredictor, question: Question, config: SelectionConfig, draft: Draft | None
) -> QueryCopies:
    """The rows that a scorer of RIDING sends through the network behind every chunk."""
    batch = question.query.shape[0]
    if config.scorer == "confidence":
        return copies_from_tail(
            model, question, _masks(model, batch, config.draft_length), config, 0
        )
    if config.scorer == "query":
        return copies_from_tail(model, question, _masks(model, batch, 0), config, 0)
    if draft is None:
        draft = _draft(model, question, config)
    return copies_from_tail(
        model, question, draft, config, min(config.draft_steps, draft.tokens.shape[1])
    )


def copies_from_tail(
    model: MaskPredictor, question: Question, tail: Draft, config: SelectionConfig, most: int
) -> QueryCopies:
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
    return QueryCopies(ids, question.query_length + d, copy, row, read_token, valid)


def read_scores(
    model: MaskPredictor, x: Float[Array, "g T M"], query_copies: QueryCopies
) -> Float[Array, "g"]:
    """Mean log-probability of the scored slots; only their rows reach the LM head."""
    group, n, t = query_copies.ids.shape
    each = jnp.arange(group)[:, None]
    x = x.reshape(group, n, t, -1)[each, query_copies.read_copy, query_copies.read_row]
    logits = model.logits(model.final_norm(x))
    tokens = (
        jnp.argmax(logits, axis=-1) if query_copies.read_token is None else query_copies.read_token
    )
    likelihood = jnp.where(query_copies.read_valid, log_probability(logits, tokens), 0.0)
    return row_sum(likelihood) / jnp.maximum(query_copies.read_valid.sum(axis=-1), 1)


def attend_copies(
    mesh: Mesh | None, seen: Partial, q: Array, k: Array, v: Array, query_copies: QueryCopies
) -> Array:
    """Attention of riders [g, R T, H, D]: what they saw elsewhere, and each copy itself."""
    group, n, t = query_copies.ids.shape

    def split(x: Array) -> Array:
        return x.reshape(group * n, t, *x.shape[2:])

    lengths = jnp.repeat(query_copies.length, n)
    own = attention(mesh, split(q), split(k), split(v), lengths, need_lse=True)
    lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
    return merge(Partial(split(seen.out), lse), own).out.reshape(q.shape)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def score_chunks(
    model: MaskPredictor,
    cache: ChunkCache,
    query_ids: Int[Array, "B Q"],
    config: SelectionConfig = SelectionConfig(),
    *,
    query_length: Int[Array, "B"] | None = None,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "B M"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B N"]:
    """Scores of a document's chunks for another question, from the KV that `prefill` has kept.

    The scores that `prefill` gives for the same question and scorer, at the cost of the question's
    own rows. Pure; compiles once for each (shapes, config, implementation).

    Args:
      cache: of `prefill` or `encode_document`; its pool is needed by all scorers but the controls.
        With an axis of documents, question b is about document b; else all are about the one.
      query_ids: [Q], or [B, Q] for several questions; padded behind query_length where that is
        given.
      draft: from `draft_response`; made here where none is given.
      key, oracle: as `prefill` takes them.
      implementation: of the attention over chunks, as `chunk_attention` names them.

    Returns:
      Natural log, float32 ("attention": a share of one), -inf for chunks that are padding.

    Raises:
      ValueError: the cache holds no pool, or that of a streamed document; questions that do not
        go with the cache.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    batch = query_ids.shape[0]
    document = cache.document_of(batch)
    if config.scorer in CONTROLS:
        return control_scores(config, cache.lengths[document] > 0, key, oracle)
    question = Question(
        cache.prefix_ids[document],
        cache.prefix_length[document],
        query_ids,
        count_ids(query_ids) if query_length is None else jnp.asarray(query_length, jnp.int32),
    )
    check_scorable(cache)
    if draft is not None and draft.tokens.shape[0] != batch:
        raise ValueError(f"{draft.tokens.shape[0]} drafts for {batch} questions")
    query_copies = None
    if config.scorer in QUERY_COPY_SCORERS:
        query_copies = make_query_copies(model, question, config, draft)
    return score_question(model, cache, question, query_copies, config, implementation)


def check_scorable(cache: ChunkCache) -> None:
    """ValueError where the cache does not hold the KV of every chunk."""
    if cache.pool is None:
        raise ValueError("the cache holds no chunk KV to score with: prefill with keep_pool=True")
    if cache.streamed:
        raise ValueError("the cache holds the kept chunks alone: no other chunk can be scored")


def score_question(
    model: MaskPredictor,
    cache: ChunkCache,
    question: Question,
    query_copies: QueryCopies | None,
    config: SelectionConfig,
    implementation: Implementation | None,
    *,
    counted: Bool[Array, "B T"] | None = None,
    wanted: Bool[Array, "B"] | None = None,
) -> Float[Array, "B N"]:
    """Scores of every request's chunks by a scorer that reads them; riders None: "attention".

    counted: query rows whose attention counts, all by default. wanted: requests that are scored at
    all, which cost nothing elsewhere; -inf for the others.
    """
    document = cache.document_of(question.query.shape[0])
    exists = cache.lengths[document] > 0
    if wanted is not None:
        exists &= wanted[:, None]
    place = cache.places(jnp.where(exists, jnp.arange(exists.shape[1]), -1))
    if query_copies is None:
        if counted is None:
            counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
        scores = _attention_mass(model, cache, question, document, place, counted, implementation)
    else:
        scores = _score_riders(model, cache, query_copies, document, place, config, implementation)
    return constrain(model.mesh, jnp.where(exists, scores, -jnp.inf))


def _score_riders(
    model: MaskPredictor,
    cache: ChunkCache,
    query_copies: QueryCopies,
    document: Int[Array, "B"],
    place: Int[Array, "B N"],
    config: SelectionConfig,
    implementation: Implementation | None,
) -> Float[Array, "B N"]:
    """Groups of (request, chunk) pairs go through the network together."""
    pool = cache.pool
    assert pool is not None
    size, (batch, n) = cache.tokens.shape[-1], place.shape
    _, copies, t = query_copies.ids.shape
    # As many rows at once as an encoding pass has.
    group = min(batch * n, max(1, config.encode_batch * size // (copies * t)))
    group = whole_groups(model.mesh, group)
    place_in = jnp.tile(jnp.arange(t), copies)
    local = rotation(model.config, size + place_in)
    places = place.reshape(-1)
    order = jnp.argsort(places < 0, stable=True)

    def score_group(i: Array, scores: Array) -> Array:
        at = i * group + jnp.arange(group)
        pair = order[jnp.minimum(at, batch * n - 1)]
        request, chunk = pair // n, jnp.where(at < batch * n, places[pair], -1)
        here = query_copies.of(request)
        owner = document[request]
        start = cache.prefix_length[owner, None]
        behind_prefix = rotation(model.config, start + size + place_in)

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            before = None
            if cache.prefix_k is not None and cache.prefix_v is not None:
                before = attention(
                    model.mesh,
                    rotate(q, behind_prefix),
                    cache.prefix_k[layer][owner],
                    cache.prefix_v[layer][owner],
                    cache.prefix_length[owner],
                    need_lse=True,
                )
            turned, own_k = rotate(q, local), rotate(k, local)
            seen = chunk_attention(
                model.mesh, turned, pool.k, pool.v, chunk[:, None], pool.lengths,
                layer=layer, implementation=implementation,
            )  # fmt: skip
            seen = seen if before is None else merge(before, seen)
            return attend_copies(model.mesh, seen, turned, own_k, v, here), None

        x, _ = model.run(here.ids.reshape(group, copies * t), attend, None)
        # The last group may hang over the end; those rows are dropped.
        where = jnp.where(chunk >= 0, pair, batch * n)
        found = constrain(model.mesh, read_scores(model, x, here))
        return scores.at[where].set(found, mode="drop")

    groups = -(-jnp.count_nonzero(places >= 0) // group)
    scores = lax.fori_loop(0, groups, score_group, jnp.zeros((batch * n,), jnp.float32))
    return scores.reshape(batch, n)


def _attention_mass(
    model: MaskPredictor,
    cache: ChunkCache,
    question: Question,
    document: Int[Array, "B"],
    place: Int[Array, "B N"],
    counted: Bool[Array, "B T"],
    implementation: Implementation | None,
) -> Float[Array, "B N"]:
    """Each chunk's share of the attention that the counted query rows pay to the document.

    The query goes through the network once, behind the prefix, and sees every chunk as if it lay
    just before it. The mean over layers, heads and rows.
    """
    pool = cache.pool
    assert pool is not None
    row = jnp.arange(question.query.shape[1])
    local = rotation(model.config, cache.tokens.shape[-1] + row)
    start = cache.prefix_length[document, None] + cache.tokens.shape[-1]
    behind_prefix = rotation(model.config, start + row)
    counts = counted.astype(jnp.float32)

    def attend(layer: int, q: Array, k: Array, v: Array, total: Array) -> tuple[Array, Array]:
        turned = rotate(q, local)
        own = turned, rotate(k, local), v
        parts = [attention(model.mesh, *own, question.query_length, need_lse=True)]
        if cache.prefix_k is not None and cache.prefix_v is not None:
            parts.append(
                attention(
                    model.mesh,
                    rotate(q, behind_prefix),
                    cache.prefix_k[layer][document],
                    cache.prefix_v[layer][document],
                    cache.prefix_length[document],
                    need_lse=True,
                )
            )
        seen, mass = chunk_attention_mass(
            model.mesh, turned, pool.k, pool.v, place, pool.lengths,
            layer=layer, implementation=implementation,
        )  # fmt: skip
        share = jnp.einsum("bhtn,bt->bn", mass, counts)
        share /= jnp.maximum(counts.sum(axis=-1), 1)[:, None] * q.shape[2]
        return merge(seen, *parts).out, total + share

    none = jnp.zeros(place.shape, jnp.float32)
    _, total = model.run(question.query, attend, none)
    return total / model.config.n_layers
