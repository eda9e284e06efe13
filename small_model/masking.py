"""Masking and batches: which tokens of a training sequence are hidden, and what they weigh.

numpy only, deterministic by seed. Rows of the loss are a fixed number, so that one step compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from small_model.sequences import ANSWER, QUESTION, TEXT_SHARE, SequenceMaker, TrainingSequence

# What may be masked in a dialogue: answers alone (fine-tuning form), questions too, or anything
# but BOS (pretraining form). The last two let the model judge how well a document fits a question:
# it does when the document makes the question's words likely.
REGION_SHARES = {"answer": 0.63, "question": 0.25, "all": 0.12}
# In most of the sequences with masked questions an answer shows no more than its first tokens:
# the rest of it would repeat the question's words, and the document would not be asked for them.
# Then a quarter of the question is masked on average, so that words follow from one another where
# they can and from the document where they cannot.
OPENING_SHARE, OPENING = 0.75, 4
# Dialogues whose answers are masked to the last token, where decoding starts.
FULL_SHARE = {"many": 0.3, "single": 0.5}
EPSILON = 1e-3  # p = (1 - eps) t + eps
WEIGHT_CAP = 16.0  # bound of 1/p: a lone masked token shall not rule a batch
TEXT_ROWS = 192  # masked tokens of such a sequence in the loss: a random part stands for the rest
TEXT_WEIGHT = 0.5  # of sequences where anything may be masked, against 1 for answers
GROUPS = ("text", "answer", "full", "question")  # rows of the loss, as the log parts them


class Masking(NamedTuple):
    """What is masked in a sequence, places ascending, and which of it the loss counts.

    hidden: all masked places.  places: those of them that are predicted.  weights: float32, one for
    each of `places`.  group: index into GROUPS.
    """

    hidden: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    group: int


class Batch(NamedTuple):
    """One training step's input, host arrays.

    tokens: int32 [B, T], masks in place.  rows: int32 [R], flat places (b * T + t) of masked
    tokens.  targets: int32 [R].  weights: float32 [R], 0 for padding; they sum to the loss as is.
    groups: int32 [R], index into GROUPS.
    """

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    groups: np.ndarray


def _answer_depths(role: np.ndarray) -> np.ndarray:
    """For every token its place in its own answer, from 0; -1 outside answers."""
    places = np.flatnonzero(role == ANSWER)
    starts = places[np.diff(places, prepend=-2) > 1]
    depths = np.full(len(role), -1)
    depths[places] = places - starts[np.searchsorted(starts, places, side="right") - 1]
    return depths


def mask_sequence(rng: np.random.Generator, sequence: TrainingSequence, t: float) -> Masking:
    """LLaDA's masking of one sequence.

    t: the sequence's draw of the mask ratio, kept unless it is masked in full. Weights are
    1/p (bounded) over the number of tokens that might have been masked.
    """
    role, kind = sequence.role, sequence.kind
    region = "all"
    if kind == "absent":
        region = "question"
    elif kind != "text":
        names = list(REGION_SHARES)
        region = names[rng.choice(len(names), p=list(REGION_SHARES.values()))]
    covered = np.zeros(0, np.int64)  # masked and not predicted: which needle is meant is not known
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
    """Rows for each sequence, at most its count, evenly cut so that the sum fits the budget."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() <= budget:
            low = middle
        else:
            high = middle - 1
    return np.minimum(counts, low)


def make_batch(
    sequences: Sequence[TrainingSequence], rng: np.random.Generator, rows: int, mask_id: int
) -> Batch:
    """Masks the sequences, t stratified over the batch; at most `rows` masked tokens are predicted.

    Where more could be, each sequence's loss is taken over a random part of them, scaled up.
    """
    count, length = len(sequences), len(sequences[0].tokens)
    strata = (rng.permutation(count) + rng.random()) / count
    masked = [mask_sequence(rng, one, t) for one, t in zip(sequences, strata, strict=True)]
    limits = [TEXT_ROWS if one.group == 0 else length for one in masked]
    counts = [min(len(one.places), limit) for one, limit in zip(masked, limits, strict=True)]
    shares = _share_rows(np.array(counts), rows)
    tokens = np.stack([one.tokens for one in sequences]).astype(np.int32)
    clean = tokens.copy()
    flat, weights, groups = [], [], []
    for index, (one, share) in enumerate(zip(masked, shares, strict=True)):
        places, weight, group = one.places, one.weights, one.group
        tokens[index, one.hidden] = mask_id
        scale = len(places) / max(share, 1)
        chosen = rng.choice(len(places), share, replace=False) if scale > 1 else slice(None)
        flat.append(index * length + places[chosen])
        weights.append(weight[chosen] * scale / count)
        groups.append(np.full(share, group, np.int32))
    places = np.concatenate(flat)
    spare = (0, rows - len(places))
    return Batch(
        tokens=tokens,
        rows=np.pad(places, spare).astype(np.int32),
        targets=np.pad(clean.reshape(-1)[places], spare),
        weights=np.pad(np.concatenate(weights), spare).astype(np.float32),
        groups=np.pad(np.concatenate(groups), spare),
    )


def training_batch(maker: SequenceMaker, batch_size: int, rows: int, seed: Sequence[int]) -> Batch:
    """Step `seed` of training: text and dialogues in their shares."""
    rng = np.random.default_rng(list(seed))
    texts = int(TEXT_SHARE * batch_size + rng.random())
    sequences = [maker.text(rng) for _ in range(texts)]
    sequences += [maker.dialogue(rng) for _ in range(batch_size - texts)]
    return make_batch(sequences, rng, rows, maker.encode.mask)
