"""The rules that settings of every class share, and their messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

# Problems that a message spells out.
_LISTED = 10
# Of a setting's magnitude, so that its products with scores stay finite in float32.
LARGEST = 1e30


class ConfigError(ValueError):
    """A setting that is malformed, contradicts another one or is not implemented."""


class Rule(NamedTuple):
    """What a setting allows: the message of a refusal, for name and value, and the test."""

    message: str
    allows: Callable[[Any], bool]


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def python_value(value: Any) -> Any:
    """Returns NumPy scalars, also in a tuple, as Python's; float32's 0.07 becomes 0.07."""
    if isinstance(value, tuple):
        return tuple(map(python_value, value))
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def exact_share(share: float, count: int) -> Fraction:
    """Returns share * count, the share as its decimal text says: 7 for 0.07 of 100."""
    return Fraction(str(share)) * count


def listed(entries: Iterable[str], separator: str = ", ") -> str:
    """Joins the first 10 entries, each cut to 300 characters, and counts the others."""
    entries = list(entries)
    shown = [f"{entry:.300}" for entry in entries[:_LISTED]]
    rest = len(entries) - len(shown)
    return separator.join([*shown, f"and {rest} more"] if rest else shown)


def is_number(value: Any) -> bool:
    """Returns whether value is an int or float, not a bool, of magnitude at most LARGEST."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_index(value: Any, count: int = 1 << 31) -> bool:
    """Returns whether value is an int (not a bool) in [0, count)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def is_seed(value: Any) -> bool:
    """Returns whether value is an int or a NumPy integer (not a bool) in [0, 2**64)."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    return integer and is_index(int(value), 1 << 64)


def number(least: float) -> Rule:
    """Returns the rule of the numbers from `least` to LARGEST."""
    text = f"{{}} must be a number from {least:g} to {LARGEST:g}, got {{!r}}"
    return Rule(text, lambda x: is_number(x) and x >= least)


def one_of(names: Iterable[str]) -> Rule:
    """Returns the rule of a name out of `names`."""
    names = tuple(names)
    text = f"{{}} {{!r}} is not known ({', '.join(names)})"
    return Rule(text, lambda x: isinstance(x, str) and x in names)


SIZE = Rule("{} must be a positive integer below 2**31, got {!r}", lambda x: is_index(x) and x > 0)
COUNT = Rule("{} must be an integer from 0 to 2**31 - 1, got {!r}", is_index)
POSITIVE, AT_LEAST_0, AT_LEAST_1 = number(1 / LARGEST), number(0), number(1)
SHARE = Rule("{} must lie in (0, 1], got {!r}", lambda x: is_number(x) and 0 < x <= 1)
UNIT = Rule("{} must lie in [0, 1], got {!r}", lambda x: is_number(x) and 0 <= x <= 1)
SWITCH = Rule("{} must be true or false, got {!r}", lambda x: isinstance(x, bool))
TOKEN = Rule("{} must be a token id, got {!r}", is_index)
SEED = Rule("{} must be an integer in [0, 2**64), got {!r:.40}", is_seed)


Heads = tuple[tuple[int, int], ...]  # pairs (layer, head)


def heads_of(value: Any) -> Heads:
    """Returns pairs (layer, head) as tuples, ascending, each once; lists are taken too.

    Raises:
      ConfigError: there is no pair, or a value that is not a pair of integers from 0 on.
    """
    try:
        pairs = sorted({(python_value(layer), python_value(head)) for layer, head in value})
    except (TypeError, ValueError):
        pairs = []
    valid = bool(pairs) and all(is_index(x) for pair in pairs for x in pair)
    message = f"heads must be pairs (layer, head) of integers from 0 on, got {value!r:.60}"
    require(valid, message)
    return tuple(pairs)


def size(name: str, value: Any) -> None:
    """Raises ConfigError unless value is a positive integer below 2**31."""
    require(SIZE.allows(value), SIZE.message.format(name, value))


def validate(settings: Any, rules: Mapping[str, Rule], label: str = "") -> None:
    """Raises ConfigError for the first field of a dataclass that its rule does not allow.

    None is allowed in fields whose default or type has it. Makes Python values of NumPy's, in all
    fields. `label` stands before the name in messages.
    """
    fields = dataclasses.fields(settings)
    optional = {x.name for x in fields if x.default is None or str(x.type).endswith("| None")}
    for field in fields:
        object.__setattr__(settings, field.name, python_value(getattr(settings, field.name)))
    for name, rule in rules.items():
        value = getattr(settings, name)
        valid = (value is None and name in optional) or rule.allows(value)
        require(valid, rule.message.format(label + name, value))
