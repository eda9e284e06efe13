"""What a calibration of retrieval heads saves in a checkpoint's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.rules import ConfigError, Heads, heads_of, require
from pdllm_jax.text_files import read_text

HEADS_FILE = "retrieval_heads.json"
PARTIAL = f".{HEADS_FILE}.partial"  # left where writing it was interrupted
VERSION = 1  # of the file's format
# Sizes of the calibrated model. Where the file states them, it fits no model with others.
SAME = ("family", "n_layers", "n_heads", "d_model")


def read_heads(folder: Path) -> Heads | None:
    """Returns the retrieval heads saved with a checkpoint, pairs (layer, head); None without.

    Raises:
      ConfigError: the file is not JSON of this version, its `heads` are not pairs, or it is of
        another model than the folder's config.json.
    """
    path = Path(folder) / HEADS_FILE
    if not os.path.lexists(path):
        return None
    try:
        content = json.loads(read_text(path))
        if (version := content.get("version")) != VERSION:
            raise ConfigError(f"version must be {VERSION}, got {version!r:.20}")
        _check_model(content.get("model", {}), Path(folder) / "config.json")
        return heads_of(content["heads"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        command = f"make it again with scripts/calibrate.py {folder} --overwrite"
        raise ConfigError(f"{path} does not hold retrieval heads ({error}); {command}") from None


def _check_model(stated: dict[str, Any], path: Path) -> None:
    """Raises ConfigError where config.json, if there is one, has other sizes than those stated."""
    if not path.is_file():
        return
    config = ModelConfig.from_dict(json.loads(read_text(path)))
    for name in SAME:
        have = getattr(config, name)
        same = stated.get(name, have) == have
        require(same, f"they are of a model with {name} {stated.get(name)!r:.20}, not {have!r}")
