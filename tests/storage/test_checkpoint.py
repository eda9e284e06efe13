"""Restoring converted checkpoints, and refusing damaged ones by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from convert import convert
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.checkpoint import CHECKPOINT, load_config, load_model
from pdllm_jax.storage.manifest import CheckpointError, write_manifest
from tests.support import convert_sources as sources

ROOT = Path(__file__).resolve().parents[2]


# Heads and words that four devices share.
DIVISIBLE = {
    "n_layers": 1, "d_model": 32, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 256,
    "embedding_size": 256, "mask_token_id": 255, "max_sequence_length": 512,
}  # fmt: skip


def make(folder: Path, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A converted checkpoint, `folder/converted`."""
    sources.make(folder, dtype, seed, **changes)
    convert(folder / "source", folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage."""
    return Path(shutil.copytree(original, tmp_path / "converted"))


def weights(model: MaskPredictor) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in leaves}


def published(folder: Path) -> dict[str, np.ndarray]:
    """What the model should hold, by the names of its parameters."""
    values = sources.read_folder(folder / "source")
    return {sources.parameter_path(name): value for name, value in values.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_model_has_the_checkpoints_weights(tmp_path: Path, dtype: str, tied: bool) -> None:
    folder = make(tmp_path, dtype, weight_tying=tied)
    model = load_model(str(folder))
    sources.assert_same(weights(model), published(tmp_path))
    assert model.dtype == dtype
    config = ModelConfig.from_dict(sources.config(weight_tying=tied))
    assert model.config == load_config(folder) == config


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float32", np.float16])
def test_dtype_can_be_chosen(tmp_path: Path, stored: str, dtype: Any) -> None:
    model = load_model(make(tmp_path, stored), dtype=dtype)
    assert model.dtype == jnp.dtype(dtype)
    cast = {name: value.astype(jnp.dtype(dtype)) for name, value in published(tmp_path).items()}
    sources.assert_same(weights(model), cast)


def test_dtype_that_is_not_supported(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dtype int8 is not supported \(bfloat16"):
        load_model(folder, dtype=jnp.int8)


def test_model_is_a_plain_pytree_that_runs(folder: Path) -> None:
    model = load_model(folder)
    ids = jnp.arange(12).reshape(2, 6)
    logits = jax.jit(lambda model, ids: model(ids))(model, ids)
    assert logits.shape == (2, 6, 52)
    assert bool(jnp.isfinite(logits).all())
    fresh = MaskPredictor(model.config, rngs=nnx.Rngs(0))
    assert jax.tree.structure(model) == jax.tree.structure(fresh)


def test_arrays_lie_on_the_default_device(folder: Path) -> None:
    """On the second of two devices, where JAX is told to make its arrays there."""
    code = """
import sys, jax
from pdllm_jax.storage.checkpoint import load_model
with jax.default_device(jax.devices()[1]):
    model = load_model(sys.argv[1])
assert {leaf.device for leaf in jax.tree.leaves(model)} == {jax.devices()[1]}
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, env={**os.environ, **flags}, check=True
    )


