"""What an ablation compares: cells, and the grids that they are drawn from (grids.toml).

A cell is one setting of everything. A grid asks one question over the same examples. A cell that
several grids share runs once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pdllm_jax import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.caches import CACHE_METHODS, CacheMethod, cache_method
from pdllm_jax.method.scorers import SCORERS
from pdllm_jax.network.config import WeightFormat
from pdllm_jax.rules import SEED, exact_share, require, validate
from small_model.tasks import RESPONSE_LENGTH, TASKS

# Methods on the whole prompt, without a selection. Records call plain generation "dense".
DENSE = {
    {"plain": "dense"}.get(name, name): name
    for name, method in CACHE_METHODS.items()
    if not method.uses_chunks
}
# Chunk ids that the experiment gives. oracle: the needle's chunks and random others, K in all;
# needle: the needle's alone; without: K random ones that hold nothing of the needle.
GIVEN = ("oracle", "needle", "without")
SELECTIONS = (*DENSE, "all", "top-k", "random", "first", "last", *GIVEN)
MULTI = "multi_needle"  # a task whose question asks for two numbers; its responses are longer


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting; every factor is varied from these defaults.

    selection: of chunks, or a method on the whole prompt, with its settings: "NAME:SETTING=VALUE".
    length: tokens of prompt and response. tasks: in turn. depths: number of evenly spaced depths
    that the needle takes in turn; None: any depth. streamed: one request at a time, the document's
    KV not kept. keep_tokens: share of a kept chunk's tokens. margin: adaptive K, from 1 up to
    top_k. head_layers: first layers that retrieval heads are chosen from; None: all. selects_only:
    nothing is decoded, and recall takes the place of accuracy. The others are the library's
    settings.
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
    head_layers: int | None = None
    selects_only: bool = False
    weight_format: str = "full"
    kv_format: str = "full"

    def __post_init__(self) -> None:
        for name, got, allowed in (
            ("selection", (self.selection.partition(":")[0],), SELECTIONS),
            ("tasks", self.tasks, TASKS if MULTI not in self.tasks else (MULTI,)),
            ("weight_format", (self.weight_format,), get_args(WeightFormat)),
        ):
            if not got or not set(got) <= set(allowed):
                got = ", ".join(got) or "none"
                raise ValueError(f"{name} must be of {', '.join(allowed)}, got {got}")
        validate(self, {"seed": SEED})
        scored = self.method.uses_chunks and self.selection not in GIVEN
        require(scored or not self.selects_only, f"selects_only is not for {self.selection!r}")
        self.chunk_config(), self.selection_config(), self.decode_config()

    @property
    def method(self) -> CacheMethod:
        """The method that answers: a whole prompt's, or prefilling."""
        name, colon, settings = self.selection.partition(":")
        return cache_method(f"{DENSE.get(name, 'prefilling')}{colon}{settings}")

    @property
    def response_length(self) -> int:
        """Tokens of a response."""
        return (2 if MULTI in self.tasks else 1) * RESPONSE_LENGTH

    def depth(self, index: int) -> float | None:
        """Returns the depth that an example's needle is put at; every depth gets every task."""
        if self.depths is None:
            return None
        return (index // len(self.tasks)) % self.depths / max(1, self.depths - 1)

    def chunk_config(self) -> ChunkConfig:
        return ChunkConfig(self.chunk_size, self.anchors, self.overlap)

    def selection_config(self, encode_batch: int = 8) -> SelectionConfig:
        """Returns the library's settings; a baseline has the default ones and ignores them."""
        if not self.method.uses_chunks:
            return SelectionConfig()
        settings = {name: getattr(self, name) for name in _SELECTION}
        settings["scorer"] = "oracle" if self.selection in GIVEN else self.selection
        if self.selection == "top-k":
            settings["scorer"] = self.scorer
        if self.keep_tokens is not None:
            settings["keep_tokens"] = max(1, int(exact_share(self.keep_tokens, self.chunk_size)))
        if self.margin is not None:
            settings |= {"top_k": 1, "max_k": self.top_k, "margin": self.margin}
        return SelectionConfig.from_flat(encode_batch=encode_batch, **settings)

    def decode_config(self, length: int = RESPONSE_LENGTH) -> DecodeConfig:
        block = min(length, RESPONSE_LENGTH)
        return DecodeConfig(gen_length=length, block_length=block, threshold=self.threshold)

    def used_settings(self) -> set[str]:
        """Returns the names of the settings that change anything of this cell."""
        names = {"selection", "length", "tasks", "depths", "weight_format"}
        names |= set() if self.selects_only else {"threshold"}
        if not self.method.uses_chunks:
            return names
        names |= {"selects_only", "kv_format"}
        names |= {"chunk_size", "anchors", "overlap", "encoding", "positions", "keep_tokens"}
        scored = self.selection == "top-k"
        used = {
            "streamed": True,
            "bridge_tokens": self.encoding == "bridge",
            "head_layers": scored and self.scorer == "heads",
            "top_k": self.selection != "all",
            "seed": self.selection in ("random", "oracle", "without"),
            **dict.fromkeys(("scorer", "margin", "keep_first", "reselect"), scored),
            **{name: scored and hasattr(SCORERS[self.scorer], name) for name in _SCORER},
        }
        return names | {name for name, is_used in used.items() if is_used}

    def canonical(self) -> Cell:
        """Returns the cell with every setting that it does not use at its default."""
        return Cell(**{name: getattr(self, name) for name in self.used_settings()})

    def programs(self) -> tuple[Any, ...]:
        """Returns a key that cells with the same compiled programs share."""
        settings = (self.selection_config(), self.chunk_config(), self.decode_config())
        own = (self.length, self.streamed, self.selects_only, self.weight_format, self.head_layers)
        return (str(self.method), *own, *settings)

    def selected_by(self, selection: str) -> Cell:
        """Returns the cell with another selection."""
        plain = {"reselect": "never", "margin": None, "keep_first": False}
        return dataclasses.replace(self, selection=selection, **plain).canonical()

    def settings(self) -> dict[str, Any]:
        """Returns the settings as JSON holds them."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Cell:
        """Makes a cell of settings that come from JSON."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

    def label(self, base: Cell | None = None) -> str:
        """Names the settings that differ from `base`, by default from the defaults."""
        base, used = base or Cell(), self.used_settings()
        changes = [
            _label(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name in used and getattr(self, field.name) != getattr(base, field.name)
        ]
        return ", ".join(changes) or "default"

    @property
    def key(self) -> str:
        """The cell's name in records: readable, and different for all that differs."""
        settings = self.settings()
        for name in _LATER:
            if settings[name] == getattr(type(self), name):
                del settings[name]
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.selection}-{self.length}-{digest}"


# Options of scorers, and all settings that SelectionConfig has under the same names.
_SCORER = ("masked_copies", "draft_length", "draft_steps")
_SELECTION = (
    *("top_k", "keep_first", "reselect", *_SCORER),
    *("encoding", "bridge_tokens", "positions", "kv_format"),
)
# Settings that older records lack: at their defaults they are left out of the cell's key.
_LATER = ("head_layers", "selects_only", "weight_format", "kv_format")
# How labels show values, and settings.
_VALUES: dict[tuple[str, Any], str] = {
    ("anchors", True): "anchors",
    ("anchors", False): "no anchors",
    ("depths", None): "any depth",
    ("streamed", True): "streamed",
    ("streamed", False): "in batches",
    ("keep_tokens", None): "all tokens",
    ("masked_copies", None): "leave-one-out",
    ("reselect", "never"): "no re-selection",
    ("threshold", None): "one token a step",
    ("head_layers", None): "heads of all layers",
    ("selects_only", True): "selection alone",
}
_FORMS = {
    **dict.fromkeys(("selection", "encoding"), "{}"),
    "depths": "{} depths",
    "keep_tokens": "{:.3g} of the tokens",
    "reselect": "re-selection every {}",
    "chunk_size": "C = {}",
    "top_k": "K = {}",
    "draft_length": "d = {}",
    "head_layers": "heads of the first {} layers",
    "weight_format": "{} weights",
    "kv_format": "{} KV",
}


def _label(name: str, value: Any) -> str:
    if name == "tasks":
        return " and ".join(value).replace("_", " ")
    form = _VALUES.get((name, value)) or _FORMS.get(name, f"{name.replace('_', ' ')} {{}}")
    return form.format(value)


Change = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """One question. over: settings under which it is asked; arms: what is compared.

    base: settings of all its cells; the reference has no others.
    """

    question: str
    arms: Sequence[Change]
    over: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    base: Change = dataclasses.field(default_factory=dict)

    def groups(self, changes: Change | None = None) -> list[tuple[Cell, list[Cell]]]:
        """Returns (reference, arms) for each combination of `over`; changes: to all cells."""
        groups = []
        for values in itertools.product(*self.over.values()):
            common = {**self.base, **(changes or {}), **dict(zip(self.over, values, strict=True))}
            reference = Cell(**common).canonical()
            arms = [Cell(**{**common, **change}).canonical() for change in self.arms]
            groups.append((reference, [arm for arm in dict.fromkeys(arms) if arm != reference]))
        return groups

    def cells(self, changes: Change | None = None) -> list[Cell]:
        """Returns the grid's cells, each once."""
        return list(dict.fromkeys(c for cell, arms in self.groups(changes) for c in (cell, *arms)))


def setting(name: str, value: Any) -> Any:
    """Returns a cell's setting as command lines and grids.toml write it."""
    if name == "tasks":
        return tuple(value.split("+"))
    return None if value == "none" else value


def _arms(table: Change) -> list[Change]:
    """Returns an arm for each place of the table's lists, at least one."""
    lists = [value for value in table.values() if isinstance(value, list)]
    return [
        {k: setting(k, v[i] if isinstance(v, list) else v) for k, v in table.items()}
        for i in range(len(lists[0]) if lists else 1)
    ]


def _grid(table: Mapping[str, Any]) -> Grid:
    arms = table["arms"]  # a name: those of this grid
    arms = _TABLES[arms]["arms"] if isinstance(arms, str) else arms
    arms = [arm for table in arms for arm in _arms(table)]
    over = {k: [setting(k, value) for value in v] for k, v in table.get("over", {}).items()}
    base = {k: setting(k, v) for k, v in table.get("base", {}).items()}
    return Grid(table["question"], arms, over, base)


def all_cells(names: Sequence[str], changes: Change | None = None) -> list[Cell]:
    """Returns the cells of several grids, each once."""
    return list(dict.fromkeys(cell for name in names for cell in GRIDS[name].cells(changes)))


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
GRIDS: dict[str, Grid] = {name: _grid(table) for name, table in _TABLES.items()}
# What accuracy does not show, measured beside the grids.
MEASUREMENTS = {
    "attention": "attention on anchors by layer and head",
    "order": "the denoising order of four responses",
    "speed": "seconds against length, one request at a time",
    "costs": "seconds and device memory of the grids' cells, one request at a time",
}
# What "full" leaves out.
EXTRA = ("quick", "methods", "methods-multi", "methods-quick", "costs")
