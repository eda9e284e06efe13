"""Measures of training: exact match by plain decoding, and how texts are told by their questions.

Only the second, `Evaluator.question_fit`, cuts documents into pieces; training never does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from small_model import network, tasks
from small_model.corpus import load
from small_model.network import Params, Shape

_TOKENS_AT_ONCE = 131_072
# Of `question_fit`: tokens of a piece at least, masked copies of the question, slots behind it for
# the answer's opening and how many of them are guessed, and how many pieces count as found.
_PIECE, _COPIES, _OPENING, _GUESSED, _KEPT = 511, 4, 4, 2, 4


@partial(jax.jit, static_argnames=("shape",))
def _predict(params: Params, tokens: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Likeliest tokens of the response slots and their probabilities, both [B, 32]."""
    hidden = network.encode(params, shape, tokens)[:, -tasks.RESPONSE_LENGTH :]
    logits = network.head(params, hidden)
    best = logits.argmax(axis=-1)
    top = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    return best, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1))


def decode(
    params: Params, shape: Shape, prompts: np.ndarray, mask_id: int, threshold: float = 0.9
) -> tuple[np.ndarray, np.ndarray, int]:
    """Fills the 32 response slots of equally long prompts [B, T - 32].

    Returns the responses by threshold decoding, those of the first evaluation alone, both
    [B, 32], and the evaluations taken.
    """
    slots = tasks.RESPONSE_LENGTH
    masks = np.full((len(prompts), slots), mask_id, prompts.dtype)
    tokens = np.concatenate([prompts, masks], axis=1).astype(np.int32)
    masked = np.ones((len(prompts), slots), bool)
    first, steps = None, 0
    while masked.any():
        best, sure = (np.asarray(x) for x in _predict(params, tokens, shape))
        first, steps = best if first is None else first, steps + 1
        sure = np.where(masked, sure, -1.0)
        chosen = sure >= threshold
        chosen[np.arange(len(chosen)), sure.argmax(axis=1)] = True
        chosen &= masked
        tokens[:, -slots:][chosen] = best[chosen]
        masked &= ~chosen
    return tokens[:, -slots:], first, steps


class FitRows(NamedTuple):
    """Rows that score one example's pieces, all equally long.

    tokens: [N * R, T], prefix, BOS, piece, question and opening with every R-th token masked (row
    i * R + r belongs to piece i).  slots: [N * R, S], the masked tokens' places.  targets:
    [N * R, S], -1 for padding.  needle: the pieces that hold the needle, or parts of it where none
    has it all.
    """

    tokens: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    needle: frozenset[int]


def fit_rows(
    example: tasks.Example, opening: np.ndarray, length: int, bos_id: int, mask_id: int
) -> FitRows:
    """Rows of `length` tokens: the piece is what prefix and question leave of it.

    opening: the answer's first tokens, masks where none is guessed; those are not predicted. The
    last piece overlaps the one before it, so that no padding is needed.
    """
    prefix, context = np.array(example["prefix"]), np.array(example["context"])
    asked = np.concatenate([example["query"], opening])
    scored = np.flatnonzero(asked != mask_id)
    size = length - len(prefix) - 1 - len(asked)
    count = -(-len(context) // size)
    starts = np.minimum(np.arange(count) * size, len(context) - size)
    slot_count = -(-len(scored) // _COPIES)
    rows = np.zeros((count, _COPIES, length), np.int64)
    rows[:, :, : len(prefix)] = prefix
    rows[:, :, len(prefix)] = bos_id
    first = length - len(asked)
    rows[:, :, len(prefix) + 1 : first] = context[starts[:, None] + np.arange(size)][:, None]
    rows[:, :, first:] = asked
    slots = np.zeros((count, _COPIES, slot_count), np.int64)
    targets = np.full((count, _COPIES, slot_count), -1)
    for copy in range(_COPIES):
        masked = scored[copy::_COPIES]
        rows[:, copy, first + masked] = mask_id
        slots[:, copy, : len(masked)] = first + masked
        targets[:, copy, : len(masked)] = asked[masked]
    start, end = example["needle_span"]
    whole = np.flatnonzero((starts <= start) & (end <= starts + size))
    part = np.flatnonzero((starts < end) & (start < starts + size))
    needle = whole if len(whole) else part
    flat = (values.reshape(count * _COPIES, -1) for values in (rows, slots, targets))
    return FitRows(*flat, frozenset(needle.tolist()))


def openings(
    params: Params, shape: Shape, examples: Sequence[tasks.Example], mask_id: int
) -> np.ndarray:
    """The answers' openings guessed from prefix and question alone, int64 [B, 4].

    The first token, then the surest of the others; masks where nothing is guessed.
    """
    prompts = [np.array(e["prefix"] + e["query"]) for e in examples]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + _OPENING), np.int32)
    places = lengths[:, None] + np.arange(_OPENING)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    np.put_along_axis(tokens, places, mask_id, axis=1)
    guessed = np.full((len(prompts), _OPENING), mask_id, np.int64)
    short = shape._replace(attention="xla")  # which takes any length
    for step in range(_GUESSED):
        best, sure = (np.asarray(x) for x in _guess(params, tokens, places, short))
        sure = np.where(guessed == mask_id, sure, -np.inf)
        slot = np.zeros(len(prompts), np.int64) if step == 0 else sure.argmax(axis=1)
        every = np.arange(len(prompts))
        guessed[every, slot] = best[every, slot]
        tokens[every, places[every, slot]] = best[every, slot]
    return guessed


