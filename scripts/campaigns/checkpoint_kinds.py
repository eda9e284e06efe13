"""Broken checkpoints: safetensors headers, index files, config.json.

What loads is compared with the safetensors library's own reading, and with the JSON as it stands.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from campaigns import samples
from campaigns.kind import Kind, require
from campaigns.mutate import dumped, mutated_bytes, mutated_json
from convert.mapping import LM_HEAD, lm_head, targets
from convert.shards import FLOATS, SourceTensor, open_safetensors
from convert.sources import match, open_source
from convert.values import materialize
from pdllm_jax.network.config import ConfigError, ModelConfig
from pdllm_jax.storage.checkpoint import CheckpointError, parse_json


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


KINDS = (Safetensors, Index, Config)
