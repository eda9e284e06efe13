"""Frozen, validated settings of the method: chunking, selection, decoding.

Every class here is hashable, so that it can be a static argument of a jitted function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from jax import Array

from pdllm_jax.network.config import (
    ConfigError,
    ModelConfig,
    RopeScaling,
    is_number,
    positive_int,
    require,
)

__all__ = [
    "ChunkConfig",
    "ConfigError",
    "DecodeConfig",
    "ModelConfig",
    "RopeScaling",
    "SelectionConfig",
]


def _size(name: str, value: Any) -> None:
    positive_int(name, value)
    require(value < 1 << 31, f"{name} {value} is beyond 31 bits")


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How a context is cut: chunks of `chunk_size` tokens, the first of them BOS if `anchors`.

    overlap: context tokens that a chunk repeats from the end of its predecessor.
    """

    chunk_size: int = 1024
    anchors: bool = True
    overlap: int = 0

    def __post_init__(self) -> None:
        _size("chunk_size", self.chunk_size)
        require(
            isinstance(self.overlap, int) and self.overlap >= 0,
            f"overlap must not be negative, got {self.overlap!r}",
        )
        require(
            self.stride > 0,
            f"chunk_size {self.chunk_size} leaves no new token beside "
            f"{'the anchor and ' if self.anchors else ''}an overlap of {self.overlap}",
        )

    @property
    def stride(self) -> int:
        """New context tokens in every chunk after the first."""
        return self.chunk_size - int(self.anchors) - self.overlap


Scorer = Literal[
    "draft", "query", "confidence", "attention", "all", "first", "last", "random", "oracle"
]
Encoding = Literal["independent", "query-conditioned", "joint", "bridge"]
Positions = Literal["continuous", "absolute", "reuse"]
BridgeTokens = Literal["start", "attention"]
Reselect = Literal["never", "block", "step"]