@partial(jax.jit, static_argnames=("shape",))
def _guess(
    params: Params, tokens: jax.Array, places: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Likeliest tokens at `places`, the last of each row, and their log-probabilities, [B, n]."""
    hidden = network.encode(params, shape, tokens, places[:, -1] + 1)
    logits = network.head(params, jnp.take_along_axis(hidden, places[..., None], axis=1))
    return logits.argmax(axis=-1), jax.nn.log_softmax(logits).max(axis=-1)


@partial(jax.jit, static_argnames=("shape",))
def _likelihood(
    params: Params, tokens: jax.Array, slots: jax.Array, targets: jax.Array, shape: Shape
) -> jax.Array:
    """Summed log-probability of the targets of each row, [B]; -1 counts as nothing."""
    hidden = network.encode(params, shape, tokens)
    logits = network.head(params, jnp.take_along_axis(hidden, slots[..., None], axis=1))
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    known = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(targets >= 0, known, 0.0).sum(axis=-1)


def fit_scores(params: Params, shape: Shape, rows: Sequence[FitRows]) -> list[np.ndarray]:
    """Log-likelihood of the question given each piece alone, [N] for each example."""
    slots = max(one.slots.shape[1] for one in rows)

    def joined(name: str, fill: int) -> np.ndarray:
        parts = [getattr(one, name) for one in rows]
        width = 0 if name == "tokens" else slots
        wide = [
            np.pad(part, ((0, 0), (0, max(width - part.shape[1], 0))), constant_values=fill)
            for part in parts
        ]
        return np.concatenate(wide).astype(np.int32)

    arrays = [joined("tokens", 0), joined("slots", 0), joined("targets", -1)]
    total, length = arrays[0].shape
    size = min(max(_TOKENS_AT_ONCE // length, 1), total)
    found = []
    for start in range(0, total, size):
        part = [values[start : start + size] for values in arrays]
        spare = size - len(part[0])  # one shape, one compilation
        part = [np.pad(values, ((0, spare), (0, 0))) for values in part]
        found.append(np.asarray(_likelihood(params, *part, shape))[: size - spare])
    likelihood = np.concatenate(found)
    ends = list(itertools.accumulate(len(one.tokens) for one in rows))
    parts = np.split(likelihood, ends[:-1])
    return [part.reshape(-1, _COPIES).sum(axis=1) for part in parts]


class Evaluator:
    """Held-out examples of every task at a given length, decoded and scored."""

    def __init__(self, corpora: str, shape: Shape):
        folder = Path(corpora)
        self.corpora = load(folder, held_out=True)
        self.encode = tasks.Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.shape = shape

    def __call__(self, params: Params, length: int, count: int) -> dict[str, object]:
        """`count` examples a task: exact match by threshold decoding and in a single pass."""
        exact: dict[str, float] = {}
        once: dict[str, float] = {}
        evaluations, wrong = [], []
        for task in tasks.TASKS:
            examples = [
                tasks.make_example(task, length, seed, corpora=self.corpora, encode=self.encode)
                for seed in range(count)
            ]
            prompts = np.array([e["prefix"] + e["context"] + e["query"] for e in examples])
            size = max(min(_TOKENS_AT_ONCE // length, count), 1)
            hits, single = [], []
            for start in range(0, count, size):
                part = examples[start : start + size]
                filled, first, steps = decode(
                    params, self.shape, prompts[start : start + size], self.encode.mask
                )
                evaluations.append(steps)
                for example, ids, guess in zip(part, filled, first, strict=True):
                    hits.append(tasks.score(self.encode, example["answer"], ids))
                    single.append(tasks.score(self.encode, example["answer"], guess))
                    if not hits[-1]:
                        wrong.append([example["answer"], self.encode.decode(ids)])
            exact[task] = round(float(np.mean(hits)), 3)
            once[task] = round(float(np.mean(single)), 3)
        return {
            "exact": exact,
            "single_pass": once,
            "evaluations": round(float(np.mean(evaluations)), 1),
            "wrong": wrong[:: max(len(wrong) // 6, 1)][:6],
        }

    def question_fit(self, params: Params, count: int, length: int = 4096) -> dict[str, object]:
        """Whether the piece that holds the needle makes its question likely.

        `count` examples a task; pieces of about 511 tokens behind a BOS of their own, each seen
        alone; the question's tokens, and two of the answer's that were guessed without any
        document, are predicted in four copies with a quarter masked. "fit" is the share of examples
        whose needle's piece is among the four likeliest (half of the pieces at 4,096 tokens),
        "fit_first" the share where it is the likeliest.
        """
        cells = [(task, seed) for task in tasks.TASKS for seed in range(count)]
        examples = [
            tasks.make_example(task, length, seed, corpora=self.corpora, encode=self.encode)
            for task, seed in cells
        ]
        longest = max(len(e["prefix"]) + len(e["query"]) for e in examples)
        # Attention kernels like multiples of 64.
        row_length = -(-(longest + 1 + _PIECE + _OPENING) // 64) * 64
        bos = examples[0]["prefix"][0]
        mask = self.encode.mask
        guesses = openings(params, self.shape, examples, mask)
        rows = [
            fit_rows(example, guess, row_length, bos, mask)
            for example, guess in zip(examples, guesses, strict=True)
        ]
        fit: dict[str, list[bool]] = {task: [] for task in tasks.TASKS}
        first: dict[str, list[bool]] = {task: [] for task in tasks.TASKS}
        scores = fit_scores(params, self.shape, rows)
        for (task, _), one, score in zip(cells, rows, scores, strict=True):
            order = np.argsort(-score, stable=True).tolist()
            fit[task].append(one.needle <= set(order[:_KEPT]))
            first[task].append(order[0] in one.needle)
        return {
            "fit": {task: round(float(np.mean(hits)), 3) for task, hits in fit.items()},
            "fit_first": {task: round(float(np.mean(hits)), 3) for task, hits in first.items()},
        }
