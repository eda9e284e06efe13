"""Frozen, validated settings of the method: chunking, selection, decoding.

Every class here is hashable, so that it can be a static argument of a jitted function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import InitVar
from types import EllipsisType
from typing import Any, Literal, TypeVar, get_args

from pdllm_jax.method.cache import Positions
from pdllm_jax.method.encodings import ENCODINGS, BridgeTokens, Encoding
from pdllm_jax.method.sampling import CONFIDENCES, Factor, Schedule, Threshold, Unmask
from pdllm_jax.method.scorers import SCORERS, AllScorer, Scorer
from pdllm_jax.network.config import (
    AT_LEAST_0,
    POSITIVE,
    SHARE,
    SIZE,
    ConfigError,
    ModelConfig,
    RopeScaling,
    is_index,
    one_of,
    require,
    validate,
)

__all__ = [
    "ChunkConfig",
    "ConfigError",
    "DecodeConfig",
    "ModelConfig",
    "RopeScaling",
    "SelectionConfig",
]


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How a context is cut: chunks of `chunk_size` tokens, the first of them BOS if `anchors`.

    overlap: context tokens that a chunk repeats from the end of its predecessor.
    """

    chunk_size: int = 1024
    anchors: bool = True
    overlap: int = 0

    def __post_init__(self) -> None:
        validate(self, {"chunk_size": SIZE})
        overlap = self.overlap
        require(is_index(overlap), f"overlap must be an integer of at least 0, got {overlap!r}")
        require(
            self.stride > 0,
            f"chunk_size {self.chunk_size} leaves no new token beside "
            f"{'the anchor and ' if self.anchors else ''}an overlap of {overlap}",
        )

    @property
    def stride(self) -> int:
        """New context tokens in every chunk after the first."""
        return self.chunk_size - int(self.anchors) - self.overlap


Reselect = Literal["never", "block", "step"]
Choice = TypeVar("Choice", Scorer, Encoding)

# Options that SelectionConfig takes by a flat name, and their fields in the object.
_OPTIONS = {
    "scorer": {name: name for name in ("masked_copies", "draft_length", "draft_steps")},
    "encoding": {"bridge_share": "share", "bridge_tokens": "tokens"},
}


def _choose(
    kind: str, table: Mapping[str, type[Choice]], value: str | Choice, options: dict[str, Any]
) -> Choice:
    """Returns the object of a name, with these options; an option `...` is not changed."""
    if isinstance(value, str):
        require(value in table, f"{kind} {value!r} is not known ({', '.join(table)})")
        value = table[value]()
    protocol = Scorer if kind == "scorer" else Encoding
    require(isinstance(value, protocol), f"{kind} must be a name or an object, got {value!r:.60}")
    fields, changes = {field.name for field in fields_of(value)}, {}
    for name, option in options.items():
        if option is not ...:
            field = _OPTIONS[kind][name]
            if field in fields:  # other scorers ignore it, as flat settings always were
                changes[field] = option
    return dataclasses.replace(value, **changes) if changes else value  # type: ignore[type-var]


