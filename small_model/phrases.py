"""Varied names, sentences and questions of the training data.

Evaluation has two unkeyed needles, the pass key and the number string, with one wording of the
question (tasks.py). A model trained on these alone learns the question by heart, and its likelihood
then says nothing about the document. Names here are as varied as keys, and they share words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from small_model.corpus import Words, is_held_out
from small_model.tasks import Encoder, Fact, Needle

Name = tuple[str, ...]

EVALUATED: tuple[Name, ...] = (("pass", "key"), ("number", "string"))
# Names, sentences and questions: {X} is the name with a leading space, {N} the number. The first
# pattern is InfiniteBench's form, the first question the evaluated wording.
_DATA = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
PATTERNS, QUESTIONS, BLOCK_QUESTIONS = (
    tuple(_DATA[name]) for name in ("patterns", "questions", "block_questions")
)
# Names have no held-out words, except "pass", which belongs to an evaluated name.
NATURAL: tuple[Name, ...] = tuple(
    tuple(name.split())
    for name in _DATA["names"]
    if not any(is_held_out(word) and word != "pass" for word in name.split())
)
_FIRST = tuple(sorted({name[0] for name in (*NATURAL, *EVALUATED)}))
_HEADS = tuple(sorted({name[-1] for name in (*NATURAL, *EVALUATED)}))

COMMON_SHARE = {"pattern": 0.5, "question": 0.7}  # share of the first entry of each list
EVALUATED_SHARE = 0.03  # share of evaluated names; with more of them they are learned by heart
RELATED_SHARE = 0.22  # share of names with a word of an evaluated one: "pass ...", "... string"
LOOKALIKE_SHARE = 0.35  # share of names with a word of an earlier name of the document


def fill(template: str, subject: Sequence[str], digits: str = "") -> tuple[str, ...]:
    """Returns the template's pieces for the encoder, with {X} and {N} replaced.

    Each word is one piece, so that the encoder caches words and not names.
    """
    pieces: list[str] = []
    for part in re.split(r"(\{[XN]\})", template):
        pieces += subject if part == "{X}" else digits if part == "{N}" else [part] if part else []
    return tuple(pieces)


def _pick(rng: np.random.Generator, templates: Sequence[str], common: float) -> str:
    """Draws the first template with probability `common`, otherwise one of the others."""
    return templates[0 if rng.random() < common else rng.integers(1, len(templates))]


class Names:
    """Draws distinct names of two or three words for the unkeyed needles of one document."""

    def __init__(self, words: Words, rng: np.random.Generator):
        self.words, self.rng = words, rng
        self._drawn: list[Name] = []

    def draw(self) -> Name:
        """Draws a new name, in some cases with a word of an earlier name."""
        while True:
            name = self._draw()
            if self._drawn and self.rng.random() < LOOKALIKE_SHARE:
                earlier = self._drawn[self.rng.integers(len(self._drawn))]
                first = self.rng.random() < 0.5
                name = (earlier[0], *name[1:]) if first else (*name[:-1], earlier[-1])
            if name not in self._drawn and len(set(name)) == len(name):
                self._drawn.append(name)
                return name

    def _draw(self) -> Name:
        def one(options: Sequence[str]) -> str:
            return options[self.rng.integers(len(options))]

        roll = self.rng.random()
        if roll < EVALUATED_SHARE:
            return EVALUATED[self.rng.integers(len(EVALUATED))]
        if roll < EVALUATED_SHARE + RELATED_SHARE:
            first, head = EVALUATED[self.rng.integers(len(EVALUATED))]
            firsts, heads = _FIRST, _HEADS
            if self.rng.random() < 0.5:
                firsts = heads = self.words.nouns
            return (first, one(heads)) if self.rng.random() < 0.5 else (one(firsts), head)
        natural = NATURAL[self.rng.integers(len(NATURAL))]
        if roll < 0.45:
            return natural
        if roll < 0.8:
            return one(_FIRST if roll < 0.65 else self.words.nouns), one(_HEADS)
        adjective = one(self.words.adjectives)
        return (adjective, one(self.words.nouns)) if roll < 0.9 else (adjective, *natural)


def named_needle(encode: Encoder, rng: np.random.Generator, name: Name, value: str) -> Needle:
    """Makes a sentence that states a name's number, e.g. " The door code is 71432.".

    The answer always has the form "The door code is 71432.", so that the question determines its
    opening.
    """
    subject = tuple(f" {word}" for word in name)
    tokens = encode(*fill(_pick(rng, PATTERNS, COMMON_SHARE["pattern"]), subject, value))
    question = fill(_pick(rng, QUESTIONS, COMMON_SHARE["question"]), subject)
    answer = fill("The{X} is {N}.", subject, value)
    return Needle(tokens, (Fact(subject, question, answer, value, 0, len(tokens)),))


def reworded(rng: np.random.Generator, needle: Needle, templates: Sequence[str]) -> Needle:
    """Rewords some questions of a needle of tasks.py; templates[0] is their present wording."""
    chosen = [_pick(rng, templates, COMMON_SHARE["question"]) for _ in needle.facts]
    pairs = zip(needle.facts, chosen, strict=True)
    facts = (fact._replace(question=fill(template, fact.subject)) for fact, template in pairs)
    return Needle(needle.tokens, tuple(facts))
