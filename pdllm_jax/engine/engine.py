"""The method from chunked prompts to tokens, phase by phase, for one request or a batch of them.

Everything between the phases stays on the device; the host waits at their ends, for the timings,
and once a block where blocks are handed out as they are finished.

All of it: document and question in, answer out, with what was selected and where time went.

Many requests in one batch: ragged documents, or many questions about one document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import (
    Implementation,
    implementation_name,
    require_device,
    resolve_implementation,
    resolve_matmul,
)
from pallas_kernels.chunk_attention.dense import dense_implementation
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.memory import require_baseline_memory, require_document_memory, require_memory
from pdllm_jax.engine.request import (
    Prefilled,
    Stopwatch,
    begin,
    choose,
    chunk_counts,
)
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.cache_methods import Method, cache_method
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    TokenIds,
    batch_prompts,
    batch_size,
    bucket,
    bucket_rows,
    check_bos_id,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.method.sampling import random_key
from pdllm_jax.method.scorers import OracleScorer
from pdllm_jax.method.scoring import check_scorable
from pdllm_jax.method.selection import EMPTY_SLOT
from pdllm_jax.network.config import ConfigError
from pdllm_jax.network.sharding import DATA, mesh_name, rows_axis
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

# (request, block, its tokens): called when a block of a response is finished.
OnBlock = Callable[[int, int, list[int]], None]


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What came out, and how.

    tokens: the response's G ids; text: decoded up to its end, None without a tokenizer.
    evaluations: denoising evaluations of the network (draft, scoring and encoding not among them).
    selection: {"chunks": ids kept, "scores": of every chunk or None where nothing was scored}, and
      with re-selection "rescored", how often, and "chunks_at_end"; None for the baselines.
    timings: seconds by phase: draft, score (where chunk KV is kept: the pass that also encodes),
      encode, decode, compile (tracing and compiling, in no other phase), total. Of the whole batch.
    paths: implementations used, by name.
    """

    tokens: list[int]
    text: str | None
    evaluations: int
    selection: dict[str, Any] | None
    timings: dict[str, float]
    paths: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def used_paths(model: MaskPredictor, rows: int, **more: str) -> dict[str, str]:
    """`GenerationResult.paths`. rows: of a narrow step, of all requests of a device together."""
    block = model.blocks[0]
    widest = [block.gate_proj.weight[...], block.up_proj.weight[...]]
    if model.mesh is not None:
        more["mesh"] = mesh_name(model.mesh)
        more["sums"] = "xla" if model.links is None else "mosaic_gpu"
        parts = [x.sharding.shard_shape(x.shape) for x in widest]
        widest = [jax.ShapeDtypeStruct(shape, model.dtype) for shape in parts]
    return {
        "attention": dense_implementation(model.dtype, model.config.head_dim),
        "matmul": resolve_matmul(None, rows, tuple(widest), "swiglu"),
        **more,
        "device": jax.devices()[0].device_kind,
        "dtype": str(model.dtype),
    }


def phase_times(watch: Stopwatch) -> dict[str, float]:
    """`GenerationResult.timings`."""
    order = ("draft", "score", "encode", "decode", "compile")
    timings = {name: watch.seconds.get(name, 0.0) for name in order}
    return {**timings, "total": sum(timings.values())}


def decode(
    model: MaskPredictor,
    cache: ChunkCache | None,
    state: DenoiseState,
    config: DecodeConfig,
    *,
    implementation: Implementation | None = None,
    selecting: SelectionConfig | None = None,
    on_block: OnBlock | None = None,
) -> DenoiseState:
    """`denoise`; with `on_block` block by block, the next one under way before one is fetched."""
    if on_block is None:
        return denoise(
            model, cache, state,
            config=config, implementation=implementation, selecting=selecting,
        )  # fmt: skip
    sent = np.asarray(state.block).tolist()
    pending: list[tuple[Array, Array]] = []

    def send(tokens: Array, done: Array) -> None:
        for request, row in enumerate(np.asarray(tokens)):
            for block in range(sent[request], int(done[request])):
                piece = row[block * config.block_length :][: config.block_length].tolist()
                on_block(request, block, piece)
                sent[request] = block + 1
                if not set(piece).isdisjoint(config.stop_ids):
                    sent[request] = config.n_blocks  # what follows is filling
                    break

    for block in range(config.n_blocks):
        state = denoise(
            model, cache, state,
            config=config, implementation=implementation, selecting=selecting,
            until=jnp.int32(block + 1),
        )  # fmt: skip
        # Copies, for the state's buffers go into the next call.
        pending.append((jnp.copy(state.tokens), jnp.copy(state.block)))
        if len(pending) > 1:
            send(*pending.pop(0))
    send(*pending.pop())
    return state


