"""The pytrees of a snapshot as named arrays, and what each of them must look like.

One table says it all: for every field the dtype and the axes. An axis has one size throughout a
snapshot, or, where its letter is small, within one pytree. "d" is 1 or the batch size B; L, G and D
are the model's layers, KV heads and head size; "kv" is its dtype. A field that may be None
ends in "?".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pdllm_jax.engine.request import SelectedRequest, StartedRequest
from pdllm_jax.method.cache import ChunkCache, ChunkPool, DenoiseState, LiveCache
from pdllm_jax.method.selection import Selection
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.snapshot_format import Manifest, refusal

Tree = TypeVar("Tree", ChunkCache, SelectedRequest, StartedRequest)

_TREES: dict[type, dict[str, Any]] = {
    ChunkPool: {"k": "kv L z G c D", "v": "kv L z G c D", "lengths": "int32 z"},
    LiveCache: {"k": "kv L B s G D", "v": "kv L B s G D"},
    Selection: {
        "chunk_ids": "int32 B K", "scores": "float32 B K", "slots": "int32 B K ?",
    },
    ChunkCache: {
        "pool": (ChunkPool, "?"),
        "tokens": "int32 d N C", "lengths": "int32 d N",
        "prefix_ids": "int32 d P", "prefix_length": "int32 d",
        "prefix_k": "kv L d P G D ?", "prefix_v": "kv L d P G D ?",
    },
    DenoiseState: {
        "tokens": "int32 B t", "query": "int32 B Q", "query_length": "int32 B",
        "prefix_length": "int32 B", "selected": "int32 B K", "chunk_ids": "int32 B K",
        "chunk_starts": "int32 B K", "query_start": "int32 B",
        "live": (LiveCache, "?"), "pool": (ChunkPool, "?"),
        "block": "int32 B", "step": "int32 B", "stale": "bool B", "evaluations": "int32 B",
        "rescored": "int32 B", "keys": "uint32 B w",
    },
    SelectedRequest: {
        "cache": (ChunkCache, ""), "selection": (Selection, ""),
        "query": "int32 B Q", "query_length": "int32 B", "keys": "uint32 B w",
        "counts": "int32 B", "scores": "float32 B M ?",
    },
    StartedRequest: {
        "cache": (ChunkCache, "?"), "selection": (Selection, ""),
        "counts": "int32 B", "scores": "float32 B M ?", "state": (DenoiseState, ""),
    },
}  # fmt: skip

# What bounds the integers of an array: [lowest, highest] with axes, "V" tokens and "blocks".
# Wherever a number is an index, one that is out of range would read other memory or another chunk.
_RANGES = {
    "pool.lengths": (0, "c"), "tokens": (0, "V"), "lengths": (0, "C"), "prefix_ids": (0, "V"),
    "prefix_length": (0, "P"), "chunk_ids": (-1, "N"), "slots": (-1, "Z"), "query": (-1, "V"),
    "query_length": (0, "Q"), "state.tokens": (0, "V"), "state.selected": (-1, "N"),
    "state.chunk_ids": (-1, "Z"), "state.block": (0, "blocks"),
}  # fmt: skip


def arrays_of(tree: ChunkCache | SelectedRequest | StartedRequest, name: str) -> dict[str, Array]:
    """The arrays of a pytree by name, "cache.pool.k"; PRNG keys as their data."""
    return dict(_walk(tree, name))


def _walk(tree: Any, name: str) -> Iterator[tuple[str, Array]]:
    for field in _TREES[type(tree)]:
        value, where = getattr(tree, field), f"{name}.{field}" if name else field
        if isinstance(value, tuple):  # an array for each layer
            value = jnp.stack(value)
        if type(value) in _TREES:
            yield from _walk(value, where)
        elif value is not None:
            keys = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
            yield where, jax.random.key_data(value) if keys else value


def flags_of(tree: ChunkCache | SelectedRequest | StartedRequest) -> dict[str, Any]:
    """Static fields by name, the settings not among them; and the kind of the PRNG keys."""
    flags: dict[str, Any] = {}
    cache = tree if isinstance(tree, ChunkCache) else tree.cache
    if cache is not None:
        flags |= {"anchors": cache.anchors, "streamed": cache.streamed}
    if not isinstance(tree, ChunkCache):
        keys = tree.keys if isinstance(tree, SelectedRequest) else tree.state.keys
        flags |= {"requests": tree.requests, "keys": str(jax.random.key_impl(keys))}
        if isinstance(tree, StartedRequest):
            flags["live_encoded"] = tree.state.live_encoded
    return flags


def tree_of(
    kind: type[Tree], name: str, arrays: Mapping[str, Array], flags: Mapping[str, Any], **more: Any
) -> Tree:
    """The pytree again; `check_shapes` must have passed. more: static fields of the outermost."""
    fields: dict[str, Any] = {}
    for field, says in _TREES[kind].items():
        where = f"{name}.{field}" if name else field
        if isinstance(says, tuple):
            there = any(array.startswith(f"{where}.") for array in arrays)
            fields[field] = tree_of(says[0], where, arrays, flags) if there else None
        else:
            fields[field] = arrays.get(where)
    if kind is LiveCache:
        fields = {field: jnp.unstack(layers) for field, layers in fields.items()}
    if "keys" in fields:
        fields["keys"] = jax.random.wrap_key_data(fields["keys"], impl=flags["keys"])
    static = {field.name for field in dataclasses.fields(kind)} - _TREES[kind].keys() - more.keys()
    return kind(**fields, **{field: flags[field] for field in static}, **more)


def check_shapes(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Refuses arrays that are missing, too many, or of another shape or dtype than the table's.

    So what is allocated is decided by the model and by files that are there in full.
    """
    document = manifest.holds == "document"
    wanted = {f"cache.{k}": v for k, v in _TREES[ChunkCache].items()}
    if not document:
        wanted = dict(_TREES[StartedRequest if manifest.holds == "state" else SelectedRequest])
    sizes = {"L": config.n_layers, "G": config.n_kv_heads, "D": config.head_dim}
    sizes["C"] = manifest.chunking.chunk_size
    left = dict(manifest.arrays)

    def check(name: str, says: str, *, needed: bool) -> None:
        record = left.pop(name, None)
        if record is None:
            if needed and not says.endswith("?"):
                raise refusal(folder, name, "is missing")
            return
        dtype, *axes = says.removesuffix(" ?").split()
        dtype = manifest.model["dtype"] if dtype == "kv" else dtype
        if record.dtype != dtype:
            raise refusal(folder, f"{name} dtype", found=record.dtype, wanted=dtype)
        where = name.rpartition(".")[0]
        if len(axes) != len(record.shape):
            raise refusal(folder, f"{name} shape", f"is {list(record.shape)}, of another rank")
        for axis, size in zip(axes, record.shape, strict=True):
            known = sizes.setdefault(axis if axis.isupper() else f"{where} {axis}", size)
            if known != size:
                raise refusal(
                    folder, f"{name} shape", f"is {list(record.shape)}: {axis} is {known} elsewhere"
                )

    def walk(fields: Mapping[str, Any], prefix: str) -> None:
        for field, says in fields.items():
            name = f"{prefix}{field}"
            if isinstance(says, str):
                check(name, says, needed=True)
                continue
            kind, optional = says
            if any(array.startswith(f"{name}.") for array in left):
                walk(_TREES[kind], f"{name}.")
            elif not optional:
                raise refusal(folder, name, "is missing")

    walk(wanted, "")
    if left:
        raise refusal(folder, next(iter(left)), "is no array of such a snapshot")
    if not document and sizes.get("cache d", 1) not in (1, sizes["B"]):
        raise refusal(folder, "cache.tokens shape", f"has {sizes['cache d']} documents")
    if sizes.get("cache.pool c", sizes["C"]) != sizes["C"]:
        raise refusal(folder, "cache.pool.k shape", f"has chunks of other than {sizes['C']} tokens")
    _check_flags(folder, manifest)


