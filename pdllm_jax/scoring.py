"""Step 2: what a question is worth to every chunk, from the KV that a document's pass has kept."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation, merge
from pdllm_jax.cache import ChunkCache
from pdllm_jax.config import CONTROLS, SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.parallel import constrain, whole_groups
from pdllm_jax.riders import RIDING, Draft, Question, Riders, make_riders, read_scores, ride
from pdllm_jax.rope import rotate, rotation
from pdllm_jax.selection import control_scores
from pdllm_jax.sharded import attention, chunk_attention, chunk_attention_mass


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
    oracle: Int[Array, "*B M"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
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
        go with the documents.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    rows = query_ids.shape[-1]
    if query_length is None:
        query_length = jnp.full(query_ids.shape[:-1], rows, jnp.int32)
    query_length = jnp.asarray(query_length, jnp.int32)
    if cache.batched and cache.tokens.shape[:1] != query_ids.shape[:-1]:
        raise ValueError(
            f"query_ids {query_ids.shape} for {cache.tokens.shape[0]} documents: want one for each"
        )
    if config.scorer in CONTROLS:
        exists = jnp.broadcast_to(
            cache.lengths > 0, (*query_ids.shape[:-1], cache.lengths.shape[-1])
        )
        return control_scores(config, exists, key, oracle)
    queries = jnp.atleast_2d(query_ids)
    documents = cache.per_document()
    batch = queries.shape[0]
    question = Question(
        jnp.broadcast_to(documents.prefix_ids, (batch, documents.prefix_ids.shape[1])),
        jnp.broadcast_to(documents.prefix_length, (batch,)),
        queries,
        jnp.broadcast_to(query_length, (batch,)),
    )
    check_scorable(cache)
    if draft is not None and draft.tokens.shape[:-1] != query_ids.shape[:-1]:
        raise ValueError(
            f"draft of {draft.tokens.shape} for questions of {query_ids.shape}: want one for each"
        )
    riders = None
    if config.scorer in RIDING:
        riders = make_riders(model, question, config, draft)
    scores = score_question(model, cache, question, riders, config, implementation)
    return scores if query_ids.ndim == 2 else scores[0]


def check_scorable(cache: ChunkCache) -> None:
    """ValueError where the cache does not hold the KV of every chunk."""
    if cache.pool is None:
        raise ValueError("the cache holds no chunk KV to score with: prefill with keep_pool=True")
    if cache.streamed:
        raise ValueError("the cache holds the kept chunks alone: no other chunk can be scored")


def score_question(
    model: LLaDA,
    cache: ChunkCache,
    question: Question,
    riders: Riders | None,
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
    batch, (documents, n) = question.query.shape[0], cache.per_document().lengths.shape
    document = jnp.arange(batch) if documents == batch else jnp.zeros((batch,), jnp.int32)
    exists = cache.per_document().lengths[document] > 0
    if wanted is not None:
        exists &= wanted[:, None]
    place = jnp.where(exists, document[:, None] * n + jnp.arange(n), -1)  # [B, N], in the pool
    if riders is None:
        if counted is None:
            counted = jnp.arange(question.query.shape[1]) < question.query_length[:, None]
        scores = _attention_mass(model, cache, question, document, place, counted, implementation)
    else:
        scores = _score_riders(model, cache, riders, document, place, config, implementation)
    return constrain(model.mesh, jnp.where(exists, scores, -jnp.inf))


def _score_riders(
    model: LLaDA,
    cache: ChunkCache,
    riders: Riders,
    document: Int[Array, "B"],
    place: Int[Array, "B N"],
    config: SelectionConfig,
    implementation: Implementation | None,
) -> Float[Array, "B N"]:
    """Groups of (request, chunk) pairs go through the network together."""
    pool, documents = cache.pool, cache.per_document()
    assert pool is not None
    size, (batch, n) = cache.tokens.shape[-1], place.shape
    _, copies, t = riders.ids.shape
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
        here = riders.of(request)
        owner = document[request]
        start = documents.prefix_length[owner, None]
        behind_prefix = rotation(model.config, start + size + place_in)

        def attend(layer: int, q: Array, k: Array, v: Array, carry: None) -> tuple[Array, None]:
            before = None
            if documents.prefix_k is not None and documents.prefix_v is not None:
                before = attention(
                    model.mesh,
                    rotate(q, behind_prefix),
                    documents.prefix_k[layer][owner],
                    documents.prefix_v[layer][owner],
                    documents.prefix_length[owner],
                    need_lse=True,
                )
            turned, own_k = rotate(q, local), rotate(k, local)
            seen = chunk_attention(
                model.mesh, turned, pool.k, pool.v, chunk[:, None], pool.lengths,
                layer=layer, implementation=implementation,
            )  # fmt: skip
            seen = seen if before is None else merge(before, seen)
            return ride(model.mesh, seen, turned, own_k, v, here), None

        x, _ = model.run(here.ids.reshape(group, copies * t), attend, None)
        # The last group may hang over the end; those rows are dropped.
        where = jnp.where(chunk >= 0, pair, batch * n)
        found = constrain(model.mesh, read_scores(model, x, here))
        return scores.at[where].set(found, mode="drop")

    groups = -(-jnp.count_nonzero(places >= 0) // group)
    scores = lax.fori_loop(0, groups, score_group, jnp.zeros((batch * n,), jnp.float32))
    return scores.reshape(batch, n)


def _attention_mass(
    model: LLaDA,
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
    pool, documents = cache.pool, cache.per_document()
    assert pool is not None
    row = jnp.arange(question.query.shape[1])
    local = rotation(model.config, cache.tokens.shape[-1] + row)
    start = documents.prefix_length[document, None] + cache.tokens.shape[-1]
    behind_prefix = rotation(model.config, start + row)
    counts = counted.astype(jnp.float32)

    def attend(layer: int, q: Array, k: Array, v: Array, total: Array) -> tuple[Array, Array]:
        turned = rotate(q, local)
        own = turned, rotate(k, local), v
        parts = [attention(model.mesh, *own, question.query_length, need_lse=True)]
        if documents.prefix_k is not None and documents.prefix_v is not None:
            parts.append(
                attention(
                    model.mesh,
                    rotate(q, behind_prefix),
                    documents.prefix_k[layer][document],
                    documents.prefix_v[layer][document],
                    documents.prefix_length[document],
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