def fields_of(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Returns the options of a scorer or an encoding: the fields of a dataclass, else ()."""
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which chunks are kept and how their KV is obtained (algorithm steps 2-5).

    Which chunks:
      top_k: chunks kept, K; at least the number of chunks keeps all and scores nothing.
      max_k, margin: adaptive K. Behind the K best, chunks whose score lies at most `margin` under
        the K-th score are kept too, up to max_k in all. max_k None keeps K.
      keep_first: the first chunk is always kept.
      reselect: when relevance is computed again from the denoising state (`reselect`): "never", at
        the start of every further "block", or before every further "step".
    How they are scored:
      scorer: a `Scorer`, or the name of one: "draft" (self-information of query and draft), "query"
        (of the query), "confidence" (mean log-probability of the likeliest token in each mask
        behind the query), "attention" (the query rows' attention to a chunk, as a share of that to
        all), or a control: "all", "first", "last", "random", "oracle" (ids given by the caller).
      masked_copies, draft_length, draft_steps: options of the named scorer.
      encode_batch: chunks that go through the network together.
    Their KV:
      encoding: an `Encoding`, or the name of one, what a chunk's KV is computed from: "independent"
        (prefix and the chunk alone), "query-conditioned" (prefix, chunk and query), "joint" (one
        forward over prefix, all kept chunks, query and masked response), "bridge" (independent,
        then a share of the tokens recomputed with the other chunks, query and response in view).
      bridge_share, bridge_tokens: options `share` and `tokens` of the encoding "bridge".
      positions: of kept chunk j, id n: "continuous" P + j C, "absolute" P + n C, "reuse" P; the
        query starts behind the last slot of these.
      keep_tokens: B, tokens of a chunk kept per layer and KV head; None, or at least C, keeps all.

    The five options may be given where the name is, or to `dataclasses.replace`; they are kept in
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
    encode_batch: int = 8
    encoding: Any = "joint"
    bridge_share: InitVar[float | EllipsisType] = ...
    bridge_tokens: InitVar[BridgeTokens | EllipsisType] = ...
    positions: Positions = "continuous"
    keep_tokens: int | None = None

    def __post_init__(self, *options: Any) -> None:
        scoring = dict(zip(_OPTIONS["scorer"], options, strict=False))
        encoding = dict(zip(_OPTIONS["encoding"], options[len(scoring) :], strict=True))
        scorer = _choose("scorer", SCORERS, self.scorer, scoring)
        object.__setattr__(self, "scorer", scorer)
        chosen = _choose("encoding", ENCODINGS, self.encoding, encoding)
        object.__setattr__(self, "encoding", chosen)
        sizes = dict.fromkeys(("top_k", "encode_batch", "max_k", "keep_tokens"), SIZE)
        places, times = one_of(get_args(Positions)), one_of(get_args(Reselect))
        validate(self, {**sizes, "positions": places, "reselect": times, "margin": AT_LEAST_0})
        require(
            self.max_k is None or self.max_k >= self.top_k,
            f"max_k {self.max_k} is less than top_k {self.top_k}",
        )
        require(self.max_k is not None or self.margin == 0, "margin needs max_k")
        require(
            self.reselect == "never" or self.scorer.reads_document,
            f"reselect needs a scorer that reads the document, not {self.scorer.name!r}",
        )

    @classmethod
    def from_flat(cls, **settings: Any) -> SelectionConfig:
        """Returns the settings of flat names; leaves out options that scorer or encoding lack."""
        options = {*_OPTIONS["scorer"], *_OPTIONS["encoding"]}
        plain = cls(**{name: value for name, value in settings.items() if name not in options})
        flat = plain.to_flat()
        return dataclasses.replace(
            plain, **{name: settings[name] for name in options if name in {*settings} & {*flat}}
        )

    def to_flat(self) -> dict[str, Any]:
        """Returns all settings by their flat names, scorer and encoding by name, for JSON."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        flat |= {"scorer": self.scorer.name, "encoding": self.encoding.name}
        for kind, names in _OPTIONS.items():
            value = getattr(self, kind)
            fields = {field.name for field in fields_of(value)}
            flat |= {name: getattr(value, f) for name, f in names.items() if f in fields}
        return flat

    @property
    def has_code(self) -> bool:
        """Whether scorer or encoding is an object of the caller's, which JSON cannot hold."""
        return SCORERS.get(self.scorer.name) is not type(self.scorer) or ENCODINGS.get(
            self.encoding.name
        ) is not type(self.encoding)

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
        """Whether answering keeps the KV of all chunks of the documents of a pass.

        Encodings that compute their own KV need none of it. A single document is streamed, where
        the kept chunks are enough.
        """
        reads_all = self.reselects or (self.scorer.needs_pool and not self.scorer.in_pass)
        return reads_all or (documents > 1 and self.needs_pool)

    def streams(self, *, documents: int = 1) -> bool:
        """Whether only the kept chunks' KV stays in memory."""
        return self.needs_pool and not self.keeps_pool(documents=documents)

    def for_document(self, n: int, *, named: bool = False) -> SelectionConfig:
        """Returns the settings for documents of at most n chunks.

        named: the caller names the chunks to keep.
        """
        if isinstance(self.scorer, AllScorer):
            return dataclasses.replace(self, top_k=n, max_k=None, margin=0.0)
        if n <= self.top_k and not named:
            # Everything is kept: there is nothing to score, now or later.
            return dataclasses.replace(
                self, scorer=AllScorer(), top_k=n, max_k=None, margin=0.0, reselect="never"
            )
        if self.max_k is not None:
            return dataclasses.replace(self, max_k=min(self.max_k, n))
        return self

    def scoring(self) -> SelectionConfig:
        """Returns the scorer's settings, all others at their defaults."""
        return SelectionConfig(scorer=self.scorer, encode_batch=self.encode_batch)

    def for_prefill(self, *, streaming: bool) -> SelectionConfig:
        """Returns what the pass over the documents reads, so that it compiles for few settings."""
        names = (
            ("top_k", "max_k", "margin", "keep_first") if streaming else ("encoding", "reselect")
        )
        return dataclasses.replace(self.scoring(), **{name: getattr(self, name) for name in names})


Recompute = Literal["block", "suffix", "response"]
Remasking = Literal["low_confidence", "margin", "entropy", "random"]


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the response is denoised (algorithm step 6).

    gen_length: response tokens, G; block_length: tokens of a block, divides gen_length.
    steps: evaluations over the whole response, a multiple of the number of blocks; None means one
      per token. Not used by the threshold and factor rules, which take what they need.
    temperature: of the Gumbel noise; 0 is greedy.
    remasking: which predictions are kept: the most confident ones, by the token's probability
      ("low_confidence"), by the lead of the best token over the second ("margin", p1 - p2) or by
      exp(-entropy) of the prediction ("entropy"); or random ones ("random"). Or a function
      (logits [T, V], tokens [T], key) -> log confidence [T], finite.
    threshold: unmask every slot with at least this confidence, and always the best one.
    factor: Fast-dLLM's factor rule (arXiv 2505.22618); excludes threshold.
    unmask: a custom rule that replaces steps, threshold and factor: a function (log confidence [G],
      -inf for slots that are not candidates; evaluations made in the block, int32) -> bool [G]. A
      block ends when nothing is masked, or after block_length evaluations. Both functions are
      traced and static under jit: hashable, and the same object for the same rule, or every call
      compiles anew. A snapshot cannot hold them.
    guidance: classifier-free guidance scale; needs recompute "response" and no context cache.
    stop_ids: tokens (EOS, EOT) that end the text: a request is done with the block in which one of
      them appears, and the slots behind that block become EOS. None by default, as published.
    recompute: rows that a step recomputes while the rest of the live KV stays as it was at the
      block's start: "block" (dual cache), "suffix" (prefix cache), or "response" (none is stale).
    """

    gen_length: int = 32
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Any = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    guidance: float = 0.0
    stop_ids: tuple[int, ...] = ()
    recompute: Recompute = "block"
    unmask: Unmask | None = None

    def __post_init__(self) -> None:
        if not callable(self.remasking):
            validate(self, {"remasking": one_of(CONFIDENCES)})
            object.__setattr__(self, "remasking", CONFIDENCES[self.remasking]())
        validate(self, dict.fromkeys(("gen_length", "block_length", "steps"), SIZE))
        validate(self, {"temperature": AT_LEAST_0, "threshold": SHARE, "factor": POSITIVE})
        validate(self, {"guidance": AT_LEAST_0, "recompute": one_of(get_args(Recompute))})
        require(
            self.gen_length % self.block_length == 0,
            f"block_length {self.block_length} does not divide gen_length {self.gen_length}",
        )
        require(
            (self.steps or 0) % self.n_blocks == 0,
            f"steps {self.steps} is not a multiple of the number of blocks {self.n_blocks}",
        )
        given = [x is not None for x in (self.steps, self.threshold, self.factor)]
        require(not all(given[1:]), "threshold and factor exclude each other")
        if self.unmask is not None:
            require(callable(self.unmask), f"unmask must be a function, got {self.unmask!r}")
            require(not any(given), "unmask excludes steps, threshold and factor")
        stops = self.stop_ids
        require(
            isinstance(stops, tuple) and all(map(is_index, stops)),
            f"stop_ids must be a tuple of token ids, got {stops!r}",
        )
        require(
            self.guidance == 0 or self.recompute == "response",
            f"guidance needs recompute='response', got {self.recompute!r}",
        )

    @property
    def n_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def has_code(self) -> bool:
        """Whether a rule is a function of the caller's, which JSON cannot hold."""
        return type(self.remasking) not in CONFIDENCES.values() or self.unmask is not None

    @property
    def scheduled(self) -> bool:
        """Whether a block takes a fixed number of evaluations."""
        return self.threshold is None and self.factor is None and self.unmask is None

    @property
    def steps_per_block(self) -> int:
        """Evaluations of a block with a schedule."""
        return self.block_length if self.steps is None else self.steps // self.n_blocks

    @property
    def unmasking(self) -> Unmask:
        """The rule that takes the slots of a step."""
        if self.unmask is not None:
            return self.unmask
        if self.threshold is not None:
            return Threshold(self.threshold)
        if self.factor is not None:
            return Factor(self.factor)
        return Schedule(self.block_length, self.steps_per_block)

    def to_flat(self) -> dict[str, Any]:
        """Returns all settings but code, the confidence rule by name, for JSON."""
        flat = dataclasses.asdict(dataclasses.replace(self, unmask=None))
        del flat["unmask"]
        return flat | {"remasking": getattr(self.remasking, "name", "")}

    @classmethod
    def from_flat(cls, **settings: Any) -> DecodeConfig:
        """Returns the settings that `to_flat` gave, also after JSON made lists of tuples."""
        return cls(**settings | {"stop_ids": tuple(settings.get("stop_ids", ()))})
