"""All of it: document and question in, answer out, with what was selected and where time went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pdllm_jax.answer import (
    GenerationResult,
    OnBlock,
    answer,
    decode,
    phase_times,
    request_keys,
    used_paths,
)
from pdllm_jax.chunking import (
    ChunkedPrompt,
    TokenIds,
    bucket,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.config import ChunkConfig, ConfigError, DecodeConfig, Recompute, SelectionConfig
from pdllm_jax.model import LLaDA
from pdllm_jax.prefilled import Prefilled, begin, choose, keeps_pool
from pdllm_jax.start import init_denoise
from pdllm_jax.timing import Stopwatch
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

Method = Literal["prefilling", "plain", "prefix-cache", "dual-cache"]

_RECOMPUTE: dict[Method, Recompute] = {
    "plain": "response",
    "prefix-cache": "suffix",
    "dual-cache": "block",
}


def decode_config(method: Method, config: DecodeConfig) -> DecodeConfig:
    """config with the rows that a baseline recomputes; the method itself keeps its own choice."""
    if method not in get_args(Method):
        raise ConfigError(f"method {method!r} is not known ({', '.join(get_args(Method))})")
    if config.guidance > 0 and method != "plain":
        raise ConfigError(f"guidance is implemented for method 'plain', not for {method!r}")
    if method == "prefilling":
        return config
    return dataclasses.replace(config, recompute=_RECOMPUTE[method])


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

    Raises:
      ValueError: empty context or question, settings that do not fit; one line that names it.
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
        prompt, ids = _chunked(prefix, context, query, chunking, selection, bos_id, oracle)
        return answer(
            model, prompt, selection, config, request_keys([seed], 1),
            oracle=ids, implementation=implementation, on_block=on_block,
        )[0]  # fmt: skip
    if oracle is not None:
        raise ValueError(f"oracle ids are for method 'prefilling', not for {method!r}")
    prompt_ids = np.concatenate([prefix, context, query])
    if prompt_ids.size == 0:
        raise ValueError("prompt is empty")
    return _baseline(model, prompt_ids, config, jax.random.key(seed), on_block)


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
) -> Prefilled:
    """`generate_ids` up to its decoding, for `save_prefilled`; `finish` gives the same tokens.

    decode: what the state is made for; None stops before the chosen chunks are encoded (`begin`).
    """
    vocab = model.config.vocab_size
    prompt, ids = _chunked(
        check_token_ids("prefix", prefix_ids, vocab),
        check_token_ids("context", context_ids, vocab),
        check_token_ids("query", query_ids, vocab),
        chunking, selection, bos_id, oracle,
    )  # fmt: skip
    if decode is not None:
        decode = decode_config("prefilling", decode)
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
    return prompt, _oracle_ids(oracle, selection, prompt.n_chunks)


def _oracle_ids(
    oracle: Sequence[int] | None, config: SelectionConfig, n_chunks: int
) -> np.ndarray | None:
    """The ids, sorted, once each; None for all other scorers."""
    if config.scorer != "oracle":
        if oracle is not None:
            raise ValueError(f"oracle ids are for the scorer 'oracle', not for {config.scorer!r}")
        return None
    ids = np.unique(np.asarray([] if oracle is None else oracle, np.int32))
    if ids.size == 0:
        raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
    if ids[0] < 0 or ids[-1] >= n_chunks:
        raise ValueError(f"oracle ids {ids.tolist()} are not all inside [0, {n_chunks})")
    if ids.size > config.top_k:
        raise ValueError(f"oracle names {ids.size} chunks, top_k is {config.top_k}")
    return ids


def _baseline(
    model: LLaDA,
    prompt: np.ndarray,
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
            jnp.asarray(pad_to(prompt, bucket(prompt.size, 8))),
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
        paths=used_paths(model),
    )
