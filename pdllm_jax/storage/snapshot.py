"""KV snapshots on disk: an encoded document, or requests between prefill and decode.

A snapshot is written whole or not at all, and loads where model, RoPE settings, dtype and tokenizer
are those that it was made with, on whatever mesh. docs/snapshots.md has the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.request import SelectedRequest, StartedRequest
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.network.sharding import sharding_of
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.atomic import AtomicFolder, check_space, write_errors
from pdllm_jax.storage.fingerprint import (
    ModelIdentity,
    document_fingerprint,
    model_identity,
    tokenizer_fingerprint,
)
from pdllm_jax.storage.snapshot_format import (
    ARRAYS,
    MANIFEST,
    ArrayRecord,
    Holds,
    Manifest,
    SnapshotError,
    check_files,
    check_matches,
    model_fields,
    read_manifest,
    refusal,
)
from pdllm_jax.storage.snapshot_tree import arrays_of, check_shapes, check_values, flags_of, tree_of
from pdllm_jax.tokenizer import Tokenizer

# Where an array of a snapshot goes, by its name ("cache.pool.k", "state.tokens", ...).
Placement = Callable[[str], Sharding]


class Document(NamedTuple):
    """A snapshot's document, and how it was cut."""

    cache: ChunkCache
    chunking: ChunkConfig


