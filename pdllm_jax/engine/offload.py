"""A document whose KV does not fit the device: it lies in the host's memory, chunk by chunk.

    document = encode_offloaded(model, prompt)              a few chunks at a time on the device
    selected = select_offloaded(model, document, query_ids, config)
    (answer,) = engine.decode(selected)

Selection scores groups of chunks that pass through the device, then brings the K chosen ones over.
Every chunk is two host arrays, so that one transfer each moves exactly what was chosen. They lie in
pinned memory where the backend has it (JAX memory kinds), which a GPU reads by DMA.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from pallas_kernels import Implementation
from pdllm_jax.config import SelectionConfig
from pdllm_jax.engine.memory import MemoryLimitError
from pdllm_jax.engine.request import (
    PreparedRequest,
    SelectedRequest,
    Timer,
    prepare,
    question_prompt,
    request_keys,
)
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.method.chunking import ChunkedPrompt, TokenIds, check_token_ids
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.method.scorers import OracleScorer
from pdllm_jax.method.scoring import score_chunks
from pdllm_jax.method.selection import EMPTY_SLOT, select
from pdllm_jax.network.sharding import TENSOR
from pdllm_jax.network.transformer import MaskPredictor

_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of pinned memory, in GiB; 64 where it is not set
_RESERVED = 1 << 30  # for other transfers, and what allocating leaves between arrays


@dataclasses.dataclass(frozen=True)
class OffloadedDocument:
    """One document's KV in host memory; its tokens, and the prefix's KV, on the device.

    k, v: of each chunk that holds tokens, [L, G, C, D], keys rotated at chunk-local positions.
    cache: the document without a pool.
    device: sharding of a chunk on the device.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    cache: ChunkCache
    device: Sharding

    @property
    def nbytes(self) -> int:
        """In host memory."""
        return sum(x.nbytes for x in (*self.k, *self.v))


def host_memory(sharding: Sharding) -> Sharding:
    """The same devices' host memory: pinned where there is such a thing.

    Raises ValueError where the backend has no memory of the host's.
    """
    devices: Any = sharding.device_set
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    for kind in ("pinned_host", "unpinned_host"):
        if kind in kinds:
            return sharding.with_memory_kind(kind)
    raise ValueError(f"the device has no host memory to offload to, only {sorted(kinds)}")


def check_host_memory(host: Sharding, nbytes: int) -> None:
    """Raises MemoryLimitError where XLA would not pin as much of a GPU's host memory.

    The limit is one for all of a process's devices, and set as the first of them is used.
    """
    devices: Any = host.device_set
    if next(iter(devices)).platform != "gpu" or host.memory_kind != "pinned_host":
        return
    limit = int(os.environ.get(_LIMIT, 64))
    if nbytes > (limit << 30) - _RESERVED:
        raise MemoryLimitError(
            f"the document's KV takes {nbytes / 2**30:.1f} GiB of pinned host memory, XLA's limit "
            f"is {limit}: start the process with {_LIMIT}={2 + -(-nbytes // 2**30)} or more"
        )


