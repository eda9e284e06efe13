"""Makes training sequences before masking; deterministic by seed.

A sequence has exactly the stage's length, so that attention sees no padding. It is one document
that starts with BOS. Nothing here chunks a document: the method is training-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from small_model.corpus import Corpora, Text
from small_model.phrases import BLOCK_QUESTIONS, QUESTIONS, Names, named_needle, reworded
from small_model.tasks import (
    ATTRIBUTES,
    INSTRUCTION,
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
)

# Half of the dialogues start with PREFIX, the others with one of these instructions.
_OTHER_INSTRUCTIONS = (
    "Answer the question with what the document says.",
    "Some information is hidden in a long text. Find it and remember it.",
    "Here is a document. A question follows.",
)
_NEXT_TURN = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"

MANY_SHARE = 0.65  # share of dialogues with several questions
TEXT_SHARE = 0.25  # share of plain text in a batch
# Share of one-question dialogues whose needle is missing. Only the question is predicted there:
# its words must not become likelier without evidence.
ABSENT_SHARE = 0.35
CONTEXT, QUESTION, ANSWER = 0, 1, 2
_TURN = 48  # estimated tokens of a question, its answer and their headers


class TrainingSequence(NamedTuple):
    """A training sequence. tokens: uint16 [T]. role: uint8 [T], CONTEXT, QUESTION or ANSWER.

    kind: "text", "many" or "single" questions, or "absent": one without an answer in the document.
    """

    tokens: np.ndarray
    role: np.ndarray
    kind: str


class SequenceMaker:
    """Makes sequences of one length from the training side of the corpora."""

    def __init__(self, corpora: Corpora, encode: Encoder, length: int):
        self.corpora, self.encode, self.length = corpora, encode, length
        self._texts = list(corpora.texts.values())
        # The Bible is as long as all novels together and counts less.
        weights = [0.3 if name == "bible" else 1.0 for name in corpora.texts]
        sizes = [len(text.tokens) * w for text, w in zip(self._texts, weights, strict=True)]
        self._shares = np.array(sizes) / sum(sizes)
        instructions = [PREFIX.replace(INSTRUCTION, other) for other in _OTHER_INSTRUCTIONS]
        self._prefixes = [encode(prefix) for prefix in (PREFIX, *instructions)]

    def text(self, rng: np.random.Generator) -> TrainingSequence:
        """Makes a sequence of BOS and a part of a book."""
        source = self._pick_text(rng).tokens
        start = int(rng.integers(0, len(source) - self.length + 2))
        bos = self._prefixes[0][:1]
        tokens = np.concatenate([bos, source[start : start + self.length - 1]])
        return TrainingSequence(tokens, np.zeros(self.length, np.uint8), "text")

    def dialogue(self, rng: np.random.Generator) -> TrainingSequence:
        """Makes a document with needles, then one or several questions with answers."""
        while True:
            many = bool(rng.random() < MANY_SHARE)
            needles, asked, source = self._many(rng) if many else self._single(rng)
            absent = not many and rng.random() < ABSENT_SHARE
            if absent:
                needles = [needle for needle in needles if asked[0] not in needle.facts]
            prefix = self._prefixes[0]
            if rng.random() < 0.5:
                prefix = self._prefixes[rng.integers(1, len(self._prefixes))]
            tail, tail_role = self._turns(rng, asked, fill=not many or rng.random() < 0.25)
            room = self.length - len(prefix) - len(tail)
            if room >= sum(len(needle.tokens) for needle in needles):
                break
        tokens = np.concatenate([prefix, bury(rng, source, needles, room)[0], tail])
        role = np.zeros(self.length, np.uint8)
        role[self.length - len(tail) :] = tail_role
        kind = "many" if many else "absent" if absent else "single"
        return TrainingSequence(tokens, role, kind)

    def _turns(
        self, rng: np.random.Generator, asked: Sequence[Fact], fill: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and roles of questions and answers; `fill` appends EOS."""
        parts, roles = [], []

        def add(tokens: np.ndarray, role: int) -> None:
            parts.append(tokens.astype(np.uint16))
            roles.append(np.full(len(tokens), role, np.uint8))

        for turn, fact in enumerate(asked):
            if turn > 0:
                add(self.encode(_NEXT_TURN)[1:], CONTEXT)  # the answer ends with <|eot_id|>
            add(self.encode(*question_pieces(fact, first=turn == 0)), QUESTION)
            add(self.encode(QUERY_END), QUESTION)  # scoring masks the template too
            add(np.append(self.encode(*fact.answer), self.encode.eot), ANSWER)
        if fill:
            last, filled = len(parts[-1]), RESPONSE_LENGTH
            if rng.random() < 0.5:
                filled = int(rng.integers(min(last, RESPONSE_LENGTH), RESPONSE_LENGTH + 1))
            add(np.full(max(filled - last, 0), self.encode.eos), ANSWER)
        return np.concatenate(parts), np.concatenate(roles)

    def _pick_text(self, rng: np.random.Generator) -> Text:
        return self._texts[rng.choice(len(self._texts), p=self._shares)]

    def _value(self, rng: np.random.Generator, usual: int) -> str:
        """Draws a number, in half of the cases with `usual` digits."""
        return number(rng, usual if rng.random() < 0.5 else int(rng.integers(4, 11)))

    def _keyed(self, rng: np.random.Generator, keys: Keys, attribute: str) -> Needle:
        key, nouns = keys.draw(lookalike=0.3), self.corpora.words.nouns
        if rng.random() < 0.1:
            word = nouns[rng.integers(len(nouns))]
            needle = keyed_needle(self.encode, "secret word for", key, word, is_word=True)
        else:
            needle = keyed_needle(self.encode, attribute, key, self._value(rng, 7))
        return reworded(rng, needle, QUESTIONS)

    def _block(self, rng: np.random.Generator, keys: Keys, items: int) -> Needle:
        digits = 7 if rng.random() < 0.5 else int(rng.integers(4, 11))
        pairs = [(keys.draw(lookalike=0.2), number(rng, digits)) for _ in range(items)]
        return reworded(rng, block_needle(self.encode, pairs), BLOCK_QUESTIONS)

    def _named(self, rng: np.random.Generator, names: Names) -> Needle:
        usual = (5, 7, 10)[rng.integers(3)]
        return named_needle(self.encode, rng, names.draw(), self._value(rng, usual))

    def _single(self, rng: np.random.Generator) -> tuple[list[Needle], list[Fact], Text]:
        """Draws needles of one kind, one question and a text."""
        keys, kind, source = Keys(self.corpora, rng), rng.random(), self._pick_text(rng)
        fits = max((self.length - 160) // 24, 2)  # needles that leave room for text
        if kind < 0.35:
            names = Names(self.corpora.words, rng)
            count = 1 if rng.random() < 0.4 else int(rng.integers(2, 10))
            needles = [self._named(rng, names) for _ in range(min(count, max(fits // 2, 1)))]
            source = self.corpora.noise if rng.random() < 0.5 else source
        elif kind < 0.65:
            attribute = ATTRIBUTES[0 if rng.random() < 0.6 else rng.integers(len(ATTRIBUTES))]
            count = min(int(rng.integers(2, 17)), fits)
            needles = [self._keyed(rng, keys, attribute) for _ in range(count)]
        else:
            items = int(rng.integers(2, 13))
            blocks = max(min(int(rng.integers(1, 7)), fits // items), 1)
            needles = [self._block(rng, keys, min(items, fits)) for _ in range(blocks)]
        facts = needles[rng.integers(len(needles))].facts
        return needles, [facts[rng.integers(len(facts))]], source

    def _many(self, rng: np.random.Generator) -> tuple[list[Needle], list[Fact], Text]:
        """Draws needles of mixed kinds for a share of the sequence, questions and a text."""
        keys, names = Keys(self.corpora, rng), Names(self.corpora.words, rng)
        budget = (self.length - 64) * rng.uniform(0.35, 0.9)
        asking, alike, blocks = rng.uniform(0.5, 1.0), rng.random() < 0.5, rng.uniform(0.0, 0.6)
        named = rng.uniform(0.0, 0.7)
        needles: list[Needle] = []
        asked: list[Fact] = []
        while budget > 0 or not asked:
            if rng.random() < named:
                needle = self._named(rng, names)
            elif rng.random() < blocks:
                needle = self._block(rng, keys, int(rng.integers(2, 13)))
            else:
                place = 0 if alike else rng.integers(len(ATTRIBUTES))
                needle = self._keyed(rng, keys, ATTRIBUTES[place])
            chosen = [fact for fact in needle.facts if rng.random() < asking]
            budget -= len(needle.tokens) + _TURN * len(chosen)
            if budget < 0 and asked:
                break
            needles.append(needle)
            asked.extend(chosen)
        order, turns = rng.permutation(len(needles)), rng.permutation(len(asked))
        shuffled = [needles[place] for place in order]
        return shuffled, [asked[place] for place in turns], self._pick_text(rng)
