"""What an answer needs of a device's memory: the plan, how it is printed, and the refusal."""

from __future__ import annotations

import dataclasses


class MemoryLimitError(ValueError):
    """An answer that does not fit the device; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Item:
    """Bytes of one device under one name."""

    name: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of an answer, or the time before the first.

    held: what lies on the device before it begins (and stays, unless a later phase lacks it);
    made: its results; scratch: XLA's temporaries, which go when it ends.
    """

    name: str
    held: tuple[Item, ...]
    made: tuple[Item, ...] = ()
    scratch: tuple[Item, ...] = ()

    @property
    def nbytes(self) -> int:
        """Most bytes at once: XLA allocates results and temporaries before a program runs."""
        return sum(item.nbytes for item in (*self.held, *self.made, *self.scratch))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device, phase by phase.

    phases: in the order of an answer. resident: bytes that are there before it begins (weights,
      and of questions about an encoded document its cache).
    """

    phases: tuple[Phase, ...]
    resident: int

    @property
    def peak(self) -> int:
        """Most bytes that the device holds at once."""
        return self.largest.nbytes

    @property
    def largest(self) -> Phase:
        """The phase of the peak, the first of equals."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    def __getitem__(self, name: str) -> Phase:
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def __str__(self) -> str:
        """A table, sizes in GB (1e9 bytes)."""
        lines = []
        for phase in self.phases:
            mark = "  <- peak" if phase is self.largest else ""
            lines.append(f"{phase.name:44}{phase.nbytes / 1e9:10.3f} GB{mark}")
            lines += [
                f"  {kind:8}{item.name:34}{item.nbytes / 1e9:10.3f}"
                for kind in ("held", "made", "scratch")
                for item in getattr(phase, kind)
                if item.nbytes
            ]
        return "\n".join(lines)

    def require(self, limit: int, *, in_use: int | None = None, advice: str = "") -> None:
        """Refuses an answer that would not fit.

        limit: bytes that the device gives. in_use: bytes that it holds now, by default those that
        the plan says are there.

        Raises:
          MemoryLimitError: the peak exceeds the limit.
        """
        elsewhere = 0 if in_use is None else max(0, in_use - self.resident)
        peak = self.peak + elsewhere
        if peak <= limit:
            return
        other = f" ({elsewhere / 1e9:.2f} of them held already beside the model)"
        items = sorted(
            (i for kind in ("held", "made", "scratch") for i in getattr(self.largest, kind)),
            key=lambda item: -item.nbytes,
        )
        parts = ", ".join(f"{item.name} {item.nbytes / 1e9:.2f}" for item in items[:4])
        raise MemoryLimitError(
            f"phase {self.largest.name!r} would take {peak / 1e9:.2f} GB"
            f"{other if elsewhere > 1e7 else ''}, the device gives {limit / 1e9:.2f} GB; "
            f"most of it: {parts}{'; ' + advice if advice else ''}"
        )
