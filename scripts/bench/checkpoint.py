"""A checkpoint of random weights at LLaDA-8B's shapes, and the page cache around it."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert import orbax_stream
from convert.mapping import targets
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.checkpoint import CHECKPOINT, CONFIG, PARAMS
from pdllm_jax.storage.manifest import write_manifest

BLOCK = 16 << 20


def config_json(layers: int) -> dict[str, Any]:
    """config.json of LLaDA-8B with so many layers."""
    c = ModelConfig.llada_8b()
    return {
        "model_type": "llada", "d_model": c.d_model, "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads, "n_layers": layers, "mlp_hidden_size": c.mlp_hidden_size,
        "rope_theta": c.rope_theta, "rms_norm_eps": c.rms_norm_eps,
        "max_sequence_length": c.max_sequence_length, "vocab_size": c.vocab_size,
        "embedding_size": c.embedding_size, "mask_token_id": c.mask_token_id,
        "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
    }  # fmt: skip


def _random(seed: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Returns random finite bfloat16 values."""
    nbytes = 2 * math.prod(shape)
    bits = np.random.default_rng(seed).integers(0, 1 << 64, -(-nbytes // 8), np.uint64)
    # Clearing the exponent's highest bits leaves values below 2^-62, none of them NaN.
    bits &= np.uint64(0xBFFFBFFFBFFFBFFF)
    return bits.view(np.uint8)[:nbytes].view(ml_dtypes.bfloat16).reshape(shape)


def make(folder: Path, layers: int) -> None:
    """Writes the checkpoint, in bfloat16, with the converter's own writer; replaces nothing."""
    folder.mkdir(parents=True)
    raw = config_json(layers)
    rows = targets(ModelConfig.from_dict(raw)).values()
    leaves = {
        row.path: orbax_stream.Leaf(
            i, 2 * math.prod(row.shape), functools.partial(_random, i, row.shape)
        )
        for i, row in enumerate(rows)
    }
    orbax_stream.save((folder / PARAMS).resolve(), leaves)
    (folder / CONFIG).write_text(json.dumps(raw, indent=1), encoding="utf-8")
    write_manifest(folder, CHECKPOINT, {"dtype": "bfloat16"})


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache, once they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read(folder: Path, buffer: NDArray[np.uint8]) -> tuple[float, int]:
    """Seconds and bytes of reading every file from front to back, as cat does, into one buffer."""
    start, total = time.perf_counter(), 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(memoryview(buffer)):
                    total += count
    return time.perf_counter() - start, total
