"""Step 2: scores of a document's chunks for a question, from KV that a pass has kept."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation
from pdllm_jax.config import SelectionConfig
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import ChunkedPrompt, count_ids
from pdllm_jax.method.scorers import Draft, Question, Scorer, ScoreRequest
from pdllm_jax.network.sharding import constrain
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import Use, derive


@functools.partial(jax.jit, static_argnames=("config",))
def draft_response(
    model: MaskPredictor, prompt: ChunkedPrompt | Question, config: SelectionConfig
) -> Draft | None:
    """Guesses the response's first tokens from prefix and query alone, `draft_steps` evaluations.

    Slot 0 first, then each time the most confident of the slots that are still masked.

    Returns:
      Tokens [B, d] int32, d = `draft_length`, and which of them are guesses [B, d] bool; None for a
      scorer that needs no draft.
    """
    question = prompt.question if isinstance(prompt, ChunkedPrompt) else prompt
    draft = config.scorer.draft(model, question)
    return None if draft is None else constrain(model.mesh, draft)


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
    """Scores a document's chunks for other questions, from the KV that `prefill` has kept.

    The scores that `prefill` gives for the same question and scorer, at the cost of the question's
    own rows. Pure; compiles once for each (shapes, config, implementation).

    Args:
      cache: of `prefill` or `encode_document`, of one document for all questions or one for each.
        Its pool is needed by scorers with copies of the query. "attention" and "heads" read it, and
        go over the document's tokens again without it.
      query_ids: [B, Q], padded with -1, or with any ids behind query_length where given.
      draft, key, oracle: as in `prefill`.
      implementation: of the attention over chunks, as `chunk_attention` names them.

    Returns:
      Natural log, float32 ("attention", "heads": a share of one), -inf for chunks that are padding.

    Raises:
      ValueError: the cache holds no pool, or a streamed document; the number of questions differs
        from the number of documents or drafts.
    """
    query_ids = jnp.asarray(query_ids, jnp.int32)
    batch = query_ids.shape[0]
    document = cache.document_of(batch)
    if config.scorer.needs_pool:
        check_scorable(cache)
    if draft is not None and draft.tokens.shape[0] != batch:
        raise ValueError(f"{draft.tokens.shape[0]} drafts for {batch} questions")
    if query_length is None:
        query_length = count_ids(query_ids)
    prefix = cache.prefix_ids[document], cache.prefix_length[document]
    request = ScoreRequest(
        Question(*prefix, query_ids, jnp.asarray(query_length, jnp.int32)),
        cache.lengths[document] > 0,
        draft=draft,
        keys=scoring_keys(key),
        oracle=oracle,
        encode_batch=config.encode_batch,
        implementation=implementation,
    )
    return run_scorer(config.scorer, model, cache, request)


def scoring_keys(key: Array | None) -> Array | None:
    """Returns what a scorer may draw from, derived from a request's key."""
    return None if key is None else derive(key, Use.SCORES)


def check_scorable(cache: ChunkCache) -> None:
    """Raises ValueError where the cache does not hold the KV of every chunk."""
    if cache.pool is None:
        raise ValueError("the cache holds no chunk KV to score with: prefill with keep_pool=True")
    if cache.streamed:
        raise ValueError("the cache holds the kept chunks alone: no other chunk can be scored")


def run_scorer(
    scorer: Scorer, model: MaskPredictor, cache: ChunkCache, request: ScoreRequest
) -> Float[Array, "B N"]:
    """Returns `scorer.scores`, -inf for chunks that were not to be scored."""
    scores = scorer.scores(model, cache, request)
    return constrain(model.mesh, jnp.where(request.wanted, scores, -jnp.inf))
