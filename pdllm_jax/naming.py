"""Methods and rules as text: `NAME`, or `NAME:SETTING=VALUE:SETTING=VALUE`.

Command lines, lm-eval's arguments and grids of experiments name cache methods and unmasking rules
in this way. A setting is a field of a dataclass; its value is JSON, or a text without quotes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pdllm_jax.rules import require

_WORDS = {"none": None, "None": None, "True": True, "False": False}


def read_named(kind: str, text: str, known: Mapping[str, Any]) -> Any:
    """Returns the object that a text names.

    Args:
      kind: "method" or "unmask", for messages.
      known: dataclasses by name.

    Raises:
      ConfigError: a name or a setting that is not known, or a value that is not allowed.
    """
    name, *pairs = text.split(":")
    require(name in known, f"{kind} {name!r} is not known ({', '.join(known)})")
    named, settings = known[name], {}
    fields = [field.name for field in dataclasses.fields(named)]
    for pair in pairs:
        setting, sign, value = pair.partition("=")
        allowed = ", ".join(fields) or "it has none"
        require(bool(sign), f"{kind} {name!r} needs SETTING=VALUE behind a colon, got {pair!r}")
        require(setting in fields, f"{kind} {name!r} has no setting {setting!r} ({allowed})")
        require(setting not in settings, f"{kind} {name!r} is given {setting} twice")
        settings[setting] = _value(value)
    return named(**settings)


def text_of(named: Any) -> str:
    """Returns the text that `read_named` reads: the name, and settings that are not defaults."""
    values = {field: getattr(named, field.name) for field in dataclasses.fields(named)}
    changed = {x.name: value for x, value in values.items() if value != x.default}
    texts = (f"{name}={_value_text(value)}" for name, value in changed.items())
    return ":".join([named.name, *texts])


def settings_text(named: Any) -> str:
    """Returns a class's name and its settings with their defaults, as `read_named` takes them."""
    fields = dataclasses.fields(named)
    texts = (f"{field.name}={_value_text(field.default)}" for field in fields)
    return ":".join([named.name, *texts])


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(text)
        return tuple(value) if isinstance(value, list) else value
    return text
