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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.cache import ChunkCache, Placement, dynamic_updates, init_live
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
from pdllm_jax.method.live_forward import Context, QueryRows, live_forward, predicting_rows
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.method.scorers import OracleScorer
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.method.selection import Selection, select
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive, random_key
from pdllm_jax.rules import ConfigError

_LOGIT_ROWS = 64  # logits in memory at once


def answer_samples(
    key: Array, length: Int[Array, ""], n: int, rows: int
) -> tuple[Bool[Array, "n A"], Int[Array, "n"]]:
    """Draws n masks over the first `length` of `rows` places; returns them and their counts."""
    first, orders = derive(key, Use.MASK_COUNTS), derive(key, Use.MASKS, jnp.arange(n))
    steps = jnp.round(jnp.arange(n) * (length / n)).astype(jnp.int32)
    counts = (jax.random.randint(first, (), 0, length) + steps) % length + 1
    noise = jax.vmap(lambda key: jax.random.uniform(key, (rows,)))(orders)
    noise = jnp.where(jnp.arange(rows) < length, noise, 2.0)
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return rank < counts[:, None], counts


def masked_log_likelihood(
    model: MaskPredictor,
    hidden: Float[Array, "n A M"],
    targets: Int[Array, "A"],
    masked: Bool[Array, "n A"],
    unconditional: Float[Array, "n A M"] | None = None,
    guidance: Float[Array, ""] | float = 0.0,
) -> Float[Array, "n"]:
    """Sums the log-probability of the masked targets, from rows before the final norm.

    Only masked rows go through the LM head, in blocks. With the rows of a masked prompt, u, the
    logits are guided: u + (1 + guidance) (c - u).
    """
    n, length = masked.shape
    rows = min(_LOGIT_ROWS, n * length)
    order = jnp.argsort(~masked.reshape(-1), stable=True)
    flat = hidden.reshape(n * length, -1)

    def block(i: Array, total: Array) -> Array:
        at = i * rows + jnp.arange(rows)
        row = order[jnp.minimum(at, n * length - 1)]
        logits = model.logits(model.final_norm(flat[row]))
        if unconditional is not None:
            blind = unconditional.reshape(n * length, -1)[row]
            base = model.logits(model.final_norm(blind))
            logits = base + (guidance + 1) * (logits - base)
        counts = masked.reshape(-1)[row] & (at < n * length)
        values = jnp.where(counts, log_probability(logits, targets[row % length]), 0.0)
        return total.at[row // length].add(values)

    blocks = -(-jnp.count_nonzero(masked) // rows)
    return lax.fori_loop(0, blocks, block, jnp.zeros((n,), jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptContext:
    """A document's cache and the chunks that a question keeps."""

    cache: ChunkCache
    selection: Selection
    settings: SelectionConfig = dataclasses.field(metadata={"static": True})


class _Rows(NamedTuple):
    """Prompt or question, the answer from `start` on, padding."""

    tokens: Int[Array, "T"]
    start: Int[Array, ""]
    length: Int[Array, ""]


def _on_prompt(rows: _Rows, group: int) -> Context:
    """Returns what the rows of a group of samples attend to: each other."""
    zeros, none = jnp.zeros((group,), jnp.int32), jnp.zeros((group, 0), jnp.int32)
    total = jnp.full((group,), rows.start + rows.length)
    return Context(None, Placement(none, none, zeros, zeros, total), None)


def _on_chunks(
    model: MaskPredictor, kept: KeptContext, rows: _Rows, group: int, path: Implementation | None
) -> Context:
    """Returns what the rows of a group of samples attend to: prefix, kept chunks and each other."""
    cache, settings, selected = kept.cache, kept.settings, kept.selection.chunk_ids
    tokens, start, length = rows
    inside = (jnp.arange(tokens.size) >= start) & (jnp.arange(tokens.size) < start + length)
    blank = jnp.where(inside, model.config.mask_token_id, tokens)[None]
    # The answer's number of rows must not be a shape, so the answer is the query's last rows. Only
    # joint encoding attends to its masks.
    ends = (start + length)[None]
    query_length = ends if settings.encoding.live_encoded else start[None]
    prefix = cache.prefix_length
    placement = cache.place(selected, prefix, prefix + query_length, settings.positions)
    live_rows = cache.prefix_ids.shape[-1] + tokens.size
    live = init_live(model.config, 1, live_rows, model.dtype, model.mesh)
    query = QueryRows(blank, query_length, blank)
    request = EncodeRequest(selected, placement, query, live, path)
    context = encode_chosen(model, cache, request, settings)
    placement = dataclasses.replace(context.placement, total=prefix + ends)
    placement, live = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (group, *x.shape[1:])), (placement, context.live)
    )
    return Context(cache.pool if context.pool is None else context.pool, placement, live, path)


@functools.partial(jax.jit, static_argnames=("samples", "group", "most", "implementation"))
def _estimate(
    model: MaskPredictor,
    kept: KeptContext | None,
    rows: _Rows,
    key: Array,
    *,
    samples: int,
    group: int,
    most: int,
    implementation: Implementation | None,
    guidance: Float[Array, ""] | None,
) -> Float[Array, ""]:
    """most: rows of an answer at most; as many tokens follow rows.start."""
    tokens, start, length = rows
    masks, counts = answer_samples(key, length, samples, most)
    targets = lax.dynamic_slice_in_dim(tokens, start, most)
    if kept is None:
        context = _on_prompt(rows, group)
    else:
        context = _on_chunks(model, kept, rows, group, implementation)
    starts = jnp.full((group,), start)

    def score(masked: Array) -> Array:
        answers = jnp.where(masked, model.config.mask_token_id, targets)
        ids = dynamic_updates(jnp.broadcast_to(tokens, (group, tokens.size)), starts, answers)
        hidden = predicting_rows(model, live_forward(model, context, ids)[0], starts, most)
        if guidance is None:
            return masked_log_likelihood(model, hidden, targets, masked)
        ids = jnp.where(jnp.arange(tokens.size) < start, model.config.mask_token_id, ids)
        blind = predicting_rows(model, live_forward(model, context, ids)[0], starts, most)
        return masked_log_likelihood(model, hidden, targets, masked, blind, guidance)

    sums = lax.map(score, masks.reshape(-1, group, most))
    return (sums.reshape(-1) * (length / counts)).mean()


def answer_log_likelihood(
    model: MaskPredictor,
    prompt_ids: TokenIds,
    answer_ids: TokenIds,
    *,
    samples: int = 128,
    group: int = 16,
    seed: int = 0,
    guidance: float = 0.0,
) -> float:
    """Estimates log p(answer | prompt), natural logarithm, with full attention over both.

    Costs `samples` evaluations of the whole sequence, twice as many with guidance. Compiles for
    each bucket of the prompt's and the answer's length.

    Args:
      samples: Monte Carlo samples. group: most samples that go through the network together.
      seed: the same seed gives the same masks to answers of the same length.
      guidance: scale of classifier-free guidance, as of `DecodeConfig`: the unconditional logits
        are those of the masked prompt.

    Raises:
      ValueError: the answer is empty, an id is outside the vocabulary, samples or group is below 1,
        guidance is negative.
    """
    plan: dict[str, Any] = {"samples": samples, "group": group, "seed": seed}
    return answer_log_likelihood_kept(
        model, None, prompt_ids, answer_ids, guidance=guidance, **plan
    )


def keep_context(
    model: MaskPredictor, prompt: ChunkedPrompt, config: SelectionConfig, *, seed: int = 0
) -> KeptContext:
    """Scores the chunks of one document for its question and keeps the best, before any answer.

    Args:
      seed: of the scorer "random": the chunks that a request with this seed keeps.

    Raises:
      ConfigError: settings that the likelihood is not implemented for; a wrong seed.
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
    cache, scores = prefill(model, prompt, passing, draft=draft, key=random_key(seed)[None])
    return KeptContext(cache, select(scores, config), config)


def answer_log_likelihood_kept(
    model: MaskPredictor,
    context: KeptContext | None,
    query_ids: TokenIds,
    answer_ids: TokenIds,
    *,
    samples: int = 128,
    group: int = 16,
    seed: int = 0,
    guidance: float = 0.0,
    implementation: Implementation | None = None,
) -> float:
    """Estimates log p(answer | prefix, kept chunks, query); see `answer_log_likelihood`.

    The kept chunks' KV is computed once; joint encoding attends to the masked answer. A sample
    costs the rows of query and answer, as a denoising step with recompute "response".

    Args:
      context: from `keep_context` with the same question; None where the query is a whole prompt.
      guidance: for a whole prompt alone.
    """
    vocab = model.config.vocab_size
    prompt = check_token_ids("prompt", query_ids, vocab)
    answer = check_token_ids("answer", answer_ids, vocab)
    if answer.size == 0:
        raise ValueError("answer is empty")
    if samples < 1 or group < 1:
        raise ValueError(f"samples and group must be positive, got {samples} and {group}")
    if not guidance >= 0 or (guidance > 0 and context is not None):
        allowed = "at least 0 for a whole prompt, 0 for kept chunks"
        raise ConfigError(f"guidance of a log-likelihood must be {allowed}, got {guidance!r}")
    most = bucket_rows(answer.size)
    size = bucket(prompt.size + most, 8) if context is None else bucket_rows(prompt.size + most)
    tokens = pad_to(np.concatenate([prompt, answer]), size)
    rows = _Rows(*map(jnp.asarray, (tokens, prompt.size, answer.size)))
    # The largest group that divides the samples.
    group = next(n for n in range(min(group, samples), 0, -1) if samples % n == 0)
    plan: dict[str, Any] = {"samples": samples, "group": group, "most": most}
    plan |= {"guidance": jnp.float32(guidance) if guidance > 0 else None}
    key = random_key(seed)
    return float(_estimate(model, context, rows, key, implementation=implementation, **plan))
