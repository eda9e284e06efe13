"""The conversion: a PyTorch folder to a folder with Orbax parameters.

Tensors are streamed: one is read and checked while those before it are written. The result appears
under its name when it is complete, verified (if asked for) and on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from convert import eight_bits, orbax_stream
from convert.adapter import check_adapter_files, merge, refuse_unmerged
from convert.folders import check_links, snapshot_folder
from convert.mapping import Target, targets
from convert.quantised import refuse_quantised, refuse_quantised_tensors
from convert.sources import BLOCK, SAFETENSORS_INDEX, Source, SourceTensor, match, open_source
from pdllm_jax.compilation import cache_folder
from pdllm_jax.downloads import TOKENIZER_FILES, read_clean, tokenizer_files
from pdllm_jax.method.scorers.calibration import HEADS_FILE, PARTIAL
from pdllm_jax.network.config import ModelConfig, WeightFormat
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.checkpoint import CHECKPOINT, CONFIG, PARAMS, WEIGHTS
from pdllm_jax.storage.manifest import MANIFEST, CheckpointError, read_json, write_manifest
from pdllm_jax.tokenizer import Tokenizer

OutputDtype = Literal["keep", "bfloat16", "float32"]
# (stage, bytes done since the last call, bytes in total); stages are "convert" and "verify".
Progress = Callable[[str, int, int], None]

# Files that travel along with the weights, so that the result is complete; never code.
_READ = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
# The manifest of format version 1.
_OLD_MANIFEST = "pdllm.json"
# Arrays that are compared at a time.
_COMPARE_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done.

    Args:
      nbytes: of the parameters written.
      dtype: of the model; where tensors differ, float32.
      ignored: tensors of the source that were left out.
      notes: what else was done: a prefix that was replaced, an adapter that was merged.
    """

    destination: Path
    tensors: int
    nbytes: int
    dtype: str
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: OutputDtype = "keep",
    weights: WeightFormat = "full",
    adapter: str | Path | None = None,
    follow_links: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    text: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Converts a PyTorch checkpoint to a folder that `pdllm_jax.load_model` reads.

    Args:
      source: folder with config.json and safetensors or .bin files in bfloat16, float16 or float32;
        or the root of its Hugging Face cache.
      dtype: "keep" copies every tensor's bits; the others cast all, rounding to nearest even.
      weights: "fp8" or "int8" writes the matrices of the layers in 8 bits, made of the tensors as
        they are stored, with a float32 scale for each output channel. `dtype` is of all others.
      adapter: folder of a LoRA adapter of peft, merged in float32 and rounded once.
      follow_links: reads files that symbolic links place outside of the folder.
      verify: reads the result back and compares it bit by bit before it gets its name.
      overwrite: replaces a checkpoint at `destination`.
      text: refuses a tokenizer that `Tokenizer.load` refuses; otherwise its files are copied as
        they are.

    Raises:
      CheckpointError: lists everything that is wrong with the source; or the destination exists,
        or the disk is full. Nothing is left behind.
      ConfigError: config.json describes an architecture that is not implemented.
      TokenizerError: of `text`.
    """
    folder = snapshot_folder(Path(source))
    if dtype not in get_args(OutputDtype):
        allowed = ", ".join(get_args(OutputDtype))
        raise CheckpointError(f"dtype must be one of {allowed}, got {dtype!r}")
    if weights not in get_args(WeightFormat):
        allowed = ", ".join(get_args(WeightFormat))
        raise CheckpointError(f"weights must be one of {allowed}, got {weights!r}")
    output = output_folder(folder, destination, overwrite)
    added = None if adapter is None else Path(adapter)
    check_adapter_files(folder, added)
    check_links(folder, (*_READ, *_LICENCES), follow_links)
    if (folder / CONFIG).exists():
        refuse_quantised(read_json(folder / CONFIG), folder)
    opened = open_source(folder, follow_links=follow_links)
    refuse_quantised_tensors(opened)
    refuse_unmerged(opened)
    try:
        config = ModelConfig.from_dict(read_json(folder / CONFIG))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    wanted = _match(opened, config)
    if text and tokenizer_files(folder):
        Tokenizer.load(folder, config)
    tensors = {name: opened.tensors[name] for name in wanted}
    notes = [opened.note] if opened.note else []
    if added is not None:
        tensors, note = merge(added, tensors, follow_links=follow_links)
        notes.append(note)
    chosen = {row.path: tensors[name] for name, row in wanted.items()}
    dtypes = {p: tensor.dtype if dtype == "keep" else dtype for p, tensor in chosen.items()}
    report = count(progress, sum(tensor.nbytes for tensor in chosen.values()))

    def read(path: str) -> eight_bits.Arrays:
        return eight_bits.read(path, chosen[path], dtypes[path], weights)

    made: eight_bits.Arrays = {}  # of a tensor whose first array is written

    def leaf(source: str, path: str, nbytes: int) -> orbax_stream.Leaf:
        def load() -> NDArray[Any]:
            if path not in made:
                made.update(read(source))
                report("convert", chosen[source].nbytes)
            return made.pop(path)

        return orbax_stream.Leaf((*chosen[source].order, path != source), nbytes, load)

    written = {path: eight_bits.parts(path, chosen[path], dtypes[path], weights) for path in chosen}
    leaves = {
        path: leaf(source, path, nbytes)
        for source, sizes in written.items()
        for path, nbytes in sizes.items()
    }
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    kinds = set(dtypes.values())
    model_dtype = kinds.pop() if len(kinds) == 1 else "float32"
    settings = {"dtype": model_dtype}
    if weights != "full":
        settings[WEIGHTS] = weights
        notes.append(f"weights of the layers in {weights}, with a scale for each output channel")
    with output.write(nbytes) as partial:
        orbax_stream.save(partial / PARAMS, leaves)
        copy_companions(folder, partial)
        if verify:

            def stored(paths: list[str]) -> eight_bits.Arrays:
                names = [name for path in paths for name in written[path]]
                return orbax_stream.restore(partial / PARAMS, names)

            compare(chosen, stored, read, report)
        write_manifest(partial, CHECKPOINT, settings)
    ignored = tuple(sorted(opened.tensors.keys() - wanted.keys()))
    return Report(output.destination, len(chosen), nbytes, model_dtype, ignored, tuple(notes))


def converted(
    path: str | Path,
    cache: Path | None = None,
    *,
    text: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> Path:
    """Returns a converted checkpoint for `path`: itself, or its conversion, made on first use.

    The cache key covers name, size and modification time of every file of the source, so that a
    changed checkpoint is converted again.

    Args:
      cache: folder that keeps conversions; by default below the user's cache folder.
      text: as of `convert`.
      notify: called with one line when a conversion begins.

    Raises:
      CheckpointError, ConfigError, TokenizerError: as `convert`.
    """
    source = snapshot_folder(Path(path))
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a directory")
    if (source / MANIFEST).is_file():
        return source
    real = os.path.realpath(source)
    digest = hashlib.sha256(f"{CHECKPOINT.version} {real}".encode())
    for file in sorted(source.iterdir()):
        stat = file.stat() if file.exists() else file.lstat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    folder = (cache or cache_folder()) / "converted"
    target = folder / f"{Path(real).name}-{digest.hexdigest()[:16]}"
    if not (target / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        notify(f"converting {source} (kept in {target})")
        convert(source, target, text=text)
    return target


def compare(
    tensors: Mapping[str, SourceTensor],
    stored: Callable[[list[str]], eight_bits.Arrays],
    expected: Callable[[str], eight_bits.Arrays],
    report: Callable[[str, int], None],
) -> None:
    """Compares arrays that were written with those that were to be written, bit by bit.

    Args:
      tensors: by parameter path.
      stored: reads the arrays of some of the tensors; expected: makes those of one.

    Raises:
      CheckpointError: names the first difference.
    """
    for paths in batches({path: tensors[path].nbytes for path in tensors}, _COMPARE_BYTES):
        arrays = stored(paths)
        for path in paths:
            for name, wanted in expected(path).items():
                array = arrays.pop(name)
                if (array.shape, array.dtype) != (wanted.shape, wanted.dtype) or not _equal(
                    array, wanted
                ):
                    file = tensors[path].file
                    raise CheckpointError(f"verification failed: {name} differs from {file}")
            report("verify", tensors[path].nbytes)


def batches(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yields runs of names whose sizes add up to at most `limit`, or one name that exceeds it."""
    batch: list[str] = []
    total = 0
    for name, size in sizes.items():
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    if batch:
        yield batch


