"""A converted checkpoint: the folder's layout, its manifest, and restoring it as a model.

    FOLDER/pdllm.json     manifest: what the folder holds, written last
    FOLDER/config.json    the architecture, as the PyTorch checkpoint states it
    FOLDER/tokenizer.*    the tokenizer's files
    FOLDER/params/        Orbax checkpoint of nnx.to_pure_dict(nnx.state(model))

The folder is written by `convert`, which renames it into place once it is whole. What is read here
is checked against the manifest before anything is allocated, so that a folder that was damaged
afterwards (a file lost or cut short in a copy) is refused by name instead of being loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pallas_kernels import AllReduceImplementation
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import mesh_sizes
from pdllm_jax.network.transformer import MaskPredictor, put_on
from pdllm_jax.storage.zarr_layout import MAX_METADATA_BYTES, METADATA, check_layout

MANIFEST = "pdllm.json"
CONFIG = "config.json"
PARAMS = "params"
FORMAT = "pdllm-jax checkpoint"
VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
# Far above any real config or index, and small enough to parse without harm.
MAX_JSON_BYTES = 100 << 20


class CheckpointError(ValueError):
    """A checkpoint folder that is not what it should be; the message names file and tensor."""


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One parameter of a converted checkpoint.

    path: keys of the pure dict joined by dots, "blocks.0.q_proj.weight".
    dtype: one of DTYPES, as stored in params/.
    source: the tensor's name in the PyTorch checkpoint.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    source: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted checkpoint holds.

    dtype: of the model, one of DTYPES; where tensors differ, the narrowest that holds them all.
    files: bytes of every file under params/, by path relative to the checkpoint's folder.
    """

    dtype: str
    tensors: tuple[TensorRecord, ...]
    files: Mapping[str, int]

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "tensors": [dataclasses.asdict(record) for record in self.tensors],
            "files": dict(self.files),
        }
        return json.dumps(content, indent=1) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; CheckpointError where it holds none or repeats a key."""
    return parse_json(read_small(path), str(path))


def read_small(path: Path) -> bytes:
    """A file's contents; CheckpointError where there is no file, or one too large for its kind."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_file():  # a pipe, which would never answer
        raise CheckpointError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    return content


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object; CheckpointError, which begins with `where`, on anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            repeated = [repr(name) for name, number in counts.items() if number > 1]
            raise CheckpointError(f"{where} repeats the key {', '.join(repeated)}")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        result = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse
        )
        if b"\\ud" in content.lower():
            json.dumps(result, ensure_ascii=False).encode("utf-8")  # half a surrogate pair
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{where} does not hold a JSON object")
    return result


