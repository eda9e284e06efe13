"""Masked copies of the query that go through the network behind a chunk.

R copies of the query and its tail (a draft, or the response so far), copy r with the scored slots s
with s % R == r masked. They attend to prefix, chunk and themselves, all copies at the same
positions, and no chunk row attends to them. So one pass over a document yields chunk KV that does
not depend on the question, together with the pseudo-log-likelihood of every scored slot. A later
question costs its own rows against that KV. R = number of slots is exactly leave-one-out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, Partial, merge
from pallas_kernels.common import row_sum
from pdllm_jax.method.cache import ChunkCache, dynamic_slices, dynamic_updates
from pdllm_jax.method.question import Question
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.network.sharding import attention, chunk_attention, constrain, whole_groups
from pdllm_jax.network.transformer import MaskPredictor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """d tokens behind the query: guesses where `confirmed`, mask tokens elsewhere."""

    tokens: Int[Array, "B d"]
    confirmed: Bool[Array, "B d"]


class QueryCopies(NamedTuple):
    """Copies of query and tail, and the rows that are scored.

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


def masked_draft(model: MaskPredictor, batch: int, d: int) -> Draft:
    """Returns a draft of d masks."""
    tokens = jnp.full((batch, d), model.config.mask_token_id, jnp.int32)
    return Draft(tokens, jnp.zeros((batch, d), bool))


def write_draft(model: MaskPredictor, question: Question, d: int, steps: int) -> Draft:
    """Denoises `steps` of d masks: slot 0, then the most confident of those still masked."""
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

    return lax.fori_loop(0, steps, step, masked_draft(model, question.query.shape[0], d))


def _place(values: Array, rows: int, start: int | Array) -> Array:
    """Returns [rows] of zeros with `values` from `start` on."""
    return lax.dynamic_update_slice_in_dim(jnp.zeros(rows, values.dtype), values, start, 0)


def masked_copies(
    model: MaskPredictor, question: Question, tail: Draft, copies: int | None, most: int
) -> QueryCopies:
    """Returns copies in which every query token and the tail's confirmed ones are scored.

    Args:
      copies: R; None for one copy of every scored slot.
      most: confirmed tokens of the tail that are scored, at most; 0 scores the query alone.
    """
    mask_id, q_rows = model.config.mask_token_id, question.query.shape[1]
    rows, scored_rows = q_rows + tail.tokens.shape[1], q_rows + most
    copies = scored_rows if copies is None else copies

    def of_request(query: Array, length: Array, tokens: Array, confirmed: Array):
        ids = lax.dynamic_update_slice_in_dim(_place(query, rows, 0), tokens, length, 0)
        scored = jnp.arange(rows) < length
        if most:
            scored |= _place(confirmed, rows, length)
        slot = jnp.where(scored, jnp.cumsum(scored) - 1, -1)
        masked = scored & (slot % copies == jnp.arange(copies)[:, None])
        row = jnp.argsort(~scored, stable=True)[:scored_rows]
        read_slot = jnp.arange(scored_rows)
        copy, valid = read_slot % copies, read_slot < scored.sum()
        return jnp.where(masked, mask_id, ids), copy, row, ids[row], valid

    ids, copy, row, token, valid = jax.vmap(of_request)(
        question.query, question.query_length, tail.tokens, tail.confirmed
    )
    length = question.query_length + tail.tokens.shape[1]
    return QueryCopies(ids, length, copy, row, token, valid)


def open_slots_copy(question: Question, tail: Draft) -> QueryCopies:
    """Returns one copy, in which the likeliest token of every slot not confirmed is scored."""
    d = tail.tokens.shape[1]
    rows = question.query.shape[1] + d

    def of_request(query: Array, length: Array, tokens: Array, confirmed: Array):
        ids = lax.dynamic_update_slice_in_dim(_place(query, rows, 0), tokens, length, 0)
        scored = _place(~confirmed, rows, length)
        row = jnp.argsort(~scored, stable=True)[:d]
        return ids[None], jnp.zeros_like(row), row, jnp.arange(d) < scored.sum()

    ids, copy, row, valid = jax.vmap(of_request)(
        question.query, question.query_length, tail.tokens, tail.confirmed
    )
    return QueryCopies(ids, question.query_length + d, copy, row, None, valid)


