"""What a calibration of retrieval heads saves in a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

from pdllm_jax.rules import ConfigError, heads_of
from pdllm_jax.text_files import read_text

HEADS_FILE = "retrieval_heads.json"
_VERSION = 1


def read_heads(folder: Path) -> tuple[tuple[int, int], ...] | None:
    """Returns the retrieval heads saved with a checkpoint, pairs (layer, head); None without.

    Raises:
      ConfigError: the file is not JSON of this version, or its `heads` are not pairs.
    """
    path = Path(folder) / HEADS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
        if content["version"] != _VERSION:
            raise ConfigError(f"version {content['version']!r:.20} is not known")
        return heads_of(content["heads"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        command = f"make it again with scripts/calibrate.py {folder}"
        raise ConfigError(f"{path} does not hold retrieval heads ({error}); {command}") from None
