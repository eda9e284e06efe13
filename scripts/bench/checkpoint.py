"""A checkpoint of random weights at LLaDA-8B's shapes, and the page cache around it."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import stream
from convert.mapping import targets, tree
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.checkpoint import CONFIG, MANIFEST, PARAMS, Manifest, TensorRecord

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


@dataclasses.dataclass(frozen=True)
class _Random:
    """A tensor of random finite bfloat16 values, as `convert.stream` takes them."""

    order: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def load(self, buffer: NDArray[np.uint8]) -> NDArray[Any]:
        import ml_dtypes

        words = -(-self.nbytes // 8)
        bits = np.random.default_rng(self.order).integers(0, 1 << 64, words, np.uint64)
        # Clearing the exponent's highest bits leaves values below 2^-62, none of them NaN.
        bits &= np.uint64(0xBFFFBFFFBFFFBFFF)
        buffer[:] = bits.view(np.uint8)[: self.nbytes]
        return buffer.view(ml_dtypes.bfloat16).reshape(self.shape)


def make(folder: Path, layers: int) -> None:
    """Writes the checkpoint, in bfloat16, with the converter's own writer; replaces nothing."""
    folder.mkdir(parents=True)
    raw = config_json(layers)
    rows = targets(ModelConfig.from_dict(raw)).values()
    leaves = {row.path: _Random(i, row.shape) for i, row in enumerate(rows)}
    stream.save((folder / PARAMS).resolve(), tree(leaves), _Random)
    (folder / CONFIG).write_text(json.dumps(raw, indent=1), encoding="utf-8")
    files = [path for path in sorted((folder / PARAMS).rglob("*")) if path.is_file()]
    manifest = Manifest(
        dtype="bfloat16",
        tensors=tuple(TensorRecord(row.path, row.shape, "bfloat16", row.source) for row in rows),
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


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
