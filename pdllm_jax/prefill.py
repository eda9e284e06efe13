"""Steps 2 and 4: drafting, and the pass that encodes chunks and scores them on the way.

Chunk rows attend to the prefix and their own chunk. Behind them ride R copies of query and draft;
copy r has the scored slots s with s % R == r masked, and attends to prefix, chunk and itself. All
copies lie on the same positions. So one pass yields chunk KV that no question has touched and the
pseudo-log-likelihood of every scored slot; R = number of slots is exactly leave-one-out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import merge
from pallas_kernels.partial import Partial
from pdllm_jax.attention import attention
from pdllm_jax.cache import ChunkCache, ChunkPool, init_pool, write_chunks
from pdllm_jax.chunking import ChunkedPrompt
from pdllm_jax.config import SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.rope import Rotation, rotate, rotation
from pdllm_jax.sampling import log_probability
from pdllm_jax.selection import control_scores


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
def draft_response(model: LLaDA, prompt: ChunkedPrompt, config: SelectionConfig) -> Draft:
    """Guesses the response's first tokens from prefix and query alone, `draft_steps` evaluations.

    Slot 0 first, then each time the most confident of the slots that are still masked.
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


class _Copies(NamedTuple):
    """Masked copies of query and draft, and where their scored slots are read."""

    ids: Int[Array, "R T"]
    length: Int[Array, ""]
    read_copy: Int[Array, "S"]
    read_row: Int[Array, "S"]
    read_token: Int[Array, "S"] | None  # None: whatever is likeliest there
    read_valid: Bool[Array, "S"]


def _next_block(prompt: ChunkedPrompt, config: SelectionConfig, mask_id: int) -> _Copies:
    """The query with the next block's masks behind it, which are read."""
    d = config.draft_length
    ids = jnp.zeros(prompt.query.shape[0] + d, jnp.int32)
    ids = place(place(ids, jnp.int32(0), prompt.query), prompt.query_length, jnp.full(d, mask_id))
    return _Copies(
        ids=ids[None],
        length=prompt.query_length + d,
        read_copy=jnp.zeros(d, jnp.int32),
        read_row=prompt.query_length + jnp.arange(d),
        read_token=None,
        read_valid=jnp.ones(d, bool),
    )


def _masked_copies(
    prompt: ChunkedPrompt, draft: Draft | None, config: SelectionConfig, mask_id: int
) -> _Copies:
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
    return _Copies(
        ids=jnp.where(masked, mask_id, ids),
        length=q + d,
        read_copy=read_slot % copies,
        read_row=read_row,
        read_token=ids[read_row],
        read_valid=read_slot < scored.sum(),
    )


class _Prefix(NamedTuple):
    """Per-layer KV of the prefix, keys unrotated."""

    k: tuple[Float[Array, "P G D"], ...]
    v: tuple[Float[Array, "P G D"], ...]


def _encode_prefix(model: LLaDA, prompt: ChunkedPrompt) -> _Prefix:
    rows = prompt.prefix.shape[0]
    if rows == 0:
        return _Prefix((), ())
    by = rotation(model.config, jnp.arange(rows))

    def attend(layer: int, q: Array, k: Array, v: Array, carry: _Prefix) -> tuple[Array, _Prefix]:
        out = attention(rotate(q, by), rotate(k, by), v, prompt.prefix_length[None]).out
        return out, _Prefix((*carry.k, k[0]), (*carry.v, v[0]))

    _, prefix = model.run(prompt.prefix[None], attend, _Prefix((), ()))
    return prefix


def _chunk_attend(
    by: Rotation,
    chunk_size: int,
    lengths: Array,
    prefix: _Prefix,
    prefix_by: Rotation,
    prefix_length: Array,
    copies: _Copies | None,
    first: Array,
):
    """Attention of a group of chunks with the copies behind them; the carry is the pool or None."""

    def attend(layer: int, q: Array, k: Array, v: Array, pool: ChunkPool | None):
        group, rows, heads, dim = q.shape
        q, k = rotate(q, by), rotate(k, by)
        chunk_k, chunk_v = k[:, :chunk_size], v[:, :chunk_size]
        seen = attention(q, chunk_k, chunk_v, lengths, need_lse=True)
        if prefix.k:
            # All rows against one copy of the prefix.
            part = attention(
                q.reshape(1, group * rows, heads, dim),
                rotate(prefix.k[layer], prefix_by)[None],
                prefix.v[layer][None],
                prefix_length[None],
                need_lse=True,
            )
            lse = part.lse.reshape(heads, group, rows).swapaxes(0, 1)
            seen = merge(seen, Partial(part.out.reshape(q.shape), lse))
        out = seen.out
        if copies is not None:
            n, t = copies.ids.shape

            def own_rows(x: Array) -> Array:
                return x[:, chunk_size:].reshape(group * n, t, *x.shape[2:])

            lengths_own = jnp.broadcast_to(copies.length, (group * n,))
            own = attention(own_rows(q), own_rows(k), own_rows(v), lengths_own, need_lse=True)
            seen_lse = own_rows(seen.lse.swapaxes(1, 2)).swapaxes(1, 2)
            both = merge(Partial(own_rows(seen.out), seen_lse), own).out
            out = jnp.concatenate(
                [out[:, :chunk_size], both.reshape(group, n * t, heads, dim)], axis=1
            )
        return out, None if pool is None else write_chunks(pool, layer, chunk_k, chunk_v, first)

    return attend