def count(progress: Progress | None, total: int) -> Callable[[str, int], None]:
    """Returns `progress` with its last argument filled in."""
    if progress is None:
        return lambda stage, nbytes: None
    return lambda stage, nbytes: progress(stage, nbytes, total)


def output_folder(source: Path, destination: str | Path, overwrite: bool) -> AtomicFolder:
    """Returns the folder to write; refuses to write into, over or around the source."""
    inner, outer = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if inner == outer:
        raise CheckpointError(f"{destination} is the source itself")
    if outer.is_relative_to(inner):
        raise CheckpointError(f"{destination} lies inside the source {source}")
    if inner.is_relative_to(outer):
        raise CheckpointError(f"{destination} contains the source {source}")
    path = Path(os.path.abspath(destination))
    output = AtomicFolder(path, CHECKPOINT, _is_checkpoint, overwrite)
    output.check()
    return output


def _is_checkpoint(names: set[str]) -> bool:
    """Returns whether a folder holds what `convert` or `reverse` write, and nothing else."""
    weights = {name for name in names if name.endswith(".safetensors")}
    marks = {MANIFEST, _OLD_MANIFEST} | weights
    return (
        CONFIG in names
        and bool(names & marks)
        and names <= marks | {PARAMS, SAFETENSORS_INDEX, HEADS_FILE, PARTIAL, *_READ, *_LICENCES}
    )


