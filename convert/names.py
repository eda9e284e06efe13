"""Names of tensors as wrappers and trainers change them, and the published ones."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

from convert.mapping import NAMES
from pdllm_jax.rules import listed

# Modules around a module that leave its computation alone: torch.compile, FSDP, checkpointing, DDP.
_WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
_WRAPPERS = f"(?:{_WRAPPER})*"


def _modules(family: str) -> str:
    """Returns the pattern of a family's modules inside the network."""
    names = NAMES[family]
    layer = "|".join(source.replace(".", rf"\.{_WRAPPERS}") for source, _, _ in names.layer)
    numbered = rf"{names.layers}\.{_WRAPPERS}\d+\.{_WRAPPERS}(?:{layer})"
    head = names.head.removeprefix(names.network)
    return "|".join([names.embedding, names.final_norm, numbered, *[head] * names.head_inside])


_INSIDE = "|".join(f"(?P<{family}>{_modules(family)})" for family in NAMES)
_OUTSIDE = "|".join(names.head for names in NAMES.values() if not names.head_inside)


def layout(end: str) -> re.Pattern[str]:
    """Returns the pattern of a tensor's name: any prefix, the module, and `end` after a dot."""
    module = rf"(?:{_INSIDE}|(?P<outside>{_OUTSIDE}))"
    return re.compile(rf"(?P<prefix>(?:.*?\.)??){module}\.{_WRAPPERS}{end}")


def module_name(match: re.Match[str]) -> str:
    """Returns the published name of the module that a `layout` has found."""
    if match["outside"]:
        return match["outside"]
    family = next(family for family in NAMES if match[family])
    return NAMES[family].network + re.sub(_WRAPPER, "", match[family])


def several_prefixes(matches: Iterable[re.Match[str]]) -> str:
    """Describes the prefixes of the names that a `layout` has found; "" if they fit one network.

    The head of Dream is beside the network: what is before it is the start of the other prefix.
    """
    matches = list(matches)
    networks = collections.Counter(m["prefix"] for m in matches if not m["outside"])
    heads = collections.Counter(m["prefix"] for m in matches if m["outside"])
    nested = all(network.startswith(head) for network in networks for head in heads)
    if nested and len(networks) <= 1 and len(heads) <= 1:
        return ""
    counts = [f"{prefix!r} ({count})" for prefix, count in (networks + heads).most_common()]
    return f"names have several prefixes in place of one: {listed(counts)}"


class Renaming(NamedTuple):
    """What `rename` found.

    names: published name by name in the file; names that do not fit stay as they are.
    note: about the prefix that was replaced; "".
    problem: several prefixes; "".
    family: whose names they are; None if there are none inside a network, or several prefixes.
    """

    names: dict[str, str]
    note: str
    problem: str
    family: str | None


_PARAMETER = layout(r"(?P<kind>weight|bias)")


def rename(names: Iterable[str]) -> Renaming:
    """Finds the prefix that all names have in place of the published one."""
    names = list(names)
    matches = {name: match for name in names if (match := _PARAMETER.fullmatch(name))}
    if problem := several_prefixes(matches.values()):
        return Renaming({name: name for name in names}, "", problem, None)
    inside = next((match for match in matches.values() if not match["outside"]), None)
    family = next((family for family in NAMES if inside and inside[family]), None)
    network = NAMES[family or "llada"].network
    prefix = network if inside is None else inside["prefix"]
    renamed = {
        name: f"{module_name(matches[name])}.{matches[name]['kind']}"
        if name in matches
        else network + name.removeprefix(prefix)
        if name.startswith(prefix)
        else name
        for name in names
    }
    note = "" if prefix == network else f"read with the prefix {prefix!r} in place of {network!r}"
    return Renaming(renamed, note, "", family)
