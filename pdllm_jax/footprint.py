"""What the phases of an answer hold on a device, from shapes alone.

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
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jax.typing import DTypeLike

from pallas_kernels import Implementation, implementation_name
from pallas_kernels.dense import DenseImplementation
from pdllm_jax.cache import live_rows
from pdllm_jax.config import CONTROLS, DecodeConfig, ModelConfig, SelectionConfig
from pdllm_jax.parallel import mesh_sizes
from pdllm_jax.passes import streams
from pdllm_jax.plan import Item, Phase, Plan
from pdllm_jax.prefill import needs_pool
from pdllm_jax.riders import RIDING
from pdllm_jax.sizes import Shapes, Sizes
from pdllm_jax.sparsity import LAST_ROWS

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
        self.streams = streams(selecting, batched=shapes.batch is not None) and not shapes.pooled
        self.pooling = (
            self.streams
            or shapes.pooled
            or needs_pool(selecting)
            or selecting.scorer == "attention"
        )
        self.group = min(selecting.encode_batch, shapes.chunks * shapes.requests)
        self.group = -(-self.group // data) * data
        self.slots = min(selecting.slots, shapes.chunks)
        d = selecting.draft_length
        query = shapes.query
        scored, rows = query, query
        if selecting.scorer == "draft":
            scored, rows = query + min(selecting.draft_steps, d), query + d
        elif selecting.scorer == "confidence":
            scored, rows = d, query + d
        copies = selecting.masked_copies
        if selecting.scorer == "confidence" or copies is None:
            copies = 1 if selecting.scorer == "confidence" else scored
        self.scored, self.copies, self.rider_rows = scored, copies, rows

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
            return self.prefix_bytes() if self.selecting.encoding != "joint" else 0
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
        if self.selecting.encoding == "independent":
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
        riding = self.selecting.scorer in RIDING
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
        if self.selecting.scorer == "attention":
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
        if how.encoding == "joint":
            live = b * (s.prefix + own)
            items = self._forward_and_store(b * self.slots * s.chunk_size + live, b, live)
        elif how.encoding == "query-conditioned":
            each = s.prefix + s.chunk_size + s.query
            items = self._forward_and_store(b * self.slots * each, b * self.slots)
        elif how.encoding == "bridge":
            count = min(s.chunk_size, math.ceil(how.bridge_share * s.chunk_size))
            rows = b * (self.slots * count + own)
            items = [
                *self._layer(rows, b, own + s.prefix),
                self._chunk_attention(b, rows // b, self.slots),
            ]
            if how.bridge_tokens == "attention":
                items.append(self._received())
        if how.keep_tokens is not None and how.keep_tokens < s.chunk_size:
            if not items:
                items = [
                    *self._layer(b * own, b, own + s.prefix),
                    self._chunk_attention(b, own, self.slots),
                ]
            items.append(self._received())
            if how.encoding != "independent":  # the pool that tokens are kept of
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
        if merging and chosen and how.encoding in ("joint", "bridge") and d.n_blocks == 1:
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
                sizes, s._replace(batch=None), one, self.decode, self.implementation, self.data
            )
            found.append(
                Phase(
                    "encode document", (weights, self.prompt()), (document,), tuple(alone._pass())
                )
            )
            held = (*held, document)
        if how.scorer == "draft":
            rows = self.requests * (s.prefix + s.query + how.draft_length)
            read = self.requests * how.draft_length
            scratch = self._layer(rows, self.requests, rows // self.requests, read)
            found.append(Phase("draft", held, (), tuple(scratch)))
        scores = Item("scores", 4 * self.requests * s.chunks)
        if s.pooled:
            scratch = [] if how.scorer in CONTROLS else self._score_questions()
            found.append(Phase("score", held, (scores,), tuple(scratch)))
        else:
            scratch = self._pass() if self.pooling or how.scorer in RIDING else []
            found.append(Phase("score", held, (document, scores), tuple(scratch)))
            if how.scorer == "attention":
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