def read_manifest(path: str | Path) -> Manifest:
    """Reads the manifest of a converted checkpoint and checks every file of params/ against it.

    Of the arrays' files sizes are checked, and that Zarr's metadata says of shape, dtype and files
    what the manifest says; their values are not read.

    Raises CheckpointError where the folder is no converted checkpoint, is of another version, lacks
    a file or a part of one, or holds other arrays than it says.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / MANIFEST).is_file():
        hint = " (convert it first: scripts/convert_checkpoint.py)" if _is_pytorch(folder) else ""
        raise CheckpointError(f"{folder} is not a converted checkpoint: no {MANIFEST}{hint}")
    raw = read_json(folder / MANIFEST)
    where = folder / MANIFEST
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not the manifest of a {FORMAT}")
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {raw.get('version')!r}, only {VERSION} can be read"
        )
    try:
        manifest = Manifest(
            dtype=_one_of(raw["dtype"], DTYPES),
            tensors=tuple(_record(entry) for entry in _list(raw["tensors"])),
            files={_relative(name): _size(size) for name, size in raw["files"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where} is malformed: {error!r}") from None
    paths = [record.path for record in manifest.tensors]
    if not paths or len(set(paths)) != len(paths):
        raise CheckpointError(f"{where} lists no tensors, or one twice")
    for name, size in manifest.files.items():
        file = folder / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            found = file.stat().st_size
        except OSError as error:  # a name too long, a ring of links
            raise CheckpointError(f"{where} names {name!r:.99}: {error.strerror}") from None
        if found != size:
            raise CheckpointError(f"{file} has {found} bytes where {size} were written")
    _check_arrays(folder, manifest)
    return manifest


def _check_arrays(folder: Path, manifest: Manifest) -> None:
    files: dict[str, dict[str, int]] = {}
    for name, size in manifest.files.items():
        array, _, file = name.removeprefix(f"{PARAMS}/").rpartition("/")
        files.setdefault(array, {})[file] = size
    for record in manifest.tensors:
        found = files.get(record.path, {})
        where = folder / PARAMS / record.path / METADATA
        if METADATA not in found:
            raise CheckpointError(f"{where} is missing in {MANIFEST}")
        if found.pop(METADATA) > MAX_METADATA_BYTES:
            raise CheckpointError(f"{where} is larger than {MAX_METADATA_BYTES} bytes")
        try:
            check_layout(where.read_bytes(), found, record.shape, record.dtype)
        except ValueError as error:
            raise CheckpointError(f"{where} does not describe {record.path}: {error}") from None


def load_config(path: str | Path) -> ModelConfig:
    """The architecture of a converted checkpoint, from its config.json.

    Raises CheckpointError for a folder without one, ConfigError for one that is not implemented.
    """
    return ModelConfig.from_dict(read_json(Path(path) / CONFIG))


def load_model(
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    sums: AllReduceImplementation | None = None,
) -> MaskPredictor:
    """Restores a converted checkpoint.

    path: folder written by scripts/convert_checkpoint.py.
    dtype: of weights and activations, bfloat16, float16 or float32; None keeps the checkpoint's.
    mesh: of `parallel.make_mesh`; every device then reads its part of the weights and no other.
    sums: on a mesh, as of `parallel.shard_model`.

    The arrays are read and go to JAX's default device, or the mesh, a few at a time: the host
    never holds the whole model beside the device. Raises CheckpointError for whatever is not a
    whole converted checkpoint, ConfigError for a config.json that is not implemented or a mesh that
    does not divide it, ValueError for `sums` that can't be had.
    """
    folder = Path(path).resolve()
    manifest = read_manifest(folder)
    config = load_config(folder)
    if mesh is not None:
        mesh_sizes(config, mesh)
    elif sums is not None:
        raise ValueError(f"sums {sums!r}: there is no mesh whose devices would add up anything")
    name = manifest.dtype if dtype is None else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name} is not supported ({', '.join(DTYPES)} are)")
    _check_depth(folder, manifest, config)

    # Shapes alone: no weight is drawn.
    abstract = nnx.eval_shape(
        lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(name))
    )
    graph, state = nnx.split(abstract)
    wanted = nnx.to_pure_dict(state)
    _check_shapes(folder, manifest, dict(leaves(wanted)))
    # Orbax takes as long to import as the rest of the package.
    from pdllm_jax.storage.checkpoint_arrays import read_params

    nnx.replace_by_pure_dict(state, read_params(folder / PARAMS, wanted, mesh))
    model = nnx.merge(graph, state)
    return model if mesh is None else put_on(model, mesh, sums)


def reason(error: BaseException) -> str:
    """The first line of an error's message, without TensorStore's dump of its settings."""
    line = next(iter(str(error).splitlines()), "") or repr(error)
    return line.partition(" [tensorstore_spec=")[0]


def _check_depth(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Before the skeleton is built, which takes time and memory with the number of layers."""
    layers = {
        record.path.split(".")[1]
        for record in manifest.tensors
        if record.path.startswith("blocks.")
    }
    if len(layers) != config.n_layers:
        raise CheckpointError(
            f"{folder / CONFIG} says n_layers {config.n_layers}, but the checkpoint holds "
            f"{len(layers)} layers"
        )


def _check_shapes(folder: Path, manifest: Manifest, wanted: Mapping[str, Any]) -> None:
    stored = {record.path: record.shape for record in manifest.tensors}
    problems = [f"{path} is missing" for path in wanted if path not in stored]
    problems += [f"{path} is not a parameter" for path in stored if path not in wanted]
    problems += [
        f"{path} is {list(stored[path])}, not {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in stored and stored[path] != leaf.shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems)}")


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts with their keys, joined by dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_pytorch(folder: Path) -> bool:
    return any(folder.glob("*.safetensors*")) or any(folder.glob("pytorch_model*.bin*"))


def _record(entry: Mapping[str, Any]) -> TensorRecord:
    return TensorRecord(
        path=_text(entry["path"]),
        shape=tuple(_size(size) for size in _list(entry["shape"])),
        dtype=_one_of(entry["dtype"], DTYPES),
        source=_text(entry["source"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.80} is not a list")
    return value


def _one_of(value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _relative(name: Any) -> str:
    path = PurePosixPath(_text(name))
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (PARAMS,):
        raise ValueError(f"{name!r} is not a file of {PARAMS}/")
    return name
