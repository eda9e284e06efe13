"""The method from chunked prompts to tokens, phase by phase, for one request or a batch of them.

Everything between the phases stays on the device; the host waits at their ends, for the timings,
and once a block where blocks are handed out as they are finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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
from pallas_kernels.dense import dense_implementation
from pdllm_jax.cache import ChunkCache
from pdllm_jax.chunking import ChunkedPrompt
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.denoise import denoise
from pdllm_jax.model import LLaDA
from pdllm_jax.parallel import DATA, mesh_name, rows_axis
from pdllm_jax.passes import settled
from pdllm_jax.planner import require_memory
from pdllm_jax.prefilled import Prefilled, begin, choose, chunk_counts
from pdllm_jax.selection import EMPTY_SLOT
from pdllm_jax.state import DenoiseState
from pdllm_jax.timing import Stopwatch

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


def used_paths(model: LLaDA, rows: int, **more: str) -> dict[str, str]:
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
    model: LLaDA,
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
    if config.scorer != "oracle":
        if oracle is not None:
            raise ValueError(f"oracle ids are for the scorer 'oracle', not for {config.scorer!r}")
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
    model: LLaDA,
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
      oracle: ids of the chunks to keep, [M] or [B, M]; ids of no chunk name nothing.
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
    model: LLaDA,
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
        model, prompt, settled(selecting, n, named=named), config, cache=cache,
        implementation=_chunk_path(model, prompt.chunk_size, selecting, implementation),
        limit=limit,
    )  # fmt: skip


def finish(
    model: LLaDA,
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
        encoding=selecting.encoding,
        scorer=selecting.scorer,
    )
    scored = None if prefilled.scores is None else np.atleast_2d(np.asarray(prefilled.scores))
    ids = prefilled.selection.chunk_ids
    chosen_ids, at_end = (np.atleast_2d(np.asarray(x)) for x in (ids, state.selected))
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
    model: LLaDA,
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


def random_key(seed: int) -> Array:
    """`jax.random.key`; ValueError for what is no integer of 64 bits with a sign."""
    if not isinstance(seed, int | np.integer) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r:.40}")
    return jax.random.key(seed)


def request_keys(seeds: Sequence[int], size: int) -> Array:
    """Keys of a batch's requests, [size]: each by its own seed, whatever its place in the batch."""
    padded = [*seeds, *[0] * (size - len(seeds))]
    return jnp.stack([jax.random.fold_in(random_key(seed), 0) for seed in padded])
