"""Frozen, validated settings of the method: chunking and selection; `decoding` has the rest.

Every class here is hashable, so that it can be a static argument of a jitted function.
"""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, get_args

from pdllm_jax.decoding import DecodeConfig as DecodeConfig
from pdllm_jax.decoding import Recompute as Recompute
from pdllm_jax.method.cache import KVFormat, Positions
from pdllm_jax.method.encodings import ENCODINGS, BridgeTokens, Encoding
from pdllm_jax.method.scorers import SCORERS, AllScorer, Scorer
from pdllm_jax.method.token_selection import KeepBy
from pdllm_jax.rules import (
    AT_LEAST_0,
    COUNT,
    SIZE,
    SWITCH,
    Heads,
    one_of,
    require,
    validate,
)


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How a context is cut: chunks of `chunk_size` tokens, the first of them BOS if `anchors`.

    overlap: context tokens that a chunk repeats from the end of its predecessor.
    """

    chunk_size: int = 1024
    anchors: bool = True
    overlap: int = 0

    def __post_init__(self) -> None:
        validate(self, {"chunk_size": SIZE, "anchors": SWITCH, "overlap": COUNT})
        require(
            self.stride > 0,
            f"chunk_size {self.chunk_size} leaves no new token beside "
            f"{'the anchor and ' if self.anchors else ''}an overlap of {self.overlap}",
        )

    @property
    def stride(self) -> int:
        """New context tokens in every chunk after the first."""
        return self.chunk_size - int(self.anchors) - self.overlap


Reselect = Literal["never", "block", "step"]

_CHOICES: dict[str, tuple[Any, Any]] = {
    "scorer": (SCORERS, Scorer),
    "encoding": (ENCODINGS, Encoding),
}
# Options that SelectionConfig takes by a flat name: the setting, and the field of its object.
_SCORER_OPTIONS = ("masked_copies", "draft_length", "draft_steps", "heads")
_OPTIONS = {name: ("scorer", name) for name in _SCORER_OPTIONS}
_OPTIONS |= {f"bm25_{name}": ("scorer", name) for name in ("k1", "b")}
_OPTIONS |= {f"bridge_{name}": ("encoding", name) for name in ("share", "tokens")}


def _options(kind: str, value: Any) -> dict[str, str]:
    """Returns the flat names of the options that a scorer or an encoding has, and their fields."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names = {field.name for field in fields}
    return {flat: name for flat, (of, name) in _OPTIONS.items() if of == kind and name in names}