def _read_scores(model: LLaDA, x: Float[Array, "g T M"], copies: _Copies) -> Float[Array, "g"]:
    """Mean log-probability of the scored slots; only their rows reach the LM head."""
    n, t = copies.ids.shape
    x = x.reshape(x.shape[0], n, t, -1)[:, copies.read_copy, copies.read_row]
    logits = model.logits(model.final_norm(x))
    if copies.read_token is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = jnp.broadcast_to(copies.read_token, logits.shape[:-1])
    likelihood = jnp.where(copies.read_valid, log_probability(logits, tokens), 0.0)
    return likelihood.sum(axis=-1) / copies.read_valid.sum()


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(
    model: LLaDA,
    prompt: ChunkedPrompt,
    config: SelectionConfig = SelectionConfig(),
    *,
    draft: Draft | None = None,
    key: Array | None = None,
    oracle: Int[Array, "M"] | None = None,
) -> tuple[ChunkCache, Float[Array, "N"]]:
    """Encodes and scores every chunk of a document in one pass over it.

    Pure; compiles once for each (shapes of prompt, config). Chunks that are padding cost nothing.

    Args:
      prompt: from `chunk_prompt`.
      config: scorer, masked copies, encoding, chunks per group.
      draft: from `draft_response`; made here where the scorer needs one and none is given.
      key: PRNG key of the scorer "random".
      oracle: ids of the chunks that the scorer "oracle" keeps; ids of no chunk name nothing.

    Returns:
      The cache, with a pool of chunk KV where config.encoding is "independent" (joint encoding
      makes its own KV from the chosen chunks' tokens), and the scores [N], float32, natural log,
      -inf for chunks that are padding.
    """
    scoring = config.scorer in ("draft", "query", "confidence")
    pooling = config.encoding == "independent"
    exists = prompt.chunk_lengths > 0
    scores = None if scoring else control_scores(config, exists, key, oracle)
    prefix = _encode_prefix(model, prompt) if scoring or pooling else _Prefix((), ())
    pool = None
    if scoring or pooling:
        copies = None
        if config.scorer == "confidence":
            copies = _next_block(prompt, config, model.config.mask_token_id)
        elif scoring:
            if config.scorer == "draft" and draft is None:
                draft = draft_response(model, prompt, config)
            copies = _masked_copies(
                prompt,
                draft if config.scorer == "draft" else None,
                config,
                model.config.mask_token_id,
            )
        pool, pass_scores = _encode_chunks(model, prompt, config, prefix, copies, pooling)
        scores = pass_scores if scoring else scores
    assert scores is not None
    keep_prefix = pooling and bool(prefix.k)
    cache = ChunkCache(
        pool=pool,
        tokens=prompt.chunks,
        lengths=prompt.chunk_lengths,
        prefix_ids=prompt.prefix,
        prefix_length=prompt.prefix_length,
        prefix_k=_prefix_keys(model, prefix) if keep_prefix else None,
        prefix_v=jnp.stack(prefix.v) if keep_prefix else None,
    )
    return cache, scores


def _prefix_keys(model: LLaDA, prefix: _Prefix) -> Float[Array, "L P G D"]:
    k = jnp.stack(prefix.k)
    return rotate(k, rotation(model.config, jnp.arange(k.shape[1])))


def _encode_chunks(
    model: LLaDA,
    prompt: ChunkedPrompt,
    config: SelectionConfig,
    prefix: _Prefix,
    copies: _Copies | None,
    pooling: bool,
) -> tuple[ChunkPool | None, Float[Array, "N"]]:
    n, size = prompt.chunks.shape
    group = min(config.encode_batch, n)
    padded = -(-n // group) * group
    chunks = jnp.pad(prompt.chunks, ((0, padded - n), (0, 0)))
    lengths = jnp.pad(prompt.chunk_lengths, (0, padded - n))

    positions = jnp.arange(size)
    rider_ids = jnp.zeros((0,), jnp.int32)
    if copies is not None:
        repeats, rows = copies.ids.shape
        positions = jnp.concatenate([positions, jnp.tile(size + jnp.arange(rows), repeats)])
        rider_ids = copies.ids.reshape(-1)
    by = rotation(model.config, positions)
    # Chunk rows sit at 0..C-1, so the prefix ends at -1.
    prefix_by = rotation(model.config, jnp.arange(prompt.prefix.shape[0]) - prompt.prefix_length)

    def encode_group(i: Array, carry):
        pool, scores = carry
        first = i * group
        tokens = lax.dynamic_slice_in_dim(chunks, first, group)
        here = lax.dynamic_slice_in_dim(lengths, first, group)
        riders = jnp.broadcast_to(rider_ids, (group, rider_ids.shape[0]))
        attend = _chunk_attend(
            by, size, here, prefix, prefix_by, prompt.prefix_length, copies, first
        )
        x, pool = model.run(jnp.concatenate([tokens, riders], axis=1), attend, pool)
        if copies is not None:
            scored = _read_scores(model, x[:, size:], copies)
            scores = place(scores, first, jnp.where(here > 0, scored, -jnp.inf))
        return pool, scores

    pool = None
    if pooling:
        pool = init_pool(model.config, padded, size, model.dtype)
        pool = dataclasses.replace(pool, lengths=lengths)
    groups = -(-jnp.count_nonzero(lengths) // group)
    scores = jnp.full((padded,), -jnp.inf, jnp.float32)
    pool, scores = lax.fori_loop(0, groups, encode_group, (pool, scores))
    return pool, scores[:n]
