"""All of it: document and question in, answer out, with what was selected and where time went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pdllm_jax.answer import (
    GenerationResult,
    OnBlock,
    answer,
    decode,
    oracle_ids,
    phase_times,
    random_key,
    request_keys,
    require_answer_memory,
    used_paths,
)
from pdllm_jax.chunking import (
    ChunkedPrompt,
    TokenIds,
    bucket,
    check_bos_id,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.passes import Method, decode_config, keeps_pool
from pdllm_jax.planner import require_baseline_memory
from pdllm_jax.prefilled import Prefilled, begin, choose
from pdllm_jax.start import init_denoise
from pdllm_jax.timing import Stopwatch
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer


def generate(
    model: LLaDA,
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
    model: LLaDA,
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
    config = decode_config(method, decode)
    vocab = model.config.vocab_size
    prefix = check_token_ids("prefix", prefix_ids, vocab)
    context = check_token_ids("context", context_ids, vocab)
    query = check_token_ids("query", query_ids, vocab)
    if method == "prefilling":
        bos_id = check_bos_id(bos_id, vocab)
        prompt, ids = _chunked(prefix, context, query, chunking, selection, bos_id, oracle)
        return answer(
            model, prompt, selection, config, request_keys([seed], 1),
            oracle=ids, implementation=implementation, on_block=on_block,
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
    model: LLaDA,
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
        decode = planned = decode_config("prefilling", decode)
    require_answer_memory(
        model, prompt, selection, planned,
        named=ids is not None, implementation=implementation, limit=memory_limit,
    )  # fmt: skip
    chosen = choose(
        model, prompt, selection, request_keys([seed], 1),
        oracle=ids, implementation=implementation,
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
    tight = keeps_pool(selection, batched=False)
    prompt = chunk_prompt(prefix, context, query, chunking, bos_id=bos_id, tight=tight)
    return prompt, oracle_ids(oracle, selection, prompt.n_chunks)


def _baseline(
    model: LLaDA,
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
            jnp.asarray(pad_to(prompt, rows)),
            config,
            key,
            query_length=jnp.asarray(prompt.size),
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
