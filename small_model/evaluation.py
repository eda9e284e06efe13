"""Measures during training: exact match of decoding, and each piece's fit to its question.

Only `Evaluator.question_fit` cuts documents into pieces; training never does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
_PIECE = 511  # least tokens of a piece
_COPIES = 4  # masked copies of the question for each piece
_OPENING, _GUESSED = 4, 2  # slots for the answer's first tokens, and how many of them are guessed
_KEPT = 4  # `question_fit` counts a needle whose piece is among this number of pieces


@partial(jax.jit, static_argnames=("shape",))
def _predict(
    params: Params, tokens: jax.Array, places: jax.Array, lengths: jax.Array | None, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest tokens at `places` [B, n] and their probabilities, both [B, n]."""
    hidden = network.encode(params, shape, tokens, lengths)
    logits = network.head(params, jnp.take_along_axis(hidden, places[..., None], axis=1))
    return logits.argmax(axis=-1), jax.nn.softmax(logits).max(axis=-1)


def decode(
    params: Params, shape: Shape, prompts: np.ndarray, mask_id: int, threshold: float = 0.9
) -> tuple[np.ndarray, np.ndarray, int]:
    """Fills the 32 response slots of prompts [B, T - 32].

    Returns the responses of threshold decoding, the responses of the first evaluation, both
    [B, 32], and the number of evaluations.
    """
    count, start = prompts.shape
    masks = np.full((count, tasks.RESPONSE_LENGTH), mask_id, prompts.dtype)
    tokens = np.concatenate([prompts, masks], axis=1).astype(np.int32)
    places = np.tile(np.arange(start, tokens.shape[1]), (count, 1))
    masked = np.ones(masks.shape, bool)
    first, steps = None, 0
    while masked.any():
        best, sure = (np.asarray(x) for x in _predict(params, tokens, places, None, shape))
        first, steps = best if first is None else first, steps + 1
        sure = np.where(masked, sure, -1.0)
        chosen = sure >= threshold
        chosen[np.arange(count), sure.argmax(axis=1)] = True
        chosen &= masked
        tokens[:, start:][chosen] = best[chosen]
        masked &= ~chosen
    return tokens[:, start:], first, steps


class FitRows(NamedTuple):
    """Rows that score the pieces of one example.

    tokens: [N * R, T]: prefix, BOS, piece, question, opening, with every R-th token masked. Row
    i * R + r belongs to piece i. slots: [N * R, S], positions of the masks. targets: [N * R, S], -1
    for padding. needle: the pieces with the whole needle, or with parts if no piece has all of it.
    """

    tokens: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    needle: frozenset[int]


def fit_rows(
    example: tasks.Example, opening: np.ndarray, length: int, bos_id: int, mask_id: int
) -> FitRows:
    """Makes rows of `length` tokens; the piece fills what prefix, question and opening leave.

    opening: the answer's first tokens; masks among them are not predicted. The last piece overlaps
    the piece before it instead of being padded.
    """
    prefix, context = [*example["prefix"], bos_id], np.array(example["context"])
    asked = np.concatenate([example["query"], opening])
    first = length - len(asked)
    size = first - len(prefix)
    count = -(-len(context) // size)
    starts = np.minimum(np.arange(count) * size, len(context) - size)
    scored = np.flatnonzero(asked != mask_id)
    scored = np.pad(scored, (0, -len(scored) % _COPIES), constant_values=-1)
    offsets = scored.reshape(-1, _COPIES).T  # [R, S]
    slots = np.where(offsets >= 0, first + offsets, 0)
    targets = np.where(offsets >= 0, asked[offsets], -1)
    rows = np.zeros((count, _COPIES, length), np.int64)
    rows[:, :, : len(prefix)] = prefix
    rows[:, :, len(prefix) : first] = context[starts[:, None] + np.arange(size)][:, None]
    rows[:, :, first:] = asked
    for copy in range(_COPIES):
        rows[:, copy, slots[copy][targets[copy] >= 0]] = mask_id
    start, end = example["needle_span"]
    whole = np.flatnonzero((starts <= start) & (end <= starts + size))
    part = np.flatnonzero((starts < end) & (start < starts + size))
    needle = frozenset((whole if len(whole) else part).tolist())
    flat = rows.reshape(count * _COPIES, length)
    return FitRows(flat, np.tile(slots, (count, 1)), np.tile(targets, (count, 1)), needle)


def openings(
    params: Params, shape: Shape, examples: Sequence[tasks.Example], mask_id: int
) -> np.ndarray:
    """Guesses the answers' openings from prefix and question alone, int64 [B, 4].

    It guesses the first token and then the surest other token; the rest are masks.
    """
    prompts = [example["prefix"] + example["query"] for example in examples]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + _OPENING), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    places = lengths[:, None] + np.arange(_OPENING)
    guesses = np.full(places.shape, mask_id, np.int64)
    shape = shape._replace(attention="xla")  # cuDNN does not support every length
    every = np.arange(len(prompts))
    for step in range(_GUESSED):
        np.put_along_axis(tokens, places, guesses, axis=1)
        predicted = _predict(params, tokens, places, lengths + _OPENING, shape)
        best, sure = (np.asarray(x) for x in predicted)
        sure = np.where(guesses == mask_id, sure, -1.0)
        slot = sure.argmax(axis=1) if step > 0 else np.zeros_like(every)
        guesses[every, slot] = best[every, slot]
    return guesses