def _check_flags(folder: Path, manifest: Manifest) -> None:
    """Exactly the static fields that go with the arrays, each of its type."""
    names = {name.partition(".")[0] for name in manifest.arrays}
    types: dict[str, type] = {}
    if "cache" in names:
        types |= {"anchors": bool, "streamed": bool}
    if manifest.holds != "document":
        types |= {"requests": int, "keys": str}
    if "state" in names:
        types["live_encoded"] = bool
    found = {name: type(value) for name, value in manifest.flags.items()}
    if found != types:
        raise refusal(folder, "flags", found=dict(manifest.flags), wanted=sorted(types))
    asked, decode = manifest.holds != "document", manifest.decode is not None
    # A selection may say how it is meant to be decoded.
    fits = asked if decode else manifest.holds != "state"
    if (
        (manifest.selecting is not None) != asked
        or not fits
        or ("state" in names) != (manifest.holds == "state")
    ):
        raise refusal(folder, "holds", f"{manifest.holds!r} does not go with its contents")
    if manifest.holds != "document":
        where = "state.keys" if manifest.holds == "state" else "keys"
        requests, (batch, width) = manifest.flags["requests"], manifest.arrays[where].shape
        if not 0 < requests <= batch:
            raise refusal(folder, "flags.requests", f"is {requests} in a batch of {batch}")
        key = jax.random.key(0)
        wanted_keys = str(jax.random.key_impl(key))
        if manifest.flags["keys"] != wanted_keys:
            raise refusal(folder, "flags.keys", found=manifest.flags["keys"], wanted=wanted_keys)
        words = jax.random.key_data(key).size
        for name in ("keys", "state.keys"):
            if name in manifest.arrays and manifest.arrays[name].shape[-1] != words:
                raise refusal(
                    folder, f"{name} shape", f"is {[batch, width]}: keys have {words} words"
                )
    if "cache" in names and manifest.flags["anchors"] != manifest.chunking.anchors:
        raise refusal(folder, "chunking.anchors", "is not what the cache says")


