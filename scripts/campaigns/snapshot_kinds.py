"""Broken snapshots, most of them signed anew, as somebody who means harm would.

What loads is compared with the files' bytes, read by NumPy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from campaigns import samples, zarr
from campaigns.kind import Kind, require
from campaigns.mutate import mutated_bytes, mutated_json, mutated_value
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.request import Prefilled
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.method.selection import Selection
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.fingerprint import ModelIdentity
from pdllm_jax.storage.snapshot import (
    load_document,
    load_prefilled,
    save_document,
    save_prefilled,
    snapshot_holds,
)
from pdllm_jax.storage.snapshot_format import MANIFEST, SnapshotError, settings
from pdllm_jax.storage.snapshot_tree import arrays_of

CHUNKS = ChunkConfig(4)
IDENTITY = ModelIdentity(
    ModelConfig.from_dict(samples.config(d_model=16, n_heads=2, n_kv_heads=1)), "bfloat16", "0" * 64
)


def document(seed: int = 0, chunks: int = 3) -> ChunkCache:
    """A cache of random numbers: nothing is encoded."""
    rng, config = np.random.default_rng(seed), IDENTITY.config

    def kv(*middle: int) -> jax.Array:
        shape = (config.n_layers, *middle, config.head_dim)
        return jnp.asarray(rng.standard_normal(shape), IDENTITY.dtype)

    lengths = jnp.asarray([4] * (chunks - 1) + [2], jnp.int32)
    return ChunkCache(
        pool=ChunkPool(kv(chunks, config.n_kv_heads, 4), kv(chunks, config.n_kv_heads, 4), lengths),
        tokens=jnp.asarray(rng.integers(0, 250, (1, chunks, 4)), jnp.int32),
        lengths=lengths[None],
        prefix_ids=jnp.asarray(rng.integers(0, 250, (1, 4)), jnp.int32),
        prefix_length=jnp.asarray([3], jnp.int32),
        prefix_k=kv(1, 4, config.n_kv_heads),
        prefix_v=kv(1, 4, config.n_kv_heads),
    )


def request() -> Prefilled:
    """A request for that document, its chunks chosen."""
    return Prefilled(
        cache=document(),
        selection=Selection(jnp.asarray([[0, 2]], jnp.int32), jnp.asarray([[1.0, 0.5]])),
        query=jnp.asarray([[5, 6, 7, -1]], jnp.int32), query_length=jnp.asarray([3], jnp.int32),
        keys=jax.random.key(0)[None], counts=jnp.asarray([3], jnp.int32),
        scores=jnp.asarray([[1.0, -1.0, 0.5]]), state=None,
        selecting=SelectionConfig(top_k=2, encoding="independent"), decode=DecodeConfig(8, 4),
        requests=1,
    )  # fmt: skip


class Snapshots(Kind):
    """A folder of a document or a request: its manifest, arrays and their metadata."""

    name = "snapshot"
    refusals = (SnapshotError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        save_document(folder / "document", IDENTITY, document(), chunking=CHUNKS)
        save_prefilled(folder / "request", IDENTITY, request(), chunking=CHUNKS)
        self.good = {name: zarr.contents(folder / name) for name in ("document", "request")}
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        self.bait = outside / "bait"
        self.bait.write_bytes(b"bait")
        self.case = folder / "document"
        self.files = self.good["document"]

    def write(self, rng: Random) -> None:
        files = dict(self.good[rng.choice(("document", "document", "request"))])
        names = [name for name in files if name != MANIFEST]
        manifest: Any = None
        strange = None
        kind = rng.randrange(10)
        if kind == 0:  # not signed: must be refused, wherever it is
            name = rng.choice([MANIFEST, *names])
            files[name] = mutated_bytes(rng, files[name])
        elif kind == 1:
            name = rng.choice(names)
            strange = rng.choice(("remove", "link", "pipe", "folder", "more")), name
        elif kind == 2:  # files exchanged, their checksums with them
            a, b = rng.choice(names), rng.choice(names)
            files[a], files[b] = files[b], files[a]
            manifest = json.loads(files[MANIFEST])
        elif kind in (3, 4):
            name = rng.choice(names)
            files[name] = mutated_bytes(rng, files[name])
            manifest = json.loads(files[MANIFEST])
        elif kind in (5, 6):
            name = rng.choice([name for name in names if name.endswith(".zarray")])
            files[name] = mutated_json(rng, files[name])
            manifest = json.loads(files[MANIFEST])
        elif kind == 7:
            manifest = self._agreeing(rng, files)
        else:
            manifest = mutated_value(rng, json.loads(files[MANIFEST]))
        if manifest is not None:
            files[MANIFEST] = self._signed(rng, manifest, files, checksums=kind < 8)
        self.files = files
        self.case = self.folder / "case"
        zarr.replace(self.case, files)
        if strange is not None:
            zarr.make_strange(self.case / strange[1], strange[0], self.bait)

    def _agreeing(self, rng: Random, files: dict[str, bytes]) -> Any:
        """An array of another shape, about which manifest, metadata and file agree."""
        manifest = json.loads(files[MANIFEST])
        name = rng.choice(list(manifest["arrays"]))
        shape, dtype = manifest["arrays"][name]
        if shape and rng.random() < 0.8:
            axis = rng.randrange(len(shape))
            shape[axis] = max(1, shape[axis] + rng.choice((-1, 1, 1, 2)))
        else:
            shape.append(1)
        meta = f"arrays/{name}/.zarray"
        stored = json.loads(files[meta])
        files[meta] = json.dumps({**stored, "shape": shape, "chunks": shape or []}).encode()
        for other in [x for x in files if x.startswith(f"arrays/{name}/") and x != meta]:
            del files[other]
            del manifest["files"][other]
        nbytes = int(np.prod(shape)) * zarr.numpy_dtype(dtype).itemsize
        place = ".".join("0" for _ in shape) or "0"
        content = rng.randbytes(nbytes) if rng.random() < 0.5 else bytes(nbytes)
        files[f"arrays/{name}/{place}"] = content
        manifest["files"][f"arrays/{name}/{place}"] = [nbytes, 0]
        return manifest

    def _signed(
        self, rng: Random, manifest: Any, files: dict[str, bytes], *, checksums: bool
    ) -> bytes:
        """The manifest's bytes with checksums and digest as they ought to be."""
        if not isinstance(manifest, dict):
            return json.dumps(manifest).encode()
        if checksums and isinstance(manifest.get("files"), dict):
            for name in manifest["files"]:
                if name in files:
                    manifest["files"][name] = [len(files[name]), zlib.crc32(files[name])]
        manifest.pop("digest", None)
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
        return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()

    def load(self) -> Any:
        if snapshot_holds(self.case) == "document":
            return load_document(self.case, IDENTITY)
        return load_prefilled(self.case, IDENTITY)

    def check(self, loaded: Any) -> None:
        raw = json.loads(self.files[MANIFEST])
        found = dict(arrays_of(*loaded_tree(loaded)))
        require(found.keys() == raw["arrays"].keys(), "other arrays")
        for name, array in found.items():
            shape, dtype = raw["arrays"][name]
            require(list(array.shape) == shape and str(array.dtype) == dtype, f"kind of {name}")
            want = zarr.read(self.files, f"arrays/{name}/", shape, dtype)
            require(np.asarray(array).tobytes() == want.tobytes(), f"values of {name}")
        for path in self.case.rglob("*"):
            require(not path.is_symlink(), "a link was followed")
        says = {"chunking": raw["chunking"]}
        if isinstance(loaded, Prefilled):
            for field in ("selecting", "decode"):
                as_json = json.loads(json.dumps(settings(getattr(loaded, field))))
                require(as_json == raw[field], f"other settings: {field}")
            require(loaded.requests == raw["flags"]["requests"], "requests")
        else:
            require(dataclasses.asdict(loaded.chunking) == says["chunking"], "another chunking")


def loaded_tree(loaded: Any) -> tuple[Any, str]:
    """What `arrays_of` takes."""
    return (loaded, "") if isinstance(loaded, Prefilled) else (loaded.cache, "cache")


KINDS = (Snapshots,)
