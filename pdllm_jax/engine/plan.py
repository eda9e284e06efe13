"""A plan of device memory: the bytes of every phase of an answer. `memory` makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pdllm_jax.config import DecodeConfig, SelectionConfig
from pdllm_jax.engine.programs import Shapes


def total(parts: Mapping[str, int]) -> int:
    """Returns the sum of all parts, bytes."""
    return sum(parts.values())


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of an answer, or the time before the first. Bytes of one device, by name.

    held: live before the phase starts; made: its results; scratch: XLA's temporaries.
    """

    name: str
    held: Mapping[str, int]
    made: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scratch: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes while the program runs: XLA allocates results and temporaries before it starts."""
        return sum(map(total, (self.held, self.made, self.scratch)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device, phase by phase.

    phases: in the order of an answer. resident: bytes held before it starts: the weights, and for
    questions about an encoded document its KV. shapes, selection, decode: what the plan is for.
    """

    phases: tuple[Phase, ...]
    resident: int
    shapes: Shapes
    selection: SelectionConfig
    decode: DecodeConfig

    @property
    def peak(self) -> int:
        """Maximum bytes that the device holds at once."""
        return self.largest.nbytes

    @property
    def largest(self) -> Phase:
        """The phase with the peak, the first of equals."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    def __getitem__(self, name: str) -> Phase:
        return {phase.name: phase for phase in self.phases}[name]

    def __str__(self) -> str:
        """A table, sizes in GB (1e9 bytes)."""
        lines = []
        for phase in self.phases:
            mark = "  <- peak" if phase is self.largest else ""
            lines.append(f"{phase.name:44}{phase.nbytes / 1e9:10.3f} GB{mark}")
            for kind in ("held", "made", "scratch"):
                parts = getattr(phase, kind).items()
                lines += [f"  {kind:8}{name:34}{n / 1e9:10.3f}" for name, n in parts if n]
        return "\n".join(lines)
