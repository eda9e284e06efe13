"""Conversion and the way back: every layout, every dtype, bit by bit."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from convert import convert, converted, reverse
from convert.mapping import targets, tree
from convert.sources import BLOCK
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.families import FAMILIES
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.checkpoint import load_model
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources

PREFIX = sources.PREFIX
DTYPES = ["bfloat16", "float16", "float32"]
WTE, LN, HEAD = (f"{PREFIX}{name}.weight" for name in ("wte", "ln_f", "ff_out"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in float32, which most of these tests convert."""
    sources.make(tmp_path)
    return tmp_path / "source"


def write(folder: Path, values: dict[str, Any], **options: Any) -> Path:
    return sources.write(folder / "source", values, sources.config(), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_exactly_the_model(tied: bool, family: str) -> None:
    config = ModelConfig.from_dict(sources.config(weight_tying=tied))
    config = dataclasses.replace(config, family=family)
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0)))
    rows = targets(config).values()
    leaves = tree({row.path: jax.ShapeDtypeStruct(row.shape, "float32") for row in rows})
    expected = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(leaves) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, leaves, expected))


@pytest.mark.parametrize("shards", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: str, shards: int | None) -> None:
    values = sources.make(tmp_path, dtype, shards=shards)
    report = convert(tmp_path / "source", tmp_path / "converted", verify=True)
    assert (report.tensors, report.dtype, report.ignored) == (21, dtype, ())
    sources.assert_converted(tmp_path / "converted", values)
    reverse(tmp_path / "converted", tmp_path / "back", verify=True)
    sources.assert_same(sources.read_folder(tmp_path / "back"), values)
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("back", "source")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float32", True)])
def test_round_trip_of_dream(tmp_path: Path, dtype: str, tied: bool) -> None:
    values = sources.make(tmp_path, dtype, shards=3, family="dream", weight_tying=tied)
    report = convert(tmp_path / "source", tmp_path / "converted", verify=True)
    assert (report.tensors, report.ignored, report.notes) == (27 - tied, (), ())
    sources.assert_converted(tmp_path / "converted", values)
    model = load_model(tmp_path / "converted")
    assert (model.config.family, model.config.weight_tying) == ("dream", tied)
    reverse(tmp_path / "converted", tmp_path / "back", verify=True)
    sources.assert_same(sources.read_folder(tmp_path / "back"), values)


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_round_to_nearest_even(tmp_path: Path, source_dtype: str, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    values = sources.tensors(sources.config(), source_dtype)
    # Halfway between two bfloat16 numbers, from either side.
    values[LN][:2] = [1 + 2**-8, 1 + 3 * 2**-8]
    report = convert(write(tmp_path, values), tmp_path / "converted", dtype=dtype, verify=True)
    assert report.dtype == dtype
    result = sources.read_params(tmp_path / "converted")
    for name, value in values.items():
        cast = torch.from_numpy(value.astype(np.float32)).to(getattr(torch, dtype))
        array = result[sources.parameter_path(name)]
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array.astype(np.float32), cast.float().numpy())


