"""Restoring converted checkpoints, and refusing by name whatever is not a whole one."""

from __future__ import annotations

import ast
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
from pdllm_jax.network.config import ConfigError, ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage import checkpoint
from pdllm_jax.storage.checkpoint import CheckpointError, load_config, load_model, read_manifest
from tests.support import convert_sources as sources

ROOT = Path(__file__).resolve().parents[2]
PREFIX = sources.PREFIX


# Heads and words that four devices share.
DIVISIBLE = {
    "n_layers": 1, "d_model": 32, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 256,
    "embedding_size": 256, "mask_token_id": 255, "max_sequence_length": 512,
}  # fmt: skip


def make(folder: Path, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A converted checkpoint, `folder/converted`."""
    settings = sources.config(**changes)
    values = sources.tensors(settings, dtype, seed)
    source = sources.write(folder / "source", values, settings)
    convert(source, folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage."""
    return Path(shutil.copytree(original, tmp_path / "converted"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sign(folder: Path) -> None:
    """The manifest lists the files of params/ as they are now."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in (folder / "params").rglob("*")
        if path.is_file()
    }
    edit(folder / "pdllm.json", lambda manifest: manifest.update(files=files))


def weights(model: MaskPredictor) -> dict[str, np.ndarray]:
    """Under the names of the PyTorch checkpoint."""
    result = {
        "wte": model.embedding.weight,
        "ln_f": model.final_norm.weight,
    }
    if not model.config.weight_tying:
        result["ff_out"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        result |= {
            f"blocks.{i}.attn_norm": block.attn_norm.weight,
            f"blocks.{i}.q_proj": block.q_proj.weight,
            f"blocks.{i}.k_proj": block.k_proj.weight,
            f"blocks.{i}.v_proj": block.v_proj.weight,
            f"blocks.{i}.attn_out": block.attn_out.weight,
            f"blocks.{i}.ff_norm": block.ff_norm.weight,
            f"blocks.{i}.ff_proj": block.gate_proj.weight,
            f"blocks.{i}.up_proj": block.up_proj.weight,
            f"blocks.{i}.ff_out": block.down_proj.weight,
        }
    return {f"{PREFIX}{name}.weight": np.asarray(value[...]) for name, value in result.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_model_has_the_checkpoints_weights(tmp_path: Path, dtype: str, tied: bool) -> None:
    folder = make(tmp_path, dtype, weight_tying=tied)
    model = load_model(str(folder))
    expected = sources.read_folder(tmp_path / "source")
    found = weights(model)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert sources.bits(found[name]) == sources.bits(value), name
    assert model.dtype == dtype
    assert model.config == load_config(folder) == ModelConfig.from_dict(
        sources.config(weight_tying=tied)
    )  # fmt: skip


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float32", np.float16])
def test_dtype_can_be_chosen(tmp_path: Path, stored: str, dtype: Any) -> None:
    model = load_model(make(tmp_path, stored), dtype=dtype)
    assert model.dtype == jnp.dtype(dtype)
    for name, value in sources.read_folder(tmp_path / "source").items():
        np.testing.assert_array_equal(weights(model)[name], value.astype(jnp.dtype(dtype)))


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


def test_library_does_not_import_the_converter() -> None:
    """Imports run one way: convert uses pdllm_jax."""
    for path in (ROOT / "pdllm_jax").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "convert"], path.name


# --- what is refused ---------------------------------------------------------------------------


def refused(folder: Path, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "nothing is not a folder")


def test_folder_of_pytorch(folder: Path, tmp_path: Path) -> None:
    settings = sources.config()
    source = sources.write(tmp_path / "source", sources.tensors(settings), settings)
    refused(source, "no pdllm.json (convert it first: scripts/convert_checkpoint.py)")


@pytest.mark.parametrize("name", ["pdllm.json", "config.json"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(version=2), "format version 2, only 1 can be read"),
        (lambda m: m.pop("version"), "format version None"),
        (lambda m: m.update(format="other"), "is not the manifest of a pdllm-jax checkpoint"),
        (lambda m: m.pop("tensors"), "is malformed: KeyError('tensors')"),
        (lambda m: m.update(tensors=[]), "lists no tensors"),
        (lambda m: m.update(tensors=3), "is malformed"),
        (lambda m: m.update(files=[]), "is malformed"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "or one twice"),
        (lambda m: m["tensors"][0].update(dtype="int4"), "'int4' is none of bfloat16"),
        (lambda m: m["tensors"][0].update(shape=[-1]), "-1 is not a size"),
        (lambda m: m["tensors"][0].update(shape=[True]), "True is not a size"),
        (lambda m: m["tensors"][0].update(shape=""), "'' is not a list"),
        (lambda m: m["tensors"][0].update(shape={}), "{} is not a list"),
        (lambda m: m["files"].update({"params/" + "x" * 300: 1}), "File name too long"),
        (lambda m: m["files"].update({"../secret": 1}), "'../secret' is not a file of params/"),
        (lambda m: m["files"].update({"params/more": 1}), "params/more is missing"),
    ],
)
def test_bad_manifest(
    folder: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    edit(folder / "pdllm.json", change)
    refused(folder, expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}'])
def test_manifest_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "pdllm.json").write_text(text)
    refused(folder, "pdllm.json")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_array(folder: Path, keep: int) -> None:
    path = folder / "params/blocks.1.up_proj.weight/0.0"
    size = path.stat().st_size
    os.truncate(path, keep % size)
    refused(folder, f"{path} has {keep % size} bytes where {size} were written")


@pytest.mark.parametrize("name", ["0.0", ".zarray"])
def test_lost_array_file(folder: Path, name: str) -> None:
    path = folder / "params/blocks.1.up_proj.weight" / name
    path.unlink()
    refused(folder, f"{path} is missing")


def test_lost_parameters(folder: Path) -> None:
    shutil.rmtree(folder / "params")
    refused(folder, "is missing")


def test_arrays_that_disagree_with_the_manifest(folder: Path, tmp_path: Path) -> None:
    """Another checkpoint's parameters, of the same shapes, under this one's manifest."""
    other = make(tmp_path / "other", "bfloat16")
    shutil.rmtree(folder / "params")
    shutil.copytree(other / "params", folder / "params")
    edit(folder / "pdllm.json", lambda m: m.update(files={}))
    refused(folder, "embedding.weight/.zarray is missing in pdllm.json")
    sign(folder)
    refused(folder, "does not describe embedding.weight: dtype is 'bfloat16', not '<f4'")


def test_array_that_lies_about_its_shape(folder: Path) -> None:
    path = folder / "params/embedding.weight/.zarray"
    text = path.read_text()
    assert "[52,24]" in text
    path.write_text(text.replace("[52,24]", "[99,24]"))
    refused(folder, "does not describe embedding.weight: shape is [99, 24], not [52, 24]")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # TensorStore would allocate a chunk of these before it looks at the file.
        ({"chunks": [1 << 40, 24]}, "chunks [1099511627776, 24] do not divide [52, 24]"),
        ({"chunks": [26, 24]}, "2 files of 2496 bytes are wanted"),
        ({"compressor": {"id": "zlib", "level": 9}}, "compressor is {'id': 'zlib'"),
        ({"filters": [{"id": "pickle"}]}, "filters is"),
        ({"dtype": ">f4"}, "dtype is '>f4', not '<f4'"),
        ({"order": "F"}, "order is 'F', not 'C'"),
        ({"zarr_format": 3}, "zarr_format is 3, not 2"),
    ],
)
def test_array_metadata_that_would_be_read_as_something_else(
    folder: Path, change: dict[str, Any], expected: str
) -> None:
    edit(folder / "params/embedding.weight/.zarray", lambda raw: raw.update(change))
    sign(folder)
    refused(folder, f"/.zarray does not describe embedding.weight: {expected}")


def test_array_metadata_that_is_too_large(folder: Path) -> None:
    path = folder / "params/embedding.weight/.zarray"
    path.write_text(path.read_text() + " " * (1 << 20))
    sign(folder)
    refused(folder, f"{path} is larger than 1048576 bytes")


def test_only_the_arrays_of_the_manifest_are_read(folder: Path) -> None:
    """Beside each lies another by the same name, for readers of Zarr's version 3 and of OCDBT."""
    expected = weights(load_model(folder))
    edit(folder / "params/_METADATA", lambda raw: raw.update(use_zarr3=True, use_ocdbt=True))
    sign(folder)
    for path in (folder / "params").rglob(".zarray"):
        (path.parent / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    (folder / "params/manifest.ocdbt").write_bytes(b"0" * 100)
    found = weights(load_model(folder))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_corrupt_orbax_metadata(folder: Path) -> None:
    path = folder / "params/_METADATA"
    path.write_bytes(b"x" * path.stat().st_size)
    refused(folder, "params can not be restored")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_layers": 3}, "says n_layers 3, but the checkpoint holds 2 layers"),
        ({"n_layers": 10**12}, "says n_layers 1000000000000, but the checkpoint holds 2 layers"),
        ({"d_model": 48}, "embedding.weight is [52, 24], not [52, 48]"),
        ({"weight_tying": True}, "lm_head.weight is not a parameter"),
        ({"n_kv_heads": 4}, "blocks.0.k_proj.weight is [12, 24], not [24, 24]"),
    ],
)
def test_config_that_does_not_fit(folder: Path, change: dict[str, Any], expected: str) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    refused(folder, expected)


def test_config_that_is_not_implemented(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(alibi=True))
    with pytest.raises(ConfigError, match="alibi=True"):
        load_model(folder)


def test_manifest_survives_a_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "pdllm.json").write_text(manifest.to_json())
    assert read_manifest(folder) == manifest
    assert dataclasses.replace(manifest, dtype="float16") != manifest
    total = sum(record.nbytes for record in manifest.tensors)
    assert total == sum(
        path.stat().st_size
        for path in (folder / "params").rglob("*")
        if path.is_file() and path.name[0].isdigit()
    )


def test_huge_json_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 1000)
    refused(folder, "pdllm.json is larger than 1000 bytes")
