"""A document whose KV does not fit the device: it lies in the host's memory, chunk by chunk.

    document = encode_offloaded(model, prompt)              a few chunks at a time on the device
    selected = select_offloaded(model, document, query_ids, config)
    (answer,) = engine.decode(selected)

Selection scores groups of chunks that pass through the device, then brings the K chosen ones over.
Every chunk has host arrays of its own, so that transfers move exactly what was chosen. They lie in
pinned memory where the backend has it (JAX memory kinds), which a GPU reads by DMA.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation, Scaled
from pdllm_jax.config import SelectionConfig
from pdllm_jax.engine.inputs import oracle_ids
from pdllm_jax.engine.memory import MemoryLimitError
from pdllm_jax.engine.request import (
    PreparedRequest,
    SelectedRequest,
    question_prompt,
    request_keys,
    require_kv_format,
    select_chunks,
    with_pool,
)
from pdllm_jax.method.cache import ChunkCache, ChunkPool, KVFormat, init_pool
from pdllm_jax.method.chunking import ChunkedPrompt, TokenIds, check_token_ids
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.method.scoring import score_chunks
from pdllm_jax.method.selection import EMPTY_SLOT
from pdllm_jax.network.sharding import TENSOR
from pdllm_jax.network.transformer import MaskPredictor

_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of pinned memory, in GiB; 64 where it is not set
_RESERVED = 1 << 30  # for other transfers, and what allocating leaves between arrays


@dataclasses.dataclass(frozen=True)
class OffloadedDocument:
    """One document's KV in host memory; its tokens, and the prefix's KV, on the device.

    k, v: of each chunk that holds tokens, [L, G, C, D], keys rotated at chunk-local positions; in
      the format "fp8" `Scaled` with scales [L, G].
    cache: the document without a pool.
    device: sharding of a chunk on the device.
    """

    k: tuple[Array | Scaled, ...]
    v: tuple[Array | Scaled, ...]
    cache: ChunkCache
    device: Sharding

    @property
    def nbytes(self) -> int:
        """In host memory."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    @property
    def kv_format(self) -> KVFormat:
        """The format of k and v."""
        return "fp8" if isinstance(self.k[0], Scaled) else "full"


def host_memory(sharding: Sharding) -> Sharding:
    """The same devices' host memory, pinned where possible; ValueError where they have none."""
    devices: Any = sharding.device_set
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    for kind in ("pinned_host", "unpinned_host"):
        if kind in kinds:
            return sharding.with_memory_kind(kind)
    raise ValueError(f"the device has no host memory to offload to, only {sorted(kinds)}")


def check_host_memory(host: Sharding, nbytes: int) -> None:
    """Raises MemoryLimitError where XLA would not pin as much of a GPU's host memory.

    XLA would fail only after most of the document is encoded. It sets the limit, one for all
    devices of a process, when the first of them is used.
    """
    devices: Any = host.device_set
    limit = int(os.environ.get(_LIMIT, 64))
    pinned = next(iter(devices)).platform == "gpu" and host.memory_kind == "pinned_host"
    if pinned and nbytes > (limit << 30) - _RESERVED:
        raise MemoryLimitError(
            f"the document's KV takes {nbytes / 2**30:.1f} GiB of pinned host memory, XLA's limit "
            f"is {limit}: start the process with {_LIMIT}={2 + -(-nbytes // 2**30)} or more"
        )


