"""Retrieval tasks: needles hidden in long text, their questions and their answers.

A prompt is `prefix + context + query`, token ids of each tokenised apart, exactly as the command
line does: PREFIX, the document, and QUERY around the question. The response is the answer, which
repeats the needle's wording, then <|eot_id|>, then EOS filling.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from tokenizers import Tokenizer

from small_model.corpus import Corpora, Text, token_dtype

PREFIX = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    "Read the document and answer the question about it.\n\n"
)
# The answer's turn follows the question: LLaDA's chat template, cut where the document ends.
QUERY_START = "\n\n"
QUERY_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
RESPONSE_LENGTH = 32

Task = Literal["passkey", "number_string", "magic_number", "key_value"]
TASKS: tuple[Task, ...] = ("passkey", "number_string", "magic_number", "key_value")
DISTRACTORS = 8  # other magic numbers in a document of that task
BLOCKS, BLOCK_ITEMS = 4, 8  # key-value blocks of a document, and items in each

# What a keyed needle tells, with its preposition. Evaluation asks for the first.
ATTRIBUTES = (
    "magic number for", "access code for", "secret code of", "serial number of",
    "lucky number of", "room number of", "ticket number of", "phone number of",
)  # fmt: skip


class Encoder:
    """Text to token ids, remembering short pieces: uint16, or int32 where the vocabulary is larger.

    Byte-level BPE never merges across words, punctuation or digits, so that text cut there
    encodes piece by piece to what the whole would.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer)
        self._known: dict[str, list[int]] = {}
        self.eos, self.eot, self.mask = (
            tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>")
        )

    def __call__(self, *pieces: str) -> np.ndarray:
        ids: list[int] = []
        for piece in pieces:
            known = self._known.get(piece)
            if known is None:
                known = self.tokenizer.encode(piece, add_special_tokens=False).ids
                self._known[piece] = known
            ids += known
        return np.array(ids, self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the end of the turn, special tokens left out."""
        ids = [int(index) for index in ids]
        stops = [place for place, index in enumerate(ids) if index in (self.eos, self.eot)]
        return self.tokenizer.decode(ids[: stops[0]] if stops else ids)


@dataclasses.dataclass(frozen=True)
class Fact:
    """What can be asked about a needle. question and answer: pieces of text for the encoder.

    start, end: the fact's tokens inside its needle.
    """

    question: tuple[str, ...]
    answer: tuple[str, ...]
    value: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Needle:
    """Tokens to hide in a document, and the facts that they tell."""

    tokens: np.ndarray
    facts: tuple[Fact, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A haystack with its needles. spans[i]: start and end of needle i in `tokens`."""

    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]


def number(rng: np.random.Generator, digits: int) -> str:
    """A random number of that many digits, the first not zero."""
    values = rng.integers(0, 10, digits)
    values[0] = rng.integers(1, 10)
    return "".join(map(str, values))


class Keys:
    """Draws distinct keys (adjective, noun) from one side of the corpora's words."""

    def __init__(self, corpora: Corpora, rng: np.random.Generator):
        self.words, self.rng = corpora.words, rng
        self.used: set[tuple[str, str]] = set()
        self._order: list[tuple[str, str]] = []

    def draw(self, lookalike: float = 0.0) -> tuple[str, str]:
        """A new key; with probability `lookalike` it shares a word with an earlier one."""
        while True:
            adjective, noun = (
                side[self.rng.integers(len(side))]
                for side in (self.words.adjectives, self.words.nouns)
            )
            if self._order and lookalike and self.rng.random() < lookalike:
                earlier = self._order[self.rng.integers(len(self._order))]
                if self.rng.random() < 0.5:
                    adjective = earlier[0]
                else:
                    noun = earlier[1]
            if (adjective, noun) not in self.used:
                self.used.add((adjective, noun))
                self._order.append((adjective, noun))
                return adjective, noun


def unkeyed_needle(encode: Encoder, name: str, value: str) -> Needle:
    """InfiniteBench's form: " The pass key is 71432. Remember it. 71432 is the pass key."."""
    first, digits = (f" The {name} is ",), tuple(value)
    tokens = encode(*first, *digits, ". Remember it. ", *digits, f" is the {name}.")
    answer = (f"The {name} is ", *digits, ".")
    question = (f"What is the {name}?",)
    return Needle(tokens, (Fact(question, answer, value, 0, len(tokens)),))


def keyed_needle(
    encode: Encoder, attribute: str, key: tuple[str, str], value: str, *, is_word: bool = False
) -> Needle:
    """A sentence like "The magic number for amber-fox is 4839201."; the value may be a word."""
    middle = (f" {key[0]}", "-", key[1])
    tail = (" is", f" {value}", ".") if is_word else (" is ", *value, ".")
    tokens = encode(f" The {attribute}", *middle, *tail)
    question = (f"What is the {attribute}", *middle, "?")
    answer = (f"The {attribute}", *middle, *tail)
    return Needle(tokens, (Fact(question, answer, value, 0, len(tokens)),))