def _choose(kind: str, value: Any, given: dict[str, Any]) -> Any:
    """Returns the object of a name, with the given options that it has; `...` is not given."""
    table, protocol = _CHOICES[kind]
    if isinstance(value, str):
        require(value in table, f"{kind} {value!r} is not known ({', '.join(table)})")
        value = table[value]()
    require(isinstance(value, protocol), f"{kind} must be a name or an object, got {value!r:.60}")
    options = {name: given[flat] for flat, name in _options(kind, value).items()}
    changes = {name: option for name, option in options.items() if option is not ...}
    return dataclasses.replace(value, **changes) if changes else value


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which chunks are kept and how their KV is obtained (algorithm steps 2-5).

    Which chunks:
      top_k: chunks kept, K; at least the number of chunks keeps all and scores nothing.
      max_k, margin: adaptive K. Behind the K best, chunks whose score lies at most `margin` under
        the K-th score are kept too, up to max_k in all. max_k None keeps K.
      keep_first: the first chunk is always kept; of the scorer "oracle", only where it is named.
      reselect: when relevance is computed again from the denoising state (`reselect`): "never", at
        the start of every further "block", or before every further "step".
    How they are scored:
      scorer: a `Scorer`, or the name of one: "draft", "query", "confidence", "attention", "heads",
        "bm25"; with a logit shift also "causal" and "chunk-draft"; or a control: "all", "first",
        "last", "random", "oracle". Its class describes it.
      masked_copies, draft_length, draft_steps, heads: options of the named scorer.
      bm25_k1, bm25_b: options `k1` and `b` of the scorer "bm25".
      encode_batch: chunks that go through the network together.
    Their KV:
      encoding: an `Encoding`, or the name of one: "independent", "query-conditioned", "joint",
        "bridge". Its class describes it.
      bridge_share, bridge_tokens: options `share` and `tokens` of the encoding "bridge".
      positions: of kept chunk j, id n: "continuous" P + j C, "absolute" P + n C, "reuse" P; the
        query starts behind the last slot of these. "contiguous" leaves no gap behind a short chunk:
        chunks and query start right behind the tokens in front of them.
      keep_tokens: B, tokens of a chunk kept per layer and KV head; None, or at least C, keeps all.
      keep_by: the attention that ranks them: "query-to-chunk", "chunk-to-query" or "both"; see
        `token_selection`.
      kv_format: how the chunks' KV is stored: "full", in the model's dtype; or "fp8", in
        float8_e4m3fn with a scale for each layer, chunk and KV head.

    The options may be given where the name is, or to `dataclasses.replace`; they are kept in
    the scorer or the encoding. A named scorer starts from its defaults.
    """

    top_k: int = 4
    max_k: int | None = None
    margin: float = 0.0
    keep_first: bool = False
    reselect: Reselect = "never"
    scorer: Any = "draft"
    masked_copies: InitVar[int | EllipsisType | None] = ...
    draft_length: InitVar[int | EllipsisType] = ...
    draft_steps: InitVar[int | EllipsisType] = ...
    heads: InitVar[Heads | EllipsisType | None] = ...
    bm25_k1: InitVar[float | EllipsisType] = ...
    bm25_b: InitVar[float | EllipsisType] = ...
    encode_batch: int = 8
    encoding: Any = "joint"
    bridge_share: InitVar[float | EllipsisType] = ...
    bridge_tokens: InitVar[BridgeTokens | EllipsisType] = ...
    positions: Positions = "continuous"
    keep_tokens: int | None = None
    keep_by: KeepBy = "query-to-chunk"
    kv_format: KVFormat = "full"

    def __post_init__(self, *options: Any) -> None:
        given = dict(zip(_OPTIONS, options, strict=True))
        for kind in _CHOICES:
            object.__setattr__(self, kind, _choose(kind, getattr(self, kind), given))
        rules = dict.fromkeys(("top_k", "encode_batch", "max_k", "keep_tokens"), SIZE)
        choices = {"positions": Positions, "reselect": Reselect, "keep_by": KeepBy}
        choices["kv_format"] = KVFormat
        rules |= {name: one_of(get_args(choice)) for name, choice in choices.items()}
        validate(self, {**rules, "margin": AT_LEAST_0, "keep_first": SWITCH})
        k, most, name = self.top_k, self.max_k, self.scorer.name
        require(most is None or most >= k, f"max_k {most} is less than top_k {k}")
        require(most is not None or self.margin == 0, "margin needs max_k")
        reads = self.scorer.reads_document or not self.reselects
        require(reads, f"reselect needs a scorer that reads the document, not {name!r}")

    @classmethod
    def paper(cls, **changes: Any) -> SelectionConfig:
        """Returns the settings of the paper's reference run on Dream-v0-Base-7B.

        Four chunks, scored by "causal" with two of four draft tokens filled in; joint encoding at
        continuous positions. The chunks have 1,024 tokens (`ChunkConfig`), BOS among them.

        Args:
          changes: fields that replace these.

        Raises:
          ConfigError: a value that its field does not allow.
        """
        draft = {"scorer": "causal", "draft_length": 4, "draft_steps": 2}
        encoding = {"encoding": "joint", "positions": "continuous", "keep_tokens": None}
        return cls(**{"top_k": 4, **draft, **encoding, **changes})

    @classmethod
    def paper_retained(cls, **changes: Any) -> SelectionConfig:
        """Returns the settings of the best run that the authors kept: `paper` with "chunk-draft".

        Args and Raises: as of `paper`.
        """
        return cls.paper(**{"scorer": "chunk-draft", **changes})

    @classmethod
    def from_flat(cls, **settings: Any) -> SelectionConfig:
        """Returns the settings that `to_flat` gave, also after JSON made lists of tuples."""
        return cls(**settings)

    def to_flat(self) -> dict[str, Any]:
        """Returns all settings by their flat names, scorer and encoding by name, for JSON."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for kind in _CHOICES:
            value = flat[kind]
            flat |= {name: getattr(value, f) for name, f in _options(kind, value).items()}
            flat[kind] = value.name
        return flat

    @property
    def has_code(self) -> bool:
        """Whether scorer or encoding is an object of the caller's, which JSON cannot hold."""
        tables = (SCORERS, self.scorer), (ENCODINGS, self.encoding)
        return any(type(value) not in table.values() for table, value in tables)

    @property
    def slots(self) -> int:
        """Most chunks that can be kept."""
        return self.top_k if self.max_k is None else self.max_k

    @property
    def reselects(self) -> bool:
        """Whether relevance is computed again while denoising."""
        return self.reselect != "never"

    @property
    def needs_pool(self) -> bool:
        """Whether decoding starts from the KV of the document's chunks, or reads it again."""
        return self.encoding.needs_pool or self.reselects

    def keeps_pool(self, *, documents: int = 1) -> bool:
        """Whether answering keeps every chunk's KV.

        A single document is streamed if it can be; several are if their scores come before the KV.
        """
        scorer = self.scorer
        if scorer.in_pass:
            return self.reselects or (documents > 1 and self.needs_pool)
        return self.reselects or scorer.needs_pool

    def streams(self, *, documents: int = 1) -> bool:
        """Whether only the kept chunks' KV stays in memory."""
        return self.needs_pool and not self.keeps_pool(documents=documents)

    def for_document(self, n: int, *, named: bool = False) -> SelectionConfig:
        """Returns the settings for documents of at most n chunks.

        named: the caller names the chunks to keep.
        """
        everything: dict[str, Any] = {"top_k": n, "max_k": None, "margin": 0.0}
        if isinstance(self.scorer, AllScorer):
            return dataclasses.replace(self, **everything)
        if n <= self.top_k and not named:
            # Everything is kept: there is nothing to score, now or later.
            everything |= {"scorer": AllScorer(), "reselect": "never"}
            return dataclasses.replace(self, **everything)
        most = None if self.max_k is None else min(self.max_k, n)
        return dataclasses.replace(self, top_k=min(self.top_k, n), max_k=most)

    def calibrated(self, checkpoint: Path) -> SelectionConfig:
        """Returns the settings with what a calibration has saved in a checkpoint's folder.

        The scorer "heads" gets its heads, which `pdllm-calibrate` finds; no other setting changes.

        Raises:
          ConfigError: what is saved cannot be read.
        """
        return dataclasses.replace(self, scorer=self.scorer.calibrated(checkpoint))

    def scoring(self) -> SelectionConfig:
        """Returns the scorer's settings, all others at their defaults."""
        return SelectionConfig(scorer=self.scorer, encode_batch=self.encode_batch)

    def for_prefill(self, *, streaming: bool) -> SelectionConfig:
        """Returns what the pass over the documents reads, so that it compiles for few settings."""
        ranking = ("top_k", "max_k", "margin", "keep_first")
        names = ranking if streaming else ("encoding", "reselect")
        names = (*names, "kv_format")
        return dataclasses.replace(self.scoring(), **{name: getattr(self, name) for name in names})