def encode_offloaded(
    model: MaskPredictor, prompt: ChunkedPrompt, *, encode_batch: int = 8, group: int | None = None
) -> OffloadedDocument:
    """`encode_document`, with the KV of `group` chunks on the device at a time.

    The KV is that of `encode_document` bit for bit where `group` is a multiple of encode_batch, as
    it is by default (2 encode_batch).

    Raises:
      ValueError: a batch of prompts; no host memory.
      MemoryLimitError: XLA would not pin so much of it (`check_host_memory`).
    """
    if prompt.chunks.shape[0] > 1:
        raise ValueError(f"one document is offloaded at a time, got {prompt.chunks.shape[0]}")
    group = 2 * encode_batch if group is None else group
    n = prompt.n_chunks
    device = _device(model.mesh)
    host = host_memory(device)
    config = model.config
    values = 2 * config.n_layers * config.n_kv_heads * config.head_dim * prompt.chunk_size
    check_host_memory(host, n * values * model.dtype.itemsize)
    k: list[Array] = []
    v: list[Array] = []
    cache = None
    for first in range(0, n, group):
        part = dataclasses.replace(
            prompt,
            chunks=_chunks(prompt.chunks, first, group),
            chunk_lengths=_chunks(prompt.chunk_lengths, first, group),
        )
        cache = encode_document(model, part, encode_batch=encode_batch)
        assert cache.pool is not None
        for i in range(min(group, n - first)):
            # Asynchronous: the next group is encoded while this one is on its way.
            k.append(jax.device_put(cache.pool.k[:, i], host))
            v.append(jax.device_put(cache.pool.v[:, i], host))
    assert cache is not None
    cache = dataclasses.replace(
        cache.without_pool(), tokens=prompt.chunks, lengths=prompt.chunk_lengths
    )
    return OffloadedDocument(tuple(k), tuple(v), cache, device)