def test_tensors_of_several_dtypes_are_kept(tmp_path: Path) -> None:
    values = sources.tensors(sources.config(), "bfloat16")
    for number, name in enumerate(values):
        if number % 3:
            values[name] = values[name].astype(("float32", "float16")[number % 2])
    source = write(tmp_path, values, shards=2)
    assert convert(source, tmp_path / "converted", verify=True).dtype == "float32"
    assert load_model(tmp_path / "converted").dtype == np.float32
    reverse(tmp_path / "converted", tmp_path / "back", verify=True)
    sources.assert_same(sources.read_folder(tmp_path / "back"), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(
    tmp_path: Path, make_checkpoint: Callable[..., Any], dtype: str, shards: int
) -> None:
    made = make_checkpoint(dtype=dtype, shards=shards, format="bin", n_kv_heads=2)
    convert(made.folder, tmp_path / "converted", verify=True)
    result = sources.read_params(tmp_path / "converted")
    assert {array.dtype.name for array in result.values()} == {dtype}
    for name, value in made.numpy().items():
        array = result[sources.parameter_path(name)].astype(np.float32)
        np.testing.assert_array_equal(array, value)


def test_bin_with_strided_and_shared_tensors(tmp_path: Path) -> None:
    """Transposed views and two names for one storage, as torch.save keeps them."""
    torch = pytest.importorskip("torch")
    values = {k: torch.from_numpy(v) for k, v in sources.tensors(sources.config()).items()}
    name = f"{PREFIX}blocks.0.ff_proj.weight"
    values[name] = values[name].T.contiguous().T
    values[HEAD] = values[WTE]
    source = write(tmp_path, {})
    (source / "model.safetensors").unlink()
    torch.save(values, source / "pytorch_model.bin")
    convert(source, tmp_path / "converted", verify=True)
    plain = {k: v.contiguous().numpy() for k, v in values.items()}
    sources.assert_converted(tmp_path / "converted", plain)


def test_tensor_larger_than_a_block(tmp_path: Path) -> None:
    rows = BLOCK // 24 + 100
    values = sources.make(tmp_path, "bfloat16", n_layers=1, embedding_size=rows)
    convert(tmp_path / "source", tmp_path / "converted", dtype="float32", verify=True)
    result = sources.read_params(tmp_path / "converted")["embedding.weight"]
    np.testing.assert_array_equal(result, values[WTE].astype(np.float32))


def test_other_writers_of_safetensors(tmp_path: Path) -> None:
    """No metadata, tensors in reverse order, a header of odd length, files in a subfolder."""
    values = sources.tensors(sources.config(), "bfloat16")
    source = write(tmp_path, {})
    (source / "model.safetensors").unlink()
    (source / "weights").mkdir()
    weight_map = {}
    for part, file in enumerate(("weights/b", "a.st")):
        header: dict[str, Any] = {}
        data = b""
        for name in list(reversed(values))[part::2]:
            offsets = [len(data), len(data) + values[name].nbytes]
            shape = list(values[name].shape)
            data += values[name].tobytes()
            header[name] = {"data_offsets": offsets, "dtype": "BF16", "shape": shape}
            weight_map[name] = file
        encoded = json.dumps(dict(reversed(header.items())), indent=1).encode()
        encoded += b" " * (1 - len(encoded) % 2)
        assert len(encoded) % 8
        sources.write_raw(source / file, encoded, data)
    sources.write_index(source, weight_map)
    convert(source, tmp_path / "converted")
    sources.assert_converted(tmp_path / "converted", values)


def test_single_file_that_has_an_index(tmp_path: Path, source: Path) -> None:
    names = sources.tensors(sources.config())
    sources.write_index(source, dict.fromkeys(names, "model.safetensors"))
    assert convert(source, tmp_path / "converted").tensors == 21


def test_rotary_buffers_are_left_out_and_reported(tmp_path: Path) -> None:
    name = f"{PREFIX}blocks.0.rotary_emb.inv_freq"
    values = {**sources.tensors(sources.config()), name: np.full(3, np.inf, np.float64)}
    report = convert(write(tmp_path, values), tmp_path / "converted", verify=True)
    assert report.ignored == (name,)
    assert len(sources.read_params(tmp_path / "converted")) == 21


@pytest.mark.parametrize("head", ["absent", "the same", "the same in another dtype"])
def test_tied_weights(tmp_path: Path, head: str) -> None:
    settings = sources.config(weight_tying=True)
    values = sources.tensors(settings, "bfloat16")
    if head != "absent":
        dtype = np.float32 if head == "the same in another dtype" else values[WTE].dtype
        values[HEAD] = values[WTE].astype(dtype)
    source = sources.write(tmp_path / "source", values, settings, shards=2)
    report = convert(source, tmp_path / "converted", verify=True)
    assert report.ignored == (() if head == "absent" else (HEAD,))
    assert "lm_head.weight" not in sources.read_params(tmp_path / "converted")
    reverse(tmp_path / "converted", tmp_path / "back")
    values.pop(HEAD, None)
    sources.assert_same(sources.read_folder(tmp_path / "back"), values)


def test_companions_travel_and_code_does_not(tmp_path: Path) -> None:
    sources.make(tmp_path, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    source = tmp_path / "source"
    (source / "modeling_llada.py").write_text("raise SystemExit")
    (source / "LICENSE").write_text("MIT")
    convert(source, tmp_path / "converted")
    reverse(tmp_path / "converted", tmp_path / "back")
    names = {"config.json", "LICENSE", *sources.TOKENIZER}
    weights = ("model", "params", "manifest")
    for folder in (tmp_path / "converted", tmp_path / "back"):
        files = {path.name for path in folder.iterdir()}
        assert {name for name in files if not name.startswith(weights)} == names
        for name in names:
            assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_reverse_writes_what_other_tools_read(tmp_path: Path) -> None:
    values = sources.tensors(sources.config(), "bfloat16")
    values[LN] = values[LN].astype(np.float32)
    convert(write(tmp_path, values), tmp_path / "converted")
    limit = 6_000
    report = reverse(tmp_path / "converted", tmp_path / "back", shard_bytes=limit)
    assert report.nbytes == sum(value.nbytes for value in values.values())
    index = sources.read_index(tmp_path / "back")
    files = sorted(set(index.values()))
    n = len(files)
    assert n > 3
    assert files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file in files:
        path = tmp_path / "back" / file
        with safe_open(path, "numpy") as opened:
            assert sorted(opened.keys()) == sorted(k for k, v in index.items() if v == file)
            assert opened.metadata() == {"format": "pt"}
        header, data = sources.read_raw(path)
        assert len(data) <= limit
        assert path.stat().st_mode & 0o444 == 0o444
        assert (path.stat().st_size - len(data)) % 8 == 0
        del header["__metadata__"]
        for entry in header.values():
            assert entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0
    # And our own reader takes it back.
    convert(tmp_path / "back", tmp_path / "again", verify=True)


@pytest.mark.parametrize("way", ["convert", "reverse"])
def test_verification_finds_a_flipped_bit(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    run, start, file = convert, source, "params/blocks.1.q_proj.weight/0.0"
    if way == "reverse":
        convert(source, tmp_path / "converted")
        run, start, file = reverse, tmp_path / "converted", "m*1.s*"
    module = sys.modules["convert.export" if way == "reverse" else "convert.convert"]
    real = module.copy_companions

    def flip(origin: Path, folder: Path) -> None:
        real(origin, folder)
        path = next(folder.glob(file))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(module, "copy_companions", flip)
    with pytest.raises(CheckpointError, match=r"verification failed: [\w.]+ differs"):
        run(start, tmp_path / "result", verify=True)
    assert not (tmp_path / "result").exists()
    run(start, tmp_path / "result")  # the bit is there, and only --verify looks


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    total = sum(value.nbytes for value in sources.make(tmp_path).values())
    done = {"convert": 0, "verify": 0}

    def progress(stage: str, nbytes: int, expected: int) -> None:
        assert expected == total
        done[stage] += nbytes

    convert(tmp_path / "source", tmp_path / "converted", verify=True, progress=progress)
    assert done == {"convert": total, "verify": total}
    reverse(tmp_path / "converted", tmp_path / "back", verify=True, progress=progress)
    assert done == {"convert": 2 * total, "verify": 2 * total}


def test_verification_finds_a_bit_flipped_after_the_conversion(
    tmp_path: Path, source: Path
) -> None:
    folder = tmp_path / "converted"
    convert(source, folder)
    path = folder / "params/final_norm.weight/0"
    # Weights are compared with their checksums on demand; every other file always is.
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    for run in (load_model, lambda x, verify: reverse(x, tmp_path / "back", verify=verify)):
        with pytest.raises(CheckpointError, match=r"params/final_norm.weight/0 has changed"):
            run(folder, verify=True)
    assert not (tmp_path / "back").exists()


def test_cached_conversion(tmp_path: Path, source: Path) -> None:
    lines: list[str] = []
    first = converted(source, tmp_path / "cache", notify=lines.append)
    assert converted(source, tmp_path / "cache", notify=lines.append) == first
    assert converted(first) == first
    assert lines == [f"converting {source} (kept in {first})"]
    (source / "LICENSE").write_text("changed")
    assert converted(source, tmp_path / "cache") != first
    with pytest.raises(CheckpointError, match="is not a directory"):
        converted(tmp_path / "nothing")


# --- the command line --------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{PREFIX}rotary_emb.inv_freq"
    values = {**sources.tensors(sources.config(), "bfloat16"), name: np.ones(3, np.float32)}
    source = str(write(tmp_path, values))
    target, back = str(tmp_path / "converted"), str(tmp_path / "back")
    assert convert_checkpoint.main([source, target, "--dtype", "float32", "--verify"]) == 0
    assert convert_checkpoint.main(["--reverse", target, back, "--shard-size", "6e-6"]) == 0
    out, err = capsys.readouterr()
    assert "21 tensors, 0.00 GB, float32, verified" in out
    assert f"left out: {name}" in out
    assert err == ""
    assert sources.read_folder(Path(back))[LN].dtype == np.float32
    assert len(list(Path(back).glob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: SRC, DST"),
        (["{source}", "{target}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{source}", "{target}", "--reverse", "--dtype", "float32"], "--reverse keeps"),
        (["{source}", "{target}", "--shard-size", "nan", "--reverse"], "must be a positive"),
        (["{source}", "{source}"], "is the source itself"),
        (["{source}", "{source}/inside"], "lies inside the source"),
        (["{source}", "{source}/..", "--overwrite"], "contains the source"),
        (["{source}", "{target}/a/b"], "not a directory"),
        (["{target}", "{target}2"], "not a directory"),
        (["{source}", "{target}", "--reverse"], "manifest.json is missing; convert it (again)"),
        (["{loop}", "{target}"], "not a directory"),
        (["{source}", "{loop}"], "exists"),
        (["{source}", "{target}", "--reverse", "--shard-size", "inf"], "number of GB, got inf"),
        (["{source}/bad\nname", "{target}"], "bad name is not a directory"),
    ],
)
def test_command_line_errors(
    tmp_path: Path, source: Path, call_main, arguments: list[str], expected: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"source": source, "target": tmp_path / "converted", "loop": tmp_path / "loop"}
    arguments = [part.format(**places) for part in arguments]
    status, out, err = call_main(convert_checkpoint.main, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "loop"] == ["source"]
