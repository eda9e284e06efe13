"""What is compared: cells, and the grids that they are drawn from. Pure data.

A cell is one setting of everything. A grid asks one question: `over` what it is asked (every
combination), which arm is the `reference`, and which `arms` are compared with it, over the same
examples. Cells that several grids share are run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pdllm_jax import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.cache_methods import Method
from small_model.tasks import TASKS

# Nothing is selected: the whole prompt, recomputed as the method's name says.
DENSE: dict[str, Method] = {
    "dense": "plain",
    "prefix-cache": "prefix-cache",
    "dual-cache": "dual-cache",
}
# Ids that are made here: the needle's chunks and others at random, K in all; the needle's alone; K
# at random that hold nothing of the needle.
GIVEN = ("oracle", "needle", "without")
SELECTIONS = (*DENSE, "all", "top-k", "random", "first", "last", *GIVEN)
DEPTHS = 11


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting; the defaults are what every factor is varied from.

    length: tokens of prompt and response; with chunk_size it gives N. tasks: in turn. depths: how
    many evenly spaced places the needle takes in turn; None: anywhere. streamed: one request at a
    time, as `generate_ids` streams them. keep_tokens: token budget, as a share of the chunk.
    margin: adaptive K, from 1 up to top_k. The others are the library's.
    """

    selection: str = "top-k"
    length: int = 4096
    tasks: tuple[str, ...] = TASKS
    depths: int | None = None
    streamed: bool = False
    chunk_size: int = 256
    top_k: int = 4
    anchors: bool = True
    overlap: int = 0
    encoding: str = "joint"
    bridge_tokens: str = "start"
    positions: str = "continuous"
    keep_tokens: float | None = None
    scorer: str = "draft"
    masked_copies: int | None = 4
    draft_length: int = 4
    draft_steps: int = 2
    margin: float | None = None
    keep_first: bool = False
    reselect: str = "never"
    threshold: float | None = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            known = ", ".join(SELECTIONS)
            raise ValueError(f"selection {self.selection!r} is not known ({known})")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks {unknown} are not known ({', '.join(TASKS)})")
        if self.selection not in DENSE:
            self.chunking(), self.selecting()
        self.decoding()

    def chunking(self) -> ChunkConfig:
        return ChunkConfig(self.chunk_size, self.anchors, self.overlap)

    def selecting(self, encode_batch: int = 8) -> SelectionConfig:
        """The library's settings; of a dense cell they have no meaning."""
        scorer = self.scorer
        if self.selection != "top-k":
            scorer = "oracle" if self.selection in GIVEN else self.selection
        adaptive = self.margin is not None
        return SelectionConfig.from_flat(
            top_k=1 if adaptive else self.top_k,
            max_k=self.top_k if adaptive else None,
            margin=self.margin or 0.0,
            keep_first=self.keep_first,
            reselect=self.reselect,
            scorer=scorer,
            masked_copies=self.masked_copies,
            draft_length=self.draft_length,
            draft_steps=self.draft_steps,
            encode_batch=encode_batch,
            encoding=self.encoding,
            bridge_tokens=self.bridge_tokens,
            positions=self.positions,
            keep_tokens=None
            if self.keep_tokens is None
            else max(1, int(self.keep_tokens * self.chunk_size)),
        )

    def decoding(self, length: int = 32) -> DecodeConfig:
        return DecodeConfig(gen_length=length, block_length=length, threshold=self.threshold)

    def reads(self) -> set[str]:
        """Settings that have a meaning for the cell."""
        keep = {"selection", "length", "tasks", "depths", "threshold"}
        if self.selection not in DENSE:
            keep |= {"chunk_size", "anchors", "overlap", "encoding", "positions", "keep_tokens"}
            keep |= {"streamed"}
            if self.encoding == "bridge":
                keep |= {"bridge_tokens"}
            if self.selection != "all":
                keep |= {"top_k"}
            if self.selection == "top-k":
                keep |= {"scorer", "margin", "keep_first", "reselect"}
                if self.scorer not in ("attention", "confidence"):
                    keep |= {"masked_copies"}
                if self.scorer in ("draft", "confidence"):
                    keep |= {"draft_length"}
                if self.scorer == "draft":
                    keep |= {"draft_steps"}
            if self.selection in ("random", "oracle", "without"):
                keep |= {"seed"}
        return keep

    def canonical(self) -> Cell:
        """The cell with all that it does not read at its default."""
        return Cell(**{name: getattr(self, name) for name in self.reads()})

    def programs(self) -> tuple[Any, ...]:
        """Cells with the same ones are answered by the same compiled programs."""
        own = (self.selection,) if self.selection in DENSE else (self.selecting(), self.chunking())
        return (*own, self.length, self.streamed, self.decoding())

    def selected_by(self, selection: str) -> Cell:
        """The same with another selection."""
        plain = {"reselect": "never", "margin": None, "keep_first": False}
        return dataclasses.replace(self, selection=selection, **plain).canonical()

    def settings(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Cell:
        return cls(**{**settings, "tasks": tuple(settings["tasks"])})

    def label(self, base: Cell | None = None) -> str:
        """What differs from `base`, by default the defaults."""
        base, read = base or Cell(), self.reads()
        changes = [
            _said(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name in read and getattr(self, field.name) != getattr(base, field.name)
        ]
        return ", ".join(changes) or "default"

    @property
    def key(self) -> str:
        """Name of the cell's file: readable, and different for all that differs."""
        text = json.dumps(self.settings(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.selection}-{self.length}-{digest}"


def _said(name: str, value: Any) -> str:
    if name in ("selection", "encoding"):
        return str(value)
    if name == "tasks":
        return " and ".join(task.replace("_", " ") for task in value)
    if name == "anchors":
        return "anchors" if value else "no anchors"
    if name == "depths":
        return f"{value} depths" if value else "any depth"
    if name == "streamed":
        return "streamed" if value else "in batches"
    if name == "keep_tokens":
        return f"{value:.3g} of the tokens" if value else "all tokens"
    if name == "masked_copies" and value is None:
        return "leave-one-out"
    if name == "reselect":
        return f"re-selection every {value}" if value != "never" else "no re-selection"
    if name == "threshold" and value is None:
        return "one token a step"
    symbols = {"length": "length", "chunk_size": "C =", "top_k": "K =", "draft_length": "d ="}
    return f"{symbols.get(name, name.replace('_', ' '))} {value}"


Change = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """One question. over: settings under which it is asked; reference and arms: what is compared.

    varied: the settings that arms differ in; the report names rows by them.
    """

    question: str
    arms: tuple[Change, ...]
    reference: Change = dataclasses.field(default_factory=dict)
    over: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    base: Change = dataclasses.field(default_factory=dict)

    def groups(self, changes: Change | None = None) -> list[tuple[Cell, list[Cell]]]:
        """(reference, arms) for each combination of `over`; changes: to what all cells have."""
        found = []
        for values in itertools.product(*self.over.values()):
            asked = dict(zip(self.over, values, strict=True))
            common = {**self.base, **(changes or {}), **asked}
            reference, *arms = (
                Cell(**{**common, **change}).canonical() for change in (self.reference, *self.arms)
            )
            found.append((reference, list(dict.fromkeys(arm for arm in arms if arm != reference))))
        return found

    def cells(self, changes: Change | None = None) -> list[Cell]:
        return list(
            dict.fromkeys(c for first, arms in self.groups(changes) for c in (first, *arms))
        )


def values(name: str, *settings: Any) -> tuple[Change, ...]:
    """Arms that differ in one setting."""
    return tuple({name: value} for value in settings)


CONTROLS = (
    *values("selection", "dense", "dual-cache", "all"),
    *({"selection": "random", "seed": seed} for seed in range(3)),
    *values("selection", "first", "last", "oracle", "needle", "without"),
)
QUICK_TASKS = ("passkey", "magic_number")

GRIDS: dict[str, Grid] = {
    "main": Grid(
        "What is a chunk selection worth, beside everything and beside controls?",
        over={"length": (4096, 8192)},
        arms=CONTROLS,
    ),
    "depth": Grid(
        "At which depths is the needle found?",
        base={"depths": DEPTHS},
        over={"length": (1024, 2048, 4096, 8192)},
        arms=({"selection": "dense"}, {"anchors": False}),
    ),
    "anchors": Grid(
        "What do BOS anchors change, and where in the document?",
        base={"depths": DEPTHS},
        over={
            "length": (4096, 8192),
            "selection": ("top-k", "all"),
            "encoding": ("joint", "independent"),
        },
        arms=values("anchors", False),
    ),
    "encoding": Grid(
        "What must a kept chunk's KV have seen?",
        over={"length": (4096, 8192)},
        arms=(
            *values("encoding", "independent", "query-conditioned"),
            *({"encoding": "bridge", "bridge_tokens": tokens} for tokens in ("start", "attention")),
        ),
    ),
    "scorer": Grid(
        "What should chunks be scored by, and with how many masked copies?",
        arms=(
            *values("scorer", "query", "confidence", "attention"),
            *values("masked_copies", 1, 2, 8, None),
        ),
    ),
    "draft": Grid(
        "How long should the draft be?",
        arms=tuple(
            {"draft_length": length, "draft_steps": steps}
            for length, steps in ((1, 1), (2, 2), (4, 1), (4, 4), (8, 2), (8, 8))
        ),
    ),
    "top-k": Grid("How many chunks?", arms=values("top_k", 1, 2, 8, 16)),
    "chunk-size": Grid(
        "Which chunk size, at the same number of kept tokens?",
        arms=tuple({"chunk_size": c, "top_k": 1024 // c} for c in (128, 512, 1024)),
    ),
    "chunks": Grid(
        "How does it go with the number of chunks, N = 4 to 32?",
        over={"length": (1024, 2048, 4096, 8192)},
        arms=values("selection", "dense", "random", "oracle"),
        base={"top_k": 2},
    ),
    "sparsity": Grid(
        "How many of a kept chunk's tokens?", arms=values("keep_tokens", 0.5, 0.25, 0.125)
    ),
    "positions": Grid("Where do kept chunks stand?", arms=values("positions", "absolute", "reuse")),
    "choices": Grid(
        "Overlap, adaptive K, the first chunk always, re-selection?",
        arms=(
            {"overlap": 32},
            {"margin": 0.1},
            {"keep_first": True},
            {"reselect": "step"},
        ),
    ),
    "decoding": Grid(
        "What does decoding several tokens at once cost?",
        over={"selection": ("dense", "top-k")},
        arms=values("threshold", 0.5, None),
    ),
    "stream": Grid(
        "Is the needle found in a document that is streamed, its KV never all there?",
        base={"encoding": "independent", "chunk_size": 512, "streamed": True},
        over={"length": (32_768, 131_072)},
        arms=values("selection", "random", "oracle"),
    ),
    "tasks": Grid(
        "Each task by itself, chunks of 512.",
        base={"chunk_size": 512},
        over={"length": (4096, 8192), "tasks": tuple((task,) for task in TASKS)},
        arms=values("selection", "dense", "random"),
    ),
    "quick": Grid(
        "All of it in small: two tasks, 512 tokens, one chunk of four.",
        base={"length": 512, "chunk_size": 128, "top_k": 1, "tasks": QUICK_TASKS},
        arms=(
            *values("selection", "dense", "random", "oracle", "without"),
            {"anchors": False},
        ),
    ),
}
FULL = tuple(name for name in GRIDS if name != "quick")
