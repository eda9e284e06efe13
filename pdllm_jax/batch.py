"""Many requests in one batch: ragged documents, or many questions about one document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pdllm_jax.answer import GenerationResult, OnBlock, answer, oracle_ids, request_keys
from pdllm_jax.cache import ChunkCache
from pdllm_jax.chunking import (
    ChunkedPrompt,
    TokenIds,
    batch_prompts,
    batch_size,
    bucket_rows,
    check_bos_id,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.config import ChunkConfig, ConfigError, DecodeConfig, SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.passes import keeps_pool
from pdllm_jax.planner import require_document_memory
from pdllm_jax.prefill import encode_document
from pdllm_jax.scoring import check_scorable
from pdllm_jax.selection import EMPTY_SLOT
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer


class Request(NamedTuple):
    """Token ids of a prompt: what comes before the document, the document, what comes after."""

    prefix: TokenIds
    context: TokenIds
    query: TokenIds


def generate_batch_ids(
    model: LLaDA,
    requests: Sequence[Request | tuple[TokenIds, TokenIds, TokenIds]],
    *,
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    bos_id: int | None = None,
    oracle: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> list[GenerationResult]:
    """Answers of a batch, each what `generate_ids` gives for the request alone.

    Documents, queries and the number of evaluations may differ. Chunks of all documents are encoded
    in common groups, the padding of short ones costs memory alone, and a request that is done reads
    no more chunks. The batch is filled up to a power of two, so that its sizes are few.

    Args:
      requests: (prefix, context, query) ids of each.
      oracle: of each request the ids of the chunks to keep, for the scorer "oracle" alone.
      seeds: of each request; 0 by default.
      on_block: called with (request, block, its tokens).
      memory_limit: as `generate`.

    Raises:
      MemoryLimitError: as `generate`.
      ValueError: as `generate_ids`, with the number of the request; no requests; guidance.
    """
    if not requests:
        raise ValueError("no requests")
    _check(decode)
    ids_of = _oracle_of(oracle, len(requests), "requests")
    vocab = model.config.vocab_size
    bos_id = check_bos_id(bos_id, vocab)
    tight = keeps_pool(selection, batched=True)
    prompts, named = [], []
    for i, (prefix, context, query) in enumerate(requests):

        def checked(name: str, ids: TokenIds, request: str = f"request {i}: ") -> np.ndarray:
            return check_token_ids(request + name, ids, vocab)

        before, document = checked("prefix", prefix), checked("context", context)
        after = checked("query", query)
        try:
            prompts.append(
                chunk_prompt(before, document, after, chunking, bos_id=bos_id, tight=tight)
            )
            named.append(oracle_ids(ids_of[i], selection, prompts[-1].n_chunks))
        except ValueError as error:
            raise ValueError(f"request {i}: {error}") from None
    size = batch_size(len(prompts))
    return answer(
        model,
        batch_prompts(prompts, size),
        selection,
        decode,
        request_keys(_seeds(seeds, len(prompts)), size),
        requests=len(prompts),
        oracle=_stacked(named, size),
        implementation=implementation,
        on_block=on_block,
        memory_limit=memory_limit,
    )


def _oracle_of(
    oracle: Sequence[Sequence[int]] | None, several: int, what: str
) -> Sequence[Sequence[int] | None]:
    if oracle is None:
        return [None] * several
    if len(oracle) != several:
        raise ValueError(f"oracle ids for {len(oracle)} {what}, of which there are {several}")
    return oracle


def _stacked(named: Sequence[np.ndarray | None], size: int) -> np.ndarray | None:
    """Ids of all requests, [size, M], EMPTY_SLOT behind them; None where none are given."""
    given = [ids for ids in named if ids is not None]
    if not given:
        return None
    table = np.full((size, max(ids.size for ids in given)), EMPTY_SLOT, np.int32)
    for row, ids in zip(table, given, strict=False):
        row[: ids.size] = ids
    return table


def ask_ids(
    model: LLaDA,
    cache: ChunkCache,
    queries: Sequence[TokenIds],
    *,
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    oracle: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> list[GenerationResult]:
    """Answers to questions about one document that was encoded before.

    Each costs a draft, its scored rows against the cached KV, the encoding of its own chunks if
    that is not "independent", and its decoding; the questions share one pool.

    Args:
      cache: from `encode_document`, or `prefill` with keep_pool; one document, not a batch.
      queries: token ids behind the document, of each question.
      oracle: of each question the ids of the chunks to keep, for the scorer "oracle" alone.
      selection, decode, seeds, on_block, memory_limit: as `generate_batch_ids`.

    Raises:
      ValueError: the cache does not hold the KV of every chunk, or several documents'; an empty
        question.
    """
    if not queries:
        raise ValueError("no questions")
    check_scorable(cache)
    if cache.batched:
        raise ValueError("the cache holds several documents: ask about one")
    _check(decode)
    ids_of = _oracle_of(oracle, len(queries), "questions")
    vocab = model.config.vocab_size
    checked = [check_token_ids(f"query {i}", ids, vocab) for i, ids in enumerate(queries)]
    for i, ids in enumerate(checked):
        if ids.size == 0:
            raise ValueError(f"query {i} is empty")
    n_chunks = int(np.count_nonzero(np.asarray(cache.lengths)))
    named = []
    for i, given in enumerate(ids_of):
        try:
            named.append(oracle_ids(given, selection, n_chunks))
        except ValueError as error:
            raise ValueError(f"question {i}: {error}") from None
    size = batch_size(len(checked))
    rows = bucket_rows(max(ids.size for ids in checked))
    query = np.zeros((size, rows), np.int32)
    query[: len(checked)] = [pad_to(ids, rows) for ids in checked]
    lengths = [ids.size for ids in checked] + [0] * (size - len(checked))

    def each(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (size, *x.shape))

    prompt = ChunkedPrompt(
        prefix=each(cache.prefix_ids),
        prefix_length=each(cache.prefix_length),
        chunks=jnp.zeros((size, 0, cache.tokens.shape[1]), jnp.int32),
        chunk_lengths=jnp.zeros((size, 0), jnp.int32),
        query=jnp.asarray(query),
        query_length=jnp.asarray(lengths, jnp.int32),
        anchors=cache.anchors,
    )
    return answer(
        model,
        prompt,
        selection,
        decode,
        request_keys(_seeds(seeds, len(checked)), size),
        cache=cache,
        requests=len(checked),
        oracle=_stacked(named, size),
        implementation=implementation,
        on_block=on_block,
        memory_limit=memory_limit,
    )


def encode_text(
    model: LLaDA,
    tokenizer: Tokenizer,
    context: str,
    *,
    instruction: str = INSTRUCTION,
    chunking: ChunkConfig = ChunkConfig(),
    encode_batch: int = 8,
    memory_limit: int | None = None,
) -> ChunkCache:
    """A document's cache, for `ask`: every chunk encoded behind the instruction, query-free.

    Returns the KV of every chunk of one document. memory_limit: as `generate`; raises
    MemoryLimitError as it does, ValueError for a document without tokens.
    """
    prefix, query = tokenizer.around_document("?", instruction)
    ids = tokenizer.encode(context)
    prompt = chunk_prompt(prefix, ids, query, chunking, bos_id=tokenizer.bos_id, tight=True)
    require_document_memory(model, prompt, encode_batch, limit=memory_limit)
    return encode_document(model, prompt, encode_batch=encode_batch)


def ask(
    model: LLaDA,
    tokenizer: Tokenizer,
    cache: ChunkCache,
    questions: Sequence[str],
    *,
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    oracle: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> list[GenerationResult]:
    """`ask_ids` on text, for a cache of `encode_text`. ValueError for a question without text."""
    for i, question in enumerate(questions):
        if not question.strip():
            raise ValueError(f"question {i} is empty")
    results = ask_ids(
        model,
        cache,
        [tokenizer.around_document(question)[1] for question in questions],
        selection=selection,
        decode=decode,
        oracle=oracle,
        seeds=seeds,
        implementation=implementation,
        on_block=on_block,
        memory_limit=memory_limit,
    )
    return [dataclasses.replace(one, text=tokenizer.decode(one.tokens)) for one in results]


def _check(decode: DecodeConfig) -> None:
    if decode.guidance > 0:
        raise ConfigError("guidance is implemented for method 'plain'")


def _seeds(seeds: Sequence[int] | None, requests: int) -> Sequence[int]:
    if seeds is None:
        return [0] * requests
    if len(seeds) != requests:
        raise ValueError(f"{len(seeds)} seeds for {requests} requests")
    return seeds
