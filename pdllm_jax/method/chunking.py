"""Step 1: a prompt as prefix, chunks with anchors, and query, in bucketed shapes.

Runs on the host, in numpy. Shapes decide what compiles, so lengths are rounded up to buckets and
the true lengths are arrays. No token is lost. Nothing attends to padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pdllm_jax.config import ChunkConfig
from pdllm_jax.method.scorers import Question

TokenIds = Sequence[int] | np.ndarray

_ANY = 1 << 31  # size of a vocabulary with every int32 id


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedPrompt:
    """A batch of long prompts, each cut into chunks; int32 arrays, padded to buckets.

    prefix: tokens before the document, padding behind the length.
    chunks: the document; empty chunks (length 0) come last.
    query: tokens after the document, -1 behind the length.
    anchors: chunks begin with an anchor.
    """

    prefix: Int[Array, "B P"]
    prefix_length: Int[Array, "B"]
    chunks: Int[Array, "B N C"]
    chunk_lengths: Int[Array, "B N"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, "B"]
    anchors: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def n_chunks(self) -> int:
        """Chunks that hold tokens, the maximum over the batch. Waits for the device."""
        return int(np.count_nonzero(np.asarray(self.chunk_lengths), axis=-1).max())

    @property
    def chunk_size(self) -> int:
        """C, rows of a chunk."""
        return self.chunks.shape[-1]

    @property
    def question(self) -> Question:
        """Prefix and query, without the document."""
        return Question(self.prefix, self.prefix_length, self.query, self.query_length)


def count_ids(query_ids: Int[Array, "B Q"]) -> Int[Array, "B"]:
    """Counts the ids of each row that are not padding (-1)."""
    return jnp.count_nonzero(query_ids >= 0, axis=1).astype(jnp.int32)


def bucket(n: int, granularity: int = 1, parts: int = 8) -> int:
    """Rounds n up to a multiple of a `parts`-th of the power of two below it, or of granularity.

    Lengths up to n have about `parts` log2(n) buckets.
    """
    if n <= 0:
        return 0
    step = max(granularity, (1 << (n - 1).bit_length()) // (2 * parts))
    return -(-n // step) * step


def bucket_rows(n: int) -> int:
    """Returns the padded rows of prefix or query: two buckets an octave, at least 32."""
    return 0 if n == 0 else max(32, bucket(n, 8, 2))


def bucket_chunks(n: int, tight: bool = False) -> int:
    """Returns the padded number of chunks: a power of two. Padding costs its token ids alone.

    tight: at most an eighth more than n, for documents whose KV is all kept.
    """
    return bucket(n) if tight else 1 << (n - 1).bit_length()


def batch_size(requests: int) -> int:
    """Returns the padded requests of a batch: a power of two."""
    return 1 << (requests - 1).bit_length()


def check_token_ids(
    name: str, ids: TokenIds, vocab_size: int, mask_id: int | None = None
) -> np.ndarray:
    """Returns ids as int32 [n].

    Raises:
      ValueError: names the first id outside the vocabulary, or the first mask token where `mask_id`
        is given. In a prompt it would be neither text nor a slot of the response.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros((0,), np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a flat list of integer token ids")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"{name}[{at}] = {int(array[at])} is outside the vocabulary of {vocab_size} tokens"
        )
    if mask_id is not None and (array == mask_id).any():
        at = int((array == mask_id).argmax())
        raise ValueError(f"{name} has the mask token {mask_id} at position {at}: remove it")
    return array.astype(np.int32)


def check_bos_id(bos_id: int | None, vocab_size: int, mask_id: int | None = None) -> int | None:
    """Returns bos_id, which may be None; ValueError as `check_token_ids`."""
    if bos_id is not None:
        check_token_ids("bos_id", [bos_id], vocab_size, mask_id)
    return bos_id


