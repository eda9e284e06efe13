"""The jitted programs of one answer, traced on shapes alone: what the compiler says they need.

`answer` runs a draft, a pass over the document, an encoding and the denoising loop. Here the same
functions are lowered for the same shapes and settings without an array being made, so that
`compiled.memory_analysis()` tells what each would take. Compiling them takes as long as before a
first answer; `planner.plan_memory` predicts the same without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from pallas_kernels import Implementation
from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.engine.memory import Shapes
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scorers import DraftScorer, OracleScorer
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import Selection, select
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor


class Program(NamedTuple):
    """A jitted function at certain shapes.

    phase: of the plan; name: of the function; lower: traces it; held: bytes on the device before it
    runs, its arguments included.
    """

    phase: str
    name: str
    lower: Callable[[], Any]
    held: int


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree's arrays, or of what stands for them."""

    def size(x: Any) -> int:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return 8 * x.size if key else x.size * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def abstract_model(
    config: ModelConfig, dtype: DTypeLike, sharding: Sharding | None = None
) -> MaskPredictor:
    """The model's skeleton: shapes in the place of weights."""
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype))
    return _place(model, sharding)


def _place(tree: Any, sharding: Sharding | None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def programs(
    config: ModelConfig,
    shapes: Shapes,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    *,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
    sharding: Sharding | None = None,
) -> Iterator[Program]:
    """The programs in the order in which an answer runs them; nothing is allocated.

    selecting: as `answer.settled` leaves it. shapes.chunks 0: no document, a baseline.
    sharding: of all arguments, to compile for a device that need not be there.
    """
    model = abstract_model(config, dtype, sharding)

    def ids(*shape: int, lead: int | None = shapes.requests) -> Any:
        full = shape if lead is None else (lead, *shape)
        return jax.ShapeDtypeStruct(full, jnp.int32, sharding=sharding)

    def made(call: Callable[..., Any], *args: Any) -> Any:
        return _place(jax.eval_shape(call, *args), sharding)

    def program(phase: str, function: Any, beside: Any, *args: Any, **settings: Any) -> Program:
        """beside: a pytree on the device that the program does not take."""
        arrays = [x for x in jax.tree.leaves((args, settings, beside)) if hasattr(x, "dtype")]
        return Program(
            phase, function.__name__, lambda: function.lower(*args, **settings), tree_bytes(arrays)
        )

    keys = made(lambda: jax.random.split(jax.random.key(0), shapes.requests))
    query, length = ids(shapes.query), ids()
    if not shapes.chunks:
        yield program(
            "encode", init_denoise, None, model, None, None, query, decode, keys,
            query_length=length,
        )  # fmt: skip
        state = made(
            lambda m, q, n, k: init_denoise(m, None, None, q, decode, k, query_length=n),
            model, query, length, keys,
        )  # fmt: skip
        yield program("decode", denoise, None, model, None, state, config=decode)
        return

    lead = 1 if shapes.pooled else shapes.requests
    size = shapes.chunk_size
    prompt = ChunkedPrompt(
        prefix=ids(shapes.prefix), prefix_length=ids(),
        chunks=ids(shapes.chunks, size, lead=lead), chunk_lengths=ids(shapes.chunks, lead=lead),
        query=query, query_length=length,
    )  # fmt: skip
    cache: Any = None
    if shapes.pooled:
        document = dataclasses.replace(
            prompt, prefix=ids(shapes.prefix, lead=1), prefix_length=ids(lead=1),
            query=ids(1, lead=1), query_length=ids(lead=1),
        )  # fmt: skip
        batch = selecting.encode_batch
        yield program("encode document", encode_document, None, model, document, encode_batch=batch)
        cache = made(lambda m, p: encode_document(m, p, encode_batch=batch), model, document)
    passing = selecting.scoring()
    draft = None
    if isinstance(selecting.scorer, DraftScorer):
        question = prompt.question
        yield program("draft", draft_response, cache, model, question, passing)
        draft = made(lambda m, q: draft_response(m, q, passing), model, question)
    scoring_keys = keys
    chosen: Selection
    if shapes.pooled:

        def score(m: MaskPredictor, c: ChunkCache, q: Any, n: Any, d: Any, k: Any) -> Any:
            return score_chunks(m, c, q, passing, query_length=n, draft=d, key=k)

        if not selecting.scorer.needs_pool:
            scores = ids(shapes.chunks)
        else:
            yield program(
                "score", score_chunks, None, model, cache, query, passing, query_length=length,
                draft=draft, key=scoring_keys, implementation=implementation,
            )  # fmt: skip
            scores = made(score, model, cache, query, length, draft, scoring_keys)
        scores = jax.ShapeDtypeStruct(scores.shape, jnp.float32, sharding=sharding)
        chosen = made(lambda s: select(s, selecting), scores)
    elif selecting.streams(documents=shapes.requests):
        kept = selecting.for_prefill(streaming=True)
        oracle = ids(1) if isinstance(selecting.scorer, OracleScorer) else None
        more = {"draft": draft, "key": scoring_keys, "oracle": oracle}
        yield program("score", prefill_top_k, None, model, prompt, kept, **more)
        cache, chosen, _ = made(
            lambda m, p, more: prefill_top_k(m, p, kept, **more), model, prompt, more
        )
    else:
        pooling = selecting.for_prefill(streaming=False)
        oracle = ids(1) if isinstance(selecting.scorer, OracleScorer) else None
        more = {"draft": draft, "key": scoring_keys, "oracle": oracle}
        yield program("score", prefill, None, model, prompt, pooling, **more)
        cache, scores = made(lambda m, p, more: prefill(m, p, pooling, **more), model, prompt, more)
        chosen = made(lambda s: select(s, selecting), scores)

    def start(m: MaskPredictor, c: ChunkCache, s: Selection, q: Any, n: Any, k: Any) -> Any:
        return init_denoise(
            m, c, s, q, decode, k,
            query_length=n, selecting=selecting, implementation=implementation,
        )  # fmt: skip

    yield program(
        "encode", init_denoise, None, model, cache, chosen, query, decode, keys,
        query_length=length, selecting=selecting, implementation=implementation,
    )  # fmt: skip
    state = made(start, model, cache, chosen, query, length, keys)
    again = selecting.reselect != "never"
    needed = cache if state.pool is None or again else None
    yield program(
        # Of questions about one document, its cache is the caller's.
        "decode", denoise, cache if needed is None and shapes.pooled else None,
        model, needed, state, config=decode, implementation=implementation,
        selecting=selecting if again else None,
    )  # fmt: skip
