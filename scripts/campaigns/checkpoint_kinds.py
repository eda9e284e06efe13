"""Broken checkpoints: safetensors headers, index files, config.json, and converted ones.

What loads is compared with the safetensors library's own reading, with the JSON as it stands, and
with arrays that NumPy reads.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from campaigns import samples, zarr
from campaigns.kind import Kind, require
from campaigns.mutate import dumped, mutated_bytes, mutated_json, mutated_value
from convert import convert
from convert.mapping import LM_HEAD, lm_head, targets
from convert.reader import match, open_source
from convert.reverse import reverse
from convert.shards import FLOATS, SourceTensor, open_safetensors
from convert.values import materialize
from pdllm_jax.checkpoint import (
    MANIFEST,
    PARAMS,
    CheckpointError,
    Manifest,
    leaves,
    load_config,
    parse_json,
    read_manifest,
)
from pdllm_jax.checkpoint_arrays import read_params
from pdllm_jax.config import ConfigError, ModelConfig
from pdllm_jax.model import LLaDA

# Of an array's metadata: each asks for memory, for code, or for other values than the file's.
LIES = (
    ("compressor", {"id": "zlib", "level": 9}), ("compressor", {"id": "blosc"}),
    ("filters", [{"id": "pickle"}]), ("filters", []), ("shape", [1 << 40, 1 << 20]),
    ("chunks", [1 << 40, 1 << 20]), ("chunks", [1 << 28]), ("chunks", [1, 1]), ("chunks", []),
    ("dtype", "|O"), ("dtype", ">f4"), ("dtype", "<f8"), ("dtype", "<i4"),
    ("dtype", [["a", "<f4"]]), ("order", "F"), ("zarr_format", 3), ("fill_value", 1.0),
    ("dimension_separator", "/"),
)  # fmt: skip


class Safetensors(Kind):
    """A file of four tensors; its header, the header's length, and what lies behind it."""

    name = "safetensors"
    refusals = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        rng = np.random.default_rng(0)
        values = {
            "model.a": rng.standard_normal((3, 4), np.float32),
            "b": rng.standard_normal(6).astype(ml_dtypes.bfloat16),
            "scalar": np.asarray(rng.standard_normal(), np.float16),
            "ints": np.arange(5, dtype=np.int64),
        }
        self.path = folder / "model.safetensors"
        save_file(values, self.path, metadata={"format": "pt"})
        content = self.path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        self.header, self.data = content[8 : 8 + length], content[8 + length :]
        self.content = content

    def write(self, rng: Random) -> None:
        kind = rng.randrange(8)
        if kind == 0:
            self.content = mutated_bytes(rng, self._whole(self.header, self.data))
        else:
            header, data = self.header, self.data
            if kind == 1:
                data = mutated_bytes(rng, data)
            else:
                header = mutated_json(rng, header)
            length = None
            if kind == 2:
                length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(header) + len(data)))
            self.content = self._whole(header, data, length)
        self.path.write_bytes(self.content)

    @staticmethod
    def _whole(header: bytes, data: bytes, length: int | None = None) -> bytes:
        size = len(header) if length is None else length
        return size.to_bytes(8, "little") + header + data

    def load(self) -> list[tuple[SourceTensor, np.ndarray | None]]:
        return [
            (tensor, materialize(tensor, tensor.dtype) if tensor.dtype in FLOATS else None)
            for tensor in open_safetensors(self.path)
        ]

    def check(self, loaded: list[tuple[SourceTensor, np.ndarray | None]]) -> None:
        theirs = dict(safetensors.deserialize(self.content))
        require(theirs.keys() == {tensor.name for tensor, _ in loaded}, "other tensors")
        require(len(theirs) == len(loaded), "a tensor twice")
        for tensor, values in loaded:
            found = theirs[tensor.name]
            require(tuple(found["shape"]) == tensor.shape, f"shape of {tensor.name!r}")
            require(found["dtype"] == tensor.dtype, f"dtype of {tensor.name!r}")
            if values is not None:
                require(bytes(found["data"]) == values.tobytes(), f"values of {tensor.name!r}")
                require(bool(np.isfinite(values.astype(np.float64)).all()), "not finite")