def count_chunks(tokens: int, config: ChunkConfig) -> int:
    """Returns the number of chunks of a context with this many tokens; at least 1."""
    span = config.chunk_size - int(config.anchors)
    return 1 + max(0, -(-(tokens - span) // config.stride))


def chunks_of_span(span: tuple[int, int], config: ChunkConfig) -> dict[int, bool]:
    """Returns the chunks that hold a part of the context's tokens [start, end).

    The value says whether the chunk holds all of them.
    """
    size, stride = config.chunk_size - int(config.anchors), config.stride
    start, end = span
    return {
        i: i * stride <= start and end <= i * stride + size
        for i in range((end - 1) // stride + 1)
        if start < i * stride + size
    }


def needle_chunks(span: tuple[int, int], config: ChunkConfig) -> set[int]:
    """Returns the chunks that hold the whole span; if none does, one set that covers it."""
    parts = chunks_of_span(span, config)
    complete = {i for i, is_complete in parts.items() if is_complete}
    return complete or {i for i in parts if i >= span[0] // config.stride}


def split_context(
    context_ids: TokenIds, config: ChunkConfig, bos_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns chunks [N, C], each behind its anchor and zero-padded, and lengths [N]."""
    context = check_token_ids("context", context_ids, _ANY)
    if context.size == 0:
        raise ValueError("context is empty")
    anchor = int(config.anchors)
    if config.anchors and bos_id is None:
        raise ValueError("anchors need a BOS token")
    n = count_chunks(context.size, config)
    place = np.arange(n)[:, None] * config.stride + np.arange(config.chunk_size - anchor)
    valid = place < context.size
    pieces = np.where(valid, context[np.minimum(place, context.size - 1)], 0)
    heads = np.full((n, anchor), bos_id or 0, np.int32)
    return np.hstack([heads, pieces]), (anchor + valid.sum(axis=1)).astype(np.int32)


def pad_to(ids: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    """Returns ids padded to `size` rows with `fill`."""
    return np.concatenate([ids, np.full((size - len(ids), *ids.shape[1:]), fill, ids.dtype)])


def chunk_prompt(
    prefix_ids: TokenIds,
    context_ids: TokenIds,
    query_ids: TokenIds,
    config: ChunkConfig = ChunkConfig(),
    *,
    bos_id: int | None = None,
    mask_id: int | None = None,
    tight: bool = False,
) -> ChunkedPrompt:
    """Cuts a prompt into the arrays that `prefill` takes: a batch of one, [1, N, C].

    Args:
      prefix_ids: BOS and instruction; may be empty where there are no anchors.
      context_ids: the document, at least one token; shorter than a chunk is fine.
      query_ids: the question and the answer's cue, at least one token.
      config: chunk size, anchors, overlap.
      bos_id: token of the anchors; the first token of the prefix by default.
      mask_id: the model's mask token, which is then refused in prefix, context and query.
      tight: pads to fewer chunks, in more buckets, for documents whose KV is all kept.

    Raises:
      ValueError: empty context or query; anchors without BOS or prefix; values that are not ids;
        a mask token, where mask_id is given.
    """
    prefix = check_token_ids("prefix", prefix_ids, _ANY, mask_id)
    context = check_token_ids("context", context_ids, _ANY, mask_id)
    query = check_token_ids("query", query_ids, _ANY, mask_id)
    check_bos_id(bos_id, _ANY, mask_id)
    if query.size == 0:
        raise ValueError("query is empty")
    if bos_id is None and prefix.size:
        bos_id = int(prefix[0])
    chunks, lengths = split_context(context, config, bos_id)
    n = bucket_chunks(len(chunks), tight)
    return ChunkedPrompt(
        prefix=jnp.asarray(pad_to(prefix, bucket_rows(prefix.size))[None]),
        prefix_length=jnp.asarray([prefix.size], jnp.int32),
        chunks=jnp.asarray(pad_to(chunks, n)[None]),
        chunk_lengths=jnp.asarray(pad_to(lengths, n)[None]),
        query=jnp.asarray(pad_to(query, bucket_rows(query.size), -1)[None]),
        query_length=jnp.asarray([query.size], jnp.int32),
        anchors=config.anchors,
    )


def batch_prompts(prompts: Sequence[ChunkedPrompt], size: int | None = None) -> ChunkedPrompt:
    """Returns prompts of different lengths as one batch, every axis padded to the longest.

    Args:
      prompts: at least one, each of one request, with the same chunk size and anchors.
      size: requests of the batch, by default the number of prompts. Added requests are empty and
        cost nothing.

    Raises:
      ValueError: no prompt, more than `size`, or different chunk sizes or anchors.
    """
    if not prompts:
        raise ValueError("no prompts")
    if len({(prompt.chunk_size, prompt.anchors) for prompt in prompts}) > 1:
        sizes = sorted({prompt.chunk_size for prompt in prompts})
        raise ValueError(f"prompts differ in chunk size or anchors: sizes {sizes}")
    extra = (len(prompts) if size is None else size) - len(prompts)
    if extra < 0:
        raise ValueError(f"{len(prompts)} prompts do not fit a batch of {size}")

    def stack(field: str) -> Array:
        arrays = [np.asarray(getattr(prompt, field)) for prompt in prompts]
        _, *shape = np.max([x.shape for x in arrays], axis=0)
        rows = np.full((len(arrays) + extra, *shape), -1 if field == "query" else 0, np.int32)
        for i, x in enumerate(arrays):
            rows[i : i + 1][tuple(map(slice, x.shape))] = x
        return jnp.asarray(rows)

    names = [field.name for field in dataclasses.fields(ChunkedPrompt) if field.name != "anchors"]
    return ChunkedPrompt(**{name: stack(name) for name in names}, anchors=prompts[0].anchors)
