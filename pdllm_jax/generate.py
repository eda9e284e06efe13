"""All of it: document and question in, answer out, with what was selected and where time went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation, require_device, resolve_implementation
from pdllm_jax.attention import dense_implementation
from pdllm_jax.chunking import (
    ChunkedPrompt,
    TokenIds,
    bucket,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.config import ChunkConfig, ConfigError, DecodeConfig, Recompute, SelectionConfig
from pdllm_jax.denoise import denoise
from pdllm_jax.model import LLaDA
from pdllm_jax.prefill import prefill
from pdllm_jax.scoring import draft_response
from pdllm_jax.selection import EMPTY_SLOT, select_top_k
from pdllm_jax.state import init_denoise
from pdllm_jax.timing import Stopwatch
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

Method = Literal["prefilling", "plain", "prefix-cache", "dual-cache"]

_RECOMPUTE: dict[Method, Recompute] = {
    "plain": "response",
    "prefix-cache": "suffix",
    "dual-cache": "block",
}


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What came out, and how.

    tokens: the response's G ids; text: decoded up to its end, None without a tokenizer.
    evaluations: denoising evaluations of the network (draft, scoring and encoding not among them).
    selection: {"chunks": ids kept, "scores": of every chunk or None where nothing was scored};
      None for the baselines.
    timings: seconds by phase: draft, score (with independent encoding: the pass that also encodes),
      encode, decode, compile (tracing and compiling, in no other phase), total.
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
) -> GenerationResult:
    """Answers a question about a document.

    Args:
      context, question: text, neither empty.
      method: "prefilling", or a baseline on the whole prompt: "plain" (LLaDA's generation),
        "prefix-cache" or "dual-cache" (Fast-dLLM).
      oracle: ids of the chunks to keep, at most `selection.top_k`, for the scorer "oracle" alone.
      seed: of everything random; the same seed gives the same tokens.

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
    key = jax.random.key(seed)
    if method == "prefilling":
        prompt = chunk_prompt(prefix, context, query, chunking, bos_id=bos_id)
        ids = _oracle_ids(oracle, selection, prompt.n_chunks)
        return _prefilling(model, prompt, selection, config, key, ids, implementation)
    if oracle is not None:
        raise ValueError(f"oracle ids are for method 'prefilling', not for {method!r}")
    prompt_ids = np.concatenate([prefix, context, query])
    if prompt_ids.size == 0:
        raise ValueError("prompt is empty")
    return _baseline(model, prompt_ids, config, key)


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


def _paths(model: LLaDA, **more: str) -> dict[str, str]:
    return {
        "attention": dense_implementation(model.dtype, model.config.head_dim),
        **more,
        "device": jax.devices()[0].device_kind,
        "dtype": str(model.dtype),
    }


def _finish(watch: Stopwatch) -> dict[str, float]:
    order = ("draft", "score", "encode", "decode", "compile")
    timings = {name: watch.seconds.get(name, 0.0) for name in order}
    return {**timings, "total": sum(timings.values())}


def _baseline(
    model: LLaDA, prompt: np.ndarray, config: DecodeConfig, key: jax.Array
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
        state = jax.block_until_ready(denoise(model, None, state, config=config))
    return GenerationResult(
        tokens=np.asarray(state.tokens[0]).tolist(),
        text=None,
        evaluations=int(state.evaluations[0]),
        selection=None,
        timings=_finish(watch),
        paths=_paths(model),
    )


def _prefilling(
    model: LLaDA,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    config: DecodeConfig,
    key: jax.Array,
    oracle: np.ndarray | None,
    implementation: Implementation | None,
) -> GenerationResult:
    path = resolve_implementation(
        implementation,
        dtype=model.dtype,
        head_size=model.config.head_dim,
        chunk_size=prompt.chunks.shape[1],
    )
    require_device(path)
    watch = Stopwatch()
    n = prompt.n_chunks
    k = n if selecting.scorer == "all" else min(selecting.top_k, n)
    if k == n and oracle is None:
        # Everything is kept: there is nothing to score.
        selecting = dataclasses.replace(selecting, scorer="all")
    # Top-K does not enter the pass: leave it out of what makes it recompile.
    passing = dataclasses.replace(selecting, top_k=1, keep_first=False)
    draft = None
    if selecting.scorer == "draft":
        with watch.phase("draft"):
            draft = jax.block_until_ready(draft_response(model, prompt, passing))
    with watch.phase("score"):
        cache, scores = prefill(
            model, prompt, passing, draft=draft, key=jax.random.fold_in(key, 1), oracle=oracle
        )
        chosen = select_top_k(scores, k, keep_first=selecting.keep_first)
        jax.block_until_ready((cache, chosen))
    with watch.phase("encode"):
        state = init_denoise(
            model,
            cache,
            chosen,
            prompt.query,
            config,
            key,
            query_length=prompt.query_length,
            encoding=selecting.encoding,
        )
        jax.block_until_ready(state)
    if selecting.encoding == "joint":
        cache = None
    with watch.phase("decode"):
        state = denoise(model, cache, state, config=config, implementation=path)
        jax.block_until_ready(state)
    chunks = [int(i) for i in np.asarray(chosen.chunk_ids) if i != EMPTY_SLOT]
    scored = None if selecting.scorer in ("all", "oracle") else np.asarray(scores)[:n].tolist()
    return GenerationResult(
        tokens=np.asarray(state.tokens[0]).tolist(),
        text=None,
        evaluations=int(state.evaluations[0]),
        selection={"chunks": chunks, "scores": scored},
        timings=_finish(watch),
        paths=_paths(
            model,
            chunk_attention=path,
            encoding=selecting.encoding,
            scorer=selecting.scorer,
        ),
    )
