"""Random damage to any file of a folder: refused in one line, or provably without effect."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import convert
from convert.mapping import targets
from convert.sources import match, open_source
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.checkpoint import load_config, open_checkpoint
from pdllm_jax.storage.manifest import CheckpointError, read_json
from tests.support import convert_sources as sources

# Small, so that much of every file is header.
TINY: dict[str, Any] = {
    "d_model": 4, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 6, "n_layers": 1,
    "vocab_size": 8, "embedding_size": 8, "mask_token_id": 7, "eos_token_id": 6, "pad_token_id": 6,
}  # fmt: skip
VALUES = sources.tensors(sources.config(**TINY))


def write_safetensors(folder: Path) -> Path:
    return sources.write(folder / "folder", VALUES, sources.config(**TINY), shards=2)


def write_bin(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    folder = folder / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sources.config(**TINY)))
    values = {name: torch.from_numpy(value) for name, value in VALUES.items()}
    torch.save(values, folder / "pytorch_model.bin")
    return folder


def write_converted(folder: Path) -> Path:
    convert(write_safetensors(folder), folder / "converted")
    return folder / "converted"


def damaged(folder: Path, data: st.DataObject) -> tuple[str, int]:
    """Flips a bit of a file, or cuts it; returns its name and the changed byte, -1 for a cut."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    name = data.draw(st.sampled_from(names))
    content = bytearray((folder / name).read_bytes())
    # Headers and indexes are at the ends of a file.
    size = len(content)
    at = data.draw(st.integers(0, size - 1) | st.integers(max(0, size - 2000), size - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        (folder / name).write_bytes(content)
        return name, at
    (folder / name).write_bytes(content[:at])
    return name, -1


def read_source(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    opened = open_source(folder)
    if config.n_layers > len(opened.tensors):
        raise CheckpointError("n_layers")
    match(opened, targets(config), targets(config))
    return config, {name: opened.tensors[name].read("float32") for name in targets(config)}


def read_converted(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    open_checkpoint(folder, verify=True)
    return load_config(folder), sources.read_params(folder)


def check(
    original: Path, read: Callable[[Path], Any], data: st.DataObject
) -> tuple[str, int, Any, Any] | None:
    """Reads a damaged copy of the folder; None if it was refused in one line."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(original, Path(place) / "folder"))
        name, at = damaged(folder, data)
        try:
            result = read(folder)
        except (CheckpointError, ConfigError) as error:
            refused = str(error)
        else:
            return name, at, result, read(original)
    assert "\n" not in refused
    return None


@pytest.fixture(scope="module")
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the parameter, a function, writes."""
    return request.param(tmp_path_factory.mktemp("damage"))


SETTINGS = settings(max_examples=300, deadline=None)


@pytest.mark.parametrize("original", [write_converted], indirect=True)
@SETTINGS
@given(data=st.data())
def test_converted_folder(original: Path, data: st.DataObject) -> None:
    """Every file has a checksum: no change passes."""
    assert check(original, read_converted, data) is None


@pytest.mark.parametrize("original", [write_bin], indirect=True)
@SETTINGS
@given(data=st.data())
def test_bin_folder(original: Path, data: st.DataObject) -> None:
    """PyTorch's archive has checksums of its records: weights do not change silently."""
    outcome = check(original, read_source, data)
    if outcome is not None:
        name, _, (_, tensors), (_, expected) = outcome
        if name != "config.json":  # which has no checksum
            sources.assert_same(tensors, expected)


@pytest.mark.parametrize("original", [write_safetensors], indirect=True)
@SETTINGS
@given(data=st.data())
def test_safetensors_folder(original: Path, data: st.DataObject) -> None:
    """The format has no checksums: a flipped bit may change that weight, and nothing else."""
    outcome = check(original, read_source, data)
    if outcome is None or outcome[0] == "config.json":
        return
    name, at, (_, tensors), (_, expected) = outcome
    changed = [k for k in expected if sources.bits(tensors[k]) != sources.bits(expected[k])]
    assert len(changed) <= name.endswith(".safetensors")
    for tensor in changed:
        difference = tensors[tensor].view(np.uint32) ^ expected[tensor].view(np.uint32)
        assert [bin(word).count("1") for word in difference[difference != 0]] == [1]
        _, weights = sources.read_raw(original / name)
        assert at >= (original / name).stat().st_size - len(weights)