def read_scores(
    model: MaskPredictor, x: Float[Array, "g T M"], copies: QueryCopies
) -> Float[Array, "g"]:
    """Returns the mean log-probability of the scored rows; only they reach the LM head."""
    group, n, t = copies.ids.shape
    index = jnp.arange(group)[:, None], copies.read_copy, copies.read_row
    logits = model.logits(model.final_norm(x.reshape(group, n, t, -1)[index]))
    tokens = copies.read_token
    if tokens is None:
        tokens = jnp.argmax(logits, axis=-1)
    likelihood = jnp.where(copies.read_valid, log_probability(logits, tokens), 0.0)
    return row_sum(likelihood) / jnp.maximum(copies.read_valid.sum(axis=-1), 1)


def attend_copies(
    mesh: Mesh | None, seen: Partial, q: Array, k: Array, v: Array, copies: QueryCopies
) -> Array:
    """Returns attention of copies' rows [g, R T, H, D]: `seen`, merged with each copy itself."""
    group, n, t = copies.ids.shape

    def split(x: Array) -> Array:
        return x.reshape(group * n, t, *x.shape[2:])

    lengths = jnp.repeat(copies.length, n)
    itself = attention(mesh, split(q), split(k), split(v), lengths, need_lse=True)
    lse = split(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
    return merge(Partial(split(seen.out), lse), itself).out.reshape(q.shape)


def score_copies(
    model: MaskPredictor,
    cache: ChunkCache,
    query_copies: QueryCopies,
    wanted: Bool[Array, "B N"],
    *,
    encode_batch: int,
    implementation: Implementation | None,
) -> Float[Array, "B N"]:
    """Scores copies against the KV of every chunk; groups of (request, chunk) pairs at a time.

    wanted: pairs to score; the others cost nothing and get 0.
    """
    pool, size, (batch, n) = cache.pool, cache.tokens.shape[-1], wanted.shape
    assert pool is not None
    document = cache.document_of(batch)
    _, copies, t = query_copies.ids.shape
    # As many rows at once as an encoding pass has.
    group = min(batch * n, max(1, encode_batch * size // (copies * t)))
    group = whole_groups(model.mesh, group)
    row = jnp.tile(jnp.arange(t), copies)
    by_chunk = rotation(model.config, size + row)
    places = cache.places(jnp.where(wanted, jnp.arange(n), -1)).reshape(-1)
    order = jnp.argsort(places < 0, stable=True)

    def score_group(i: Array, scores: Array) -> Array:
        at = i * group + jnp.arange(group)
        pair = order[jnp.minimum(at, batch * n - 1)]
        request, chunk = pair // n, jnp.where(at < batch * n, places[pair], -1)
        group_copies = query_copies.of(request)
        owner = document[request]
        start = cache.prefix_length[owner, None]
        by_prefix = rotation(model.config, start + size + row)

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            before = None
            if cache.prefix_k is not None and cache.prefix_v is not None:
                before = attention(
                    model.mesh,
                    rotate(q, by_prefix),
                    cache.prefix_k[layer][owner],
                    cache.prefix_v[layer][owner],
                    cache.prefix_length[owner],
                    need_lse=True,
                )
            turned, turned_k = rotate(q, by_chunk), rotate(k, by_chunk)
            seen = chunk_attention(
                model.mesh, turned, pool.k, pool.v, chunk[:, None], pool.lengths,
                layer=layer, implementation=implementation,
            )  # fmt: skip
            seen = seen if before is None else merge(before, seen)
            return attend_copies(model.mesh, seen, turned, turned_k, v, group_copies), None

        x, _ = model.run(group_copies.ids.reshape(group, copies * t), attend, None)
        # Rows of the last group beyond the end are dropped.
        target = jnp.where(chunk >= 0, pair, batch * n)
        values = constrain(model.mesh, read_scores(model, x, group_copies))
        return scores.at[target].set(values, mode="drop")

    groups = -(-jnp.count_nonzero(places >= 0) // group)
    scores = lax.fori_loop(0, groups, score_group, jnp.zeros((batch * n,), jnp.float32))
    return scores.reshape(batch, n)
