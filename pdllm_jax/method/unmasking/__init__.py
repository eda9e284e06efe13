"""Unmasking rules: the slots that a step fills. `base.py` says how to write one."""

from __future__ import annotations

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
from pdllm_jax.naming import read_named

_ALL: tuple[type[Unmasking], ...] = (EntropyBound, Klass, Wino, Credit)
# `DecodeConfig.unmask` by name.
UNMASKING = {rule.name: rule for rule in _ALL}


def unmasking_rule(rule: Any) -> Any:
    """Returns a rule, which may be given as text: a name, or a name with settings.

    Raises:
      ConfigError: see `naming.read_named`.
    """
    return read_named("unmask", rule, UNMASKING) if isinstance(rule, str) else rule


__all__ = [
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
