"""Log-likelihood of an answer by LLaDA's Monte Carlo estimate, on a whole prompt or on kept chunks.

A masked diffusion model has no chain of conditionals. LLaDA (arXiv 2502.09992, appendix B.5,
eval_llada.py) masks k of the answer's L tokens at random, with k from 1 to L:

    log p(answer | prompt)  is about  mean over samples of  L / k * sum over masked tokens of log p

The k of n samples are spread evenly around the circle 1..L, at k0 + i L / n. In the published code
n is the batch; here n counts all samples, so the result does not depend on the group size. Only
masked rows reach the LM head, a block of them at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.cache import (
    ChunkCache,
    Placement,
    dynamic_slices,
    dynamic_updates,
    init_live,
    place_chunks,
)
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    TokenIds,
    bucket,
    bucket_rows,
    check_token_ids,
    pad_to,
)
from pdllm_jax.method.encoding import encode_chosen
from pdllm_jax.method.encodings import Bridge, EncodeRequest
from pdllm_jax.method.live_forward import QueryRows, live_forward
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.sampling import log_probability, random_key
from pdllm_jax.method.scorers import OracleScorer
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.method.selection import Selection, select
from pdllm_jax.network.config import ConfigError
from pdllm_jax.network.transformer import MaskPredictor

_LOGIT_ROWS = 64  # logits in memory at once


class Samples(NamedTuple):
    """Which answer tokens are masked [n, A], and how many [n]."""

    masked: Bool[Array, "n A"]
    counts: Int[Array, "n"]


def answer_samples(key: Array, length: Int[Array, ""], n: int, rows: int) -> Samples:
    """Draws n masks over the first `length` of `rows` places."""
    first, order = jax.random.split(key)
    steps = jnp.round(jnp.arange(n) * (length / n)).astype(jnp.int32)
    counts = (jax.random.randint(first, (), 0, length) + steps) % length + 1
    noise = jnp.where(jnp.arange(rows) < length, jax.random.uniform(order, (n, rows)), 2.0)
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return Samples(rank < counts[:, None], counts)


def masked_log_likelihood(
    model: MaskPredictor,
    hidden: Float[Array, "n A M"],
    targets: Int[Array, "A"],
    masked: Bool[Array, "n A"],
) -> Float[Array, "n"]:
    """Sums the log-probability of the masked targets, from rows before the final norm.

    Only masked rows go through the LM head, in blocks.
    """
    n, length = masked.shape
    rows = min(_LOGIT_ROWS, n * length)
    order = jnp.argsort(~masked.reshape(-1), stable=True)
    flat = hidden.reshape(n * length, -1)

    def block(i: Array, total: Array) -> Array:
        at = i * rows + jnp.arange(rows)
        row = order[jnp.minimum(at, n * length - 1)]
        logits = model.logits(model.final_norm(flat[row]))
        counts = masked.reshape(-1)[row] & (at < n * length)
        values = jnp.where(counts, log_probability(logits, targets[row % length]), 0.0)
        return total.at[row // length].add(values)

    blocks = -(-jnp.count_nonzero(masked) // rows)
    return lax.fori_loop(0, blocks, block, jnp.zeros((n,), jnp.float32))


@functools.partial(jax.jit, static_argnames=("n", "group", "rows"))
def _on_prompt(
    model: MaskPredictor,
    tokens: Int[Array, "T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    key: Array,
    *,
    n: int,
    group: int,
    rows: int,
) -> Float[Array, ""]:
    """tokens: prompt, answer from `start` on, padding; at least `rows` tokens from there on."""
    samples = answer_samples(key, length, n, rows)
    targets = lax.dynamic_slice_in_dim(tokens, start, rows)
    starts = jnp.full((group,), start)

    def score(masked: Array) -> Array:
        answers = jnp.where(masked, model.config.mask_token_id, targets)
        ids = dynamic_updates(jnp.broadcast_to(tokens, (group, tokens.size)), starts, answers)
        hidden = _encode(model, ids, jnp.full((group,), start + length))
        return masked_log_likelihood(model, dynamic_slices(hidden, starts, rows), targets, masked)

    return _mean(lax.map(score, samples.masked.reshape(-1, group, rows)), samples, length)


def _encode(model: MaskPredictor, ids: Int[Array, "n T"], lengths: Int[Array, "n"]) -> Array:
    """Returns `model.encode` before its final norm, by the path that decoding takes."""
    zeros = jnp.zeros_like(lengths)
    none = jnp.zeros((len(ids), 0), jnp.int32)
    placement = Placement(none, none, query_start=zeros, prefix_length=zeros, total=lengths)
    return live_forward(model, None, placement, None, ids, zeros)[0]


def _mean(sums: Array, samples: Samples, length: Int[Array, ""]) -> Float[Array, ""]:
    return (sums.reshape(-1) * (length / samples.counts)).mean()


def answer_log_likelihood(
    model: MaskPredictor,
    prompt_ids: TokenIds,
    answer_ids: TokenIds,
    *,
    samples: int = 128,
    group: int = 16,
    seed: int = 0,
) -> float:
    """Estimates log p(answer | prompt), natural logarithm, with full attention over both.

    Costs `samples` evaluations of the whole sequence. Compiles for each bucket of the prompt's and
    the answer's length.

    Args:
      samples: Monte Carlo samples. group: most samples that go through the network together.
      seed: the same seed gives the same masks to answers of the same length.

    Raises:
      ValueError: the answer is empty, an id is outside the vocabulary, samples or group is below 1.
    """
    prompt, answer = _checked(model, prompt_ids, answer_ids, samples, group)
    rows = bucket_rows(answer.size)
    size = bucket(prompt.size + rows, 8)
    value = _on_prompt(
        model, jnp.asarray(pad_to(np.concatenate([prompt, answer]), size)),
        jnp.asarray(prompt.size), jnp.asarray(answer.size), random_key(seed),
        n=samples, group=_divisor(samples, group), rows=rows,
    )  # fmt: skip
    return float(value)


class KeptContext(NamedTuple):
    """A document's cache and the chunks that a question keeps."""

    cache: ChunkCache
    selection: Selection
    settings: SelectionConfig


