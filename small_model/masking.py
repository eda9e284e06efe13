"""Chooses the masked tokens of training sequences and their weights, and makes batches.

Deterministic by seed. The loss has a fixed number of rows, so that one step compiles once.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from small_model.corpus import load
from small_model.sequences import ANSWER, QUESTION, TEXT_SHARE, SequenceMaker, TrainingSequence
from small_model.tasks import Encoder

# Maskable tokens of a dialogue: answers (fine-tuning form), questions too, or all tokens except BOS
# (pretraining form). The last two train the likelihood of a question given a document.
REGION_SHARES = {"answer": 0.63, "question": 0.25, "all": 0.12}
# Share of sequences with masked questions that show at most OPENING tokens of an answer. The rest
# of the answer would repeat the question's words. These sequences mask a quarter of the question.
OPENING_SHARE, OPENING = 0.75, 4
FULL_SHARE = {"many": 0.3, "single": 0.5}  # dialogues whose answers are fully masked
EPSILON = 1e-3  # p = (1 - eps) t + eps
WEIGHT_CAP = 16.0  # upper bound of 1/p
TEXT_ROWS = 192  # rows of the loss for a sequence of region "all", a random subset of its masks
TEXT_WEIGHT = 0.5  # weight of such a sequence; other sequences have weight 1
_AHEAD = 6  # batches made ahead for each worker
GROUPS = ("text", "answer", "full", "question")  # groups of the loss's rows in the log


class Masking(NamedTuple):
    """Masked tokens of a sequence.

    hidden: ascending places of all masks. places: those that the loss predicts. weights: float32,
    one for each of `places`. group: index into GROUPS.
    """

    hidden: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    group: int


class Batch(NamedTuple):
    """Input of one training step, host arrays.

    tokens: int32 [B, T] with masks. rows: int32 [R], flat positions (b * T + t) of predicted
    tokens. targets: int32 [R]. weights: float32 [R], 0 for padding; the loss is the weighted sum.
    groups: int32 [R], index into GROUPS.
    """

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    groups: np.ndarray


def _answer_depths(role: np.ndarray) -> np.ndarray:
    """Returns the position of each token within its answer; -1 outside answers."""
    places = np.flatnonzero(role == ANSWER)
    starts = places[np.diff(places, prepend=-2) > 1]
    depths = np.full(len(role), -1)
    depths[places] = places - starts[np.searchsorted(starts, places, side="right") - 1]
    return depths


def mask_sequence(rng: np.random.Generator, sequence: TrainingSequence, t: float) -> Masking:
    """Masks one sequence as LLaDA does.

    t: mask ratio in [0, 1), replaced by 1 for a full masking. Weights are 1/p (bounded) divided by
    the number of maskable tokens.
    """
    role, kind = sequence.role, sequence.kind
    region = "all"
    if kind == "absent":
        region = "question"
    elif kind != "text":
        region = str(rng.choice(list(REGION_SHARES), p=list(REGION_SHARES.values())))
    covered = np.zeros(0, np.int64)  # masked but not predicted
    group = GROUPS.index("text" if region == "all" else region)
    if region == "all":
        maskable = np.arange(1, len(sequence.tokens))
    elif region == "answer":
        maskable = np.flatnonzero(role == ANSWER)
        if rng.random() < FULL_SHARE[kind]:
            t, group = 1.0, GROUPS.index("full")
    elif kind == "absent" or rng.random() < OPENING_SHARE:
        depths = _answer_depths(role)
        shown = int(rng.integers(0, OPENING + 1))
        maskable = np.flatnonzero((role == QUESTION) | ((depths >= 0) & (depths < shown)))
        covered = np.flatnonzero(depths >= shown)
        t = t / 2
    else:
        maskable = np.flatnonzero(role >= QUESTION)
    p = (1 - EPSILON) * t + EPSILON
    places = maskable[rng.random(len(maskable)) < p]
    weight = min(1 / p, WEIGHT_CAP) / len(maskable)
    weight *= TEXT_WEIGHT if region == "all" else 1.0
    hidden = np.union1d(places, covered)
    return Masking(hidden, places, np.full(len(places), weight, np.float32), group)


def _share_rows(counts: np.ndarray, budget: int) -> np.ndarray:
    """Cuts the counts at the largest common limit with which their sum is at most `budget`."""
    limits = np.arange(counts.max(initial=0) + 1)
    sums = np.minimum(counts, limits[:, None]).sum(axis=1)
    return np.minimum(counts, limits[sums <= budget][-1])


def make_batch(
    sequences: Sequence[TrainingSequence], rng: np.random.Generator, rows: int, mask_id: int
) -> Batch:
    """Masks the sequences with t stratified over the batch.

    The batch predicts at most `rows` tokens. With more masked tokens, each sequence predicts a
    random subset, and its weights grow accordingly.
    """
    count, length = len(sequences), len(sequences[0].tokens)
    strata = (rng.permutation(count) + rng.random()) / count
    masked = [mask_sequence(rng, one, t) for one, t in zip(sequences, strata, strict=True)]
    limits = [TEXT_ROWS if one.group == 0 else length for one in masked]
    counts = [min(len(one.places), limit) for one, limit in zip(masked, limits, strict=True)]
    shares = _share_rows(np.array(counts), rows)
    tokens = np.stack([one.tokens for one in sequences]).astype(np.int32)
    parts = []
    for index, (one, share) in enumerate(zip(masked, shares, strict=True)):
        scale = len(one.places) / max(share, 1)
        chosen = rng.choice(len(one.places), share, replace=False) if scale > 1 else slice(None)
        places, weights = one.places[chosen], one.weights[chosen] * scale / count
        group = np.full(share, one.group)
        parts.append((index * length + places, tokens[index, places], weights, group))
        tokens[index, one.hidden] = mask_id
    spare = (0, rows - shares.sum())
    columns = (np.pad(np.concatenate(column), spare) for column in zip(*parts, strict=True))
    kinds = (np.int32, np.int32, np.float32, np.int32)
    return Batch(
        tokens, *(column.astype(kind) for column, kind in zip(columns, kinds, strict=True))
    )


def training_batch(maker: SequenceMaker, batch_size: int, rows: int, seed: Sequence[int]) -> Batch:
    """Makes the batch of step `seed` from plain text and dialogues."""
    rng = np.random.default_rng(list(seed))
    texts = int(TEXT_SHARE * batch_size + rng.random())
    sequences = [maker.text(rng) for _ in range(texts)]
    sequences += [maker.dialogue(rng) for _ in range(batch_size - texts)]
    return make_batch(sequences, rng, rows, maker.encode.mask)


class Source(NamedTuple):
    """Settings of the batches. Step i of seed s is the same batch for any number of workers."""

    corpora: str
    length: int
    batch_size: int
    rows: int
    seed: int


@lru_cache(maxsize=1)
def make_maker(source: Source) -> SequenceMaker:
    """Reads the texts of a source and returns its sequence maker."""
    texts = load(source.corpora, held_out=False)
    return SequenceMaker(texts, Encoder.load(source.corpora), source.length)


def _make_batch(source: Source, step: int) -> Batch:
    seed = (source.seed, source.length, step)
    return training_batch(make_maker(source), source.batch_size, source.rows, seed)


def make_batches(source: Source, first_step: int, workers: int) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, without end; closing the generator ends the workers.

    Raises concurrent.futures.process.BrokenProcessPool if a worker ends early.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    pending: deque[Future[Batch]] = deque()
    try:
        for step in itertools.count(first_step):
            pending.append(pool.submit(_make_batch, source, step))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