def save_document(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    cache: ChunkCache,
    *,
    chunking: ChunkConfig,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a document that was encoded (`encode_document`, `encode_text`, `prefill`).

    Args:
      path: folder to make; its parent exists.
      model: that the cache was made with; its identity (`model_identity`) saves the fingerprint
        where many snapshots are written.
      cache: with or without a pool, of one document or a batch.
      chunking: that the document was cut with.
      tokenizer: that made its ids, if any did.
      overwrite: replaces a snapshot that stands at `path`.

    Raises:
      SnapshotError: an occupied destination, a full disk, a cache that is not of this model;
        nothing is left behind then.
    """
    _save(path, model, "document", cache, chunking, tokenizer, overwrite)


def load_document(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    *,
    tokenizer: Tokenizer | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> Document:
    """Restores a document for `ask`, `score_chunks` or `init_denoise`.

    Args:
      tokenizer: that questions will be asked with; None where they are asked as ids.
      placement: sharding of each array, by name, on any mesh or memory.
      mesh: that all goes to where no placement is given, as `parallel.spec_of` says: by default the
        model's own; without one, JAX's default device.

    Raises:
      SnapshotError: names what does not match, what is damaged, or what else the snapshot holds.
    """
    manifest, arrays = _load(path, model, "document", tokenizer, placement, mesh)
    return Document(tree_of(ChunkCache, "cache", arrays, manifest.flags), manifest.chunking)


def save_request(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    request: SelectedRequest | StartedRequest,
    *,
    chunking: ChunkConfig,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes requests between prefill and decode: what `Engine.prefill` has returned.

    The rest as `save_document`. `drop_other_chunks` before it leaves out KV that is not needed.
    """
    holds: Holds = "state" if isinstance(request, StartedRequest) else "selection"
    _save(path, model, holds, request, chunking, tokenizer, overwrite)


def load_request(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    *,
    tokenizer: Tokenizer | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> SelectedRequest | StartedRequest:
    """Restores what `Engine.decode` goes on from.

    Arguments and errors as `load_document`.
    """
    manifest, arrays = _load(path, model, "", tokenizer, placement, mesh)
    fields = {
        "config": manifest.selecting,
        "decoding": manifest.decode,
        "requests": manifest.flags["requests"],
    }
    if manifest.holds == "state":
        return tree_of(StartedRequest, "", arrays, manifest.flags, **fields)
    return tree_of(SelectedRequest, "", arrays, manifest.flags, **fields)


def snapshot_holds(path: str | Path) -> Holds:
    """What a snapshot says that it holds; SnapshotError for a folder that is none."""
    return read_manifest(Path(path)).holds


def is_snapshot(folder: Path) -> bool:
    """Whether a folder looks like a snapshot, whole or not, and like nothing else."""
    names = {entry.name for entry in folder.iterdir()}
    return MANIFEST in names and names <= {MANIFEST, ARRAYS}


def require_one_process(target: Path) -> None:
    """Refuses to write where several processes are one mesh."""
    if jax.process_count() > 1:
        raise SnapshotError(f"{target}: a snapshot is written by one process, not by several")


def _placement(manifest: Manifest, mesh: Mesh | None) -> Placement:
    if mesh is not None:
        return lambda name: sharding_of(mesh, name, manifest.arrays[name].shape)
    # The device that JAX would place a new array on, jax.default_device included.
    default = jax.device_put(0).sharding
    return lambda name: default


def _identity(model: MaskPredictor | ModelIdentity) -> ModelIdentity:
    return model if isinstance(model, ModelIdentity) else model_identity(model)


def check_destination(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses, as saving does, a place where no snapshot can be made: SnapshotError."""
    _staged(Path(path).absolute(), overwrite).check()


def _staged(target: Path, overwrite: bool) -> AtomicFolder:
    return AtomicFolder(
        target, overwrite=overwrite, replaceable=is_snapshot, kind="snapshot", error=SnapshotError
    )


def _save(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    holds: Holds,
    tree: ChunkCache | SelectedRequest | StartedRequest,
    chunking: ChunkConfig,
    tokenizer: Tokenizer | None,
    overwrite: bool,
) -> None:
    target = Path(path).absolute()
    require_one_process(target)
    staged = _staged(target, overwrite)
    staged.check()
    prefilled = None if isinstance(tree, ChunkCache) else tree
    if prefilled is not None and prefilled.config.has_code:
        raise SnapshotError(
            "a snapshot cannot hold a scorer or an encoding given as an object of another class",
            field="selecting",
        )
    if prefilled is not None and prefilled.decoding is not None and prefilled.decoding.has_code:
        raise SnapshotError(
            "a snapshot cannot hold remasking or unmask given as functions: save without a state, "
            "with decoding=None, and give them to the Engine that decodes",
            field="decode",
        )
    identity = _identity(model)
    arrays = arrays_of(tree, "" if prefilled else "cache")
    cache = prefilled.cache if prefilled else tree
    document = None
    if isinstance(cache, ChunkCache):
        document = document_fingerprint(
            cache.prefix_ids, cache.prefix_length, cache.tokens, cache.lengths
        )
    model_says, rope_says = model_fields(identity)
    manifest = Manifest(
        holds=holds,
        model=model_says,
        rope=rope_says,
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        document=document,
        chunking=chunking,
        selecting=prefilled.config if prefilled else None,
        decode=prefilled.decoding if prefilled else None,
        flags=flags_of(tree),
        arrays={k: ArrayRecord(tuple(v.shape), str(v.dtype)) for k, v in arrays.items()},
        files={},
    )
    check_shapes(target, manifest, identity.config)
    check_space(target.parent, sum(x.nbytes for x in manifest.arrays.values()), SnapshotError)
    with staged, write_errors(target, SnapshotError):
        from pdllm_jax.storage.snapshot_arrays import write_arrays  # Orbax: slow to import

        files = write_arrays(staged.path, arrays)
        manifest = dataclasses.replace(manifest, files=files)
        (staged.path / MANIFEST).write_bytes(manifest.to_json())
        staged.commit()


def _load(
    path: str | Path,
    model: MaskPredictor | ModelIdentity,
    holds: str,
    tokenizer: Tokenizer | None,
    placement: Placement | None,
    mesh: Mesh | None,
) -> tuple[Manifest, Mapping[str, Array]]:
    folder = Path(path).absolute()
    manifest = read_manifest(folder)
    if (manifest.holds == "document") != (holds == "document"):
        wanted = holds or "selection or state"
        raise refusal(folder, "holds", found=manifest.holds, wanted=wanted)
    identity = _identity(model)
    check_matches(
        folder,
        manifest,
        identity,
        None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    )
    check_shapes(folder, manifest, identity.config)
    check_files(folder, manifest)
    if mesh is None and not isinstance(model, ModelIdentity):
        mesh = model.mesh
    from pdllm_jax.storage.snapshot_arrays import read_arrays  # Orbax: slow to import

    arrays = read_arrays(folder, manifest, placement or _placement(manifest, mesh))
    check_values(folder, manifest, arrays, identity.config)
    return manifest, arrays
