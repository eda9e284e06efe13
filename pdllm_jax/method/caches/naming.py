"""Cache methods as text: `NAME`, or `NAME:SETTING=VALUE:SETTING=VALUE`.

Command lines, lm-eval's arguments and grids of experiments name a method in this way. A setting is
a field of the method's dataclass; its value is JSON, or a text without quotes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pdllm_jax.method.caches.base import CacheMethod, value_text
from pdllm_jax.rules import require

_WORDS = {"none": None, "None": None, "True": True, "False": False}


def read_method(text: str, known: Mapping[str, type[CacheMethod]]) -> CacheMethod:
    """Returns the method that a text names.

    Args:
      known: methods by name.

    Raises:
      ConfigError: a name or a setting that is not known, or a value that is not allowed.
    """
    name, *pairs = text.split(":")
    require(name in known, f"method {name!r} is not known ({', '.join(known)})")
    method, settings = known[name], {}
    fields = [field.name for field in dataclasses.fields(method)]
    for pair in pairs:
        setting, sign, value = pair.partition("=")
        allowed = ", ".join(fields) or "it has none"
        require(bool(sign), f"method {name!r} needs SETTING=VALUE behind a colon, got {pair!r}")
        require(setting in fields, f"method {name!r} has no setting {setting!r} ({allowed})")
        require(setting not in settings, f"method {name!r} is given {setting} twice")
        settings[setting] = _value(value)
    return method(**settings)


def settings_text(method: type[CacheMethod]) -> str:
    """Returns a method's settings with their defaults, as `read_method` takes them."""
    fields = dataclasses.fields(method)
    texts = (f"{field.name}={value_text(field.default)}" for field in fields)
    return ":".join([method.name, *texts])


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(text)
        return tuple(value) if isinstance(value, list) else value
    return text
