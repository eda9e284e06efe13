"""Unmasking rules: the slots that a step fills. `base.py` says how to write one."""

from __future__ import annotations

import dataclasses
from typing import Any

from pdllm_jax.method.unmasking.base import Choice, Custom, Rows, Seen, Unmasking, transfer
from pdllm_jax.method.unmasking.credit import Credit
from pdllm_jax.method.unmasking.entropy_bound import EntropyBound
from pdllm_jax.method.unmasking.klass import Klass
from pdllm_jax.method.unmasking.published import (
    Chance,
    Factor,
    Schedule,
    Threshold,
    TimeSchedule,
    due_of,
)
from pdllm_jax.method.unmasking.wino import Wino
from pdllm_jax.rules import require

_ALL: tuple[type[Unmasking], ...] = (EntropyBound, Klass, Wino, Credit)
# `DecodeConfig.unmask` by name.
UNMASKING = {rule.name: rule for rule in _ALL}
# Flat names of the rules' settings, as flags and lm-eval arguments have them: rule and field.
OPTIONS = {
    f"{name}_{field.name}": (name, field.name)
    for name, rule in UNMASKING.items()
    for field in dataclasses.fields(rule)
}


def unmasking_rule(name: Any, options: dict[str, Any]) -> Any:
    """Returns the rule of a name, with settings by their flat names; another value as it is.

    Raises:
      ConfigError: the name is not known, an option belongs to another rule, or a wrong value.
    """
    for option in options:
        rule, _ = OPTIONS[option]
        require(rule == name, f"{option} needs unmask={rule!r}, got {name!r:.60}")
    if not isinstance(name, str):
        return name
    require(name in UNMASKING, f"unmask {name!r} is not known ({', '.join(UNMASKING)})")
    return UNMASKING[name](**{OPTIONS[option][1]: value for option, value in options.items()})


__all__ = [
    "OPTIONS",
    "UNMASKING",
    "Chance",
    "Choice",
    "Credit",
    "Custom",
    "EntropyBound",
    "Factor",
    "Klass",
    "Rows",
    "Schedule",
    "Seen",
    "Threshold",
    "TimeSchedule",
    "Unmasking",
    "Wino",
    "due_of",
    "transfer",
    "unmasking_rule",
]
