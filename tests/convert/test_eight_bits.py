"""Weights in 8 bits: conversion, loading and the way back, bit by bit."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import convert_checkpoint
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert import convert, reverse
from convert.eight_bits import quantise
from pallas_kernels import Scaled
from pallas_kernels import quantise as on_device
from pdllm_jax.network.eight_bits import quantise_model
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage import checkpoint
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources


def weights(model: Any) -> sources.Tensors:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in leaves}


def quantised(values: sources.Tensors, bits: Any) -> sources.Tensors:
    """Parameters of a source by path, the layers' matrices as the device quantises them."""
    result = {}
    for name, value in values.items():
        path = sources.parameter_path(name)
        result[path] = value
        if path.startswith("blocks.") and value.ndim == 2:
            result[path], scale = map(np.asarray, on_device(jnp.asarray(value), bits))
            result[path.replace(".weight", ".scale")] = scale
    return result


@pytest.mark.parametrize("bits", ["fp8", "int8"])
def test_the_host_has_the_devices_bits(bits: Any) -> None:
    rng = np.random.default_rng(0)
    rows = np.exp(20 * rng.standard_normal((64, 1))) * rng.standard_normal((64, 4096))
    x = rows.clip(-1e38, 1e38).astype(np.float32)
    x[0], x[1], x[2] = 0, 1e-38, -0.0
    x[3] = np.linspace(-448, 448, 4096)
    x[4, ::2] = (np.arange(2048) - 1024) * 2**-10  # ties of subnormal values
    x[4, 1] = 448
    compiled = jax.jit(on_device, static_argnums=1)
    for form, run in itertools.product((x, x.astype(ml_dtypes.bfloat16)), (on_device, compiled)):
        wanted, (values, scales) = run(jnp.asarray(form), bits), quantise(form, bits)
        assert values.tobytes() == np.asarray(wanted.values).tobytes()
        assert scales.tobytes() == np.asarray(wanted.scale).tobytes()
    largest = np.abs(values.astype(np.float32)).max(1)
    assert set(largest) == {0.0, 448.0 if bits == "fp8" else 127.0}


@pytest.mark.parametrize(
    ("family", "dtype", "bits"),
    [("llada", "bfloat16", "fp8"), ("dream", "float32", "int8"), ("dream", "float16", "fp8")],
)
def test_conversion_loading_and_the_way_back(
    tmp_path: Path, family: str, dtype: str, bits: Any
) -> None:
    values = sources.make(tmp_path, dtype, shards=2, family=family)
    folders = [tmp_path / name for name in ("source", "full", "eight", "back", "again")]
    source, full, eight, back, again = folders
    convert(source, full)
    report = convert(source, eight, weights=bits, verify=True)
    assert (report.tensors, report.dtype) == (len(values), dtype)
    (note,) = report.notes
    assert note == f"weights of the layers in {bits}, with a scale for each output channel"
    expected = quantised(values, bits)
    sources.assert_same(sources.read_params(eight), expected)
    assert (eight / "config.json").read_bytes() == (source / "config.json").read_bytes()

    model = load_model(eight, verify=True)
    assert model.config == load_config(eight)
    assert (model.config.weight_format, model.dtype) == (bits, dtype)
    for same in (model, load_model(full, weights=bits), quantise_model(load_model(full), bits)):
        sources.assert_same(weights(same), expected)
        assert jax.tree.structure(same) == jax.tree.structure(model)
    with pytest.raises(ConfigError, match=f"weights are in {bits} already"):
        quantise_model(model, bits)

    report = reverse(eight, back, verify=True)
    (note,) = report.notes
    assert note == f"weights in {bits} became values * scale in {dtype}, not the source's bits"
    restored = {}
    for name, value in values.items():
        path = sources.parameter_path(name)
        scale = expected.get(f"{path.removesuffix('weight')}scale")
        full = value if scale is None else Scaled(expected[path], jnp.asarray(scale)).restore(dtype)
        restored[name] = np.asarray(full)
    sources.assert_same(sources.read_folder(back), restored)
    convert(back, again, weights=bits)
    for path, array in sources.read_params(again).items():
        if dtype == "float32" and path.endswith("scale"):  # whose last bit may differ
            np.testing.assert_allclose(array, expected[path], rtol=2**-22)
        else:
            assert array.tobytes() == expected[path].tobytes(), path


def test_full_weights_are_never_whole_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers that are read together, only those that are not quantised have 16 bits."""
    sources.make(tmp_path, "bfloat16", n_layers=4)
    convert(tmp_path / "source", tmp_path / "full")

    def live() -> int:
        gc.collect()
        found = [x for x in jax.live_arrays() if (x.shape, x.dtype) == ((40, 24), jnp.bfloat16)]
        return len(found)

    before, counts, run = live(), [], checkpoint.quantise_layer

    def counted(*arguments: Any) -> Any:
        result = run(*arguments)
        counts.append(live() - before)
        return result

    monkeypatch.setattr(checkpoint, "quantise_layer", counted)
    monkeypatch.setattr(checkpoint, "_FULL_BYTES", 20_000)  # two layers
    model = load_model(tmp_path / "full", weights="int8")
    assert (counts, live() - before, model.config.n_layers) == ([4, 2, 4, 2], 0, 4)


def test_wrong_formats_and_damage_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.make(tmp_path, n_layers=1)
    source, eight = str(tmp_path / "source"), tmp_path / "eight"
    for flags, message in {
        ("--weights", "fp4"): "invalid choice: 'fp4'",
        ("--reverse", "--weights", "fp8"): "--weights cannot be given with it",
    }.items():
        with pytest.raises(SystemExit) as left:
            convert_checkpoint.main([source, str(eight), *flags])
        assert (left.value.code, message in capsys.readouterr().err) == (2, True)
    with pytest.raises(CheckpointError, match="weights must be one of full, fp8, int8, got 'fp4'"):
        convert(source, eight, weights="fp4")  # type: ignore[arg-type]
    assert convert_checkpoint.main([source, str(eight), "--weights", "fp8"]) == 0
    assert "weights of the layers in fp8" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"'int8': .* holds fp8 weights; pdllm-convert --rev"):
        load_model(eight, weights="int8")
    with pytest.raises(ConfigError, match=r"weights 'fp4' is not known \(full, fp8, int8\)"):
        load_model(eight, weights="fp4")  # type: ignore[arg-type]
    scale = next((eight / "params").glob("blocks.0.q_proj.scale/0*"))
    scale.write_bytes(scale.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"q_proj\.scale/0 has 95 bytes, 96 were written"):
        load_model(eight)
