"""Calibration: which heads of a model find the chunk that answers a question.

For each example the share of the query's attention that each head pays to each chunk is measured,
in one pass over the document. A head recalls an example if the needle's chunk gets the greatest
share. A set of heads is judged by the mean of their shares, as the scorer "heads" uses it. Among
few chunks most heads are right; in a document of many chunks only those whose lead is large. So the
clarity of a set is the mean, over 1, 2 and 4, of the share of examples in which the needle's chunk
gets more than that many times the share of any other chunk.

    choose    for each m and n: the clearest n heads within the first m layers, chosen on one half
              of the examples and tested on the other half, in several divisions; the smallest m,
              and with it the largest n, whose clarity lies within one point of the best; the
              clearest n heads within these layers, on all examples
    recall    of that procedure as a whole: it runs on seven eighths of the examples, and its heads
              are tested on the last eighth, for each eighth in turn
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.engine import Engine
from pdllm_jax.evaluation.needles import Example, Prose
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import ChunkedPrompt, chunk_prompt, count_chunks, needle_chunks
from pdllm_jax.method.scorers import ScoreRequest
from pdllm_jax.method.scorers.attention import attention_shares
from pdllm_jax.method.scorers.calibration import HEADS_FILE, PARTIAL, VERSION
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import Heads, require, size

LEAST_CHUNKS = 4  # of a document: among fewer, most heads are right
_FOLDS, _DIVISIONS = 8, 8
_LEAST_EXAMPLES = 8
_LEADS = (1, 2, 4)
_POINT = 0.01  # by which fewer layers may be less clear
_DIGITS = 4  # of figures in the file, after the point


class Shares(NamedTuple):
    """What was measured on E examples: shares of attention, and the chunks that hold the needle.

    Chunks behind a document's last one have share 0.
    """

    values: Float[np.ndarray, "E L H N"]
    needle: Bool[np.ndarray, "E N"]

    @classmethod
    def joined(cls, parts: Sequence[Shares]) -> Shares:
        """Returns the examples of several measurements as one."""
        most = max(part.needle.shape[1] for part in parts)

        def pad(x: np.ndarray) -> np.ndarray:
            return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, most - x.shape[-1])])

        return cls(*(np.concatenate([pad(x) for x in field]) for field in zip(*parts, strict=True)))

    def take(self, index: np.ndarray) -> Shares:
        """Returns some of the examples."""
        return Shares(self.values[index], self.needle[index])

    def margins(self, lead: float = 1) -> Float[np.ndarray, "E L H"]:
        """Returns by how much each head's share of the needle's chunk exceeds any other chunk's.

        lead: what the other chunk's share is multiplied by.
        """
        needle = self.needle[:, None, None]
        inside = np.where(needle, self.values, -np.inf).max(axis=-1)
        return inside - lead * np.where(needle, -np.inf, self.values).max(axis=-1)

    def of(self, heads: Heads) -> Shares:
        """Returns the mean over some heads, as of one head."""
        layers, numbers = map(list, zip(*heads, strict=True))
        mean = self.values[:, layers, numbers].mean(axis=1)
        return Shares(mean[:, None, None], self.needle)

    def recalled(self, heads: Heads) -> Bool[np.ndarray, " E"]:
        """Returns on which examples the mean over some heads finds the needle's chunk."""
        return self.of(heads).margins()[:, 0, 0] > 0

    def clarity(self) -> Float[np.ndarray, "L H"]:
        """Returns the clarity of each head."""
        return np.mean([self.margins(lead) > 0 for lead in _LEADS], axis=(0, 1))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The chosen heads, and the figures that they were chosen by.

    heads: (layer, head) of each, the best first. layers: the first layers, which hold them.
    recall: share of examples whose needle's chunk is first, of heads that other examples chose.
    clarity_by_layers [M]: the clarity for each m, by the best n, of heads that other examples
      chose; M layers were allowed.
    recall_of_all: of the mean over all layers and heads, the scorer "attention".
    head_recall, head_margin [L, H]: of each head alone, its recall and its mean margin.
    examples: how many there were.
    """

    heads: Heads
    layers: int
    recall: float
    clarity_by_layers: np.ndarray
    recall_of_all: float
    head_recall: np.ndarray
    head_margin: np.ndarray
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures for JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, float | np.ndarray):
                return np.round(np.asarray(value, float), _DIGITS).tolist()
            return [list(pair) for pair in value] if isinstance(value, tuple) else value

        fields = dataclasses.fields(self)
        return {"version": VERSION, **{f.name: plain(getattr(self, f.name)) for f in fields}}

    def save(self, folder: Path, about: dict[str, Any], *, overwrite: bool = False) -> Path:
        """Writes HEADS_FILE into a checkpoint's folder, in one step; returns its path.

        Args:
          about: further fields: settings, text, model.

        Raises:
          FileExistsError: there is a file, and `overwrite` is False.
        """
        path = check_destination(folder, overwrite=overwrite)
        lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in (self.to_dict() | about).items())
        partial = path.with_name(PARTIAL)
        with partial.open("w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return path


def check_destination(folder: Path, *, overwrite: bool = False) -> Path:
    """Returns the path of HEADS_FILE; OSError if it may not be written, before any work."""
    path = folder / HEADS_FILE
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists (--overwrite replaces it)")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: copy the checkpoint")
    return path


def check_choice(examples: int, count: int) -> None:
    """Raises ConfigError for fewer than 8 examples, or no head to choose."""
    least = f"at least {_LEAST_EXAMPLES}, to choose heads on some and test them on others"
    require(examples >= _LEAST_EXAMPLES, f"examples must be {least}, got {examples}")
    size("heads", count)


def choose_heads(
    shares: Shares, count: int = 4, *, layers: int | None = None, seed: int = 0
) -> Calibration:
    """Chooses the retrieval heads of a model; the module's docstring says how.

    Args:
      count: most heads to choose. layers: most layers that may have to run, all of them by default.
      seed: of the divisions of the examples.

    Raises:
      ConfigError: as `check_choice`.
    """
    examples = len(shares.needle)
    check_choice(examples, count)
    rng = np.random.default_rng(seed)
    allowed = shares._replace(values=shares.values[:, :layers])
    heads, curve = _procedure(allowed, count, rng)
    order, tested = rng.permutation(examples), []
    for test in np.array_split(order, _FOLDS):
        chosen, _ = _procedure(allowed.take(np.setdiff1d(order, test)), count, rng)
        tested.append(allowed.take(test).recalled(chosen))
    margins = shares.margins()
    everything = tuple(np.ndindex(*margins.shape[1:]))
    return Calibration(
        heads=heads,
        layers=1 + max(layer for layer, _ in heads),
        recall=float(np.concatenate(tested).mean()),
        clarity_by_layers=curve,
        recall_of_all=float(shares.recalled(everything).mean()),
        head_recall=(margins > 0).mean(axis=0),
        head_margin=margins.mean(axis=0),
        examples=examples,
    )


def _procedure(shares: Shares, count: int, rng: np.random.Generator) -> tuple[Heads, np.ndarray]:
    """Returns the chosen heads, and the clarity by number of layers that chose the layers."""
    results = []
    for _ in range(_DIVISIONS):
        halves = np.array_split(rng.permutation(len(shares.needle)), 2)
        for fit, test in (halves, halves[::-1]):
            ranked, tested = _ranked(shares.take(fit), count), shares.take(test)
            sets = [[heads[: n + 1] for n in range(count)] for heads in ranked]
            results.append([[tested.of(heads).clarity().item() for heads in row] for row in sets])
    table = np.mean(results, axis=0)  # [M, count]
    enough = table >= table.max() - _POINT - 1e-9
    last = int(np.argmax(enough.any(axis=1)))
    # The largest number: more heads vary less from task to task.
    most = 1 + int(np.flatnonzero(enough[last])[-1])
    return _ranked(shares, count)[last][:most], table.max(axis=1)


def _ranked(shares: Shares, count: int) -> list[Heads]:
    """Returns for each m the best heads within the first m layers: by clarity, then by margin."""
    clarity, margin = shares.clarity(), shares.margins().mean(axis=0)
    order = np.lexsort((-margin.ravel(), -clarity.ravel()))
    ranked = [divmod(int(i), margin.shape[1]) for i in order]
    return [
        tuple([head for head in ranked if head[0] <= last][:count]) for last in range(len(margin))
    ]


@functools.partial(jax.jit, static_argnames=("encode_batch",))
def _measure(
    model: MaskPredictor, prompt: ChunkedPrompt, encode_batch: int
) -> Float[Array, "L H N"]:
    cache = ChunkCache(
        *(None, prompt.chunks, prompt.chunk_lengths, prompt.prefix, prompt.prefix_length),
        *(None, None),
        anchors=prompt.anchors,
    )
    request = ScoreRequest(prompt.question, cache.lengths > 0, encode_batch=encode_batch)
    heads = np.ones((model.config.n_layers, model.config.n_heads), bool)
    return jnp.stack(attention_shares(model, cache, request, heads))[:, 0].swapaxes(1, 2)


def measure(
    engine: Engine, examples: Iterable[Example], *, done: Callable[[], object] = lambda: None
) -> Shares:
    """Measures the shares of attention on examples, cut as the engine's `chunking` says.

    Args:
      engine: with the method "prefilling". done: is called after each example.

    Raises:
      ValueError: ids outside the vocabulary, a document of one chunk, too little memory.
    """
    parts, group = [], engine.selection.encode_batch
    for example in examples:
        ids = engine.token_ids(example.request)
        context, bos = ids[1], engine.bos_id
        if bos is None and engine.tokenizer is not None:
            bos = engine.tokenizer.bos_id
        prompt = chunk_prompt(*ids, engine.chunking, bos_id=bos, tight=True)
        count = prompt.n_chunks
        require(
            count > 1, f"a document must have 2 chunks or more, got one of {len(context)} tokens"
        )
        needle = np.zeros((1, count), bool)
        needle[0, [i for i in needle_chunks(example.needle, engine.chunking) if i < count]] = True
        values = np.asarray(_measure(engine.model, prompt, group))
        parts.append(Shares(values[None, ..., :count], needle))
        done()
    return Shares.joined(parts)


def plan_needles(
    prose: Prose, lengths: Sequence[int], chunk_sizes: Sequence[int], examples: int, seed: int
) -> list[tuple[ChunkConfig, list[Example]]]:
    """Makes the examples of a calibration, for each chunk size.

    They are divided evenly among the pairs of a length and a chunk size that give 4 chunks or more.

    Args:
      lengths: tokens of a document. examples: of all pairs together. seed: of all examples.

    Raises:
      ConfigError: no such pair, fewer examples than pairs, or `Prose.example` refuses a length.
    """
    pairs = [
        (chunking, length)
        for chunking in map(ChunkConfig, dict.fromkeys(chunk_sizes))
        for length in dict.fromkeys(lengths)
        if count_chunks(length, chunking) >= LEAST_CHUNKS
    ]
    few = f"none of the lengths {list(lengths)} gives {LEAST_CHUNKS} chunks of {list(chunk_sizes)}"
    require(bool(pairs), f"{few} tokens")
    enough = f"examples must be one or more for each of {len(pairs)} pairs of length and chunk size"
    require(examples >= len(pairs), f"{enough}, got {examples}")
    seeds = np.random.default_rng(seed).integers(0, 1 << 32, examples).tolist()
    made: dict[ChunkConfig, list[Example]] = {}
    for i, (chunking, length) in enumerate(pairs):
        each = [prose.example(length, number) for number in seeds[i :: len(pairs)]]
        made.setdefault(chunking, []).extend(each)
    return list(made.items())