def offload(cache: ChunkCache) -> OffloadedDocument:
    """A document that is on the device, or was restored to host memory, as one that is offloaded.

    Of a snapshot: `load_document` with a placement that gives `host_memory` for the pool's arrays.
    """
    if cache.pool is None or cache.documents > 1 or cache.streamed:
        raise ValueError("only one document's cache with the KV of every chunk can be offloaded")
    lies = cache.pool.k.sharding
    device = _device(lies.mesh if isinstance(lies, NamedSharding) else None)
    host = host_memory(device)
    n = int(np.count_nonzero(np.asarray(cache.lengths)))
    check_host_memory(host, 2 * n * cache.pool.k.nbytes // cache.pool.k.shape[1])

    def chunks(x: Array) -> tuple[Array, ...]:
        on_device = x.sharding.memory_kind == device.memory_kind
        # What lies in host memory is cut up there; an index would be computed on the device.
        rows = x if on_device else np.asarray(x)
        return tuple(jax.device_put(rows[:, i], host) for i in range(n))

    return OffloadedDocument(
        chunks(cache.pool.k), chunks(cache.pool.v), cache.without_pool(), device
    )


def fetch(document: OffloadedDocument, chunk_ids: Sequence[int]) -> ChunkPool:
    """These chunks as a pool on the device, in this order; nothing else leaves the host.

    EMPTY_SLOT gives a chunk of length 0, for which chunk 0 comes over.
    """
    ids = [max(int(i), 0) for i in chunk_ids]
    lengths = np.where(np.asarray(chunk_ids) >= 0, np.asarray(document.cache.lengths)[0, ids], 0)
    # All transfers are under way before the first is waited for.
    k, v = ([jax.device_put(x[i], document.device) for i in ids] for x in (document.k, document.v))
    return ChunkPool(_stacked(*k), _stacked(*v), jnp.asarray(lengths, jnp.int32))


@jax.jit
def _stacked(*chunks: Array) -> Array:
    return jnp.stack(chunks, axis=1)


def score_offloaded(
    model: MaskPredictor,
    document: OffloadedDocument,
    request: PreparedRequest,
    *,
    group: int = 8,
    implementation: Implementation | None = None,
    timer: Timer | None = None,
) -> Float[Array, "1 N"]:
    """Returns the scores of `score_chunks`, up to the order of sums.

    Two groups of chunks lie on the device at once: one is scored while the next comes over. The
    controls read no KV.

    Args:
      request: one question about the document's cache (`offloaded_request`).
      group: chunks of a group.
    """
    timer, config, prompt = timer or Timer(), request.config.scoring(), request.prompt
    draft = request.draft(model, timer)
    cache, n = document.cache, len(document.k)

    def part(first: int) -> ChunkCache:
        pool = fetch(document, [i if i < n else EMPTY_SLOT for i in range(first, first + group)])
        tokens = _chunks(cache.tokens, first, group)
        return dataclasses.replace(cache, pool=pool, tokens=tokens, lengths=pool.lengths[None])

    with timer.phase("score"):
        if not config.scorer.needs_pool:
            keys, length = request.scoring_keys(), prompt.query_length
            return score_chunks(model, cache, prompt.query, config, query_length=length, key=keys)
        scores = []
        following = part(0)
        for first in range(0, n, group):
            current = following
            rows = score_chunks(
                model,
                current,
                prompt.query,
                config,
                query_length=prompt.query_length,
                draft=draft,
                implementation=implementation,
            )
            if first + group < n:
                following = part(first + group)
            # The first group is done before a third one comes over.
            scores.append(jax.block_until_ready(rows))
        joined = jnp.concatenate(scores, axis=1)[:, :n]
        padding = ((0, 0), (0, cache.lengths.shape[1] - n))
        return jnp.pad(joined, padding, constant_values=-jnp.inf)


def offloaded_request(
    document: OffloadedDocument,
    query_ids: TokenIds,
    config: SelectionConfig,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
) -> PreparedRequest:
    """Prepares one question about an offloaded document.

    Raises:
      ValueError: an empty question; ids outside the vocabulary; settings that need the KV of every
        chunk at once: re-selection and the scorer "attention"; the scorer "oracle".
    """
    if config.reselects:
        raise ValueError("re-selection reads all chunks' KV: the document cannot be offloaded")
    if config.scorer.needs_pool and not config.scorer.in_pass:
        raise ValueError(
            f"scorer {config.scorer.name!r} reads all chunks' KV: the document cannot be streamed"
        )
    if isinstance(config.scorer, OracleScorer):
        raise ValueError("scorer 'oracle' needs the ids of the chunks to keep")
    ids = check_token_ids("query", query_ids, vocab_size or 1 << 31)
    if ids.size == 0:
        raise ValueError("query is empty")
    prompt = question_prompt(document.cache, [ids], 1)
    return prepare(prompt, config, request_keys([seed], 1), cache=document.cache)


def select_offloaded(
    model: MaskPredictor,
    document: OffloadedDocument,
    query_ids: TokenIds,
    config: SelectionConfig,
    *,
    seed: int = 0,
    group: int = 8,
    implementation: Implementation | None = None,
) -> SelectedRequest:
    """Selects chunks of an offloaded document for one question; `Engine.decode` goes on.

    Encodings that start from a chunk's KV bring the K chosen chunks over, once. The others compute
    their own KV from the tokens.

    Args:
      query_ids: token ids behind the document. config: settings of the selection.
      seed: of the request. group: as in `score_offloaded`.

    Raises:
      ValueError: as `offloaded_request`.
    """
    vocab = model.config.vocab_size
    request = offloaded_request(document, query_ids, config, seed=seed, vocab_size=vocab)
    scores = score_offloaded(model, document, request, group=group, implementation=implementation)
    selected = request.selected(document.cache, select(scores, request.config), scores)
    if not request.config.encoding.needs_pool:
        return selected
    ids = np.asarray(selected.selection.chunk_ids)
    pool = fetch(document, ids[0].tolist())
    slots = jnp.asarray(np.where(ids >= 0, np.arange(ids.size), EMPTY_SLOT), jnp.int32)
    return dataclasses.replace(
        selected,
        cache=dataclasses.replace(document.cache, pool=pool, streamed=True),
        selection=dataclasses.replace(selected.selection, slots=slots),
    )


def _device(mesh: Any) -> Sharding:
    """Of a chunk [L, G, C, D]: by heads over a mesh, or JAX's default device."""
    if mesh is None:
        return jax.device_put(0).sharding
    return NamedSharding(mesh, PartitionSpec(None, TENSOR))


def _chunks(x: Array, first: int, count: int) -> Array:
    """x[:, first : first + count], padded with zeros."""
    piece = x[:, first : first + count]
    return jnp.pad(piece, [(0, 0), (0, count - piece.shape[1]), *[(0, 0)] * (x.ndim - 2)])