def encode_offloaded(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    *,
    encode_batch: int = 8,
    group: int | None = None,
    kv_format: KVFormat = "full",
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
    n, device = prompt.n_chunks, _device(model.mesh)
    host, sizes = host_memory(device), (n, prompt.chunk_size, model.dtype)
    shapes = jax.eval_shape(lambda: init_pool(model.config, *sizes, kv_format=kv_format))
    check_host_memory(host, _nbytes(shapes))
    k: list[Array | Scaled] = []
    v: list[Array | Scaled] = []
    for first in range(0, n, group):
        chunks, lengths = (_chunks(x, first, group) for x in (prompt.chunks, prompt.chunk_lengths))
        part = dataclasses.replace(prompt, chunks=chunks, chunk_lengths=lengths)
        cache = encode_document(model, part, encode_batch=encode_batch, kv_format=kv_format)
        assert cache.pool is not None
        # Asynchronous: the next group is encoded while this one is on its way.
        k += _to_host(cache.pool.k, min(group, n - first), host)
        v += _to_host(cache.pool.v, min(group, n - first), host)
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
    pool, n = cache.pool, int(np.count_nonzero(np.asarray(cache.lengths)))
    sharding = jax.tree.leaves(pool.k)[0].sharding
    device = _device(sharding.mesh if isinstance(sharding, NamedSharding) else None)
    host = host_memory(device)
    check_host_memory(host, n * _nbytes(pool) // pool.k.shape[1])
    k, v = (tuple(_to_host(x, n, host)) for x in (pool.k, pool.v))
    return OffloadedDocument(k, v, cache.without_pool(), device)


def fetch(document: OffloadedDocument, chunk_ids: Sequence[int]) -> ChunkPool:
    """These chunks as a pool on the device, in this order; nothing else leaves the host.

    EMPTY_SLOT gives a chunk of length 0, for which chunk 0 comes over.
    """
    ids = [max(int(i), 0) for i in chunk_ids]
    lengths = np.where(np.asarray(chunk_ids) >= 0, np.asarray(document.cache.lengths)[0, ids], 0)
    # All transfers are under way before the first is waited for.
    k, v = ([jax.device_put(x[i], document.device) for i in ids] for x in (document.k, document.v))
    return ChunkPool(_stacked(*k), _stacked(*v), jnp.asarray(lengths, jnp.int32))


def score_offloaded(
    model: MaskPredictor,
    document: OffloadedDocument,
    query_ids: Int[Array, "1 Q"],
    config: SelectionConfig,
    *,
    group: int = 8,
    **inputs: Any,
) -> Float[Array, "1 N"]:
    """`score_chunks`, up to the order of sums, with `group` chunks on the device at a time.

    One group is scored while the next comes over. Scorers that need no KV score the tokens.
    """
    cache, n = document.cache, len(document.k)
    if not config.scorer.needs_pool:
        return score_chunks(model, cache, query_ids, config, **inputs)

    def part(first: int) -> ChunkCache:
        pool = fetch(document, [i if i < n else EMPTY_SLOT for i in range(first, first + group)])
        tokens = _chunks(cache.tokens, first, group)
        return dataclasses.replace(cache, pool=pool, tokens=tokens, lengths=pool.lengths[None])

    scores, following = [], part(0)
    for first in range(0, n, group):
        rows = score_chunks(model, following, query_ids, config, **inputs)
        if first + group < n:
            following = part(first + group)
        # The first group is done before a third one comes over.
        scores.append(jax.block_until_ready(rows))
    joined = jnp.concatenate(scores, axis=1)[:, :n]
    padding = ((0, 0), (0, cache.lengths.shape[1] - n))
    return jnp.pad(joined, padding, constant_values=-jnp.inf)


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
      query_ids, seed: of the request. config: settings of the selection.
      group: chunks that are scored at a time.

    Raises:
      ValueError: an empty question; ids outside the vocabulary; settings that need the KV of every
        chunk at once, as re-selection does; the scorer "oracle".
    """
    if config.keeps_pool():
        reader = "re-selection" if config.reselects else f"scorer {config.scorer.name!r}"
        raise ValueError(f"{reader} reads all chunks' KV: the document cannot be offloaded")
    require_kv_format(document, config)
    oracle_ids(None, config, len(document.k))  # raises for the scorer "oracle"
    vocabulary = model.config.vocab_size, model.config.mask_token_id
    ids = check_token_ids("query", query_ids, *vocabulary)
    if ids.size == 0:
        raise ValueError("query is empty")
    cache, keys = document.cache, request_keys([seed], 1)
    request = PreparedRequest(question_prompt(cache, [ids], 1), config, keys, cache=cache)

    def score(model: MaskPredictor, _: ChunkCache, *args: Any, **inputs: Any) -> Array:
        return score_offloaded(model, document, *args, group=group, **inputs)

    selected = select_chunks(model, request, implementation=implementation, score=score)
    if not request.config.encoding.needs_pool:
        return selected
    chosen = np.asarray(selected.selection.chunk_ids)
    slots = jnp.asarray(np.where(chosen >= 0, np.arange(chosen.size), EMPTY_SLOT), jnp.int32)
    return with_pool(selected, fetch(document, chosen[0].tolist()), slots)


def _device(mesh: Any) -> Sharding:
    """Of a chunk [L, G, C, D]: by heads over a mesh, or JAX's default device."""
    if mesh is None:
        return jax.device_put(0).sharding
    return NamedSharding(mesh, PartitionSpec(None, TENSOR))


def _nbytes(pool: ChunkPool) -> int:
    """The bytes of K and V of a pool, or of its shapes."""
    leaves = jax.tree.leaves((pool.k, pool.v))
    return sum(x.size * x.dtype.itemsize for x in leaves)


def _to_host(x: Any, count: int, host: Sharding) -> list[Any]:
    """The first chunks of K or V of a pool, each in host memory."""

    def source(x: Array) -> Any:
        # An array in host memory is cut up there; an index would be computed on the device.
        return np.asarray(x) if x.sharding.memory_kind == host.memory_kind else x

    sources = jax.tree.map(source, x)
    chunks = (jax.tree.map(operator.itemgetter((slice(None), i)), sources) for i in range(count))
    return [jax.device_put(chunk, host) for chunk in chunks]


@jax.jit
def _stacked(*chunks: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *chunks)


def _chunks(x: Array, first: int, count: int) -> Array:
    """x[:, first : first + count], padded with zeros."""
    piece = x[:, first : first + count]
    return jnp.pad(piece, [(0, 0), (0, count - piece.shape[1]), *[(0, 0)] * (x.ndim - 2)])
