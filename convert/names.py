"""Names of tensors as wrappers and trainers change them, and the published ones."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

from convert.mapping import LAYER_NAMES, NETWORK
from pdllm_jax.rules import listed

# Modules around a module that leave its computation alone: torch.compile, FSDP, checkpointing, DDP.
_WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
_MODULE = (
    rf"(?:wte|ln_f|ff_out|blocks\.(?:{_WRAPPER})*\d+\.(?:{_WRAPPER})*(?:{'|'.join(LAYER_NAMES)}))"
)


def layout(end: str) -> re.Pattern[str]:
    """Returns the pattern of a tensor's name: any prefix, the module, and `end` after a dot."""
    return re.compile(rf"(?P<prefix>(?:.*?\.)??)(?P<module>{_MODULE})\.(?:{_WRAPPER})*{end}")


def module_name(match: re.Match[str]) -> str:
    """Returns the published name of the module that a `layout` has found."""
    return NETWORK + re.sub(_WRAPPER, "", match["module"])


class Renaming(NamedTuple):
    """What `rename` found.

    names: published name by name in the file; names that do not fit stay as they are.
    note: about the prefix that was replaced; "".
    problem: several prefixes; "".
    """

    names: dict[str, str]
    note: str
    problem: str


_WEIGHT = layout("weight")


def rename(names: Iterable[str]) -> Renaming:
    """Finds the prefix that all names have in place of the published one."""
    names = list(names)
    matches = {name: match for name in names if (match := _WEIGHT.fullmatch(name))}
    prefixes = collections.Counter(match["prefix"] for match in matches.values())
    if len(prefixes) > 1:
        counts = [f"{prefix!r} ({count})" for prefix, count in prefixes.most_common()]
        problem = f"names have several prefixes in place of one: {listed(counts)}"
        return Renaming({name: name for name in names}, "", problem)
    prefix = next(iter(prefixes), NETWORK)
    renamed = {
        name: f"{module_name(matches[name])}.weight"
        if name in matches
        else NETWORK + name.removeprefix(prefix)
        if name.startswith(prefix)
        else name
        for name in names
    }
    note = "" if prefix == NETWORK else f"read with the prefix {prefix!r} in place of {NETWORK!r}"
    return Renaming(renamed, note, "")