def check_values(
    folder: Path, manifest: Manifest, arrays: Mapping[str, Array], config: ModelConfig
) -> None:
    """Refuses indices and lengths that are out of range."""
    shapes = {name: record.shape for name, record in manifest.arrays.items()}
    pool = shapes.get("state.pool.lengths", shapes.get("cache.pool.lengths", (0,)))
    highest = {"V": config.embedding_size - 1, "Z": pool[0] - 1, "C": manifest.chunking.chunk_size}
    highest["N"] = int(np.max(arrays["counts"])) - 1 if "counts" in arrays else 0
    if "cache.lengths" in shapes:
        highest |= {"N": shapes["cache.lengths"][-1] - 1, "P": shapes["cache.prefix_ids"][-1]}
    else:
        highest["P"] = np.iinfo(np.int32).max
    for name in ("query", "state.query"):
        if name in shapes:
            highest["Q"] = shapes[name][-1]
    if manifest.decode is not None:
        highest["blocks"] = manifest.decode.n_blocks
    for name, array in arrays.items():
        bounds = _RANGES.get(name) or next(
            (
                limits
                for ending, limits in _RANGES.items()
                if not ending.startswith("state.") and name.endswith(f".{ending}")
            ),
            None,
        )
        if bounds is None or not array.size:
            continue
        low, axis = bounds
        high = shapes[name.replace("lengths", "k")][3] if axis == "c" else highest[axis]
        values = np.asarray(array)
        if values.min() < low or values.max() > high:
            outside = int(values.min() if values.min() < low else values.max())
            raise refusal(folder, name, f"holds {outside}, outside [{low}, {high}]")
