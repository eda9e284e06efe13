"""Broken converted checkpoints: the manifest, and what lies in params/, loaded and going back.

What loads is compared with the JSON as it stands, and with arrays that NumPy reads.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from campaigns import samples, zarr
from campaigns.kind import Kind, require
from campaigns.mutate import dumped, mutated_bytes, mutated_json, mutated_value
from convert import convert
from convert.export import reverse
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.checkpoint import (
    MANIFEST,
    PARAMS,
    CheckpointError,
    Manifest,
    leaves,
    load_config,
    read_manifest,
)
from pdllm_jax.storage.checkpoint_arrays import read_params

# Of an array's metadata: each asks for memory, for code, or for other values than the file's.
LIES = (
    ("compressor", {"id": "zlib", "level": 9}), ("compressor", {"id": "blosc"}),
    ("filters", [{"id": "pickle"}]), ("filters", []), ("shape", [1 << 40, 1 << 20]),
    ("chunks", [1 << 40, 1 << 20]), ("chunks", [1 << 28]), ("chunks", [1, 1]), ("chunks", []),
    ("dtype", "|O"), ("dtype", ">f4"), ("dtype", "<f8"), ("dtype", "<i4"),
    ("dtype", [["a", "<f4"]]), ("order", "F"), ("zarr_format", 3), ("fill_value", 1.0),
    ("dimension_separator", "/"),
)  # fmt: skip


class Conversion(Kind):
    """pdllm.json, the manifest of a converted checkpoint, beside its parameters."""

    name = "manifest"
    refusals = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.target = folder / "converted"
        convert(samples.write_checkpoint(folder / "source"), self.target)
        self.path = self.target / MANIFEST
        self.good = self.path.read_bytes()
        self.content = self.good

    def write(self, rng: Random) -> None:
        if rng.random() < 0.3:
            value = json.loads(self.good)
            files = value["files"]
            name = rng.choice(list(files))
            files[rng.choice((name, "params/../config.json", "/etc/passwd", "params/\0"))] = (
                files.pop(name) + rng.choice((0, 0, 1, -1))
            )
            self.content = dumped(rng, value)
        elif rng.random() < 0.5:
            self.content = dumped(rng, mutated_value(rng, json.loads(self.good)))
        else:
            self.content = mutated_json(rng, self.good)
        self.path.write_bytes(self.content)

    def load(self) -> Manifest:
        return read_manifest(self.target)

    def check(self, loaded: Manifest) -> None:
        raw = json.loads(self.content)
        says = json.loads(loaded.to_json())
        rows = [
            {key: row[key] for key in ("path", "shape", "dtype", "source")}
            for row in raw["tensors"]
        ]
        require(says["tensors"] == rows, "other tensors")
        require(says["files"] == raw["files"] and says["dtype"] == raw["dtype"], "other files")
        for name, size in raw["files"].items():
            path = (self.target / name).resolve()
            require(path.is_relative_to(self.target / "params"), f"{name!r} is elsewhere")
            require(path.stat().st_size == size, f"{name!r} has another size")


class Parameters(Kind):
    """What a converted checkpoint's params/ holds, under a manifest that agrees with the sizes."""

    name = "params"
    refusals = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        small = {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "weight_tying": True}
        self.target = folder / "converted"
        convert(samples.write_checkpoint(folder / "source", **small), self.target)
        self.good = zarr.contents(self.target)
        self.files = self.good
        model = nnx.eval_shape(lambda: MaskPredictor(load_config(self.target), rngs=nnx.Rngs(0)))
        self.wanted = nnx.to_pure_dict(nnx.state(model))
        self.bait = folder.parent / "outside" / "bait"
        self.bait.parent.mkdir(exist_ok=True)
        self.bait.write_bytes(b"bait")

    def write(self, rng: Random) -> None:
        files = dict(self.good)
        names = [name for name in files if name.startswith(f"{PARAMS}/")]
        metadata = [name for name in names if name.endswith(".zarray")]
        strange = None
        kind = rng.randrange(11)
        if kind == 10:
            self._smuggle(rng, files)
        elif kind < 2:
            name = rng.choice(names)
            files[name] = mutated_bytes(rng, files[name])
        elif kind < 5:
            name = rng.choice(metadata)
            files[name] = mutated_json(rng, files[name])
        elif kind == 5:
            name = rng.choice(metadata)
            stored = json.loads(files[name])
            key, value = rng.choice(LIES)
            files[name] = json.dumps({**stored, key: value}).encode()
            name = name.removesuffix(".zarray") + ".".join("0" * len(stored["shape"]))
            if rng.random() < 0.5:
                files[name] = zlib.compress(bytes(rng.choice((1 << 10, 1 << 24))))
        elif kind < 8:
            name = f"{PARAMS}/_METADATA"
            files[name] = mutated_json(rng, files[name])
        elif kind == 8:
            a, b = rng.choice(names), rng.choice(names)
            files[a], files[b] = files[b], files[a]
        else:
            strange = rng.choice(("remove", "link", "pipe", "folder", "more")), rng.choice(names)
        if rng.random() < 0.9:
            manifest = json.loads(files[MANIFEST])
            manifest["files"] = {name: len(files[name]) for name in manifest["files"]}
            files[MANIFEST] = json.dumps(manifest).encode()
        self.files = files
        zarr.replace(self.target, files)
        if strange is not None:
            zarr.make_strange(self.target / strange[1], strange[0], self.bait)

    def _smuggle(self, rng: Random, files: dict[str, bytes]) -> None:
        """One array more, of which Orbax' metadata knows and the manifest may not."""
        name = rng.choice(("more", "blocks.0.more", "..", "../../../outside", "/"))
        stored = json.loads(files[f"{PARAMS}/final_norm.weight/.zarray"])
        stored |= dict(rng.sample(LIES, 1))
        files[f"{PARAMS}/more/.zarray"] = json.dumps(stored).encode()
        files[f"{PARAMS}/more/0"] = bytes(rng.choice((0, 64)))
        metadata = json.loads(files[f"{PARAMS}/_METADATA"])
        tree = metadata["tree_metadata"]
        row = json.loads(json.dumps(rng.choice(list(tree.values()))))
        row["key_metadata"] = [{"key": key, "key_type": 2} for key in name.split(".") if key]
        tree[str(tuple(name.split(".")))] = row
        files[f"{PARAMS}/_METADATA"] = json.dumps(metadata).encode()
        if rng.random() < 0.5:
            manifest = json.loads(files[MANIFEST])
            manifest["files"] |= {f"{PARAMS}/more/.zarray": 0, f"{PARAMS}/more/0": 0}
            files[MANIFEST] = json.dumps(manifest).encode()

    def load(self) -> dict[str, Any]:
        read_manifest(self.target)
        return read_params(self.target / PARAMS, self.wanted, mesh=None)

    def check(self, loaded: dict[str, Any]) -> None:
        self.compare(dict(leaves(loaded)))

    def compare(self, found: dict[str, Any]) -> None:
        """Arrays by path, with what the files say."""
        rows = {row["path"]: row for row in json.loads(self.files[MANIFEST])["tensors"]}
        require(found.keys() == rows.keys(), "other tensors")
        for path, row in rows.items():
            array = np.asarray(found[path])
            require(list(array.shape) == row["shape"], f"shape of {path}")
            require(array.dtype.name == row["dtype"], f"dtype of {path}")
            want = zarr.read(self.files, f"{PARAMS}/{path}/", row["shape"], row["dtype"])
            require(array.tobytes() == want.tobytes(), f"values of {path}")


class Reversed(Parameters):
    """The same, on the way back to safetensors."""

    name = "reverse"

    def load(self) -> Path:
        return reverse(self.target, self.folder / "back", overwrite=True).destination

    def check(self, loaded: Path) -> None:
        (file,) = loaded.glob("*.safetensors")
        rows = json.loads(self.files[MANIFEST])["tensors"]
        names = {row["source"]: row["path"] for row in rows}
        self.compare({names[name]: array for name, array in load_file(file).items()})


KINDS = (Conversion, Parameters, Reversed)
