"""Conversion and the way back: every layout, every dtype, bit by bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors import safe_open

from convert import convert, reverse
from convert.mapping import targets, tree
from convert.values import BLOCK
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.checkpoint import CheckpointError, load_model
from tests.support import convert_sources as sources

PREFIX = sources.PREFIX


def read_params(folder: Path) -> dict[str, np.ndarray]:
    """Parameters by dotted path, through Orbax's plain API and without a target."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore((folder / "params").resolve())
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def parameter_path(name: str) -> str:
    """The checkpoint's names translated as the documentation of the layout says."""
    path = name.removeprefix(PREFIX)
    path = re.sub(r"^(blocks\.\d+)\.ff_proj", r"\1.gate_proj", path)
    path = re.sub(r"^(blocks\.\d+)\.ff_out", r"\1.down_proj", path)
    path = re.sub(r"^ff_out", "lm_head", path)
    return re.sub(r"^ln_f", "final_norm", re.sub(r"^wte", "embedding", path))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    different = [k for k in expected if sources.bits(found[k]) != sources.bits(expected[k])]
    assert not different


@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_exactly_the_model(tied: bool) -> None:
    config = ModelConfig.from_dict(sources.config(weight_tying=tied))
    model = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0)))
    leaves = tree({row.path: jax.ShapeDtypeStruct(row.shape, "float32")
                   for row in targets(config).values()})  # fmt: skip
    expected = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(leaves) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, leaves, expected))