def keep_context(
    model: MaskPredictor, prompt: ChunkedPrompt, config: SelectionConfig
) -> KeptContext:
    """Scores the chunks of one document for its question and keeps the best, before any answer.

    Raises:
      ConfigError: settings that the likelihood is not implemented for.
    """
    if config.keep_tokens is not None or isinstance(config.encoding, Bridge) or config.reselects:
        raise ConfigError(
            "log-likelihood is not implemented for keep_tokens, reselect and encoding 'bridge'"
        )
    if isinstance(config.scorer, OracleScorer):
        raise ConfigError("log-likelihood is not implemented for scorer 'oracle'")
    config = config.for_document(prompt.n_chunks)
    passing = dataclasses.replace(config.scoring(), encoding=config.encoding)
    draft = draft_response(model, prompt, passing)
    cache, scores = prefill(model, prompt, passing, draft=draft, key=jax.random.key(0))
    return KeptContext(cache, select(scores, config), config)


@functools.partial(jax.jit, static_argnames=("settings", "n", "group", "rows", "implementation"))
def _on_chunks(
    model: MaskPredictor,
    cache: ChunkCache,
    selection: Selection,
    tokens: Int[Array, "Q"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    key: Array,
    *,
    settings: SelectionConfig,
    n: int,
    group: int,
    rows: int,
    implementation: Implementation | None,
) -> Float[Array, ""]:
    """As `_on_prompt`; tokens: the question, the answer from `start` on, padding."""
    samples = answer_samples(key, length, n, rows)
    targets = lax.dynamic_slice_in_dim(tokens, start, rows)
    inside = (jnp.arange(tokens.size) >= start) & (jnp.arange(tokens.size) < start + length)
    blank = jnp.where(inside, model.config.mask_token_id, tokens)
    # The answer's number of rows must not be a shape, so the answer is the query's last rows. Only
    # joint encoding attends to its masks.
    ends = (start + length)[None]
    query_length = ends if settings.encoding.live_encoded else start[None]
    prefix_length = cache.prefix_length
    placement = place_chunks(
        cache, selection.chunk_ids, prefix_length, prefix_length + query_length, settings.positions
    )
    live_rows = cache.prefix_ids.shape[-1] + tokens.size
    request = EncodeRequest(
        selection.chunk_ids,
        placement,
        QueryRows(blank[None], query_length, blank[None]),
        init_live(model.config, 1, live_rows, model.dtype, model.mesh),
    )
    (pool, live), placement = encode_chosen(model, cache, request, settings, implementation)
    pool = cache.pool if pool is None else pool
    placement = dataclasses.replace(placement, total=prefix_length + ends)
    placement, live = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (group, *x.shape[1:])), (placement, live)
    )
    starts = jnp.full((group,), start)

    def score(masked: Array) -> Array:
        answers = jnp.where(masked, model.config.mask_token_id, targets)
        ids = dynamic_updates(jnp.broadcast_to(tokens, (group, tokens.size)), starts, answers)
        hidden, _, _ = live_forward(
            model,
            pool,
            placement,
            live,
            ids,
            placement.prefix_length,
            implementation=implementation,
        )
        return masked_log_likelihood(model, dynamic_slices(hidden, starts, rows), targets, masked)

    return _mean(lax.map(score, samples.masked.reshape(-1, group, rows)), samples, length)


def answer_log_likelihood_kept(
    model: MaskPredictor,
    context: KeptContext,
    query_ids: TokenIds,
    answer_ids: TokenIds,
    *,
    samples: int = 128,
    group: int = 16,
    seed: int = 0,
    implementation: Implementation | None = None,
) -> float:
    """Estimates log p(answer | prefix, kept chunks, query); see `answer_log_likelihood`.

    The kept chunks' KV is computed once; joint encoding attends to the masked answer. A sample
    costs the rows of query and answer, as a denoising step with recompute "response".

    Args:
      context: from `keep_context` with the same question.
    """
    query, answer = _checked(model, query_ids, answer_ids, samples, group)
    rows = bucket_rows(answer.size)
    size = bucket_rows(query.size + rows)
    value = _on_chunks(
        model, context.cache, context.selection,
        jnp.asarray(pad_to(np.concatenate([query, answer]), size)),
        jnp.asarray(query.size), jnp.asarray(answer.size), random_key(seed),
        settings=context.settings, n=samples, group=_divisor(samples, group), rows=rows,
        implementation=implementation,
    )  # fmt: skip
    return float(value)


def _checked(
    model: MaskPredictor, prompt: TokenIds, answer: TokenIds, samples: int, group: int
) -> tuple[np.ndarray, np.ndarray]:
    vocab = model.config.vocab_size
    ids = check_token_ids("prompt", prompt, vocab), check_token_ids("answer", answer, vocab)
    if ids[1].size == 0:
        raise ValueError("answer is empty")
    if samples < 1 or group < 1:
        raise ValueError(f"samples and group must be positive, got {samples} and {group}")
    return ids


def _divisor(samples: int, most: int) -> int:
    """Returns the largest group size, at most `most`, that divides the samples."""
    return next(size for size in range(min(most, samples), 0, -1) if samples % size == 0)
