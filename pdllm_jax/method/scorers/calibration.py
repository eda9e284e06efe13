"""The file in a checkpoint's folder that names its retrieval heads; `pdllm-calibrate` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from pdllm_jax.rules import ConfigError, is_index
from pdllm_jax.text_files import read_text

HEADS_FILE = "retrieval_heads.json"


def read_heads(folder: Path) -> tuple[tuple[int, int], ...] | None:
    """Returns (layer, head) of each retrieval head; None where the folder has no such file.

    Raises:
      ConfigError: the file does not hold them.
    """
    path = Path(folder) / HEADS_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
        heads = content["heads"]
        valid = len(heads) > 0 and all(len(pair) == 2 and all(map(is_index, pair)) for pair in heads)
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid:
        raise ConfigError(f"{path} holds no pairs [layer, head] under 'heads': calibrate again")
    return tuple((layer, head) for layer, head in heads)