def block_needle(encode: Encoder, items: Sequence[tuple[tuple[str, str], str]]) -> Needle:
    """A JSON object: ' {"amber-fox": "4839201", ...}'."""
    parts, facts, length = [], [], 0
    for place, (key, value) in enumerate(items):
        # Runs of punctuation are one word to the tokenizer: '",' must not be cut.
        opening = ' {"' if place == 0 else ' "'
        closing = '"}' if place == len(items) - 1 else '",'
        tokens = encode(opening, key[0], "-", key[1], '":', ' "', *value, closing)
        question = ('What is the value of "', key[0], "-", key[1], '"?')
        answer = ('"', key[0], "-", key[1], '":', ' "', *value, '"')
        facts.append(Fact(question, answer, value, length, length + len(tokens)))
        parts.append(tokens)
        length += len(tokens)
    return Needle(np.concatenate(parts), tuple(facts))


def bury(
    rng: np.random.Generator,
    text: Text,
    needles: Sequence[Needle],
    length: int,
    *,
    fixed: tuple[int, float] | None = None,
) -> Document:
    """`length` tokens: a random stretch of `text`, the needles in random places, in their order.

    Needles stand after a sentence's end where the stretch has one behind the place drawn. fixed:
    number of a needle, and the share of the stretch that goes before it; the others stay where
    they were drawn.
    """
    room = length - sum(len(needle.tokens) for needle in needles)
    if room < 0:
        raise ValueError(f"{length} tokens cannot hold the needles, {-room} too few")
    tokens = text.tokens
    if len(tokens) < room:
        raise ValueError(f"the text has {len(tokens)} tokens, {room} are needed")
    start = int(rng.integers(0, len(tokens) - room + 1))
    places = np.sort(rng.integers(0, room + 1, len(needles)))
    if fixed is not None:
        places[fixed[0]] = round(fixed[1] * room)
    after = np.searchsorted(text.breaks, start + places)
    snapped = np.append(text.breaks, start + room)[after] - start
    places = np.minimum(snapped, room)
    parts, spans, done, total = [], {}, 0, 0
    for index in np.argsort(places, stable=True).tolist():
        needle, place = needles[index], int(places[index])
        parts += [tokens[start + done : start + place], needle.tokens]
        total += place - done
        spans[index] = (total, total + len(needle.tokens))
        total, done = total + len(needle.tokens), place
    parts.append(tokens[start + done : start + room])
    return Document(np.concatenate(parts), tuple(spans[i] for i in range(len(needles))))


class Example(TypedDict):
    """An evaluation example; `answer` is the value that the response must name first.

    needle_span: start and end of the asked fact's tokens within `context`.
    """

    prefix: list[int]
    context: list[int]
    query: list[int]
    answer: str
    needle_span: tuple[int, int]


Haystack = Literal["auto", "text", "noise"]


def make_example(
    task: Task,
    n_tokens: int,
    seed: int,
    *,
    corpora: Corpora,
    encode: Encoder,
    haystack: Haystack = "auto",
    depth: float | None = None,
) -> Example:
    """An example whose prompt and 32 response tokens together are exactly `n_tokens`.

    corpora: the held-out side. haystack: "text" is the held-out texts, "noise" InfiniteBench's
    repeated sentences; "auto" takes noise for every other pass key and number string (by seed).
    The asked needle's place is uniform over the document, as are the others'; depth: it stands at
    this share of the text instead, 0 the beginning and 1 the end (of "key_value": its block does).
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    rng = np.random.default_rng([TASKS.index(task), n_tokens, seed])
    keys = Keys(corpora, rng)
    if task == "passkey":
        needles = [unkeyed_needle(encode, "pass key", number(rng, 5))]
    elif task == "number_string":
        needles = [unkeyed_needle(encode, "number string", number(rng, 10))]
    elif task == "magic_number":
        needles = [
            keyed_needle(encode, ATTRIBUTES[0], keys.draw(), number(rng, 7))
            for _ in range(1 + DISTRACTORS)
        ]
    else:
        needles = [
            block_needle(encode, [(keys.draw(), number(rng, 7)) for _ in range(BLOCK_ITEMS)])
            for _ in range(BLOCKS)
        ]
    asked = int(rng.integers(len(needles)))
    fact = needles[asked].facts[int(rng.integers(len(needles[asked].facts)))]
    prefix = encode(PREFIX)
    query = encode(*question_pieces(fact, first=True), QUERY_END)
    noisy = haystack == "noise" or (
        haystack == "auto" and task in ("passkey", "number_string") and seed % 2 == 0
    )
    texts = list(corpora.texts.values())
    sizes = np.array([len(text.tokens) for text in texts], float)
    text = corpora.noise if noisy else texts[rng.choice(len(texts), p=sizes / sizes.sum())]
    room = n_tokens - RESPONSE_LENGTH - len(prefix) - len(query)
    fixed = None if depth is None else (asked, depth)
    document = bury(rng, text, needles, room, fixed=fixed)
    start = document.spans[asked][0]
    return Example(
        prefix=prefix.tolist(),
        context=document.tokens.tolist(),
        query=query.tolist(),
        answer=fact.value,
        needle_span=(start + fact.start, start + fact.end),
    )


def question_pieces(fact: Fact, *, first: bool) -> tuple[str, ...]:
    """The question as it follows the document (first), or as a later turn of its own."""
    return (QUERY_START + fact.question[0], *fact.question[1:]) if first else fact.question


def is_right(answer: str, response: str) -> bool:
    """Exact match: the first number in the response's text is the value asked for."""
    found = re.search(r"\d+", response)
    return found is not None and found.group() == answer


def score(encode: Encoder, answer: str, response_ids: Sequence[int] | np.ndarray) -> bool:
    """`is_right` for token ids."""
    return is_right(answer, encode.decode(response_ids))
