"""Training sequences and masked batches for the small model; numpy only, deterministic by seed.

Every sequence is exactly as long as its stage, so that no padding enters attention, and it is one
plain document in one piece: the method that the model serves is training-free, so nothing here
cuts a document into chunks or puts BOS anywhere but first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from small.corpus import Corpora, Text
from small.tasks import (
    ATTRIBUTES,
    PREFIX,
    QUERY_END,
    RESPONSE_LENGTH,
    Encoder,
    Fact,
    Keys,
    Needle,
    block_needle,
    bury,
    keyed_needle,
    number,
    question_pieces,
    unkeyed_needle,
)

# Half of the dialogues begin with PREFIX, the others with one of these.
_INSTRUCTION = "Read the document and answer the question about it."
_OTHER_INSTRUCTIONS = (
    "Answer the question with what the document says.",
    "Some information is hidden in a long text. Find it and remember it.",
    "Here is a document. A question follows.",
)
_NEXT_TURN = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"

# Share of a dialogue's sequences with several questions; the rest has one, as in evaluation.
MANY_SHARE = 0.7
TEXT_SHARE = 0.25  # plain text in a batch
# What may be masked in a dialogue: answers alone (fine-tuning form), questions too, or anything
# but BOS (pretraining form). The last two let the model judge how well a document fits a question.
REGION_SHARES = {"answer": 0.76, "question": 0.12, "all": 0.12}
# Dialogues whose answers are masked to the last token, where decoding starts.
FULL_SHARE = {"many": 0.3, "single": 0.5}
EPSILON = 1e-3  # p = (1 - eps) t + eps
WEIGHT_CAP = 16.0  # bound of 1/p: a lone masked token shall not rule a batch
TEXT_ROWS = 192  # masked tokens of such a sequence in the loss: a random part stands for the rest
TEXT_WEIGHT = 0.5  # of sequences where anything may be masked, against 1 for answers

CONTEXT, QUESTION, ANSWER = 0, 1, 2
GROUPS = ("text", "answer", "full")  # rows of the loss, as the log parts them


@dataclasses.dataclass(frozen=True)
class TrainingSequence:
    """tokens: uint16 [T]. role: uint8 [T], CONTEXT, QUESTION or ANSWER. kind: text/many/single."""

    tokens: np.ndarray
    role: np.ndarray
    kind: str


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


class SequenceMaker:
    """Makes sequences of one length from the training side of the corpora."""

    def __init__(self, corpora: Corpora, encode: Encoder, length: int):
        self.corpora, self.encode, self.length = corpora, encode, length
        self._texts = list(corpora.texts.values())
        # Novels count in full, in either line layout; the Bible, as long as all of them, less.
        sizes = [
            len(text.tokens) * (0.3 if name == "bible" else 1.0)
            for name, text in corpora.texts.items()
        ]
        self._shares = np.array(sizes) / sum(sizes)
        instructions = [PREFIX.replace(_INSTRUCTION, other) for other in _OTHER_INSTRUCTIONS]
        self._prefixes = [encode(prefix) for prefix in (PREFIX, *instructions)]

    def text(self, rng: np.random.Generator) -> TrainingSequence:
        """BOS and a stretch of a book."""
        source = self._pick_text(rng).tokens
        start = int(rng.integers(0, len(source) - self.length + 2))
        bos = self._prefixes[0][:1]
        tokens = np.concatenate([bos, source[start : start + self.length - 1]])
        return TrainingSequence(tokens, np.zeros(self.length, np.uint8), "text")

    def dialogue(self, rng: np.random.Generator) -> TrainingSequence:
        """A document with needles, then one question or many with their answers."""
        many = rng.random() < MANY_SHARE
        needles, asked = self._many(rng) if many else self._single(rng)
        prefix = self._prefixes[0]
        if rng.random() < 0.5:
            prefix = self._prefixes[rng.integers(1, len(self._prefixes))]
        parts, roles = [], []

        def add(tokens: np.ndarray, role: int) -> None:
            parts.append(tokens)
            roles.append(np.full(len(tokens), role, np.uint8))

        for turn, fact in enumerate(asked):
            if turn > 0:
                add(self.encode(_NEXT_TURN)[1:], CONTEXT)  # its <|eot_id|> closed the answer
            add(self.encode(*question_pieces(fact, first=turn == 0)), QUESTION)
            add(self.encode(QUERY_END), CONTEXT)
            answer = np.append(self.encode(*fact.answer), self.encode.eot)
            add(answer.astype(np.uint16), ANSWER)
        last = len(parts[-1])
        if not many or rng.random() < 0.25:
            filled = RESPONSE_LENGTH
            if rng.random() < 0.5:
                filled = int(rng.integers(min(last, RESPONSE_LENGTH), RESPONSE_LENGTH + 1))
            filling = max(filled - last, 0)
            add(np.full(filling, self.encode.eos, np.uint16), ANSWER)
        tail, tail_role = np.concatenate(parts), np.concatenate(roles)
        room = self.length - len(prefix) - len(tail)
        noisy = not many and len(needles) == 1 and rng.random() < 0.5
        source = self.corpora.noise if noisy else self._pick_text(rng)
        document = bury(rng, source, needles, room).tokens
        tokens = np.concatenate([prefix, document, tail])
        role = np.zeros(self.length, np.uint8)
        role[self.length - len(tail) :] = tail_role
        return TrainingSequence(tokens, role, "many" if many else "single")

    def _pick_text(self, rng: np.random.Generator) -> Text:
        return self._texts[rng.choice(len(self._texts), p=self._shares)]

    def _value(self, rng: np.random.Generator, usual: int) -> str:
        """A number, of the usual count of digits in half of the cases."""
        return number(rng, usual if rng.random() < 0.5 else int(rng.integers(4, 11)))

    def _keyed(self, rng: np.random.Generator, keys: Keys, attribute: str) -> Needle:
        key = keys.draw(lookalike=0.3)
        if rng.random() < 0.1:
            nouns = self.corpora.words.nouns
            word = nouns[rng.integers(len(nouns))]
            attribute = "secret word for"
            return keyed_needle(self.encode, attribute, key, word, is_word=True)
        return keyed_needle(self.encode, attribute, key, self._value(rng, 7))

    def _block(self, rng: np.random.Generator, keys: Keys, items: int) -> Needle:
        digits = 7 if rng.random() < 0.5 else int(rng.integers(4, 11))
        pairs = [(keys.draw(lookalike=0.2), number(rng, digits)) for _ in range(items)]
        return block_needle(self.encode, pairs)

    def _single(self, rng: np.random.Generator) -> tuple[list[Needle], list[Fact]]:
        """Needles of one kind and one question."""
        keys, kind = Keys(self.corpora, rng), rng.random()
        fits = max((self.length - 160) // 24, 2)  # needles that leave some room for text
        if kind < 0.1:
            needles = [unkeyed_needle(self.encode, "pass key", self._value(rng, 5))]
        elif kind < 0.25:
            needles = [unkeyed_needle(self.encode, "number string", self._value(rng, 10))]
        elif kind < 0.6:
            attribute = ATTRIBUTES[0 if rng.random() < 0.6 else rng.integers(len(ATTRIBUTES))]
            count = min(int(rng.integers(2, 17)), fits)
            needles = [self._keyed(rng, keys, attribute) for _ in range(count)]
        else:
            items = int(rng.integers(2, 13))
            blocks = max(min(int(rng.integers(1, 7)), fits // items), 1)
            needles = [self._block(rng, keys, min(items, fits)) for _ in range(blocks)]
        facts = needles[rng.integers(len(needles))].facts
        return needles, [facts[rng.integers(len(facts))]]

    def _many(self, rng: np.random.Generator) -> tuple[list[Needle], list[Fact]]:
        """Needles of mixed kinds up to a share of the sequence, most of them asked about."""
        keys = Keys(self.corpora, rng)
        budget = (self.length - 64) * rng.uniform(0.35, 0.9)
        asking, alike, blocks = rng.uniform(0.5, 1.0), rng.random() < 0.5, rng.uniform(0.0, 0.6)
        needles: list[Needle] = []
        asked: list[Fact] = []
        for name, usual in (("pass key", 5), ("number string", 10)):
            if rng.random() < 0.25:
                needles.append(unkeyed_needle(self.encode, name, self._value(rng, usual)))
        while True:
            if rng.random() < blocks:
                fresh = self._block(rng, keys, int(rng.integers(2, 13)))
            else:
                place = 0 if alike else rng.integers(len(ATTRIBUTES))
                fresh = self._keyed(rng, keys, ATTRIBUTES[place])
            budget -= len(fresh.tokens)
            chosen = [fact for fact in fresh.facts if rng.random() < asking]
            budget -= 48 * len(chosen)  # tokens of a question, its answer and their headers
            if budget < 0:
                break
            needles.append(fresh)
            asked += chosen
        if not needles:
            needles = [self._keyed(rng, keys, ATTRIBUTES[0])]
        for needle in needles:  # pass keys, and something where nothing was chosen
            if needle.facts[0].question[0].startswith("What is the pass") or not asked:
                asked.append(needle.facts[0])
            elif needle.facts[0].question[0].startswith("What is the number string"):
                asked.append(needle.facts[0])
        order = rng.permutation(len(needles))
        turns = rng.permutation(len(asked))
        return [needles[place] for place in order], [asked[place] for place in turns]


def mask_sequence(
    rng: np.random.Generator, sequence: TrainingSequence, t: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """LLaDA's masking of one sequence: places to mask, their weights, and the group.

    t: the sequence's draw of the mask ratio, kept unless it is masked in full. Weights are
    1/p (bounded) over the number of tokens that might have been masked.
    """
    region = "all"
    if sequence.kind != "text":
        names = list(REGION_SHARES)
        region = names[rng.choice(len(names), p=list(REGION_SHARES.values()))]
    group = 0
    if region == "all":
        maskable = np.arange(1, len(sequence.tokens))
    else:
        least = ANSWER if region == "answer" else QUESTION
        maskable = np.flatnonzero(sequence.role >= least)
        group = 1
        if region == "answer" and rng.random() < FULL_SHARE[sequence.kind]:
            t, group = 1.0, 2
    p = (1 - EPSILON) * t + EPSILON
    places = maskable[rng.random(len(maskable)) < p]
    weight = min(1 / p, WEIGHT_CAP) / len(maskable)
    weight *= TEXT_WEIGHT if region == "all" else 1.0
    return places, np.full(len(places), weight, np.float32), group


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
    """Masks the sequences, t stratified over the batch, and gathers at most `rows` masked tokens.

    Where more are masked, each sequence's loss is taken over a random part of them, scaled up.
    """
    count, length = len(sequences), len(sequences[0].tokens)
    strata = (rng.permutation(count) + rng.random()) / count
    masked = [mask_sequence(rng, one, t) for one, t in zip(sequences, strata, strict=True)]
    limits = [TEXT_ROWS if group == 0 else length for _, _, group in masked]
    counts = [min(len(one[0]), limit) for one, limit in zip(masked, limits, strict=True)]
    shares = _share_rows(np.array(counts), rows)
    tokens = np.stack([one.tokens for one in sequences]).astype(np.int32)
    clean = tokens.copy()
    flat, weights, groups = [], [], []
    for index, ((places, weight, group), share) in enumerate(zip(masked, shares, strict=True)):
        tokens[index, places] = mask_id
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


def training_batch(
    maker: SequenceMaker, batch_size: int, rows: int, seed: Sequence[int]
) -> Batch:
    """Step `seed` of training: text and dialogues in their shares."""
    rng = np.random.default_rng(list(seed))
    texts = int(TEXT_SHARE * batch_size + rng.random())
    sequences = [maker.text(rng) for _ in range(texts)]
    sequences += [maker.dialogue(rng) for _ in range(batch_size - texts)]
    return make_batch(sequences, rng, rows, maker.encode.mask)