@partial(jax.jit, static_argnames=("shape",))
def _likelihood(
    params: Params, tokens: jax.Array, slots: jax.Array, targets: jax.Array, shape: Shape
) -> jax.Array:
    """Returns the summed log-probability of each row's targets, [B]; -1 adds nothing."""
    hidden = network.encode(params, shape, tokens)
    logits = network.head(params, jnp.take_along_axis(hidden, slots[..., None], axis=1))
    logs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, chosen, 0.0).sum(axis=-1)


def fit_scores(params: Params, shape: Shape, rows: Sequence[FitRows]) -> list[np.ndarray]:
    """Returns the log-likelihood of the question given each piece alone, [N] for each example."""
    width = max(one.slots.shape[1] for one in rows)

    def widen(values: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)

    tokens = np.concatenate([one.tokens for one in rows]).astype(np.int32)
    slots = np.concatenate([widen(one.slots, 0) for one in rows])
    targets = np.concatenate([widen(one.targets, -1) for one in rows])
    size = min(max(_TOKENS_AT_ONCE // tokens.shape[1], 1), len(tokens))
    scores = []
    for start in range(0, len(tokens), size):
        batch = [values[start : start + size] for values in (tokens, slots, targets)]
        count = len(batch[0])
        # All batches have one shape, so that JAX compiles once.
        batch = [np.pad(values, ((0, size - count), (0, 0))) for values in batch]
        scores.append(np.asarray(_likelihood(params, *batch, shape))[:count])
    pieces = np.concatenate(scores).reshape(-1, _COPIES).sum(axis=1)
    return np.split(pieces, np.cumsum([len(one.tokens) // _COPIES for one in rows])[:-1])


def _means(values: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {task: round(float(np.mean(hits)), 3) for task, hits in values.items()}


class Evaluator:
    """Decodes and scores held-out examples of every task."""

    def __init__(self, corpora: str, shape: Shape):
        folder = Path(corpora)
        self.corpora = load(folder, held_out=True)
        self.encode = tasks.Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.shape = shape

    def _examples(self, task: tasks.Task, length: int, count: int) -> list[tasks.Example]:
        settings = {"corpora": self.corpora, "encode": self.encode}
        return [tasks.make_example(task, length, seed, **settings) for seed in range(count)]

    def __call__(self, params: Params, length: int, count: int) -> dict[str, object]:
        """Returns exact match of threshold decoding and of one pass, `count` examples a task."""
        exact, single = defaultdict(list), defaultdict(list)
        evaluations, wrong = [], []
        size = max(min(_TOKENS_AT_ONCE // length, count), 1)
        for task in tasks.TASKS:
            examples = self._examples(task, length, count)
            for start in range(0, count, size):
                part = examples[start : start + size]
                prompts = np.array([e["prefix"] + e["context"] + e["query"] for e in part])
                filled, first, steps = decode(params, self.shape, prompts, self.encode.mask)
                evaluations.append(steps)
                for example, ids, guess in zip(part, filled, first, strict=True):
                    exact[task].append(tasks.score(self.encode, example["answer"], ids))
                    single[task].append(tasks.score(self.encode, example["answer"], guess))
                    if not exact[task][-1]:
                        wrong.append([example["answer"], self.encode.decode(ids)])
        return {
            "exact": _means(exact),
            "single_pass": _means(single),
            "evaluations": round(float(np.mean(evaluations)), 1),
            "wrong": wrong[:: max(len(wrong) // 6, 1)][:6],
        }

    def question_fit(self, params: Params, count: int, length: int = 4096) -> dict[str, object]:
        """Returns how often the needle's piece makes its question likely, `count` examples a task.

        A row has one piece of at least 511 tokens after a BOS. Four copies predict the question and
        two tokens of the answer, guessed without the document; each copy masks a quarter. "fit" is
        the share of examples whose needle's piece is among the four likeliest, "fit_first" the
        share where it is the likeliest.
        """
        cells = [(t, e) for t in tasks.TASKS for e in self._examples(t, length, count)]
        examples = [example for _, example in cells]
        longest = max(len(e["prefix"]) + len(e["query"]) for e in examples)
        row_length = -(-(longest + 1 + _PIECE + _OPENING) // 64) * 64  # attention kernels need 64
        bos, mask = examples[0]["prefix"][0], self.encode.mask
        guesses = openings(params, self.shape, examples, mask)
        rows = [
            fit_rows(example, guess, row_length, bos, mask)
            for example, guess in zip(examples, guesses, strict=True)
        ]
        fit, first = defaultdict(list), defaultdict(list)
        scores = fit_scores(params, self.shape, rows)
        for (task, _), one, score in zip(cells, rows, scores, strict=True):
            order = np.argsort(-score, stable=True).tolist()
            fit[task].append(one.needle <= set(order[:_KEPT]))
            first[task].append(order[0] in one.needle)
        return {"fit": _means(fit), "fit_first": _means(first)}
