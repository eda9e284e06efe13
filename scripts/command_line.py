"""How command lines end: an exit status, and one line on stderr for what the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


def status(call: Callable[[], int | None]) -> int:
    """0 or what the call returns; 2 for ValueError and OSError; 130 when interrupted."""
    try:
        return call() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