def test_public_orbax_restores_the_parameters(folder: Path) -> None:
    """With and without a target, by checkpointers that know nothing of the converter."""
    params = folder / "params"
    abstract = nnx.eval_shape(lambda: MaskPredictor(load_config(folder), rngs=nnx.Rngs(0)))
    target = nnx.to_pure_dict(nnx.state(abstract))
    expected = nnx.to_pure_dict(nnx.state(load_model(folder)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(params, target)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = jax.tree.leaves(checkpointer.restore(params))
    jax.tree.map(np.testing.assert_array_equal, leaves, jax.tree.leaves(expected))


# --- what is refused ---------------------------------------------------------------------------


def text(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        new = change((folder / name).read_text())
        (folder / name).write_text(new, errors="surrogateescape")

    return run


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, size)


def old_version(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "pdllm.json")


def other_version(folder: Path) -> None:
    write_manifest(folder, dataclasses.replace(CHECKPOINT, version=3), {"dtype": "float32"})


def other_kind(folder: Path) -> None:
    write_manifest(folder, dataclasses.replace(CHECKPOINT, name="snapshot"), {})


ARRAY = "params/blocks.1.up_proj.weight/0.0"
AGAIN = "; convert it (again): pdllm-convert SOURCE DESTINATION"


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (shutil.rmtree, "not a directory"),
        (old_version, f"manifest.json is missing{AGAIN}"),
        (other_version, f"version 3, only a 'checkpoint' of version 2 can be read{AGAIN}"),
        (other_kind, "manifest.json is of a 'snapshot' of format version 2"),
        (text("manifest.json", lambda s: s[:-9]), "manifest.json is not valid JSON"),
        (text("manifest.json", lambda s: ""), "manifest.json is empty"),
        (text("manifest.json", lambda s: "[]"), "manifest.json does not hold a JSON object"),
        (text("manifest.json", lambda s: "[" * 100_000), "manifest.json is not valid JSON"),
        (text("manifest.json", lambda s: s + " "), "manifest.json has changed"),
        (text("manifest.json", lambda s: '{"a": 1, "a": 2}'), "manifest.json repeats the key 'a'"),
        (text("manifest.json", lambda s: "\udcff"), "manifest.json is not UTF-8 text"),
        (text("manifest.json", lambda s: '{"kind": 1}'), "manifest.json is of a 1 of format"),
        (text("manifest.json", lambda s: s.replace("32", "16", 1)), "manifest.json has changed"),
        (remove("config.json"), "config.json is missing"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (text("config.json", lambda s: s.replace("24", "48")), "config.json has changed"),
        (text("params/_METADATA", lambda s: s.replace("1", "2")), "params/_METADATA has changed"),
        (
            text("params/embedding.weight/.zarray", lambda s: s.replace("52", "99")),
            "params/embedding.weight/.zarray has changed",
        ),
        (lambda folder: shutil.rmtree(folder / "params"), "is missing"),
        (remove(ARRAY), f"{ARRAY} is missing"),
        (truncate(ARRAY, 0), f"{ARRAY} has 0 bytes, 3840 were written"),
        (truncate(ARRAY, 3839), f"{ARRAY} has 3839 bytes, 3840 were written"),
        (
            lambda folder: (folder / "params/manifest.ocdbt").write_text("0"),
            "params/manifest.ocdbt is not part of the checkpoint",
        ),
    ],
)
def test_damaged_folder_is_refused(
    folder: Path, mutate: Callable[[Path], Any], expected: str
) -> None:
    mutate(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.removeprefix("checkpoint ").startswith(str(folder))
    assert expected in message
    assert "\n" not in message


def test_folder_of_pytorch(tmp_path: Path) -> None:
    sources.make(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing; convert it"):
        load_model(tmp_path / "source")


def test_parameters_of_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Of another dtype they have other sizes; of the same sizes they have other checksums."""
    other = make(tmp_path / "other", "bfloat16")
    (folder / ARRAY).write_bytes((other / ARRAY).read_bytes())
    with pytest.raises(CheckpointError, match="1920 bytes, 3840 were written"):
        load_model(folder)
    same = make(tmp_path / "same", seed=1)
    (folder / ARRAY).write_bytes((same / ARRAY).read_bytes())
    with pytest.raises(CheckpointError, match=f"{ARRAY} has changed: its checksum differs"):
        load_model(folder, verify=True)


def test_unlisted_file_beside_the_manifest_is_ignored(folder: Path) -> None:
    (folder / "README.md").write_text("notes")
    load_model(folder, verify=True)


def test_config_that_is_not_implemented(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "alibi": True}))
    with pytest.raises(ConfigError, match="alibi=True"):
        load_config(folder)
