"""The way back: a converted folder to sharded safetensors in LLaDA's published layout."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import stream
from convert.convert import (
    CHECKPOINT,
    Progress,
    Report,
    check_apart,
    compare,
    copy_companions,
    count,
    is_checkpoint,
)
from convert.mapping import Target, targets
from convert.shards import FLOATS
from convert.sources import SAFETENSORS_INDEX, open_source
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.checkpoint import (
    CONFIG,
    PARAMS,
    CheckpointError,
    TensorRecord,
    load_config,
    read_manifest,
)

_NAMES = {dtype.name: name for name, dtype in FLOATS.items()}


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A tensor's place: byte `offset` of `file`."""

    name: str
    record: TensorRecord
    file: str
    offset: int


def reverse(
    source: str | Path,
    destination: str | Path,
    *,
    shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes a converted checkpoint as safetensors with an index, every tensor's bits unchanged.

    shard_bytes: no file holds more tensor bytes than this, unless one tensor alone does.
    verify, overwrite: as for `convert`. Raises CheckpointError or ConfigError likewise.
    """
    folder, target = Path(source).absolute(), Path(os.path.abspath(destination))
    check_apart(folder, target)
    staged = AtomicFolder(target, CHECKPOINT, is_checkpoint, overwrite)
    staged.check()
    manifest = read_manifest(folder)
    config = load_config(folder)
    if config.n_layers > len(manifest.tensors):
        raise CheckpointError(
            f"{folder / CONFIG} says n_layers {config.n_layers}, but the checkpoint holds "
            f"{len(manifest.tensors)} tensors"
        )
    records = {record.path: record for record in manifest.tensors}
    wanted = targets(config)
    if {row.path: row.shape for row in wanted.values()} != {
        path: record.shape for path, record in records.items()
    }:
        raise CheckpointError(f"{folder} does not fit its {CONFIG}")
    nbytes = sum(record.nbytes for record in manifest.tensors)
    staged.check_space(nbytes)

    done = count(progress, nbytes)
    with staged.write() as out:
        slots = _write_headers(out, list(wanted.values()), records, shard_bytes)
        _write_values(folder / PARAMS, out, slots, done)
        index = {
            "metadata": {"total_size": nbytes},
            "weight_map": {slot.name: slot.file for slot in slots.values()},
        }
        (out / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (out / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        copy_companions(folder, out)
        if verify:
            written = open_source(out).tensors
            compare(
                folder / PARAMS,
                {path: written[slot.name] for path, slot in slots.items()},
                done,
            )
    return Report(target, len(slots), nbytes, manifest.dtype, ())


def _shards(
    rows: list[Target], records: dict[str, TensorRecord], shard_bytes: int
) -> list[list[Target]]:
    shards: list[list[Target]] = []
    filled = math.inf
    for row in rows:
        size = records[row.path].nbytes
        if filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += size
    return shards


def _write_headers(
    folder: Path, rows: list[Target], records: dict[str, TensorRecord], shard_bytes: int
) -> dict[str, _Slot]:
    """Creates the shards with their headers; slots by parameter path."""
    slots: dict[str, _Slot] = {}
    shards = _shards(rows, records, shard_bytes)
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for row in members:
            record = records[row.path]
            # An even number of values (d_model is even): float32 stays aligned after bfloat16.
            begin, end = end, end + record.nbytes
            entries[row.source] = {
                "dtype": _NAMES[record.dtype],
                "shape": list(record.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
        for row in members:
            offset = 8 + len(header) + entries[row.source]["data_offsets"][0]
            slots[row.path] = _Slot(row.source, records[row.path], file, offset)
    return slots


def _write_values(
    params: Path, folder: Path, slots: dict[str, _Slot], done: Callable[[str, int], None]
) -> None:
    def write(path: str, array: NDArray[Any]) -> None:
        slot = slots[path]
        if (array.shape, array.dtype.name) != (slot.record.shape, slot.record.dtype):
            raise CheckpointError(f"{params} holds {path} as {array.dtype.name}{list(array.shape)}")
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        descriptor = os.open(folder / slot.file, os.O_WRONLY)
        try:
            at = 0
            while at < len(data):
                at += os.pwrite(descriptor, data[at:], slot.offset + at)
        finally:
            os.close(descriptor)
        done("convert", len(data))

    stream.restore(params, slots, write)
