"""KV snapshots: an encoded document, or requests between prefill and decode, in a folder.

    FOLDER/manifest.json   model, tokenizer, settings, tree of arrays, checksum of every file
    FOLDER/arrays/         the arrays by their path in the pytree ("cache.pool.k"), through Orbax

A snapshot is written completely or not at all, and loads onto any mesh. The code walks dataclasses
by their fields and annotations, so that a new field needs no change here. docs/snapshots.md
describes the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.request import SelectedRequest, StartedRequest
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.network.sharding import sharding_of
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.arrays import heads_axis, read_arrays, write_arrays
from pdllm_jax.storage.atomic import AtomicFolder
from pdllm_jax.storage.fingerprint import (
    YOUNGER_FIELDS,
    ModelIdentity,
    document_fingerprint,
    model_fields,
    model_identity,
    tokenizer_fingerprint,
)
from pdllm_jax.storage.manifest import (
    MANIFEST,
    FolderKind,
    errors_as,
    read_manifest,
    write_manifest,
)
from pdllm_jax.tokenizer import Tokenizer

Holds = Literal["document", "selection", "state"]
Model = MaskPredictor | ModelIdentity
# Where to place an array of a snapshot, by its path ("cache.pool.k", "state.tokens").
Placement = Callable[[str], Sharding]

ARRAYS = "arrays"


class SnapshotError(ValueError):
    """A snapshot is damaged, belongs to something else, or cannot be written.

    Args:
      field: what is wrong, such as "rope.theta"; empty for files.
      found, wanted: the two values where two were compared, otherwise None.
    """

    def __init__(
        self, message: str, *, field: str = "", found: Any = None, wanted: Any = None
    ) -> None:
        super().__init__(message)
        self.field, self.found, self.wanted = field, found, wanted


# The class of what a snapshot holds, and the path of its root.
_ROOTS: dict[Holds, tuple[type, str]] = {
    "document": (ChunkCache, "cache"),
    "selection": (SelectedRequest, ""),
    "state": (StartedRequest, ""),
}
SNAPSHOT = FolderKind("snapshot", 2, SnapshotError, "write it again with this version")


class Document(NamedTuple):
    """An encoded document, and the settings it was chunked with."""

    cache: ChunkCache
    chunking: ChunkConfig


def save_document(
    path: str | Path,
    model: Model,
    cache: ChunkCache,
    *,
    chunking: ChunkConfig,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an encoded document.

    Args:
      path: folder to make; its parent exists.
      model: the model that encoded the document. `model_identity(model)` saves computing the
        fingerprint again for every snapshot.
      cache: with or without a pool, of one document or a batch.
      chunking: settings that the document was chunked with.
      tokenizer: the tokenizer of the ids; None for ids of another origin.
      overwrite: replaces an existing snapshot at `path`.

    Raises:
      SnapshotError: the destination exists, the disk is full, or the cache does not fit the model;
        then nothing is left behind.
    """
    _save(_folder(path, overwrite), model, cache, chunking, tokenizer)


