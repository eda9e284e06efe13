"""The jitted programs of one answer, traced on shapes: what the compiler says that they need.

An answer runs a draft, a pass over the document, an encoding and the denoising loop. Here the same
functions are lowered for the same shapes and settings, and no array is made. `plan_memory` predicts
what `lower().compile().memory_analysis()` tells, without compiling.
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
from pdllm_jax.engine.request import passing_config, streams
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scoring import Question, draft_response, score_chunks
from pdllm_jax.method.selection import select
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor


class Program(NamedTuple):
    """A jitted function at certain shapes.

    phase: of the plan. name: of the function. lower: traces it. held: bytes on the device before it
    runs, its arguments included.
    """

    phase: str
    name: str
    lower: Callable[[], Any]
    held: int


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree's arrays, or of their shapes."""

    def size(x: Any) -> int:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return 8 * x.size if key else x.size * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def abstract_model(
    config: ModelConfig, dtype: DTypeLike, sharding: Sharding | None = None
) -> MaskPredictor:
    """Returns the model with shapes in the place of weights."""
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
    """Yields the programs in the order in which an answer runs them; nothing is allocated.

    selecting, shapes, decode: as `shapes_of` returns them. shapes.chunks 0: a baseline without a
    document. sharding: of all arguments, to compile for a device that is not there.
    """
    model = abstract_model(config, dtype, sharding)

    def ids(*shape: int, lead: int | None = shapes.batch) -> Any:
        full = shape if lead is None else (lead, *shape)
        return jax.ShapeDtypeStruct(full, jnp.int32, sharding=sharding)

    def program(
        phase: str, function: Any, *args: Any, beside: Any = None, **settings: Any
    ) -> tuple[Program, Any]:
        """Returns the program and its result's shapes. beside: held on the device as well."""
        arrays = [x for x in jax.tree.leaves((args, settings, beside)) if hasattr(x, "dtype")]
        result = function.eval_shape(*args, **settings)
        lower = lambda: function.lower(*args, **settings)  # noqa: E731
        item = Program(phase, function.__name__, lower, tree_bytes(arrays))
        return item, _place(result, sharding)

    keys = _place(
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shapes.requests)), sharding
    )
    query, length = ids(shapes.query), ids()
    if not shapes.chunks:
        item, state = program(
            "encode", init_denoise, model, None, None, query, decode, keys, query_length=length
        )
        yield item
        yield program("decode", denoise, model, None, state, config=decode)[0]
        return

    lead = None if shapes.pooled else shapes.batch
    prompt = ChunkedPrompt(
        prefix=ids(shapes.prefix), prefix_length=ids(),
        chunks=ids(shapes.chunks, shapes.chunk_size, lead=lead),
        chunk_lengths=ids(shapes.chunks, lead=lead), query=query, query_length=length,
    )  # fmt: skip
    cache: Any = None
    if shapes.pooled:
        document = dataclasses.replace(
            prompt, prefix=ids(shapes.prefix, lead=None), prefix_length=ids(lead=None),
            query=ids(1, lead=None), query_length=ids(lead=None),
        )  # fmt: skip
        batch = selecting.encode_batch
        item, cache = program(
            "encode document", encode_document, model, document, encode_batch=batch
        )
        yield item
    scoring, draft = selecting.scoring(), None
    if selecting.scorer == "draft":
        question = Question(prompt.prefix, prompt.prefix_length, query, length)
        item, draft = program("draft", draft_response, model, question, scoring, beside=cache)
        yield item
    key = (
        keys if shapes.batch is not None else _place(jax.eval_shape(lambda k: k[0], keys), sharding)
    )
    oracle = ids(1, lead=None) if selecting.scorer == "oracle" else None
    scores: Any = jax.ShapeDtypeStruct(ids(shapes.chunks).shape, jnp.float32, sharding=sharding)
    chosen: Any = None
    if shapes.pooled:
        if selecting.scorer not in ("all", "first", "last", "random", "oracle"):
            item, scores = program(
                "score", score_chunks, model, cache, query, scoring, query_length=length,
                draft=draft, key=key, implementation=implementation,
            )  # fmt: skip
            yield item
    elif streams(selecting, batched=shapes.batch is not None):
        config_ = passing_config(selecting, streaming=True)
        item, (cache, chosen, _) = program(
            "score", prefill_top_k, model, prompt, config_, draft=draft, key=key, oracle=oracle
        )
        yield item
    else:
        config_ = passing_config(selecting, streaming=False)
        item, (cache, scores) = program(
            "score", prefill, model, prompt, config_, draft=draft, key=key, oracle=oracle
        )
        yield item
    if chosen is None:
        chosen = _place(jax.eval_shape(lambda s: select(s, selecting), scores), sharding)
    item, state = program(
        "encode", init_denoise, model, cache, chosen, query, decode, keys,
        query_length=length, selecting=selecting, implementation=implementation,
    )  # fmt: skip
    yield item
    again = selecting.reselect != "never"
    needed = cache if state.pool is None or again else None
    # The cache of a document with several questions stays with the caller.
    beside = cache if needed is None and shapes.pooled else None
    yield program(
        "decode", denoise, model, needed, state, beside=beside, config=decode,
        implementation=implementation, selecting=selecting if again else None,
    )[0]  # fmt: skip
