"""Needles with random keys in public-domain prose: the examples of a calibration.

A document is a part of a text in which a sentence gives the value that the question asks for. Up to
eight sentences of the same form give the values of other keys.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import lzma
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdllm_jax.engine.inputs import Request
from pdllm_jax.rules import require
from pdllm_jax.text_files import read_text
from pdllm_jax.tokenizer import Tokenizer

# Northanger Abbey by Jane Austen (1817), public domain; the text of Debian's r-cran-janeaustenr.
_TEXT = "northanger_abbey.txt.xz"

# What a needle says, and the question about it.
_FORMS = (
    ("The code of {key} is {value}.", "What is the code of {key}?"),
    ("Remember that the number for {key} is {value}.", "What is the number for {key}?"),
    ("In the register, {key} has the entry {value}.", "Which entry does {key} have?"),
    ("The ticket with the name {key} costs {value}.", "What does the ticket {key} cost?"),
)
_ADJECTIVES = (
    *("amber", "ancient", "blue", "bold", "brave", "bright", "calm", "clever", "cold", "copper"),
    *("crimson", "curious", "dark", "distant", "eager", "early", "empty", "gentle", "golden"),
    *("green", "happy", "heavy", "hidden", "hollow", "humble", "iron", "jolly", "late", "lonely"),
    *("lucky", "mellow", "narrow", "noble", "olive", "patient", "plain", "purple", "quick"),
    *("quiet", "rapid", "rough", "royal", "scarlet", "silent", "silver", "simple", "tall", "wild"),
)
_NOUNS = (
    *("anchor", "apple", "arrow", "badger", "barrel", "beacon", "bridge", "candle", "canyon"),
    *("castle", "cedar", "cloud", "comet", "desert", "eagle", "falcon", "feather", "forest"),
    *("fountain", "garden", "harbour", "hammer", "island", "kettle", "ladder", "lantern", "lemon"),
    *("marble", "meadow", "mirror", "mountain", "needle", "orchard", "otter", "pebble", "pepper"),
    *("piano", "pillow", "planet", "raven", "river", "saddle", "spider", "temple", "tiger"),
    *("tunnel", "valley", "violin"),
)
_DISTRACTORS, _TOKENS_EACH = 8, 256  # other needles: up to 8, up to one for each 256 tokens
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|[。！？]")
_SPARE = 4  # tokens for each needle, whose neighbours may be tokenized differently


class Example(NamedTuple):
    """A question about a document, in token ids, and where its answer lies.

    needle: the first token of the answer's sentence in the context, and the one behind its last.
    """

    request: Request
    needle: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Prose:
    """A text to plant needles in, as a tokenizer divides it.

    name: for records.
    """

    name: str
    text: str
    tokenizer: Tokenizer

    @classmethod
    def read(cls, tokenizer: Tokenizer, files: Sequence[Path] = ()) -> Prose:
        """Reads UTF-8 files, joined; without any, the text of this package.

        Raises:
          ValueError: a file that is not UTF-8. OSError: a file that cannot be read.
        """
        if files:
            text = "\n\n".join(read_text(path).strip() for path in files)
            return cls(", ".join(path.name for path in files), text, tokenizer)
        packed = importlib.resources.files(__package__).joinpath(_TEXT).read_bytes()
        return cls(_TEXT, lzma.decompress(packed).decode(), tokenizer)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each token begins, in characters."""
        return _offsets(self.tokenizer, self.text)[:, 0]

    def example(self, length: int, seed: int) -> Example:
        """Makes an example whose document has `length` tokens, deterministic by length and seed.

        Raises:
          ConfigError: the text is too short, or no needle fits the length.
        """
        rng = np.random.default_rng([length, seed])
        statement, question = _FORMS[rng.integers(len(_FORMS))]
        keys = _keys(rng, 1 + int(rng.integers(1 + min(_DISTRACTORS, length // _TOKENS_EACH))))
        values = rng.choice(np.arange(10_000, 100_000), len(keys), replace=False).tolist()
        needles = [
            statement.format(key=key, value=value) for key, value in zip(keys, values, strict=True)
        ]
        taken = sum(len(self.tokenizer.encode(f" {needle}")) + _SPARE for needle in needles)
        room, most = length - taken, len(self.starts) - length
        short = f"a document of {length} tokens is too short for its needles of {taken} tokens"
        require(room > 0, short)
        enough = f"{self.name} has {len(self.starts)} tokens: too few for a document of {length}"
        require(most > 0, f"{enough}, give a longer text")
        first = int(rng.integers(most))
        begin, end, stop = (int(self.starts[first + i]) for i in (0, room, length))
        text, span = _plant(rng, self.text[begin:stop], end - begin, needles)
        offsets = _offsets(self.tokenizer, text)
        inside = np.flatnonzero((offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1]))
        where = int(inside[0]), int(inside[-1]) + 1
        require(where[1] <= length, f"needles of {taken} tokens do not fit {length} tokens")
        prefix, query = self.tokenizer.around_document(question.format(key=keys[0]))
        ids = self.tokenizer.encode(text)[:length]
        return Example(Request(ids, query, prefix), where)


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys; the second and the third share a word with the first."""
    adjective, noun = rng.choice(_ADJECTIVES), rng.choice(_NOUNS)
    keys = [f"{adjective} {noun}"]
    while len(keys) < count:
        first = adjective if len(keys) == 1 else rng.choice(_ADJECTIVES)
        second = noun if len(keys) == 2 else rng.choice(_NOUNS)
        if (key := f"{first} {second}") not in keys:
            keys.append(key)
    return keys


def _plant(
    rng: np.random.Generator, text: str, end: int, needles: Sequence[str]
) -> tuple[str, tuple[int, int]]:
    """Puts needles behind sentences that end before `end`; returns the span of the first one."""
    text = text.strip()
    ends = np.array([m.end() for m in _SENTENCE_END.finditer(text, 0, end)] or [0])
    # At random depths: the last sentence that has ended by then, or the first one.
    after = np.searchsorted(ends, rng.uniform(0, end, len(needles)), side="right")
    places = ends[np.maximum(after - 1, 0)]
    parts, done, length, span = list[str](), 0, 0, (0, 0)
    for i in np.argsort(places, kind="stable").tolist():
        before, done = text[done : places[i]], int(places[i])
        needle = f" {needles[i]}" if length or before else needles[i]
        length += len(before) + len(needle)
        if i == 0:
            span = length - len(needles[i]), length
        parts += [before, needle]
    return "".join([*parts, "" if done else " ", text[done:]]), span


def _offsets(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Begin and end of each token of a text, in characters, [n, 2]."""
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    return np.array(encoded.offsets, np.int64).reshape(-1, 2)