def oracle_ids(
    oracle: Sequence[int] | None, config: SelectionConfig, n_chunks: int
) -> np.ndarray | None:
    """Ids that a caller names, sorted, once each; None for all scorers but "oracle"."""
    if not isinstance(config.scorer, OracleScorer):
        if oracle is not None:
            raise ValueError(
                f"oracle ids are for the scorer 'oracle', not for {config.scorer.name!r}"
            )
        return None
    ids = np.unique(np.asarray([] if oracle is None else oracle))
    if ids.size == 0:
        raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError("oracle ids must be integers")
    if ids[0] < 0 or ids[-1] >= n_chunks:
        raise ValueError(f"oracle ids {ids.tolist()} are not all inside [0, {n_chunks})")
    if ids.size > config.top_k:
        raise ValueError(f"oracle names {ids.size} chunks, top_k is {config.top_k}")
    return ids.astype(np.int32)


def answer(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    config: DecodeConfig,
    keys: Array,
    *,
    cache: ChunkCache | None = None,
    requests: int = 1,
    oracle: np.ndarray | None = None,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> list[GenerationResult]:
    """Draft, score, select, encode, decode.

    Args:
      prompt: of one request, or a batch; those behind the first `requests` are filling. With a
        `cache`, the questions about its document(s): chunks are then not read.
      keys: one for each request of the batch, [B].
      cache: document(s) encoded before, with the KV of every chunk.
      oracle: ids of the chunks to keep, [B, M]; ids of no chunk name nothing.
      memory_limit: bytes that the device may hold, by default what it says that it gives.

    Raises:
      MemoryLimitError: it would hold more, by the plan (`planner`); nothing was computed then.
    """
    require_answer_memory(
        model, prompt, selecting, config,
        cache=cache, named=oracle is not None, implementation=implementation, limit=memory_limit,
    )  # fmt: skip
    watch = Stopwatch()
    chosen = choose(
        model, prompt, selecting, keys,
        cache=cache, requests=requests, oracle=oracle, implementation=implementation, watch=watch,
    )  # fmt: skip
    begun = begin(model, chosen, config, implementation=implementation, watch=watch)
    del chosen, cache  # the document's KV may go
    return finish(model, begun, implementation=implementation, on_block=on_block, watch=watch)


def require_answer_memory(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    config: DecodeConfig,
    *,
    cache: ChunkCache | None = None,
    named: bool = False,
    implementation: Implementation | None = None,
    limit: int | None = None,
) -> None:
    """Refuses what `answer` is about to do where the device would run out: MemoryLimitError.

    Arguments as `answer`. named: an oracle names the chunks. limit: its memory_limit.
    """
    n = int(chunk_counts(prompt, cache).max())
    require_memory(
        model, prompt, selecting.for_document(n, named=named), config, cache=cache,
        implementation=_chunk_path(model, prompt.chunk_size, selecting, implementation),
        limit=limit,
    )  # fmt: skip


def finish(
    model: MaskPredictor,
    prefilled: Prefilled,
    *,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    watch: Stopwatch | None = None,
) -> list[GenerationResult]:
    """Decodes what `begin` has begun, here or in another process; `prefilled.state` is consumed.

    implementation: of attention over chunks, by default what the device runs. on_block: as
    `generate`. watch: gets the time of "decode". Returns a result for each of the requests.

    Raises:
      ValueError: there is no state.
    """
    selecting, state, config = prefilled.selecting, prefilled.state, prefilled.decode
    if state is None or config is None:
        raise ValueError("there is no state to decode from: call begin first")
    pool = state.pool
    if pool is None and prefilled.cache is not None:
        pool = prefilled.cache.pool
    assert pool is not None
    path = _chunk_path(model, pool.k.shape[3], selecting, implementation)
    watch = watch or Stopwatch()
    again = selecting.reselect != "never"
    with watch.phase("decode"):
        state = decode(
            model, prefilled.cache, state, config,
            implementation=implementation, selecting=selecting if again else None,
            on_block=on_block,
        )  # fmt: skip
        jax.block_until_ready(state)
    batch = state.tokens.shape[0]
    if model.mesh is not None and rows_axis(model.mesh, batch):
        batch //= model.mesh.shape[DATA]
    rows = batch * config.block_length
    paths = used_paths(
        model,
        rows,
        chunk_attention=implementation_name(path),
        encoding=selecting.encoding.name,
        scorer=selecting.scorer.name,
    )
    scored = None if prefilled.scores is None else np.asarray(prefilled.scores)
    ids = prefilled.selection.chunk_ids
    chosen_ids, at_end = (np.asarray(x) for x in (ids, state.selected))
    counts, timings = np.asarray(prefilled.counts), phase_times(watch)
    counts = np.broadcast_to(counts, len(chosen_ids))
    results = []
    for b in range(prefilled.requests):
        selection: dict[str, Any] = {
            "chunks": _existing(chosen_ids[b]),
            "scores": None if scored is None else scored[b, : counts[b]].tolist(),
        }
        if again:
            selection["rescored"] = int(state.rescored[b])
            selection["chunks_at_end"] = _existing(at_end[b])
        results.append(
            GenerationResult(
                tokens=np.asarray(state.tokens[b]).tolist(),
                text=None,
                evaluations=int(state.evaluations[b]),
                selection=selection,
                timings=timings,
                paths=paths,
            )
        )
    return results


def _chunk_path(
    model: MaskPredictor,
    chunk_size: int,
    selecting: SelectionConfig,
    implementation: Implementation | None,
) -> Implementation:
    """The implementation of the attention over chunks; ValueError where it does not run here."""
    sparse = selecting.keep_tokens
    size = chunk_size if sparse is None else min(sparse, chunk_size)
    path = resolve_implementation(
        implementation, dtype=model.dtype, head_size=model.config.head_dim, chunk_size=size
    )
    require_device(path)
    return path


def _existing(ids: np.ndarray) -> list[int]:
    return [int(i) for i in ids if i != EMPTY_SLOT]


def request_keys(seeds: Sequence[int], size: int) -> Array:
    """Keys of a batch's requests, [size]: each by its own seed, whatever its place in the batch."""
    padded = [*seeds, *[0] * (size - len(seeds))]
    return jnp.stack([jax.random.fold_in(random_key(seed), 0) for seed in padded])


def generate(
    model: MaskPredictor,
    tokenizer: Tokenizer,
    *,
    context: str,
    question: str,
    method: Method = "prefilling",
    instruction: str = INSTRUCTION,
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    oracle: Sequence[int] | None = None,
    seed: int = 0,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> GenerationResult:
    """Answers a question about a document.

    Args:
      context, question: text, neither empty.
      method: "prefilling", or a baseline on the whole prompt: "plain" (LLaDA's generation),
        "prefix-cache" or "dual-cache" (Fast-dLLM).
      oracle: ids of the chunks to keep, at most `selection.top_k`, for the scorer "oracle" alone.
      seed: of everything random; the same seed gives the same tokens.
      on_block: called with (0, block, its tokens) when a block is finished, the last ones of a text
        that ends early excepted; the host then waits once a block. A slot that still holds the mask
        token (the model predicted that) may be filled with a later block.
      memory_limit: bytes that the device may hold; by default what it says that it gives, and
        nothing is refused where it does not say (the CPU).

    Raises:
      ValueError: empty context or question, settings that do not fit; one line that names it.
      MemoryLimitError: a ValueError; by its plan the answer would take more memory than there is
        (`plan_memory`). Nothing was computed then.
    """
    if not question.strip():
        raise ValueError("question is empty")
    prefix, query = tokenizer.around_document(question, instruction)
    result = generate_ids(
        model,
        prefix,
        tokenizer.encode(context),
        query,
        method=method,
        chunking=chunking,
        selection=selection,
        decode=decode,
        bos_id=tokenizer.bos_id,
        oracle=oracle,
        seed=seed,
        implementation=implementation,
        on_block=on_block,
        memory_limit=memory_limit,
    )
    return dataclasses.replace(result, text=tokenizer.decode(result.tokens))


def generate_ids(
    model: MaskPredictor,
    prefix_ids: TokenIds,
    context_ids: TokenIds,
    query_ids: TokenIds,
    *,
    method: Method = "prefilling",
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    bos_id: int | None = None,
    oracle: Sequence[int] | None = None,
    seed: int = 0,
    implementation: Implementation | None = None,
    on_block: OnBlock | None = None,
    memory_limit: int | None = None,
) -> GenerationResult:
    """As `generate`, on token ids. For a baseline, prefix + context + query is the prompt.

    bos_id: token of the anchors; the first token of the prefix by default.
    oracle: ids of the chunks to keep, at most `selection.top_k`, for the scorer "oracle" alone.
    """
    config = cache_method(method).decode_config(decode)
    vocab = model.config.vocab_size
    prefix = check_token_ids("prefix", prefix_ids, vocab)
    context = check_token_ids("context", context_ids, vocab)
    query = check_token_ids("query", query_ids, vocab)
    if method == "prefilling":
        bos_id = check_bos_id(bos_id, vocab)
        prompt, ids = _chunked(prefix, context, query, chunking, selection, bos_id, oracle)
        return answer(
            model, prompt, selection, config, request_keys([seed], 1),
            oracle=_stacked([ids], 1), implementation=implementation, on_block=on_block,
            memory_limit=memory_limit,
        )[0]  # fmt: skip
    if oracle is not None:
        raise ValueError(f"oracle ids are for method 'prefilling', not for {method!r}")
    prompt_ids = np.concatenate([prefix, context, query])
    if prompt_ids.size == 0:
        raise ValueError("prompt is empty")
    rows = bucket(prompt_ids.size, 8)
    require_baseline_memory(model, rows, config, limit=memory_limit)
    return _baseline(model, prompt_ids, rows, config, random_key(seed), on_block)


def prefill_request(
    model: MaskPredictor,
    prefix_ids: TokenIds,
    context_ids: TokenIds,
    query_ids: TokenIds,
    *,
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig | None = DecodeConfig(),
    bos_id: int | None = None,
    oracle: Sequence[int] | None = None,
    seed: int = 0,
    implementation: Implementation | None = None,
    memory_limit: int | None = None,
) -> Prefilled:
    """`generate_ids` up to its decoding, for `save_prefilled`; `finish` gives the same tokens.

    decode: what the state is made for; None stops before the chosen chunks are encoded (`begin`).
    memory_limit: as `generate`, of the whole answer; with decode None of one that has one token.
    Raises what `generate_ids` raises.
    """
    vocab = model.config.vocab_size
    prompt, ids = _chunked(
        check_token_ids("prefix", prefix_ids, vocab),
        check_token_ids("context", context_ids, vocab),
        check_token_ids("query", query_ids, vocab),
        chunking, selection, check_bos_id(bos_id, vocab), oracle,
    )  # fmt: skip
    planned = DecodeConfig(gen_length=1, block_length=1)
    if decode is not None:
        decode = planned = cache_method("prefilling").decode_config(decode)
    require_answer_memory(
        model, prompt, selection, planned,
        named=ids is not None, implementation=implementation, limit=memory_limit,
    )  # fmt: skip
    chosen = choose(
        model, prompt, selection, request_keys([seed], 1),
        oracle=_stacked([ids], 1), implementation=implementation,
    )  # fmt: skip
    if decode is None:
        return chosen
    return begin(model, chosen, decode, implementation=implementation)


def _chunked(
    prefix: np.ndarray,
    context: np.ndarray,
    query: np.ndarray,
    chunking: ChunkConfig,
    selection: SelectionConfig,
    bos_id: int | None,
    oracle: Sequence[int] | None,
) -> tuple[ChunkedPrompt, np.ndarray | None]:
    """The prompt as it is prefilled, and the oracle's chunks."""
    tight = selection.keeps_pool()
    prompt = chunk_prompt(prefix, context, query, chunking, bos_id=bos_id, tight=tight)
    return prompt, oracle_ids(oracle, selection, prompt.n_chunks)


def _baseline(
    model: MaskPredictor,
    prompt: np.ndarray,
    rows: int,
    config: DecodeConfig,
    key: jax.Array,
    on_block: OnBlock | None,
) -> GenerationResult:
    watch = Stopwatch()
    with watch.phase("decode"):
        state = init_denoise(
            model,
            None,
            None,
            jnp.asarray(pad_to(prompt, rows, -1))[None],
            config,
            key,
        )
        state = decode(model, None, state, config, on_block=on_block)
        jax.block_until_ready(state)
    return GenerationResult(
        tokens=np.asarray(state.tokens[0]).tolist(),
        text=None,
        evaluations=int(state.evaluations[0]),
        selection=None,
        timings=phase_times(watch),
        paths=used_paths(model, config.block_length),
    )


class Request(NamedTuple):
    """Token ids of a prompt: what comes before the document, the document, what comes after."""

    prefix: TokenIds
    context: TokenIds
    query: TokenIds


def generate_batch_ids(
    model: MaskPredictor,
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
    tight = selection.keeps_pool(documents=len(requests))
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
    model: MaskPredictor,
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
    if cache.documents > 1:
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
    query = np.full((size, rows), -1, np.int32)
    query[: len(checked)] = [pad_to(ids, rows, -1) for ids in checked]
    lengths = [ids.size for ids in checked] + [0] * (size - len(checked))

    def each(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (size, *x.shape[1:]))

    prompt = ChunkedPrompt(
        prefix=each(cache.prefix_ids),
        prefix_length=each(cache.prefix_length),
        chunks=jnp.zeros((size, 0, cache.tokens.shape[2]), jnp.int32),
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
    model: MaskPredictor,
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
    model: MaskPredictor,
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
