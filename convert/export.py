"""Export: a converted folder to sharded safetensors in its family's published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert import eight_bits, orbax_stream
from convert.convert import (
    Progress,
    Report,
    batches,
    compare,
    copy_companions,
    count,
    output_folder,
)
from convert.mapping import targets
from convert.sources import SAFETENSORS_INDEX, open_source
from pdllm_jax.storage.checkpoint import PARAMS, load_config, open_checkpoint


def reverse(
    source: str | Path,
    destination: str | Path,
    *,
    shard_bytes: int = 2_000_000_000,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes a converted checkpoint as safetensors with an index, every tensor's bits unchanged.

    Weights in 8 bits become values * scale in the model's dtype; the report says so.

    Args:
      shard_bytes: largest sum of tensor bytes in a file, unless one tensor alone exceeds it. One
        file at a time is held in memory.
      verify: compares the source with its checksums first, and the result with the source.
      overwrite: replaces a checkpoint at `destination`.

    Raises:
      CheckpointError: the source is not a complete converted checkpoint, the destination exists,
        or the disk is full. Nothing is left behind.
    """
    folder = Path(source).absolute()
    output = output_folder(folder, destination, overwrite)
    manifest = open_checkpoint(folder, verify=verify)
    config, dtype = load_config(folder), manifest.settings["dtype"]
    weights = config.weight_format
    rows = {row.path: row for row in targets(config).values()}
    sizes = orbax_stream.sizes(folder / PARAMS, rows)
    notes = []
    if weights != "full":
        for path, row in rows.items():
            if eight_bits.is_quantised(path, row.shape, weights):
                sizes[path] *= np.dtype(dtype).itemsize
        notes = [f"weights in {weights} became values * scale in {dtype}, not the source's bits"]

    def stored(paths: list[str]) -> eight_bits.Arrays:
        shapes = {path: rows[path].shape for path in paths}
        return eight_bits.restore(folder / PARAMS, shapes, dtype, weights)

    nbytes = sum(sizes.values())
    report = count(progress, nbytes)
    shards = list(batches(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    with output.write(nbytes) as partial:
        for number, paths in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {rows[path].source: array for path, array in stored(paths).items()}
            save_file(tensors, partial / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            report("convert", sum(sizes[path] for path in paths))
            del tensors  # before the next shard is read
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (partial / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file in set(weight_map.values()):  # the library makes its files private
            shutil.copymode(partial / SAFETENSORS_INDEX, partial / file)
        copy_companions(folder, partial)
        if verify:
            opened = open_source(partial).tensors
            written = {path: opened[row.source] for path, row in rows.items()}
            compare(written, stored, lambda path: {path: written[path].load()}, report)
    return Report(output.destination, len(rows), nbytes, dtype, (), tuple(notes))