def copy_companions(source: Path, destination: Path) -> None:
    """Copies config.json, the tokenizer's files and licences; byte order marks are dropped.

    Raises:
      CheckpointError: a file holds something else, as after an unfinished download.
    """
    for name in (*_READ, *_LICENCES):
        path = source / name
        if not path.is_file():
            continue
        if name in _LICENCES:
            shutil.copyfile(path, destination / name)
            continue
        try:
            content = read_clean(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        (destination / name).write_bytes(content)


def _match(source: Source, config: ModelConfig) -> dict[str, Target]:
    """Returns the tensors to convert, by their names in the source, after all checks."""
    settings = source.folder / CONFIG
    if config.n_layers > (count := len(source.tensors)):  # before a row is made for every layer
        problem = f"n_layers {config.n_layers}, but the checkpoint holds {count} tensors"
        raise CheckpointError(f"{settings} says {problem}")
    if source.family not in (None, config.family):
        problem = f"the names of the tensors are of the family {source.family}"
        raise CheckpointError(f"{settings} is of the family {config.family}, but {problem}")
    wanted, allowed = targets(config), targets(dataclasses.replace(config, weight_tying=False))
    match(source, wanted, allowed)
    names = {row.path: name for name, row in allowed.items()}
    embedding = names["embedding.weight"]
    head = source.tensors.get(names["lm_head.weight"]) if config.weight_tying else None
    if head is not None and not _equal(source.tensors[embedding].load(), head.load()):
        problem = f"{head.name!r} in {head.file.name} differs from {embedding!r}"
        raise CheckpointError(f"{settings} ties the LM head to the embedding, but {problem}")
    return wanted


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Returns whether two arrays of one size have the same bits as float32."""

    def bits(array: NDArray[Any], start: int) -> NDArray[Any]:
        return array.reshape(-1)[start : start + BLOCK].astype(np.float32).view(np.uint32)

    return all(np.array_equal(bits(a, i), bits(b, i)) for i in range(0, a.size, BLOCK))
