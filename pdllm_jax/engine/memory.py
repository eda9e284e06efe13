"""Device memory of an answer: predicted from shapes, and refused where the device has less.

The plan adds up what a device holds around each jitted function of an answer (`programs`).
Arguments and results are exact: `jax.eval_shape` of the functions gives their shapes. One layer is
traced; weights and KV count once for each layer.

XLA's temporaries follow from one formula for every program, of the forward passes in its trace:

- The rows of one layer: the residual stream with the MLP (2 M + 2 F values a row), or with
  attention (M + 4 H D + 2 G D). Or the stream of the last layer with the float32 logits.
- Of weights in 8 bits, the rows in fp8, or one weight in the model's dtype (`_Case.eight_bits`).
- Of the portable attention, float32 scores and weights of one block of rows.
- Of attention over chunks, the rotated query rows of each slot, and what its implementation copies.
- KV that a program holds while it writes its results (`_Case.in_flight`).
- What the cache method says that its widest evaluation takes (`CacheMethod.scratch`).

Not counted: the CUDA context, fragmentation, compiling.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike

from pallas_kernels import Implementation, compat, implementation_name, resolve_implementation
from pallas_kernels.chunk_attention import dense
from pallas_kernels.matmul.hopper_tiling import FEW_ROWS
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.plan import Phase, Plan, total
from pdllm_jax.engine.programs import (
    MEMORY,
    Program,
    RecordedModel,
    Recorder,
    Shapes,
    method_memory,
    programs,
)
from pdllm_jax.method.cache import KVFormat, live_rows, pool_dtype
from pdllm_jax.method.caches import Method, cache_method
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    batch_size,
    bucket,
    bucket_chunks,
    bucket_rows,
    count_chunks,
)
from pdllm_jax.method.scorers import AllScorer, OracleScorer
from pdllm_jax.method.scorers.attention import AttentionScorer
from pdllm_jax.method.scorers.chunk_draft import ChunkDraftScorer
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import DATA, TENSOR, mesh_sizes, shardings
from pdllm_jax.network.transformer import MaskPredictor

_CUBLAS_WORKSPACE = 32 << 20  # of every cuBLAS call on Hopper (GemmConfig::kHopperWorkspace)
# Arrays that each layer has: weights of its block, and K and V of pools, prefixes and live rows.
_PER_LAYER = re.compile(r"\bblocks\.|(^|[._])[kv](\.(0|values|scale))?$")


class MemoryLimitError(ValueError):
    """An answer that does not fit the device; the message says which settings would."""


@dataclasses.dataclass(frozen=True)
class _Case:
    """An answer, and one device of a mesh of `sizes` (data, tensor) devices that computes it."""

    config: ModelConfig
    dtype: jnp.dtype
    sizes: tuple[int, int]
    implementation: Implementation
    attention: dense.DenseImplementation
    shapes: Shapes
    selection: SelectionConfig
    decode: DecodeConfig

    @functools.cached_property
    def gpu(self) -> bool:
        return self.attention == "cudnn" or jax.default_backend() == "gpu"

    @functools.cached_property
    def mesh(self) -> Any:  # an AbstractMesh, which has no devices
        if self.sizes == (1, 1):
            return None
        return AbstractMesh(self.sizes, (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))

    def nbytes(self, tree: Any, layers: int | None = None) -> int:
        """Bytes on this device of a pytree that was traced with one layer of all, or of so many."""
        if isinstance(tree, MaskPredictor):
            tree = nnx.to_pure_dict(nnx.state(tree))
        places = [] if self.mesh is None else jax.tree.leaves(shardings(self.mesh, tree))
        nbytes = 0
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shape = places[i].shard_shape(leaf.shape) if places else leaf.shape
            copies = (layers or self.config.n_layers) if _PER_LAYER.search(name) else 1
            nbytes += copies * math.prod(shape) * leaf.dtype.itemsize
        return nbytes

    def temporaries(self, program: Program, recorder: Recorder) -> dict[str, int]:
        """Estimates what XLA allocates for the program while it runs."""
        c, (data, tensor), item = self.config, self.sizes, self.dtype.itemsize
        shapes, size = self.shapes, self.shapes.chunk_size
        heads, kv = c.n_heads // tensor, c.n_kv_heads // tensor * c.head_dim
        mlp = 2 * c.d_model + 2 * c.mlp_hidden_size // tensor
        attention = c.d_model + 4 * heads * c.head_dim + 2 * kv
        live = live_rows(shapes.prefix + shapes.query + self.decode.gen_length)
        widest: dict[str, int] = {}
        for batch, rows, read in recorder.forwards:
            divided = data if batch % data == 0 else 1
            batch, read = batch // divided, read // divided
            layer = {"activations of a layer": batch * rows * max(mlp, attention) * item}
            layer |= self.eight_bits(batch * rows)
            if self.attention == "xla":
                seen = size if "KV of the document" in program.made else max(rows, live)
                keys = batch * heads * seen
                block = min(rows, max(16, dense.BLOCK_SCORES // keys))
                layer["attention scores"] = 2 * 4 * block * keys
            last = {"activations of the last layer": batch * rows * c.d_model * item}
            # A device computes its share of the logits and gathers the others.
            parts = tensor + 1 if tensor > 1 else 1
            last["logits"] = 4 * read * c.embedding_size // tensor * parts
            widest = max(widest, layer, last, key=total)
        over_chunks, path = 0, implementation_name(self.implementation)
        for batch, slots, rows in recorder.over_chunks:
            nbytes = batch * slots * rows * heads * c.head_dim * item
            if path not in ("mosaic_gpu", "interpret"):
                copied = slots if path == "cudnn" else 1
                nbytes += batch * size * (copied * 2 * kv * item + 2 * 4 * rows * heads)
            over_chunks = max(over_chunks, nbytes)
        return widest | {
            "attention over chunks": over_chunks,
            "cuBLAS workspace": _CUBLAS_WORKSPACE if self.gpu else 0,
            "KV in flight": self.in_flight(program, recorder),
            "evaluation of the method": self.scratch(program),
        }

    @functools.cached_property
    def memory(self) -> int:
        """Bytes of the cache method's memory; its settings may differ between layers."""
        full = RecordedModel.of(self.config, self.dtype, self.mesh)
        return self.nbytes({"memory": method_memory(full, self.shapes, self.decode)}, layers=1)

    def scratch(self, program: Program) -> int:
        """Bytes of the arrays of an evaluation that only its cache method has."""
        shapes, decode, (data, tensor) = self.shapes, self.decode, self.sizes
        rows = shapes.prefix + shapes.query + decode.gen_length
        each = decode.cache_method.scratch(self.config, decode, rows, self.dtype.itemsize)
        requests = shapes.requests // (data if shapes.requests % data == 0 else 1)
        return requests * each // tensor if program.phase == "decode" else 0

    def eight_bits(self, rows: int) -> dict[str, int]:
        """What the products of this number of rows and weights in 8 bits take in a layer."""
        c, item, few = self.config, self.dtype.itemsize, rows <= FEW_ROWS
        hidden, native = c.mlp_hidden_size // self.sizes[1], self.gpu and item == 2
        capability = compat.compute_capability() or "9.0"  # without a GPU: the plan is for a Hopper
        if c.weight_format == "full" or (native and few and capability == "9.0"):
            return {}  # the kernel converts on chip
        if native and not few and c.weight_format == "fp8" and float(capability) >= 8.9:
            return {"rows in fp8": rows * max(c.d_model, hidden)}
        # One weight is cast at a time; gate and up are float32 before they are rounded.
        sums = 2 * rows * hidden * (4 - item)
        return {"cast of a weight": c.d_model * hidden * item, "float32 products": sums}

    def in_flight(self, program: Program, recorder: Recorder) -> int:
        """Bytes of KV that a program holds beside its results while it writes them."""
        made, nbytes = program.made, 0
        pool = made.get("KV of the document", {}).get("pool")
        if pool is not None:
            # The pool is carried through the loop over groups of chunks. One of K and V of a group
            # waits for its last layer, and XLA on GPUs copies one of K and V of the pool.
            half = self.nbytes({"pool": {"k": pool.k}})
            batch = max(recorder.forwards, key=lambda x: x[0] * x[1])[0]
            nbytes += half // pool.k.shape[1] * (batch // self.sizes[0]) + self.gpu * half
        if "live KV" in made and recorder.forwards:
            nbytes += self.nbytes(made["live KV"])  # written when the last layer is through
        scorer, rescores = self.selection.scorer, ["decode"] * self.selection.reselects
        if isinstance(scorer, ChunkDraftScorer) and program.phase in ["score", *rescores]:
            # Of a group of chunks with the question, until the group is scored.
            c, (_, prefix, query, _, size, _) = self.config, self.shapes
            tail = self.decode.gen_length if program.phase == "decode" else scorer.draft_length
            rows = size + live_rows(prefix + query + tail) + prefix
            rows *= max(batch for batch, _, _ in recorder.forwards)
            kv = 2 * c.n_layers * c.n_kv_heads // self.sizes[1] * c.head_dim
            nbytes += rows * kv * self.dtype.itemsize
        selection = program.settings.get("settings")
        if selection is not None and program.phase == "decode":
            nbytes += self.nbytes(program.held["KV of the chosen chunks"])  # re-selected beside it
        elif selection is not None and selection.keep_tokens is not None:
            # Tokens are kept of a pool of whole chunks.
            whole = {"settings": dataclasses.replace(selection, keep_tokens=None)}
            state = program.function.eval_shape(*program.args, **{**program.settings, **whole})
            nbytes += self.nbytes({"pool": state.pool})
        return nbytes