@pytest.mark.parametrize("shards", [None, 1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: str, shards: int | None) -> None:
    settings = sources.config()
    values = sources.tensors(settings, dtype)
    source = sources.write(tmp_path / "source", values, settings, shards=shards)

    report = convert(source, tmp_path / "converted", verify=True)
    assert (report.tensors, report.dtype, report.ignored) == (21, dtype, ())
    expected = {parameter_path(name): value for name, value in values.items()}
    assert_same(read_params(tmp_path / "converted"), expected)

    reverse(tmp_path / "converted", tmp_path / "back", verify=True)
    assert_same(sources.read_folder(tmp_path / "back"), values)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("source_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_round_to_nearest_even(tmp_path: Path, source_dtype: str, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    settings = sources.config()
    values = sources.tensors(settings, source_dtype)
    # Halfway between two bfloat16 numbers, from either side.
    values[f"{PREFIX}ln_f.weight"][:2] = [1 + 2**-8, 1 + 3 * 2**-8]
    source = sources.write(tmp_path / "source", values, settings)

    report = convert(source, tmp_path / "converted", dtype=dtype, verify=True)

    assert report.dtype == dtype
    found = read_params(tmp_path / "converted")
    for name, value in values.items():
        cast = torch.from_numpy(value.astype(np.float32)).to(getattr(torch, dtype))
        array = found[parameter_path(name)]
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array.astype(np.float32), cast.float().numpy())


def test_tensors_of_several_dtypes_are_kept(tmp_path: Path) -> None:
    settings = sources.config()
    values = sources.tensors(settings, "bfloat16")
    for number, name in enumerate(values):
        if number % 3:
            values[name] = values[name].astype(("float32", "float16")[number % 2])
    source = sources.write(tmp_path / "source", values, settings, shards=2)

    assert convert(source, tmp_path / "converted", verify=True).dtype == "float32"
    assert load_model(tmp_path / "converted").dtype == np.float32
    reverse(tmp_path / "converted", tmp_path / "back", verify=True)

    assert_same(sources.read_folder(tmp_path / "back"), values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(
    tmp_path: Path, make_checkpoint: Callable[..., Any], dtype: str, shards: int
) -> None:
    made = make_checkpoint(dtype=dtype, shards=shards, format="bin", n_kv_heads=2)
    convert(made.folder, tmp_path / "converted", verify=True)
    found = read_params(tmp_path / "converted")
    assert {array.dtype.name for array in found.values()} == {dtype}
    for name, value in made.numpy().items():
        np.testing.assert_array_equal(found[parameter_path(name)].astype(np.float32), value)


def test_bin_with_strided_and_shared_tensors(tmp_path: Path) -> None:
    """Transposed views and two names for one storage, as torch.save keeps them."""
    torch = pytest.importorskip("torch")
    settings = sources.config()
    values = {k: torch.from_numpy(v) for k, v in sources.tensors(settings).items()}
    name = f"{PREFIX}blocks.0.ff_proj.weight"
    values[name] = values[name].T.contiguous().T
    values[f"{PREFIX}ff_out.weight"] = values[f"{PREFIX}wte.weight"]
    source = sources.write(tmp_path / "source", {}, settings)
    (source / "model.safetensors").unlink()
    torch.save(values, source / "pytorch_model.bin")

    convert(source, tmp_path / "converted", verify=True)

    assert_same(
        read_params(tmp_path / "converted"),
        {parameter_path(name): value.contiguous().numpy() for name, value in values.items()},
    )


def test_tensor_larger_than_a_block(tmp_path: Path) -> None:
    rows = BLOCK // 24 + 100
    settings = sources.config(n_layers=1, embedding_size=rows)
    values = sources.tensors(settings, "bfloat16")
    source = sources.write(tmp_path / "source", values, settings)
    convert(source, tmp_path / "converted", dtype="float32", verify=True)
    found = read_params(tmp_path / "converted")["embedding.weight"]
    np.testing.assert_array_equal(found, values[f"{PREFIX}wte.weight"].astype(np.float32))


def test_other_writers_of_safetensors(tmp_path: Path) -> None:
    """No metadata, tensors in reverse order, a header of odd length, files in a subfolder."""
    settings = sources.config()
    values = sources.tensors(settings, "bfloat16")
    source = sources.write(tmp_path / "source", {}, settings)
    (source / "model.safetensors").unlink()
    (source / "weights").mkdir()
    weight_map = {}
    for part, file in enumerate(("weights/b", "a.st")):
        header: dict[str, Any] = {}
        data = b""
        for name in list(reversed(values))[part::2]:
            begin = len(data)
            data += values[name].tobytes()
            header[name] = {
                "data_offsets": [begin, len(data)],
                "dtype": "BF16",
                "shape": list(values[name].shape),
            }
            weight_map[name] = file
        encoded = json.dumps(dict(reversed(header.items())), indent=1).encode()
        encoded += b" " * (1 - len(encoded) % 2)
        assert len(encoded) % 8
        sources.write_raw(source / file, encoded, data)
    sources.write_index(source, weight_map)

    convert(source, tmp_path / "converted")

    assert_same(
        read_params(tmp_path / "converted"),
        {parameter_path(name): value for name, value in values.items()},
    )


def test_single_file_that_has_an_index(tmp_path: Path) -> None:
    settings = sources.config()
    values = sources.tensors(settings)
    source = sources.write(tmp_path / "source", values, settings)
    sources.write_index(source, dict.fromkeys(values, "model.safetensors"))
    assert convert(source, tmp_path / "converted").tensors == 21


def test_rotary_buffers_are_left_out_and_reported(tmp_path: Path) -> None:
    settings = sources.config()
    name = f"{PREFIX}blocks.0.rotary_emb.inv_freq"
    values = {**sources.tensors(settings), name: np.full(3, np.inf, np.float64)}
    source = sources.write(tmp_path / "source", values, settings)
    report = convert(source, tmp_path / "converted", verify=True)
    assert report.ignored == (name,)
    assert len(read_params(tmp_path / "converted")) == 21


@pytest.mark.parametrize("head", ["absent", "the same", "the same in another dtype"])
def test_tied_weights(tmp_path: Path, head: str) -> None:
    settings = sources.config(weight_tying=True)
    values = sources.tensors(settings, "bfloat16")
    name = f"{PREFIX}ff_out.weight"
    if head != "absent":
        values[name] = values[f"{PREFIX}wte.weight"].copy()
    if head == "the same in another dtype":
        values[name] = values[name].astype(np.float32)
    source = sources.write(tmp_path / "source", values, settings, shards=2)

    report = convert(source, tmp_path / "converted", verify=True)

    assert report.ignored == (() if head == "absent" else (name,))
    assert "lm_head.weight" not in read_params(tmp_path / "converted")
    reverse(tmp_path / "converted", tmp_path / "back")
    values.pop(name, None)
    assert_same(sources.read_folder(tmp_path / "back"), values)


def test_companions_travel_and_code_does_not(tmp_path: Path) -> None:
    settings = sources.config(auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    source = sources.write(tmp_path / "source", sources.tensors(settings), settings)
    (source / "modeling_llada.py").write_text("raise SystemExit")
    (source / "LICENSE").write_text("MIT")
    convert(source, tmp_path / "converted")
    reverse(tmp_path / "converted", tmp_path / "back")
    names = {"config.json", "LICENSE", *sources.TOKENIZER}
    for folder in ("converted", "back"):
        found = {path.name for path in (tmp_path / folder).iterdir()}
        assert {
            name for name in found if not name.startswith(("model", "params", "pdllm"))
        } == names
        for name in names:
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()


def test_reverse_writes_what_other_tools_read(tmp_path: Path) -> None:
    settings = sources.config()
    values = sources.tensors(settings, "bfloat16")
    values[f"{PREFIX}ln_f.weight"] = values[f"{PREFIX}ln_f.weight"].astype(np.float32)
    source = sources.write(tmp_path / "source", values, settings)
    convert(source, tmp_path / "converted")
    limit = 6_000
    report = reverse(tmp_path / "converted", tmp_path / "back", shard_bytes=limit)

    index = sources.read_index(tmp_path / "back")
    files = sorted(set(index.values()))
    assert len(files) > 3
    assert files == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert report.nbytes == sum(value.nbytes for value in values.values())
    for file in files:
        path = tmp_path / "back" / file
        with safe_open(path, "numpy") as opened:
            assert sorted(opened.keys()) == sorted(k for k, v in index.items() if v == file)
            assert opened.metadata() == {"format": "pt"}
        header, data = sources.read_raw(path)
        assert len(data) <= limit
        assert (path.stat().st_size - len(data)) % 8 == 0
        assert all(
            entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0
            for name, entry in header.items()
            if name != "__metadata__"
        )
    # And our own reader takes it back.
    convert(tmp_path / "back", tmp_path / "again", verify=True)


@pytest.mark.parametrize("way", ["convert", "reverse"])
def test_verification_finds_a_flipped_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    settings = sources.config()
    source = sources.write(tmp_path / "source", sources.tensors(settings), settings)
    if way == "reverse":
        convert(source, tmp_path / "converted")
    module = sys.modules["convert.export" if way == "reverse" else "convert.convert"]
    real = module.copy_companions

    def flip(origin: Path, folder: Path) -> None:
        real(origin, folder)
        path = next(
            folder.glob("params/blocks.1.q_proj.weight/0.0" if way == "convert" else "m*1.s*")
        )
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(module, "copy_companions", flip)
    run = convert if way == "convert" else reverse
    start = source if way == "convert" else tmp_path / "converted"
    with pytest.raises(CheckpointError, match=r"verification failed: [\w.]+ differs"):
        run(start, tmp_path / "result", verify=True)
    assert not (tmp_path / "result").exists()
    run(start, tmp_path / "result")  # the bit is there, and only --verify looks


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    settings = sources.config()
    values = sources.tensors(settings)
    source = sources.write(tmp_path / "source", values, settings)
    total = sum(value.nbytes for value in values.values())
    done = {"convert": 0, "verify": 0}

    def progress(stage: str, nbytes: int, expected: int) -> None:
        assert expected == total
        done[stage] += nbytes

    convert(source, tmp_path / "converted", verify=True, progress=progress)
    assert done == {"convert": total, "verify": total}
    reverse(tmp_path / "converted", tmp_path / "back", verify=True, progress=progress)
    assert done == {"convert": 2 * total, "verify": 2 * total}


@pytest.mark.parametrize("spoil", ["manifest", "file", "config", "more", "less"])
def test_reverse_refuses_a_damaged_checkpoint(tmp_path: Path, spoil: str) -> None:
    settings = sources.config()
    source = sources.write(tmp_path / "source", sources.tensors(settings), settings)
    folder = tmp_path / "converted"
    convert(source, folder)
    if spoil == "manifest":
        (folder / "pdllm.json").unlink()
        expected = "no pdllm.json"
    elif spoil == "file":
        os.truncate(folder / "params/final_norm.weight/0", 5)
        expected = "has 5 bytes where 96 were written"
    elif spoil in ("more", "less"):
        # Orbax' list of arrays. One more would be read as its own metadata likes, up to all memory.
        path = folder / "params/_METADATA"
        listed = json.loads(path.read_text())
        row = listed["tree_metadata"].pop("('final_norm', 'weight')")
        expected = "params lacks final_norm.weight"
        if spoil == "more":
            row["key_metadata"][0]["key"] = "more"
            listed["tree_metadata"]["('more', 'weight')"] = row
            shutil.copytree(folder / "params/final_norm.weight", folder / "params/more.weight")
            expected = "params also holds 'more.weight'"
        path.write_text(json.dumps(listed))
        manifest = json.loads((folder / "pdllm.json").read_text())
        manifest["files"]["params/_METADATA"] = path.stat().st_size
        (folder / "pdllm.json").write_text(json.dumps(manifest))
    else:
        (folder / "config.json").write_text(json.dumps({**settings, "n_layers": 10**9}))
        expected = "n_layers 1000000000"
    with pytest.raises(CheckpointError, match=expected):
        reverse(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- the command line --------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = sources.config()
    name = f"{PREFIX}rotary_emb.inv_freq"
    values = {**sources.tensors(settings, "bfloat16"), name: np.ones(3, np.float32)}
    source = str(sources.write(tmp_path / "source", values, settings))
    target, back = str(tmp_path / "converted"), str(tmp_path / "back")

    assert convert_checkpoint.main([source, target, "--dtype", "float32", "--verify"]) == 0
    assert convert_checkpoint.main(["--reverse", target, back, "--shard-size", "6e-6"]) == 0

    out, err = capsys.readouterr()
    assert "21 tensors, 0.00 GB, float32, verified" in out
    assert f"left out: {name}" in out
    assert err == ""
    assert sources.read_folder(Path(back))[f"{PREFIX}ln_f.weight"].dtype == np.float32
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
        (["{target}", "{target}2"], "is not a folder"),
        (["{source}", "{target}", "--reverse"], "is not a converted checkpoint"),
        (["{loop}", "{target}"], "is not a folder"),
        (["{source}", "{loop}"], "exists"),
        (["{source}", "{target}", "--reverse", "--shard-size", "inf"], "number of GB, got inf"),
        (["{source}/bad\nname", "{target}"], "bad name is not a folder"),
    ],
)
def test_command_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    settings = sources.config()
    source = sources.write(tmp_path / "source", sources.tensors(settings), settings)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"source": source, "target": tmp_path / "converted", "loop": tmp_path / "loop"}
    filled = [part.format(**places) for part in arguments]
    try:
        status = convert_checkpoint.main(filled)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "loop"] == ["source"]
