"""What an answer needs of a device's memory: the plan, how it is printed, and the refusal.

Shapes of an answer, and bytes of arrays on one device; `footprint.py` adds them up.

What the phases of an answer hold on a device, from shapes alone.

A phase's peak is what the device holds before it, its results, and XLA's temporaries. The first two
are the shapes of `ChunkCache`, `DenoiseState` and the weights, exactly. The temporaries are the
largest set of intermediate arrays that live at once; what that set is follows from the programs:

- One layer's rows live at a time. The widest moment is the MLP (residual stream, its norm, gate and
  up: 2 M + 2 F values a row) or attention (stream, q, k, v, and three results on their way
  together: 5 M + 2 KV). Where a step recomputes rows of which some stay as they were (blocks behind
  the first), keys and values are there four times, new, old, merged and as attention reads them:
  3 M + 8 KV. Weights are never copied.
- Logits are float32 and only of the rows that are read; they come when the last layer is through,
  so that the wider of the two moments counts.
- Joint encoding's writes of live KV wait for the program's end. Those of chunks would too, were
  they not held to their layer (`encoding.encode_jointly`).
- A pool that is the carry of the loop over chunks is kept with a chunk's rows outermost: one of K
  and V passes through a temporary of its size (GPU alone), and one of K and V of a group waits.
- The portable attention adds float32 scores and weights of a block of rows.

`programs.py` asks the compiler instead; tests compare the two, `scripts/benchmark.py memory` both
with what a device has measured. Of what libraries take for themselves cuBLAS' workspace is counted;
CUDA's context, fragmentation, and what compiling takes are not.

Device memory of an answer, predicted before anything is allocated or compiled; and the refusal.

`footprint.py` says what is counted and what is assumed of XLA.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import Implementation, implementation_name, resolve_implementation
from pallas_kernels.chunk_attention.dense import (
    BLOCK_SCORES,
    DenseImplementation,
    dense_implementation,
)
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.cache import ChunkCache, live_rows
from pdllm_jax.method.cache_methods import Method, cache_method
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    batch_size,
    bucket,
    bucket_chunks,
    bucket_rows,
    count_chunks,
)
from pdllm_jax.method.encodings import Bridge, Independent, Joint, QueryConditioned
from pdllm_jax.method.scorers import AllScorer, AttentionScorer, OracleScorer
from pdllm_jax.method.scorers.query_copies import DraftScorer
from pdllm_jax.method.token_selection import LAST_ROWS
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import mesh_sizes
from pdllm_jax.network.transformer import MaskPredictor


class MemoryLimitError(ValueError):
    """An answer that does not fit the device; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Item:
    """Bytes of one device under one name."""

    name: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of an answer, or the time before the first.

    held: what lies on the device before it begins (and stays, unless a later phase lacks it);
    made: its results; scratch: XLA's temporaries, which go when it ends.
    """

    name: str
    held: tuple[Item, ...]
    made: tuple[Item, ...] = ()
    scratch: tuple[Item, ...] = ()

    @property
    def nbytes(self) -> int:
        """Most bytes at once: XLA allocates results and temporaries before a program runs."""
        return sum(item.nbytes for item in (*self.held, *self.made, *self.scratch))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device, phase by phase.

    phases: in the order of an answer. resident: bytes that are there before it begins (weights,
      and of questions about an encoded document its cache).
    """

    phases: tuple[Phase, ...]
    resident: int

    @property
    def peak(self) -> int:
        """Most bytes that the device holds at once."""
        return self.largest.nbytes

    @property
    def largest(self) -> Phase:
        """The phase of the peak, the first of equals."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    def __getitem__(self, name: str) -> Phase:
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def __str__(self) -> str:
        """A table, sizes in GB (1e9 bytes)."""
        lines = []
        for phase in self.phases:
            mark = "  <- peak" if phase is self.largest else ""
            lines.append(f"{phase.name:44}{phase.nbytes / 1e9:10.3f} GB{mark}")
            lines += [
                f"  {kind:8}{item.name:34}{item.nbytes / 1e9:10.3f}"
                for kind in ("held", "made", "scratch")
                for item in getattr(phase, kind)
                if item.nbytes
            ]
        return "\n".join(lines)

    def require(self, limit: int, *, in_use: int | None = None, advice: str = "") -> None:
        """Refuses an answer that would not fit.

        limit: bytes that the device gives. in_use: bytes that it holds now, by default those that
        the plan says are there.

        Raises:
          MemoryLimitError: the peak exceeds the limit.
        """
        elsewhere = 0 if in_use is None else max(0, in_use - self.resident)
        peak = self.peak + elsewhere
        if peak <= limit:
            return
        other = f" ({elsewhere / 1e9:.2f} of them held already beside the model)"
        items = sorted(
            (i for kind in ("held", "made", "scratch") for i in getattr(self.largest, kind)),
            key=lambda item: -item.nbytes,
        )
        parts = ", ".join(f"{item.name} {item.nbytes / 1e9:.2f}" for item in items[:4])
        raise MemoryLimitError(
            f"phase {self.largest.name!r} would take {peak / 1e9:.2f} GB"
            f"{other if elsewhere > 1e7 else ''}, the device gives {limit / 1e9:.2f} GB; "
            f"most of it: {parts}{'; ' + advice if advice else ''}"
        )


class Shapes(NamedTuple):
    """Padded sizes of a batch of requests.

    chunks: places of chunks a document; 0: no document, the query is the whole prompt.
    pooled: one document's KV is held already, and `requests` questions are asked about it.
    """

    requests: int
    prefix: int
    query: int
    chunks: int
    chunk_size: int
    pooled: bool = False

    @classmethod
    def of(cls, prompt: ChunkedPrompt, cache: ChunkCache | None = None) -> Shapes:
        """Those of a prompt, or of questions about the document of a cache."""
        chunks = prompt.chunks if cache is None else cache.tokens
        return cls(
            requests=prompt.query.shape[0],
            prefix=prompt.prefix.shape[-1],
            query=prompt.query.shape[-1],
            chunks=chunks.shape[-2],
            chunk_size=prompt.chunk_size,
            pooled=cache is not None,
        )


class Sizes:
    """Bytes of arrays and sets of them, of one device of a mesh."""

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, attention: DenseImplementation, tensor: int
    ):
        self.config, self.attention, self.tensor = config, attention, tensor
        self.gpu = attention == "cudnn" or jax.default_backend() == "gpu"
        self.itemsize = jnp.dtype(dtype).itemsize
        self.kv_size = config.n_kv_heads * config.head_dim // tensor

    def weights(self) -> int:
        """As `LLaDA` holds them; norms on every device."""
        c = self.config
        kv = c.n_kv_heads * c.head_dim
        matrices = 2 * c.d_model**2 + 2 * c.d_model * kv + 3 * c.d_model * c.mlp_hidden_size
        tables = (1 if c.weight_tying else 2) * c.embedding_size * c.d_model
        norms = (2 * c.n_layers + 1) * c.d_model
        return self.itemsize * ((c.n_layers * matrices + tables) // self.tensor + norms)

    def kv(self, rows: int) -> int:
        """Keys and values of rows, in all layers."""
        return 2 * self.config.n_layers * rows * self.kv_size * self.itemsize

    def layer(self, rows: int, merging: bool = False) -> int:
        """The widest moment of one layer. merging: its rows' KV with what the live cache holds."""
        c = self.config
        heads = c.d_model // self.tensor
        mlp = 2 * c.d_model + 2 * c.mlp_hidden_size // self.tensor
        attention = c.d_model + 4 * heads + 2 * self.kv_size
        if merging:
            attention = c.d_model + 2 * heads + 8 * self.kv_size
        return rows * max(mlp, attention) * self.itemsize

    def stream(self, rows: int) -> int:
        """The residual stream."""
        return rows * self.config.d_model * self.itemsize

    def scores(self, batch: int, rows: int, keys: int) -> int:
        """Of the portable attention: one block of query rows, float32 scores and weights."""
        if self.attention == "cudnn":
            return 0
        heads = self.config.n_heads // self.tensor
        size = max(16, BLOCK_SCORES // (batch * heads * keys))
        return 2 * 4 * batch * heads * min(rows, size) * keys

    def logits(self, rows: int) -> int:
        """Logits of rows, float32: a device's share and, gathered, all of them."""
        whole = 4 * rows * self.config.embedding_size
        return whole if self.tensor == 1 else whole + whole // self.tensor


# GemmConfig::kHopperWorkspace of XLA, which it gives to every cuBLAS call; one runs at a time.
_CUBLAS_WORKSPACE = 32 << 20


def plan_shapes(
    config: ModelConfig,
    shapes: Shapes,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    *,
    dtype: DTypeLike,
    implementation: Implementation,
    attention: DenseImplementation,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of what `answer` does with arrays of these shapes.

    selecting: as `passes.settled` leaves it; implementation: of attention over chunks, attention:
    over other rows, as they are resolved. mesh: see `plan_memory`.
    """
    data, tensor = mesh_sizes(config, mesh)
    sizes = Sizes(config, dtype, attention, tensor)
    weights = Item("weights", sizes.weights())
    planned = _Answer(sizes, shapes, selecting, decode, implementation, data)
    if not shapes.chunks:
        phases = [Phase("load", (weights,)), *planned.baseline(weights)]
        return Plan(tuple(phases), weights.nbytes)
    phases = [Phase("load", (weights,)), *planned.phases(weights)]
    return Plan(tuple(phases), weights.nbytes + (planned.pool_bytes() if shapes.pooled else 0))


class _Answer:
    """The phases of one answer; everything counted per device."""

    def __init__(
        self,
        sizes: Sizes,
        shapes: Shapes,
        selecting: SelectionConfig,
        decode: DecodeConfig,
        implementation: Implementation,
        data: int,
    ):
        self.sizes, self.shapes, self.selecting, self.decode = sizes, shapes, selecting, decode
        self.implementation, self.data = implementation, data
        # A device's share, as `parallel.rows_axis` divides; pools lie whole on the data axis.
        self.requests = shapes.requests // (1 if shapes.requests % data else data)
        self.streams = selecting.streams(documents=shapes.requests) and not shapes.pooled
        self.pooling = (
            self.streams
            or shapes.pooled
            or selecting.needs_pool
            or (selecting.scorer.needs_pool and not selecting.scorer.in_pass)
        )
        self.group = min(selecting.encode_batch, shapes.chunks * shapes.requests)
        self.group = -(-self.group // data) * data
        self.slots = min(selecting.slots, shapes.chunks)
        sizes_of_copies = selecting.scorer.copy_sizes(shapes.query)
        copies, rows, scored = sizes_of_copies or (1, shapes.query, 0)
        self.copies, self.rider_rows, self.scored = copies, rows, scored

    # Arrays.

    def prompt(self) -> Item:
        s = self.shapes
        documents = 1 if s.pooled else s.requests
        ids = documents * s.chunks * (s.chunk_size + 1) + s.requests * (s.prefix + s.query + 2)
        return Item("token ids", 4 * ids)

    def places(self) -> int:
        """Chunks that the pool has places for, on one device."""
        documents = 1 if self.shapes.pooled else self.shapes.requests
        if self.streams:
            return self.slots + self.group
        chunks = documents * self.shapes.chunks
        return -(-chunks // self.group) * self.group

    def pool_bytes(self) -> int:
        """Of the document's pool, its lengths, and the prefix' KV."""
        if not self.pooling:
            return self.prefix_bytes() if self.selecting.encoding.keeps_prefix else 0
        pool = self.sizes.kv(self.places() * self.shapes.chunk_size)
        return pool + self.prefix_bytes() + 4 * self.places()

    def prefix_bytes(self) -> int:
        documents = 1 if self.shapes.pooled else self.shapes.requests
        return self.sizes.kv(documents * self.shapes.prefix)

    def live_bytes(self) -> int:
        s = self.shapes
        if self.decode.recompute == "response" and not (s.chunks and s.prefix):
            return 0
        prefix = s.prefix if s.chunks else 0
        return self.sizes.kv(self.requests * live_rows(prefix + s.query + self.decode.gen_length))

    def own_pool_bytes(self) -> int:
        """Of the state's own pool: chosen chunks, or what is kept of their tokens."""
        s, size, keep = self.shapes, self.shapes.chunk_size, self.selecting.keep_tokens
        if keep is not None and keep < size:
            return self.sizes.kv(s.requests * self.slots * keep)
        if isinstance(self.selecting.encoding, Independent):
            return 0
        return self.sizes.kv(s.requests * self.slots * size)

    # Temporaries.

    def _layer(
        self, rows: int, batch: int, keys: int, read: int = 0, merging: bool = False
    ) -> list[Item]:
        """The widest moment of a forward over `rows` rows in all, of which `read` get logits."""
        sizes = self.sizes
        layer = Item("one layer's rows", sizes.layer(rows, merging))
        scores = Item("attention scores", sizes.scores(batch, -(-rows // batch), keys))
        logits = Item("logits", sizes.logits(read))
        last = Item("the last layer's rows", sizes.stream(rows))
        widest = max(((layer, scores), (last, logits)), key=lambda x: x[0].nbytes + x[1].nbytes)
        return [*widest, Item("cuBLAS workspace", _CUBLAS_WORKSPACE if sizes.gpu else 0)]

    def _chunk_attention(self, batch: int, rows: int, slots: int) -> Item:
        """Attention over chosen chunks: rotated rows of every slot, and what it gathers."""
        c, s = self.sizes.config, self.sizes
        heads = c.d_model // s.tensor
        turned = batch * slots * rows * heads * s.itemsize
        chunk = 2 * self.shapes.chunk_size * s.kv_size * s.itemsize
        # Of an implementation of the caller's own nothing is known: as "xla".
        named = isinstance(self.implementation, str)
        path = implementation_name(self.implementation) if named else "xla"
        gathered = {"cudnn": batch * slots * chunk, "xla": batch * chunk}
        scores = 2 * 4 * batch * rows * c.n_heads // s.tensor * self.shapes.chunk_size
        more = gathered.get(path, 0) + (scores if path == "xla" else 0)
        return Item("attention over chunks", turned + more)

    def _pass(self) -> list[Item]:
        """Of `prefill`: a group of chunks with riders behind them."""
        s, sizes = self.shapes, self.sizes
        group = self.group // self.data
        riding = self.selecting.scorer.in_pass
        rows = group * (s.chunk_size + (self.copies * self.rider_rows if riding else 0))
        items = self._layer(rows, group, s.chunk_size, group * self.scored if riding else 0)
        items.append(Item("prefix KV", self.prefix_bytes()))
        if self.pooling:
            if sizes.gpu:
                half = sizes.kv(self.places() * s.chunk_size) // 2
                items.append(Item("pool in another layout, K or V", half))
            items.append(Item("KV of a group, K or V", sizes.kv(group * s.chunk_size) // 2))
        return items

    def _score_questions(self) -> list[Item]:
        """Of `score_chunks`: groups of (question, chunk) pairs, or one pass of the questions."""
        s = self.shapes
        if isinstance(self.selecting.scorer, AttentionScorer):
            rows = self.requests * s.query
            pairs = self.requests * s.chunks
            return [
                *self._layer(rows, self.requests, s.query),
                self._chunk_attention(pairs, s.query, 1),
            ]
        each = self.copies * self.rider_rows
        pairs = self.requests * s.chunks
        group = min(pairs, max(1, self.selecting.encode_batch * s.chunk_size // each))
        return [
            *self._layer(group * each, group, max(s.prefix, self.rider_rows), group * self.scored),
            self._chunk_attention(group, each, 1),
        ]

    def _forward_and_store(self, rows: int, batch: int, live: int = 0) -> list[Item]:
        """An encoding that stores its KV layer by layer; that of `live` rows when it is through."""
        return [
            *self._layer(rows, batch, rows // batch),
            Item("KV of live rows, to be stored", self.sizes.kv(live)),
        ]

    def _encode(self) -> list[Item]:
        """Of `init_denoise`."""
        s, b, how = self.shapes, self.requests, self.selecting
        own = s.query + self.decode.gen_length
        items: list[Item] = []
        if isinstance(how.encoding, Joint):
            live = b * (s.prefix + own)
            items = self._forward_and_store(b * self.slots * s.chunk_size + live, b, live)
        elif isinstance(how.encoding, QueryConditioned):
            each = s.prefix + s.chunk_size + s.query
            items = self._forward_and_store(b * self.slots * each, b * self.slots)
        elif isinstance(how.encoding, Bridge):
            count = min(s.chunk_size, math.ceil(how.encoding.share * s.chunk_size))
            rows = b * (self.slots * count + own)
            items = [
                *self._layer(rows, b, own + s.prefix),
                self._chunk_attention(b, rows // b, self.slots),
            ]
            if how.encoding.tokens == "attention":
                items.append(self._received())
        if how.keep_tokens is not None and how.keep_tokens < s.chunk_size:
            if not items:
                items = [
                    *self._layer(b * own, b, own + s.prefix),
                    self._chunk_attention(b, own, self.slots),
                ]
            items.append(self._received())
            if not isinstance(how.encoding, Independent):  # the pool that tokens are kept of
                whole = self.sizes.kv(b * self.slots * s.chunk_size)
                items.append(Item("KV of the chosen chunks", whole))
        return items

    def _received(self) -> Item:
        """Of `sparsity`: a layer's chosen keys and values, and float32 weights on them."""
        b, size, c = self.requests, self.shapes.chunk_size, self.sizes.config
        last = min(LAST_ROWS, self.shapes.query)
        chosen = 2 * b * self.slots * size * self.sizes.kv_size * self.sizes.itemsize
        weights = 4 * b * self.slots * (c.n_heads // self.sizes.tensor) * (last + 1) * size
        return Item("attention received by tokens", chosen + weights)

    def _steps(self) -> list[Item]:
        """Of `denoise`: the wider of a step's forms."""
        s, d, b, how = self.shapes, self.decode, self.requests, self.selecting
        chosen = bool(s.chunks)
        whole = s.query + d.gen_length
        rows, merging = whole, d.recompute != "response"
        if merging and chosen and how.encoding.live_encoded and d.n_blocks == 1:
            rows, merging = d.block_length, False  # live KV is never stale
        read = d.gen_length if d.n_blocks > 1 else d.block_length
        twice = 2 if d.guidance > 0 else 1
        keys = (s.prefix if chosen else 0) + whole
        items = self._layer(twice * b * rows, twice * b, keys, twice * b * read, merging)
        if chosen:
            items.append(self._chunk_attention(b, rows, self.slots))
        return items

    # Phases.

    def baseline(self, weights: Item) -> list[Phase]:
        ids = self.prompt()
        live = Item("KV of prompt and response", self.live_bytes())
        held = (weights, ids)
        return [
            Phase("encode", held, (live,)),
            Phase("decode", (*held, live), (), tuple(self._steps())),
        ]

    def phases(self, weights: Item) -> list[Phase]:
        s, sizes, how = self.shapes, self.sizes, self.selecting
        held: tuple[Item, ...] = (weights, self.prompt())
        document = Item(
            "KV of the document" if not self.streams else "KV of kept chunks and a group",
            self.pool_bytes(),
        )
        found = []
        if s.pooled:
            one = dataclasses.replace(how, scorer="first", encoding="independent", reselect="never")
            alone = _Answer(
                sizes, s._replace(requests=1), one, self.decode, self.implementation, self.data
            )
            found.append(
                Phase(
                    "encode document", (weights, self.prompt()), (document,), tuple(alone._pass())
                )
            )
            held = (*held, document)
        if isinstance(how.scorer, DraftScorer):
            rows = self.requests * (s.prefix + s.query + how.scorer.draft_length)
            read = self.requests * how.scorer.draft_length
            scratch = self._layer(rows, self.requests, rows // self.requests, read)
            found.append(Phase("draft", held, (), tuple(scratch)))
        scores = Item("scores", 4 * self.requests * s.chunks)
        if s.pooled:
            scratch = [] if not how.scorer.needs_pool else self._score_questions()
            found.append(Phase("score", held, (scores,), tuple(scratch)))
        else:
            scratch = self._pass() if self.pooling or how.scorer.in_pass else []
            found.append(Phase("score", held, (document, scores), tuple(scratch)))
            if isinstance(how.scorer, AttentionScorer):
                more = tuple(self._score_questions())
                last = found.pop()
                found.append(dataclasses.replace(last, scratch=(*last.scratch, *more)))
            held = (*held, document)
        found.append(Phase("select", (*held, scores), (), (Item("order", 3 * scores.nbytes),)))
        live = Item("KV of prefix, query and response", self.live_bytes())
        own = Item("KV of the chosen chunks", self.own_pool_bytes())
        scratch = self._encode()
        found.append(Phase("encode", held, (live, own), tuple(scratch)))
        again = how.reselect != "never"
        if own.nbytes and not again and not s.pooled:
            held = held[:-1]
        scratch = self._steps()
        if again:
            scratch += self._score_questions()
            if own.nbytes:  # a state's pool is made anew beside it
                scratch.append(Item("chunks chosen anew", own.nbytes))
            scratch += self._encode()
        found.append(Phase("decode", (*held, live, own), (), tuple(scratch)))
        return found


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
    attention: DenseImplementation | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Predicts the device memory of an answer; allocates and compiles nothing.

    Args:
      config: the model's architecture.
      document, prefix, query: tokens of the document, before and behind it; of a batch the most.
      batch: requests of `generate_batch_ids`; None: `generate`.
      questions: questions of `ask` about one encoded document instead; excludes batch.
      method, chunking, selection, decode: as `generate` takes them.
      dtype: of weights and activations.
      implementation: of attention over chunks; attention: over other rows, "cudnn" or "xla". By
        default what this process' device would use.
      mesh: sizes of the axes "tensor", which divides heads, MLP and vocabulary, and "data", which
        divides requests and the chunks of a pass (`parallel`); the plan is of one device.

    Returns:
      The plan: phases load, encode document (of questions), draft, score, select, encode, decode.

    Raises:
      ConfigError, ValueError: settings that do not go together or with the mesh.
    """
    shapes, selection, decode = shapes_of(
        document, prefix=prefix, query=query, batch=batch, questions=questions, method=method,
        chunking=chunking, selection=selection, decode=decode,
    )  # fmt: skip
    implementation, attention = _paths(
        config, selection, chunking.chunk_size, jnp.dtype(dtype), implementation, attention
    )
    return plan_shapes(
        config, shapes, selection, decode,
        dtype=dtype, implementation=implementation, attention=attention, mesh=mesh,
    )  # fmt: skip


def shapes_of(
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
) -> tuple[Shapes, SelectionConfig, DecodeConfig]:
    """The bucketed shapes of an answer, and its settings as they apply to them.

    Arguments and errors as `plan_memory`.
    """
    least = {
        "document": int(method == "prefilling"),
        "prefix": 0,
        "query": 0,
        "batch": 1,
        "questions": 1,
    }
    given = {"document": document, "prefix": prefix, "query": query}
    for name, count in {**given, "batch": batch, "questions": questions}.items():
        if count is not None and (count != int(count) or count < least[name]):
            raise ValueError(f"{name} must be a number of at least {least[name]}, got {count!r}")
    if batch is not None and questions is not None:
        raise ValueError("batch and questions exclude each other")
    decode = cache_method(method).decode_config(decode)
    if method != "prefilling":
        if batch is not None or questions is not None:
            raise ValueError(f"method {method!r} answers one request at a time")
        rows = bucket(prefix + document + query, 8)
        return Shapes(1, 0, rows, 0, chunking.chunk_size), selection, decode
    n = count_chunks(document, chunking)
    several = batch if questions is None else questions
    tight = questions is not None or selection.keeps_pool(documents=batch or 1)
    shapes = Shapes(
        requests=batch_size(several or 1),
        prefix=bucket_rows(prefix),
        query=bucket_rows(query),
        chunks=bucket_chunks(n, tight),
        chunk_size=chunking.chunk_size,
        pooled=questions is not None,
    )
    return (
        shapes,
        selection.for_document(n, named=isinstance(selection.scorer, OracleScorer)),
        decode,
    )


def _paths(
    config: ModelConfig,
    selecting: SelectionConfig,
    chunk_size: int,
    dtype: jnp.dtype,
    implementation: Implementation | None,
    attention: DenseImplementation | None,
) -> tuple[Implementation, DenseImplementation]:
    keep = selecting.keep_tokens
    size = chunk_size if keep is None else min(keep, chunk_size)
    found = resolve_implementation(
        implementation, dtype=dtype, head_size=config.head_dim, chunk_size=size
    )
    return found, attention or dense_implementation(dtype, config.head_dim)


def require_memory(
    model: MaskPredictor,
    prompt: ChunkedPrompt,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    *,
    cache: ChunkCache | None = None,
    implementation: Implementation,
    limit: int | None = None,
) -> None:
    """Refuses what `answer` is about to do where the device would run out.

    selecting: as `passes.settled` leaves it. limit: bytes, by default what the device reports, with
    what it holds already; where it reports nothing (the CPU), nothing is refused.

    Raises:
      MemoryLimitError: names the phase, its bytes, the limit, and what would fit.
    """
    found = _limit(model, limit)
    if found is not None:
        shapes = Shapes.of(prompt, cache)
        _require(model, shapes, selecting, decode, implementation, *found)


def require_document_memory(
    model: MaskPredictor, prompt: ChunkedPrompt, encode_batch: int, *, limit: int | None = None
) -> None:
    """`require_memory` of `encode_document` alone."""
    found = _limit(model, limit)
    if found is None:
        return
    shapes = Shapes.of(prompt)._replace(pooled=True)
    select = SelectionConfig(scorer="first", encoding="independent", encode_batch=encode_batch)
    attention = dense_implementation(model.dtype, model.config.head_dim)
    whole = plan_shapes(
        model.config, shapes, select, DecodeConfig(),
        dtype=model.dtype, implementation="xla", attention=attention, mesh=_sizes(model),
    )  # fmt: skip
    weights = whole["load"].nbytes
    plan = Plan((whole["load"], whole["encode document"]), weights)
    plan.require(found[0], in_use=found[1], advice="a smaller encode_batch or document takes less")


def require_baseline_memory(
    model: MaskPredictor, rows: int, decode: DecodeConfig, *, limit: int | None = None
) -> None:
    """`require_memory` of a baseline, whose whole prompt has so many rows."""
    found = _limit(model, limit)
    if found is not None:
        shapes = Shapes(1, 0, rows, 0, 1)
        _require(model, shapes, SelectionConfig(), decode, "xla", *found)


def device_stats(model: MaskPredictor) -> dict[str, int]:
    """What the model's device, or the first of a mesh, says of its memory; nothing on the CPU."""
    device = model.embedding.weight[...].addressable_shards[0].device
    return device.memory_stats() or {}


def _sizes(model: MaskPredictor) -> Mapping[str, int] | None:
    return None if model.mesh is None else model.mesh.shape


def _limit(model: MaskPredictor, limit: int | None) -> tuple[int, int | None] | None:
    """Bytes that the model's device gives, and those that it holds where it says so."""
    stats = device_stats(model)
    if limit is None:
        limit = stats.get("bytes_limit")
    return None if limit is None else (limit, stats.get("bytes_in_use"))


def _require(
    model: MaskPredictor,
    shapes: Shapes,
    selecting: SelectionConfig,
    decode: DecodeConfig,
    implementation: Implementation,
    limit: int,
    in_use: int | None,
) -> None:
    attention = dense_implementation(model.dtype, model.config.head_dim)

    def plan(shapes: Shapes, selecting: SelectionConfig, decode: DecodeConfig) -> Plan:
        return plan_shapes(
            model.config, shapes, selecting, decode,
            dtype=model.dtype, implementation=implementation, attention=attention,
            mesh=_sizes(model),
        )  # fmt: skip

    wanted = plan(shapes, selecting, decode)
    beside = 0 if in_use is None else max(0, in_use - wanted.resident)
    if wanted.peak + beside <= limit:
        return
    fitting: list[str] = []
    for kind in _changes(shapes, selecting, decode):
        fits = (words for words, others in kind if plan(*others).peak + beside <= limit)
        fitting += itertools.islice(fits, 1)
    advice = "no one setting makes it fit" if not fitting else f"fits with {', or '.join(fitting)}"
    if not shapes.chunks:
        advice = "a shorter prompt takes less, and so does method 'prefilling'"
    wanted.require(limit, in_use=in_use, advice=advice)


_Settings = tuple[Shapes, SelectionConfig, DecodeConfig]


def _changes(
    shapes: Shapes, selecting: SelectionConfig, decode: DecodeConfig
) -> Iterator[list[tuple[str, _Settings]]]:
    """Settings that differ in one thing and take less memory, in words; least change first."""

    def select(words: str, **changes: Any) -> tuple[str, _Settings]:
        return words, (shapes, dataclasses.replace(selecting, **changes), decode)

    def halves(n: int) -> list[int]:
        return [n >> i for i in range(1, n.bit_length())]

    if shapes.chunks:
        group = min(selecting.encode_batch, shapes.chunks * shapes.requests)
        yield [select(f"encode_batch={n}", encode_batch=n) for n in halves(group)]
        if selecting.max_k is None and not isinstance(selecting.scorer, AllScorer):
            yield [select(f"top_k={n}", top_k=n) for n in halves(selecting.top_k)]
        if selecting.reselect != "never":
            yield [select("reselect='never'", reselect="never")]
        if (
            not isinstance(selecting.encoding, Independent)
            and shapes.requests == 1
            and not shapes.pooled
        ):
            words = "encoding='independent', which streams the document"
            yield [select(words, encoding="independent")]
        if selecting.needs_pool and shapes.requests > 1 and not shapes.pooled:
            words = "encoding='joint', which keeps no KV of the document"
            yield [select(words, encoding="joint")]
    if shapes.requests > 1:
        yield [
            (f"{n} requests at a time", (shapes._replace(requests=n), selecting, decode))
            for n in halves(shapes.requests)
        ]
