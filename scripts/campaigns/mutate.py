"""Broken input made from good: bytes, JSON values, JSON text. All of it follows from the rng."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# What parsers, sizes and paths go wrong on.
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), True, False, None,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "a", "\0", "\n", "\u2028", "é", "\ud800", "\U0001f600", "..", ".", "/", "//",
    "../outside/bait", "/etc/passwd", "outside/bait", "a/../b", "./a", "x" * 300, "a" * 5000,
    "{}", "{0}", "{context.__class__}", "%s", "{context}", "__class__", "__metadata__", "F32",
    "BF16", "I64", "float32", "bfloat16", "linear", "yarn", "NaN", "<|mdm_mask|>", "null", "-1",
)  # fmt: skip
HUGE, DEEP = "a huge number", "a deep list"
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *TEXTS,
    HUGE,
    DEEP,
    [],
    {},
    [[]],
    [0],
    [0, 0],
    [-1],
    {"": 0},
    [None],
)
TOKENS = (
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\", b"\\u0000", b"\\ud800", b"{",
    b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999",
    b"-0", b"1e-9", b"/*", b"//", b"\n", b"\r", b"\t", b" ", b"9" * 5000, b"[" * 3000,
    b'{"a":' * 3000, b"..", b"../",
)  # fmt: skip


def mutated_bytes(rng: Random, data: bytes, changes: int = 0) -> bytes:
    """With some bytes changed, moved, repeated, added or missing. changes: how many; 0: 1 to 4."""
    out = bytearray(data)
    for _ in range(changes or rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(9)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 4, 32, 256))]
        elif kind == 4:
            out[at:at] = rng.choice(TOKENS)
        elif kind == 5:
            piece = rng.choice(TOKENS)
            out[at : at + len(piece)] = piece
        elif kind == 6:
            del out[at:]
        elif kind == 7:
            out[at:at] = rng.randbytes(rng.choice((1, 3, 16)))
        else:
            other = rng.randrange(len(out) + 1)
            size = rng.choice((1, 4, 16))
            out[at : at + size] = out[other : other + size]
    return bytes(out)


def mutated_value(rng: Random, value: Any, changes: int = 0) -> Any:
    """A JSON value with some of its parts exchanged, dropped, added or repeated; in place."""
    for _ in range(changes or rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _any_value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, name = rng.choice(places)
            if _still(other, name):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice((*TEXTS, *list(holder)[:8]))] = holder.pop(key)
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = _any_value(rng)
        elif kind == 4 and isinstance(holder, list):
            more = _any_value(rng) if rng.random() < 0.5 else copy.deepcopy(holder[key])
            holder.insert(rng.randrange(len(holder) + 1), more)
        elif kind == 5 and type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, 2, 8, -256, 2**20, 2**40))
        elif kind == 6 and isinstance(holder[key], str) and holder[key]:
            text, at = holder[key], rng.randrange(len(holder[key]))
            holder[key] = text[:at] + rng.choice(TEXTS) + text[at + rng.randrange(2) :]
        else:
            holder[key] = _any_value(rng)
    return value


def mutated_json(rng: Random, text: bytes) -> bytes:
    """JSON text with another value, or the text itself broken; of both kinds about as many."""
    kind = rng.randrange(8)
    if kind < 5:
        text = dumped(rng, mutated_value(rng, json.loads(text)))
    elif kind == 5:
        text = _with_repeated_key(rng, text)
    if kind >= 6 or rng.randrange(12) == 0:
        text = mutated_bytes(rng, text)
    return text


def dumped(rng: Random, value: Any) -> bytes:
    """JSON text, its spelling left to chance; lone surrogates as UTF-8 would spell them."""
    ascii_only = rng.random() < 0.7
    text = json.dumps(value, ensure_ascii=ascii_only, indent=rng.choice((None, None, 1)))
    # Python itself would spell neither.
    text = text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode("utf-8", "surrogatepass")


def _any_value(rng: Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))  # what is changed later must not be the table's


def _with_repeated_key(rng: Random, text: bytes) -> bytes:
    """An object with one of its keys once more, and another value."""
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
        return text
    pair = f"{json.dumps(rng.choice(list(value)))}: {json.dumps(rng.choice(VALUES))}"
    body = json.dumps(value)
    parts = (f"{{{pair}, {body[1:]}", f"{body[:-1]}, {pair}}}")
    return rng.choice(parts).encode()


def _places(value: Any, depth: int = 0) -> Any:
    """(container, key) of every part; of a long list or object a few."""
    if depth > 12:
        return
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return
    if len(keys) > 64:
        keys = [*keys[:16], *keys[len(keys) // 2 : len(keys) // 2 + 16], *keys[-32:]]
    for key in keys:
        yield value, key
        yield from _places(value[key], depth + 1)


def _still(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