class Index(Kind):
    """The index of a checkpoint in two shards, beside files that it must not lead to."""

    name = "index"
    refusals = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = samples.write_checkpoint(folder / "source", shards=2)
        self.path = self.source / "model.safetensors.index.json"
        self.good = self.path.read_bytes()
        self.content = self.good
        first = next(self.source.glob("model-00001*"))
        self.held = {
            path.name: set(load_file(path))
            for path in sorted(self.source.glob("model-*.safetensors"))
        }
        # Bait: the same tensors, outside, behind a link, and where no shard is.
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.copy(first, outside / "bait.safetensors")
        os.symlink(outside / "bait.safetensors", self.source / "link.safetensors")
        os.symlink(outside, self.source / "linked")
        os.mkfifo(self.source / "pipe.safetensors")
        (self.source / "empty.safetensors").touch()
        (self.source / "folder.safetensors").mkdir()
        self.baits = (
            "link.safetensors", "linked/bait.safetensors", "pipe.safetensors", "empty.safetensors",
            "folder.safetensors", "../../outside/bait.safetensors", "absent.safetensors", "",
            str(outside / "bait.safetensors"), "./" + first.name, "x/../" + first.name,
            first.name + "\0", first.name + "/", "config.json", "a" * 300, "\ud800", "a/" * 3000,
            "tokenizer.json", first.name.upper(), "evil.bin", "pytorch_model.bin", *self.held,
        )  # fmt: skip
        config = ModelConfig.from_dict(json.loads((self.source / "config.json").read_bytes()))
        self.wanted, self.optional = targets(config), {LM_HEAD.source: lm_head(config)}

    def write(self, rng: Random) -> None:
        if rng.random() < 0.4:
            value = json.loads(self.good)
            places = value["weight_map"]
            for _ in range(rng.choice((1, 1, 2, 5))):
                places[rng.choice(list(places))] = rng.choice(self.baits)
            self.content = dumped(rng, value)
        else:
            self.content = mutated_json(rng, self.good)
        self.path.write_bytes(self.content)

    def load(self) -> Any:
        source = open_source(self.source)
        match(source, self.wanted, self.optional)
        return source

    def check(self, loaded: Any) -> None:
        places = json.loads(self.content)["weight_map"]
        for name, file in places.items():
            require(
                name in self.held.get(os.path.normpath(file), ()), f"{name!r} is not in {file!r}"
            )
        found = {tensor.name: tensor.file for tensor in loaded.tensors.values()}
        for name in self.wanted:
            file = self.source / places[name]
            require(os.path.samefile(found[name], file), f"{name!r} was read from {found[name]}")


class Config(Kind):
    """config.json."""

    name = "config"
    refusals = (CheckpointError, ConfigError)

    # Field, key; and what holds where the key is missing or null.
    FIELDS = (
        ("d_model", "d_model", None), ("n_layers", "n_layers", None),
        ("n_heads", "n_heads", None), ("vocab_size", "vocab_size", None),
        ("rope_theta", "rope_theta", None), ("mask_token_id", "mask_token_id", None),
        ("max_sequence_length", "max_sequence_length", None),
        ("bos_token_id", "bos_token_id", None),
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "config.json"
        self.good = [
            json.dumps(samples.config(**change)).encode()
            for change in ({}, {"rope_scaling": None}, {"mlp_hidden_size": None})
        ]
        self.content = self.good[0]
        self.path.write_bytes(self.content)

    def write(self, rng: Random) -> None:
        self.content = mutated_json(rng, rng.choice(self.good))
        self.path.write_bytes(self.content)

    def load(self) -> ModelConfig:
        from_file = None
        try:
            from_file = ModelConfig.from_file(self.path)
        except ConfigError as error:
            require("\n" not in str(error), "an error of several lines")
        # As the converter reads it: stricter, for it refuses keys that are there twice.
        config = ModelConfig.from_dict(parse_json(self.content, "config.json"))
        require(config == from_file, "two ways of reading disagree")
        return config

    def check(self, loaded: ModelConfig) -> None:
        raw = json.loads(self.content)
        hash(loaded)
        for field, key, default in self.FIELDS:
            require(_same(getattr(loaded, field), raw.get(key, default)), f"{field} is not {key}")
        or_default = (
            ("n_kv_heads", "n_heads"), ("embedding_size", "vocab_size"),
            ("eos_token_id", "pad_token_id"), ("pad_token_id", "eos_token_id"),
        )  # fmt: skip
        for field, other in or_default:
            says = raw.get(field) if raw.get(field) is not None else raw.get(other)
            require(_same(getattr(loaded, field), says), f"{field} is not what it says")
        require(loaded.weight_tying is (raw.get("weight_tying") or False), "weight_tying")
        hidden = raw.get("mlp_hidden_size")
        if hidden is None:
            hidden = int(raw["mlp_ratio"] * raw["d_model"])
        require(_same(loaded.mlp_hidden_size, hidden), "mlp_hidden_size")
        scaling = raw.get("rope_scaling") or {}
        asked = scaling.get("rope_type", scaling.get("type"))
        if asked in (None, "default"):
            require(loaded.rope_scaling is None, "scaled without being asked")
        else:
            found = loaded.rope_scaling
            require(found is not None and found.kind == asked, "another scaling")
            require(_same(found.factor, scaling["factor"]), "another factor")


def _same(found: Any, says: Any) -> bool:
    """Equal, and of one kind: true is not 1."""
    return found == says and isinstance(found, bool) == isinstance(says, bool)


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
        model = nnx.eval_shape(lambda: LLaDA(load_config(self.target), rngs=nnx.Rngs(0)))
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


KINDS = (Safetensors, Index, Config, Conversion, Parameters, Reversed)
