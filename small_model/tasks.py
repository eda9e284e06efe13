"""Makes retrieval tasks: needles hidden in long text, with questions and answers.

A prompt is `prefix + context + query`, token ids of parts that are tokenized separately. The
response is the answer, which repeats the needle's wording, then <|eot_id|>, then EOS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict, get_args

import numpy as np
from tokenizers import Tokenizer

from small_model.corpus import Corpora, Text, token_dtype

INSTRUCTION = "Read the document and answer the question about it."
PREFIX = f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{INSTRUCTION}\n\n"
# LLaDA's chat template after the document: the question, then the header of the answer.
QUERY_START = "\n\n"
QUERY_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
RESPONSE_LENGTH = 32

Task = Literal["passkey", "number_string", "magic_number", "key_value"]
TASKS: tuple[Task, ...] = get_args(Task)
UNKEYED = {"passkey": ("pass key", 5), "number_string": ("number string", 10)}  # name, digits
DISTRACTORS = 8  # other magic numbers in a document of that task
BLOCKS, BLOCK_ITEMS = 4, 8  # key-value blocks of a document, and items in each

# Subjects of keyed needles. Evaluation uses the first.
ATTRIBUTES = (
    *("magic number for", "access code for", "secret code of", "serial number of"),
    *("lucky number of", "room number of", "ticket number of", "phone number of"),
)


class Encoder:
    """Encodes text to token ids and caches the ids of each piece.

    Byte-level BPE never merges across words, punctuation or digits. Pieces that end there encode
    to the same ids as the joined text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer)
        self._cache: dict[str, list[int]] = {}
        self.eos, self.eot, self.mask = (
            tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>")
        )

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """Reads the tokenizer of a folder."""
        return cls(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))

    def __call__(self, *pieces: str) -> np.ndarray:
        """Returns the ids of the joined pieces, [n] of `token_dtype`."""
        ids: list[int] = []
        for piece in pieces:
            if piece not in self._cache:
                encoded = self.tokenizer.encode(piece, add_special_tokens=False)
                self._cache[piece] = encoded.ids
            ids += self._cache[piece]
        return np.array(ids, self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes up to the first EOS or <|eot_id|>, without special tokens."""
        ids = [int(index) for index in ids]
        stops = [place for place, index in enumerate(ids) if index in (self.eos, self.eot)]
        return self.tokenizer.decode(ids[: stops[0]] if stops else ids)


class Fact(NamedTuple):
    """A fact that a question asks for.

    subject, question, answer: pieces of text for the encoder; the question and its other wordings
    are about the subject. start, end: token span within the needle.
    """

    subject: tuple[str, ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]
    value: str
    start: int
    end: int


class Needle(NamedTuple):
    """Tokens to hide in a document, and the facts that they state."""

    tokens: np.ndarray
    facts: tuple[Fact, ...]


def number(rng: np.random.Generator, digits: int) -> str:
    """Draws a number of `digits` digits; the first is not zero."""
    values = rng.integers(0, 10, digits)
    values[0] = rng.integers(1, 10)
    return "".join(map(str, values))


class Keys:
    """Draws distinct keys (adjective, noun) from the words of the corpora."""

    def __init__(self, corpora: Corpora, rng: np.random.Generator):
        self.words, self.rng = corpora.words, rng
        self._drawn: list[tuple[str, str]] = []

    def draw(self, lookalike: float = 0.0) -> tuple[str, str]:
        """Draws a new key; with probability `lookalike` it shares a word with an earlier key."""
        while True:
            adjective, noun = (side[self.rng.integers(len(side))] for side in self.words)
            if self._drawn and lookalike and self.rng.random() < lookalike:
                earlier = self._drawn[self.rng.integers(len(self._drawn))]
                first = self.rng.random() < 0.5
                adjective, noun = (earlier[0], noun) if first else (adjective, earlier[1])
            if (adjective, noun) not in self._drawn:
                self._drawn.append((adjective, noun))
                return adjective, noun


def unkeyed_needle(encode: Encoder, name: str, value: str) -> Needle:
    """Makes InfiniteBench's " The pass key is 71432. Remember it. 71432 is the pass key."."""
    tokens = encode(f" The {name} is ", *value, ". Remember it. ", *value, f" is the {name}.")
    question, answer = (f"What is the {name}?",), (f"The {name} is ", *value, ".")
    return Needle(tokens, (Fact((f" {name}",), question, answer, value, 0, len(tokens)),))


def keyed_needle(
    encode: Encoder, attribute: str, key: tuple[str, str], value: str, *, is_word: bool = False
) -> Needle:
    """Makes "The magic number for amber-fox is 4839201."; the value may be a word."""
    subject = (f" {attribute}", f" {key[0]}", "-", key[1])
    tail = (" is", f" {value}", ".") if is_word else (" is ", *value, ".")
    tokens = encode(" The", *subject, *tail)
    question, answer = ("What is the", *subject, "?"), ("The", *subject, *tail)
    return Needle(tokens, (Fact(subject, question, answer, value, 0, len(tokens)),))


def block_needle(encode: Encoder, items: Sequence[tuple[tuple[str, str], str]]) -> Needle:
    """Makes a JSON object: ' {"amber-fox": "4839201", ...}'."""
    parts, facts, length = [], [], 0
    for place, ((adjective, noun), value) in enumerate(items):
        # The tokenizer treats a run of punctuation as one word: '",' must stay one piece.
        opening = ' {"' if place == 0 else ' "'
        closing = '"}' if place == len(items) - 1 else '",'
        key = (adjective, "-", noun)
        tokens = encode(opening, *key, '":', ' "', *value, closing)
        question = ('What is the value of "', *key, '"?')
        answer = ('"', *key, '":', ' "', *value, '"')
        facts.append(Fact(key, question, answer, value, length, length + len(tokens)))
        parts.append(tokens)
        length += len(tokens)
    return Needle(np.concatenate(parts), tuple(facts))


def bury(
    rng: np.random.Generator,
    text: Text,
    needles: Sequence[Needle],
    length: int,
    fixed: tuple[int, float] | None = None,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Hides needles at random positions of a random part of `text`: `length` tokens together.

    A needle moves to the next end of a sentence if the part has one after its position. fixed:
    (index of a needle, share of the text before it) sets one position. Returns the tokens, and
    start and end of each needle.
    """
    room = length - sum(len(needle.tokens) for needle in needles)
    if room < 0:
        needed = f"length must be at least {length - room} to hold the needles"
        raise ValueError(f"{needed}, got {length}")
    tokens = text.tokens
    if len(tokens) < room:
        raise ValueError(f"the text must have at least {room} tokens, got {len(tokens)}")
    start = int(rng.integers(0, len(tokens) - room + 1))
    places = np.sort(rng.integers(0, room + 1, len(needles)))
    if fixed is not None:
        places[fixed[0]] = round(fixed[1] * room)
    after = np.searchsorted(text.breaks, start + places)
    snapped = np.append(text.breaks, start + room)[after] - start
    places = np.minimum(snapped, room)
    parts, spans, done, total = [], [(0, 0)] * len(needles), 0, 0
    for index in np.argsort(places, stable=True).tolist():
        needle, place = needles[index], int(places[index])
        parts += [tokens[start + done : start + place], needle.tokens]
        first = total + place - done
        total, done = first + len(needle.tokens), place
        spans[index] = (first, total)
    parts.append(tokens[start + done : start + room])
    return np.concatenate(parts), spans


class Example(TypedDict):
    """An evaluation example.

    answer: the value that must be the first number of the response. needle_span: start and end of
    the asked fact's tokens in `context`. others: of further facts that are asked for, the same two.
    """

    prefix: list[int]
    context: list[int]
    query: list[int]
    answer: str
    needle_span: tuple[int, int]
    others: NotRequired[list[tuple[str, tuple[int, int]]]]


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
    """Makes an example of a task, deterministic by seed.

    Args:
        n_tokens: tokens of the prompt and of the 32 response slots together.
        corpora: the held-out side.
        haystack: "text" hides needles in the held-out texts, "noise" in InfiniteBench's repeated
            sentences. "auto" takes noise for pass keys and number strings with an even seed.
        depth: share of the text before the asked needle (for "key_value": before its block), 0 to
            1. None draws its position uniformly, like the others'.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    rng = np.random.default_rng([TASKS.index(task), n_tokens, seed])
    keys = Keys(corpora, rng)

    def pairs(count: int) -> list[tuple[tuple[str, str], str]]:
        return [(keys.draw(), number(rng, 7)) for _ in range(count)]

    if task in UNKEYED:
        name, digits = UNKEYED[task]
        needles = [unkeyed_needle(encode, name, number(rng, digits))]
    elif task == "magic_number":
        needles = [keyed_needle(encode, ATTRIBUTES[0], *pair) for pair in pairs(1 + DISTRACTORS)]
    else:
        needles = [block_needle(encode, pairs(BLOCK_ITEMS)) for _ in range(BLOCKS)]
    asked = int(rng.integers(len(needles)))
    fact = needles[asked].facts[int(rng.integers(len(needles[asked].facts)))]
    prefix = encode(PREFIX)
    query = encode(*question_pieces(fact, first=True), QUERY_END)
    noisy = haystack == "noise" or (haystack == "auto" and task in UNKEYED and seed % 2 == 0)
    texts = list(corpora.texts.values())
    sizes = np.array([len(text.tokens) for text in texts], float)
    text = corpora.noise if noisy else texts[rng.choice(len(texts), p=sizes / sizes.sum())]
    room = n_tokens - RESPONSE_LENGTH - len(prefix) - len(query)
    fixed = None if depth is None else (asked, depth)
    context, spans = bury(rng, text, needles, room, fixed)
    start = spans[asked][0]
    return Example(
        prefix=prefix.tolist(),
        context=context.tolist(),
        query=query.tolist(),
        answer=fact.value,
        needle_span=(start + fact.start, start + fact.end),
    )


def question_pieces(fact: Fact, *, first: bool) -> tuple[str, ...]:
    """Returns the question's pieces; the first question of a dialogue follows the document."""
    return (QUERY_START + fact.question[0], *fact.question[1:]) if first else fact.question


def is_right(answer: str, response: str) -> bool:
    """Returns whether the first number in the response's text is `answer`."""
    match = re.search(r"\d+", response)
    return match is not None and match.group() == answer


def score(encode: Encoder, answer: str, response_ids: Sequence[int] | np.ndarray) -> bool:
    """Returns `is_right` for the response's token ids."""
    return is_right(answer, encode.decode(response_ids))