# Scorers that read neither document nor question.
CONTROLS = ("all", "first", "last", "random", "oracle")


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which chunks are kept and how their KV is obtained (algorithm steps 2-5).

    Which chunks:
      top_k: chunks kept, K; at least the number of chunks keeps all and scores nothing.
      max_k, margin: adaptive K. Behind the K best, chunks whose score lies at most `margin` under
        that of the K-th are kept too, up to max_k in all. None: K it is.
      keep_first: the first chunk is always kept.
      reselect: when relevance is computed anew from the denoising state (`reselect`): "never", at
        the start of every further "block", or before every further "step".
    How they are scored:
      scorer: "draft" (query and draft self-information), "query" (query alone), "confidence" (the
        mean log-probability of the likeliest token in each of `draft_length` masks behind the
        query), "attention" (the query rows' attention to a chunk, as a share of that to all), or a
        control: "all", "first", "last", "random", "oracle" (ids given by the caller).
      masked_copies: R, copies of the query that ride along, copy r with the slots s % R == r
        masked; None is leave-one-out, one copy for every scored slot.
      draft_length, draft_steps: d masks behind prefix and query, of which this many are denoised.
      encode_batch: chunks that go through the network together.
    Their KV:
      encoding: what a chunk's KV is computed from. "independent": prefix and the chunk alone;
        "query-conditioned": prefix, chunk and query; "joint": one forward over prefix, all kept
        chunks, query and masked response; "bridge": independent, then a share of the tokens
        recomputed in a forward that sees the other chunks, query and response.
      bridge_share, bridge_tokens: of "bridge": the share of a chunk's C tokens, in (0, 1], and
        which: those at its "start", or those with most "attention" from the query's last rows.
      positions: of kept chunk j, id n: "continuous" P + j C, "absolute" P + n C, "reuse" P; the
        query starts behind the last slot of these.
      keep_tokens: B, tokens of a chunk kept per layer and KV head; None, or at least C, keeps all.
    """

    top_k: int = 4
    max_k: int | None = None
    margin: float = 0.0
    keep_first: bool = False
    reselect: Reselect = "never"
    scorer: Scorer = "draft"
    masked_copies: int | None = 4
    draft_length: int = 4
    draft_steps: int = 2
    encode_batch: int = 8
    encoding: Encoding = "joint"
    bridge_share: float = 0.15
    bridge_tokens: BridgeTokens = "start"
    positions: Positions = "continuous"
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "draft_length", "draft_steps", "encode_batch"):
            _size(name, getattr(self, name))
        for name in ("max_k", "masked_copies", "keep_tokens"):
            if getattr(self, name) is not None:
                _size(name, getattr(self, name))
        for name, kind in (
            ("scorer", Scorer),
            ("encoding", Encoding),
            ("bridge_tokens", BridgeTokens),
            ("positions", Positions),
            ("reselect", Reselect),
        ):
            value = getattr(self, name)
            known = get_args(kind)
            require(value in known, f"{name} {value!r} is not known ({', '.join(known)})")
        require(
            self.max_k is None or self.max_k >= self.top_k,
            f"max_k {self.max_k} is less than top_k {self.top_k}",
        )
        require(
            is_number(self.margin) and 0 <= self.margin < math.inf,
            f"margin must be a number >= 0, got {self.margin!r}",
        )
        require(self.max_k is not None or self.margin == 0, "margin needs max_k")
        require(
            is_number(self.bridge_share) and 0 < self.bridge_share <= 1,
            f"bridge_share must lie in (0, 1], got {self.bridge_share!r}",
        )
        require(
            self.draft_steps <= self.draft_length,
            f"draft_steps {self.draft_steps} exceeds draft_length {self.draft_length}",
        )
        require(
            self.reselect == "never" or self.scorer not in CONTROLS,
            f"reselect needs a scorer that reads the document, not {self.scorer!r}",
        )

    @property
    def slots(self) -> int:
        """Most chunks that can be kept."""
        return self.top_k if self.max_k is None else self.max_k

    def scoring(self) -> SelectionConfig:
        """The scorer's settings, all others at their defaults: for passes that only score."""
        return SelectionConfig(
            scorer=self.scorer,
            masked_copies=self.masked_copies,
            draft_length=self.draft_length,
            draft_steps=self.draft_steps,
            encode_batch=self.encode_batch,
        )


Recompute = Literal["block", "suffix", "response"]
Remasking = Literal["low_confidence", "margin", "entropy", "random"]
# (logits [T, V] float32, predicted tokens [T] int32, PRNG key) -> log confidence [T], finite.
Confidence = Callable[[Array, Array, Array], Array]
# (log confidence [G], -inf where a slot is no candidate; evaluations made in the block, a scalar)
# -> bool [G], the slots to unmask.
Unmask = Callable[[Array, Array], Array]


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
    unmask: a rule of one's own instead of steps, threshold and factor: a function (log confidence
      [G], -inf where a slot is no candidate; evaluations made in the block, int32) -> bool [G]. A
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
    remasking: Remasking | Confidence = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    guidance: float = 0.0
    stop_ids: tuple[int, ...] = ()
    recompute: Recompute = "block"
    unmask: Unmask | None = None

    def __post_init__(self) -> None:
        _size("gen_length", self.gen_length)
        _size("block_length", self.block_length)
        require(
            self.gen_length % self.block_length == 0,
            f"block_length {self.block_length} does not divide gen_length {self.gen_length}",
        )
        if self.steps is not None:
            _size("steps", self.steps)
            require(
                self.steps % self.n_blocks == 0,
                f"steps {self.steps} is not a multiple of the number of blocks {self.n_blocks}",
            )
        require(
            is_number(self.temperature) and 0 <= self.temperature < math.inf,
            f"temperature must be a number >= 0, got {self.temperature!r}",
        )
        require(
            callable(self.remasking) or self.remasking in get_args(Remasking),
            f"remasking {self.remasking!r} is not known ({', '.join(get_args(Remasking))})",
        )
        require(
            self.threshold is None or self.factor is None, "threshold and factor exclude each other"
        )
        if self.unmask is not None:
            require(callable(self.unmask), f"unmask must be a function, got {self.unmask!r}")
            require(
                self.steps is None and self.threshold is None and self.factor is None,
                "unmask excludes steps, threshold and factor",
            )
        if self.threshold is not None:
            require(
                is_number(self.threshold) and 0 < self.threshold <= 1,
                f"threshold must lie in (0, 1], got {self.threshold!r}",
            )
        if self.factor is not None:
            require(
                is_number(self.factor) and 0 < self.factor < math.inf,
                f"factor must be a positive number, got {self.factor!r}",
            )
        require(
            is_number(self.guidance) and 0 <= self.guidance < math.inf,
            f"guidance must be a number >= 0, got {self.guidance!r}",
        )
        require(
            isinstance(self.stop_ids, tuple)
            and all(isinstance(x, int) and not isinstance(x, bool) for x in self.stop_ids)
            and all(0 <= x < 1 << 31 for x in self.stop_ids),
            f"stop_ids must be a tuple of token ids, got {self.stop_ids!r}",
        )
        require(
            self.recompute in ("block", "suffix", "response"),
            f"recompute {self.recompute!r} is not known (block, suffix, response)",
        )
        require(
            self.guidance == 0 or self.recompute == "response",
            "guidance needs recompute='response'",
        )

    @property
    def n_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def has_code(self) -> bool:
        """Whether a rule is a function of the caller's."""
        return callable(self.remasking) or self.unmask is not None

    @property
    def scheduled(self) -> bool:
        """Whether a block takes a fixed number of evaluations."""
        return self.threshold is None and self.factor is None and self.unmask is None

    @property
    def steps_per_block(self) -> int:
        return self.block_length if self.steps is None else self.steps // self.n_blocks
