"""What the adapter takes of lm-eval, for tests of its own rules where lm-eval is not installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@dataclasses.dataclass
class Instance:
    """A request of a task, with lm-eval's names."""

    request_type: str
    doc: dict[str, Any]
    arguments: tuple[Any, ...]
    idx: int
    metadata: tuple[Any, ...] = (None, None, None)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments

    @property
    def task_name(self) -> Any:
        return self.metadata[0]


class LM:
    """Keeps no answers."""

    cache_hook = SimpleNamespace(add_partial=lambda *_: None)


def import_adapter() -> Any:
    """Imports the adapter, with the three names in `lm_eval.api` for as long as that takes."""
    names = {"": {}, ".api": {}, ".api.instance": {"Instance": Instance}, ".api.model": {"LM": LM}}
    names[".api.registry"] = {"register_model": lambda *_: lambda cls: cls}
    for name, values in names.items():
        module = sys.modules[f"lm_eval{name}"] = ModuleType(f"lm_eval{name}")
        vars(module).update(values)
    try:
        return importlib.import_module("pdllm_jax.evaluation.lm_eval")
    finally:
        for name in names:
            del sys.modules[f"lm_eval{name}"]
