"""How pages show numbers: Markdown tables, shares and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(estimate: Sequence[float] | None, form: str = "+.1f", scale: float = 100) -> str:
    """Formats (value, low, high, ..) times `scale`, by default a difference in points."""
    if estimate is None:
        return "-"
    value, low, high = (format(scale * x, form) for x in estimate[:3])
    return f"{value} [{low}, {high}]"


def percent(estimate: Sequence[float] | None) -> str:
    """Formats a share in percent."""
    return interval(estimate, ".1f")


def p_value(p: float | None) -> str:
    """Formats a p value."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_clear(arm: Mapping[str, Any]) -> bool:
    """Tells whether an arm is shown to differ from its reference."""
    low, high = arm["difference"][1:3]
    return (low > 0 or high < 0) and arm["p_holm"] < 0.05


def difference(arm: Mapping[str, Any] | None) -> str:
    """Formats an arm's difference, in bold where it is clear."""
    if arm is None or "difference" not in arm:
        return "-"
    text = interval(arm["difference"])
    return f"**{text}**" if is_clear(arm) else text


def verdict(arm: Mapping[str, Any]) -> str:
    """Says what an arm's comparison shows."""
    if not is_clear(arm):
        return "no difference shown"
    return "higher" if arm["difference"][1] > 0 else "lower"
