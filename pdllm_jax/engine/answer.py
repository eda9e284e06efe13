"""Decoding: the denoising loop of a started request, its blocks as they finish, and its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import Implementation, implementation_name, resolve_matmul
from pallas_kernels.chunk_attention.dense import dense_implementation
from pdllm_jax.config import DecodeConfig
from pdllm_jax.engine.request import StartedRequest, Timer
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.selection import EMPTY_SLOT
from pdllm_jax.network.sharding import DATA, mesh_name, rows_axis
from pdllm_jax.network.transformer import MaskPredictor

# (request, block, its tokens): called when a block of a response is finished.
OnBlock = Callable[[int, int, list[int]], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response and how it was computed.

    tokens: the response's G ids. text: decoded up to its end; None without a tokenizer.
    evaluations: denoising evaluations of the network, without draft, scoring and encoding.
    selection: {"chunks": ids kept, "scores": of every chunk or None where nothing was scored}; with
      re-selection also "rescored", the number of times, and "chunks_at_end". None for baselines.
    timings: seconds of draft, score (where chunk KV is kept: the pass that also encodes), encode,
      decode, compile (tracing and compiling, in no other phase) and total, of the batch.
    paths: the implementations used, by name.
    confidence: probability of each token, before temperature, when it was unmasked; None for a slot
      that stayed masked, or lies in a block after the end of the text. None instead of the list for
      a request that an older version started.
    rows: of the request that went through the network in these evaluations; a row that went through
      a share of the layers counts as this share.
    """

    tokens: list[int]
    text: str | None
    evaluations: int
    selection: dict[str, Any] | None
    timings: dict[str, float]
    paths: dict[str, str]
    confidence: list[float | None] | None = None
    rows: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


def decode_request(
    model: MaskPredictor,
    request: StartedRequest,
    implementation: Implementation,
    timer: Timer,
    on_block: OnBlock | None = None,
) -> list[Answer]:
    """Runs the denoising loop of a started request, whose state is consumed.

    Args:
      implementation: of the attention over chunks.
      timer: gets the seconds of "decode".

    Returns:
      An answer without text to each of the requests.
    """
    config, decoding = request.config, request.decoding
    settings: dict[str, Any] = {"config": decoding, "implementation": implementation}
    if config.reselects:
        settings["settings"] = config
    with timer.phase("decode"):
        state = denoise_blocks(model, request.cache, request.state, on_block, **settings)
    rows = state.tokens.shape[0]
    if model.mesh is not None and rows_axis(model.mesh, rows):
        rows //= model.mesh.shape[DATA]
    chosen = {"encoding": config.encoding.name, "scorer": config.scorer.name}
    path = implementation_name(implementation)
    paths = used_paths(model, rows * decoding.block_length, chunk_attention=path, **chosen)
    counts = np.asarray(request.counts)
    scores = None if request.scores is None else np.asarray(request.scores)
    first, last = np.asarray(request.selection.chunk_ids), np.asarray(state.selected)
    answers = []
    for b in range(request.requests):
        selection: dict[str, Any] = {
            "chunks": first[b][first[b] != EMPTY_SLOT].tolist(),
            "scores": None if scores is None else scores[b, : counts[b]].tolist(),
        }
        if config.reselects:
            selection["rescored"] = int(state.rescored[b])
            selection["chunks_at_end"] = last[b][last[b] != EMPTY_SLOT].tolist()
        answers.append(read_answer(state, b, selection, timer, paths))
    return answers


def read_answer(
    state: DenoiseState, row: int, selection: Any, timer: Timer, paths: dict[str, str]
) -> Answer:
    """The answer, without text, in a row of a state."""
    phases = ("draft", "score", "encode", "decode", "compile")
    timings = {name: timer.seconds.get(name, 0.0) for name in phases}
    probability = np.asarray(state.probability[row]).tolist()
    return Answer(
        tokens=np.asarray(state.tokens[row]).tolist(),
        text=None,
        evaluations=int(state.evaluations[row]),
        selection=selection,
        timings={**timings, "total": sum(timings.values())},
        paths=paths,
        confidence=[None if p < 0 else p for p in probability],
        rows=round(float(state.rows[row]), 2),
    )


def denoise_blocks(
    model: MaskPredictor,
    cache: ChunkCache | None,
    state: DenoiseState,
    on_block: OnBlock | None,
    **settings: Any,
) -> DenoiseState:
    """Runs `denoise` and waits for it; with `on_block`, hands out every finished block.

    A block is fetched while the next one is computed. It is handed out when no evaluation can
    change it: nothing in it is masked, or the request is done.

    Args:
      settings: of `denoise`.
    """
    if on_block is None:
        return jax.block_until_ready(denoise(model, cache, state, **settings))
    config: DecodeConfig = settings["config"]
    sent = np.asarray(state.block).tolist()
    pending: list[tuple[Array, Array, Array]] = []

    def send(tokens: Array, done: Array, text_blocks: Array) -> None:
        ready = np.minimum(done, text_blocks)
        for request, row in enumerate(np.asarray(tokens)):
            pieces = np.split(row, config.n_blocks)
            while (block := sent[request]) < ready[request]:
                masked = (pieces[block] == model.config.mask_token_id).any()
                if masked and done[request] < config.n_blocks:
                    break
                on_block(request, block, pieces[block].tolist())
                sent[request] += 1

    for block in range(config.n_blocks):
        state = denoise(model, cache, state, until=jnp.int32(block + 1), **settings)
        # Copies: the state's buffers are donated to the next call.
        now = state.tokens, state.block, state.text_blocks
        pending.append(jax.tree.map(jnp.copy, now))
        if len(pending) > 1:
            send(*pending.pop(0))
    send(*pending.pop())
    return state


def used_paths(model: MaskPredictor, rows: int, **others: str) -> dict[str, str]:
    """`Answer.paths`. rows: of a narrow step, of all requests of a device together."""
    block = model.blocks[0]
    widest: Any = (block.gate_proj.operand, block.up_proj.operand)
    if model.mesh is not None:
        others["mesh"] = mesh_name(model.mesh)
        others["sums"] = "xla" if model.links is None else "mosaic_gpu"
        widest = jax.tree.map(_part, widest)
    return {
        "attention": dense_implementation(model.dtype, model.config.head_dim),
        "matmul": resolve_matmul(None, rows, widest, "swiglu", model.dtype),
        **others,
        "device": jax.devices()[0].device_kind,
        "dtype": str(model.dtype),
        "weights": model.config.weight_format,
    }


def _part(x: Array) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array's part on one device."""
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