def load_document(
    path: str | Path,
    model: Model,
    *,
    tokenizer: Tokenizer | None = None,
    document: str | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> Document:
    """Restores an encoded document; every checksum is compared.

    Args:
      path: a snapshot that `save_document` wrote.
      model: the model that will use the document.
      tokenizer: the tokenizer of the questions; None for questions as ids.
      document: the `document_fingerprint` to expect; None accepts any document.
      placement: sharding of each array, by its path, on any mesh and memory.
      mesh: where arrays go without a placement, as `sharding.spec_of` says: by default the model's
        mesh; without a mesh, JAX's default device.

    Raises:
      SnapshotError: names what does not match, what is damaged, or what the snapshot holds instead.
    """
    settings, cache = _load(path, model, ("document",), tokenizer, document, placement, mesh)
    return Document(cache, ChunkConfig(**settings["chunking"]))


def save_request(
    path: str | Path,
    model: Model,
    request: SelectedRequest | StartedRequest,
    *,
    chunking: ChunkConfig,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a request, or a batch of them, between prefill and decode.

    Arguments and errors as `save_document`. `drop_other_chunks(request)` needs less space.
    """
    _save(_folder(path, overwrite), model, request, chunking, tokenizer)


def load_request(
    path: str | Path,
    model: Model,
    *,
    tokenizer: Tokenizer | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> SelectedRequest | StartedRequest:
    """Restores a request that `save_request` wrote. Arguments and errors as `load_document`."""
    return _load(path, model, ("selection", "state"), tokenizer, None, placement, mesh)[1]


def snapshot_holds(path: str | Path) -> Holds:
    """Returns what a snapshot says that it holds; SnapshotError for another folder."""
    return read_manifest(Path(path), SNAPSHOT).settings["holds"]


def check_destination(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises the SnapshotError that saving would raise for this destination."""
    _folder(path, overwrite).check()


def require_one_process(target: Path) -> None:
    """Raises SnapshotError where several processes share a mesh."""
    if jax.process_count() > 1:
        raise SnapshotError(f"{target}: a snapshot is written by one process, not by several")


def _folder(path: str | Path, overwrite: bool) -> AtomicFolder:
    def replaceable(names: set[str]) -> bool:
        return {MANIFEST} <= names <= {MANIFEST, ARRAYS}

    return AtomicFolder(Path(path).absolute(), SNAPSHOT, replaceable, overwrite)


def _identity(model: Model) -> ModelIdentity:
    return model if isinstance(model, ModelIdentity) else model_identity(model)


def _save(
    out: AtomicFolder, model: Model, tree: Any, chunking: ChunkConfig, tokenizer: Tokenizer | None
) -> None:
    require_one_process(out.destination)
    out.check()
    identity = _identity(model)
    holds = next(name for name, (kind, _) in _ROOTS.items() if isinstance(tree, kind))
    arrays, content = pack(tree, _ROOTS[holds][1])
    _check_heads(out.destination, arrays, identity)
    cache = tree if isinstance(tree, ChunkCache) else tree.cache
    ids = cache and (cache.prefix_ids, cache.prefix_length, cache.tokens, cache.lengths)
    settings = {
        "holds": holds,
        "model": model_fields(identity),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "document": ids and document_fingerprint(*ids),
        "chunking": dataclasses.asdict(chunking),
        "tree": content,
        "arrays": {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()},
    }
    with out.write(sum(x.nbytes for x in arrays.values())) as partial:
        write_arrays(partial / ARRAYS, arrays)
        write_manifest(partial, SNAPSHOT, settings)


def _load(
    path: str | Path,
    model: Model,
    wanted: tuple[Holds, ...],
    tokenizer: Tokenizer | None,
    document: str | None,
    placement: Placement | None,
    mesh: Mesh | None,
) -> tuple[Mapping[str, Any], Any]:
    folder = Path(path).absolute()
    manifest = read_manifest(folder, SNAPSHOT)
    settings = manifest.settings
    if settings["holds"] not in wanted:
        raise _mismatch(folder, "holds", settings["holds"], " or ".join(wanted))
    both = settings["model"], model_fields(_identity(model))
    saved, current = ({**YOUNGER_FIELDS, **fields} for fields in both)
    # The fingerprint of the weights comes last: another field says more.
    for name in sorted(saved.keys() | current.keys(), key="model.weights".__eq__):
        if saved.get(name) != current.get(name):
            raise _mismatch(folder, name, saved.get(name), current.get(name))
    expected = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    for name, fingerprint in (("tokenizer", expected), ("document", document)):
        if fingerprint is not None and settings[name] != fingerprint:
            raise _mismatch(folder, name, settings[name], fingerprint)
    manifest.check()
    if mesh is None and isinstance(model, MaskPredictor):
        mesh = model.mesh
    default = jax.device_put(0).sharding  # obeys jax.default_device

    def target(name: str, shape: list[int], dtype: str) -> jax.ShapeDtypeStruct:
        place = default if mesh is None else sharding_of(mesh, name, shape)
        place = place if placement is None else placement(name)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    targets = {name: target(name, *form) for name, form in settings["arrays"].items()}
    empty = {name: x for name, x in targets.items() if not x.size}
    root, name = _ROOTS[settings["holds"]]
    with errors_as(SnapshotError, f"snapshot {folder} cannot be restored"):
        arrays = read_arrays(folder / ARRAYS, {n: x for n, x in targets.items() if n not in empty})
        for n, x in empty.items():
            arrays[n] = jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
        return settings, unpack(settings["tree"], root, arrays, name)


def _mismatch(folder: Path, field: str, found: Any, wanted: Any) -> SnapshotError:
    message = f"snapshot {folder}: {field} is {found!r:.80} where {wanted!r:.80} is wanted"
    return SnapshotError(message, field=field, found=found, wanted=wanted)


def _check_heads(folder: Path, arrays: Mapping[str, Array], identity: ModelIdentity) -> None:
    """Refuses KV of another dtype, or with other heads, than the model's."""
    config = identity.config
    wanted = config.n_kv_heads, config.head_dim, identity.dtype
    for name, array in arrays.items():
        if (axis := heads_axis(name, array.shape)) is not None:
            heads = array.shape[axis], array.shape[-1], str(array.dtype)
            if name.endswith(".scale"):  # of values in 8 bits
                heads = heads[0], *wanted[1:]
            elif name.endswith(".values") and heads[2] == "float8_e4m3fn":
                heads = *heads[:2], wanted[2]
            if heads != wanted:
                raise _mismatch(folder, f"{name} (heads, head size, dtype)", heads, wanted)


def pack(tree: Any, name: str = "") -> tuple[dict[str, Array], Any]:
    """Splits a tree of dataclasses and tuples into arrays and JSON; `name` is the root's path.

    Returns:
      Arrays by path (data of PRNG keys), and the tree as JSON: a dataclass is an object with its
      class and fields, an array null or the kind of its PRNG keys, a missing one null.

    Raises:
      SnapshotError: names a field that holds something else, such as a function.
    """
    arrays: dict[str, Array] = {}

    def visit(value: Any, hint: Any, path: str) -> Any:
        kind = type(value)
        if isinstance(value, jax.Array | np.ndarray):
            keys = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
            arrays[path] = jax.random.key_data(value) if keys else jnp.asarray(value)
            return str(jax.random.key_impl(value)) if keys else None
        if isinstance(value, SelectionConfig | DecodeConfig) and not value.has_code:
            return {"class": kind.__name__, "settings": value.to_flat()}
        if isinstance(value, SelectionConfig | DecodeConfig):
            problem = "holds a custom function or object: a snapshot holds no code"
            raise SnapshotError(f"{path} {problem}", field=path)
        if kind in _classes(hint):
            hints, content = get_type_hints(kind), {"class": kind.__name__}
            for field in _fields(kind):
                where = f"{path}.{field}".strip(".")
                content[field] = visit(getattr(value, field), hints[field], where)
            return content
        if isinstance(value, tuple):
            return [visit(x, hint, f"{path}.{i}") for i, x in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        problem = f"is {value!r:.60}: a snapshot holds arrays and settings, not code"
        raise SnapshotError(f"{path} {problem}", field=path)

    content = visit(tree, type(tree), name)
    return arrays, content


def unpack(content: Any, hint: Any, arrays: Mapping[str, Array], path: str = "") -> Any:
    """Builds the tree that `pack` split; `hint` is the annotation, which names its classes."""
    if path in arrays:
        data = arrays[path]
        return data if content is None else jax.random.wrap_key_data(data, impl=content)
    if isinstance(content, dict):
        kind = next(x for x in _classes(hint) if x.__name__ == content["class"])
        if issubclass(kind, SelectionConfig | DecodeConfig):
            return kind.from_flat(**content["settings"])
        hints = get_type_hints(kind)
        fields = {
            name: unpack(value, hints.get(name), arrays, f"{path}.{name}".strip("."))
            for name, value in content.items()
            if name != "class"
        }
        return kind(**fields)
    if isinstance(content, list):
        return tuple(unpack(x, hint, arrays, f"{path}.{i}") for i, x in enumerate(content))
    return content


def _fields(kind: Any) -> tuple[str, ...]:
    """Returns the names of the fields of a dataclass or a NamedTuple, of another class none."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return getattr(kind, "_fields", ())


def _classes(hint: Any) -> list[type]:
    """Returns the dataclasses and NamedTuples that an annotation names."""
    if isinstance(hint, type) and _fields(hint):
        return [hint]
    return [kind for part in get_args(hint) for kind in _classes(part)]