@functools.lru_cache(maxsize=256)
def _plan(case: _Case) -> Plan:
    config = dataclasses.replace(case.config, n_layers=1)
    model = RecordedModel.of(config, case.dtype, case.mesh)
    recorder = model.recorder
    phases = [Phase("load", {"weights": case.nbytes(model)})]

    def nbytes(name: str, tree: Any) -> int:
        return case.memory if name == MEMORY and jax.tree.leaves(tree) else case.nbytes(tree)

    settings, traced = (case.shapes, case.selection, case.decode), case.selection
    # Heads of layers that the traced model does not have.
    if isinstance(traced.scorer, AttentionScorer) and traced.scorer.heads:
        traced = dataclasses.replace(traced, heads=((0, 0),))
    for program in programs(model, case.shapes, traced, case.decode, recorder.chunk_attention):
        held = {name: nbytes(name, tree) for name, tree in program.held.items()}
        made = {name: nbytes(name, tree) for name, tree in program.made.items()}
        phases.append(Phase(program.phase, held, made, case.temporaries(program, recorder)))
        recorder.clear()
    document = phases[1].made["KV of the document"] if case.shapes.encoded else 0
    return Plan(tuple(phases), phases[0].nbytes + document, *settings)


def plan_memory(
    config: ModelConfig,
    document: int,
    *,
    prefix: int = 16,
    query: int = 32,
    batch: int | None = None,
    questions: int | None = None,
    method: Method = "prefilling",
    chunking: ChunkConfig = ChunkConfig(),
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
    attention: dense.DenseImplementation | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Predicts the device memory of an answer: traces one layer, allocates and compiles nothing.

    Args:
      config: the model's architecture.
      document, prefix, query: tokens (of a batch the maximum) in, before and after the document.
      batch: requests that are answered together, one by default; or
      questions: that are asked together about one document that is encoded before.
      method, chunking, selection, decode: settings of the answer.
      dtype: of weights and activations.
      implementation: of attention over chunks; attention: over other rows, "cudnn" or "xla"; by
        default as on the device of this process.
      mesh: sizes of the axes "tensor", which divides heads, MLP and vocabulary, and "data", which
        divides requests and the chunks of a pass. The plan is of one device.

    Returns:
      The plan: phases load, encode document (for questions), draft, score, encode, decode.

    Raises:
      ConfigError, ValueError: a count below its minimum, or settings that exclude each other.
    """
    chunked = cache_method(method).uses_chunks
    if chunked:
        selection.scorer.check(config)
    minimum = {"document": int(chunked), "prefix": 0, "query": 0, "batch": 1, "questions": 1}
    counts = (document, prefix, query, batch, questions)
    for (name, least), count in zip(minimum.items(), counts, strict=True):
        if count is not None and (count != int(count) or count < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")
    if batch is not None and questions is not None:
        raise ValueError("batch and questions exclude each other")
    if not chunked and questions is not None:
        raise ValueError(f"method '{method}' encodes no document that questions could share")
    requests, encoded = batch or questions or 1, questions is not None
    rows, size = bucket(prefix + document + query, 8), chunking.chunk_size
    decode = cache_method(method).decode_config(decode)
    decode.cache_method.check(config, decode, rows + decode.gen_length)
    shapes = Shapes(batch_size(requests), 0, rows, 0, 1)
    if chunked:
        n = count_chunks(document, chunking)
        tight = encoded or selection.keeps_pool(documents=1 if encoded else requests)
        padded = batch_size(requests), bucket_rows(prefix), bucket_rows(query)
        shapes = Shapes(*padded, bucket_chunks(n, tight), size, encoded)
        selection = selection.for_document(n, named=isinstance(selection.scorer, OracleScorer))
    implementation = resolve_implementation(
        implementation,
        dtype=jnp.dtype(dtype),
        head_size=config.head_dim,
        chunk_size=min(selection.keep_tokens or size, size),
        pool_dtype=pool_dtype(selection.kv_format),
    )
    attention = attention or dense.dense_implementation(jnp.dtype(dtype), config.head_dim)
    sizes = mesh_sizes(config, mesh)
    settings = shapes, selection, decode
    return _plan(_Case(config, jnp.dtype(dtype), sizes, implementation, attention, *settings))


def device_stats(model: MaskPredictor) -> dict[str, int]:
    """Returns the memory statistics of the model's first device; empty on the CPU."""
    return model.embedding.weight[...].addressable_shards[0].device.memory_stats() or {}


def require_document_memory(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    encode_batch: int,
    kv_format: KVFormat,
    *,
    limit: int | None = None,
) -> None:
    """`require_memory` for `encode_document` alone."""
    shapes = Shapes.of(prompt)._replace(requests=0, query=1, encoded=True)
    settings = SelectionConfig(encode_batch=encode_batch, kv_format=kv_format)
    require_memory(model, shapes, settings, limit=limit)


def require_memory(
    model: MaskPredictor,
    shapes: Shapes,
    selection: SelectionConfig = SelectionConfig(),
    decode: DecodeConfig = DecodeConfig(),
    *,
    implementation: Implementation = "xla",
    limit: int | None = None,
) -> None:
    """Refuses an answer that would exceed the device memory, before anything is computed.

    Args:
      selection: as `SelectionConfig.for_document` returns it.
      implementation: of the attention over chunks, resolved.
      limit: bytes, by default as the device reports. The CPU reports none: nothing is refused.

    Raises:
      MemoryLimitError: names the phase, its bytes, the limit, and settings that would fit.
    """
    stats = device_stats(model)
    limit = stats.get("bytes_limit") if limit is None else limit
    if limit is None:
        return
    config, sizes = model.config, mesh_sizes(model.config, model.mesh)
    attention = dense.dense_implementation(model.dtype, config.head_dim)
    settings = shapes, selection, decode
    case = _Case(config, model.dtype, sizes, implementation, attention, *settings)
    plan = _plan(case)
    others = max(0, stats.get("bytes_in_use", 0) - plan.resident)
    if plan.peak + others <= limit:
        return
    fitting = _advice(case, lambda changed: _plan(changed).peak + others <= limit)
    advice = f"fits with {', or '.join(fitting)}" if fitting else "no one setting makes it fit"
    if not shapes.chunks and not fitting:
        advice = "a shorter prompt needs less, and so does method 'prefilling'"
    phase = plan.largest
    parts = {**phase.scratch, **phase.made, **phase.held}
    names = sorted(parts, key=lambda name: -parts[name])[:4]
    largest = ", ".join(f"{name} {parts[name] / 1e9:.2f}" for name in names)
    beside = f" ({others / 1e9:.2f} of them held already beside the model)" if others > 1e7 else ""
    raise MemoryLimitError(
        f"phase {phase.name!r} needs {(plan.peak + others) / 1e9:.2f} GB{beside}, "
        f"the device gives {limit / 1e9:.2f} GB; largest: {largest}; {advice}"
    )


def _advice(case: _Case, fits: Callable[[_Case], bool]) -> list[str]:
    """Returns for each setting the smallest change of it alone that fits, in words."""
    shapes, selection, advice = case.shapes, case.selection, []

    def halves(n: int) -> list[int]:
        return [n >> i for i in range(1, n.bit_length())]

    options: list[tuple[str, list[Any]]] = []
    if shapes.chunks:
        chunks = shapes.chunks * max(1, shapes.requests)
        options += [("encode_batch", halves(min(selection.encode_batch, chunks)))]
    if shapes.chunks and shapes.requests:
        if selection.max_k is None and not isinstance(selection.scorer, AllScorer):
            options += [("top_k", halves(selection.top_k))]
        options += [("reselect", ["never"]), ("encoding", ["independent"]), ("encoding", ["joint"])]
    for name, values in options:
        for value in values:
            changed = dataclasses.replace(selection, **{name: value})
            if fits(dataclasses.replace(case, selection=changed)):
                advice.append(f"{name}={value!r}")
                break
    for n in halves(shapes.requests):
        if fits(dataclasses.replace(case, shapes=shapes._replace(requests=n))):
            return [*advice, f"{n} requests at a time"]
    return advice
