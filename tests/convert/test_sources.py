"""Bad PyTorch checkpoints: each is refused by name, in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources

PREFIX = sources.PREFIX
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Mutation = Callable[[Path], Any]


def refusal(folder: Path, tmp_path: Path, **options: Any) -> str:
    """Converts `folder` and returns the message with which that is refused."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        convert(folder, tmp_path / "converted", **options)
    assert sorted(tmp_path.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two good shards with an index; tests spoil it."""
    sources.make(tmp_path, shards=2)
    return tmp_path / "source"


def write(folder: Path, values: dict[str, Any], **options: Any) -> Path:
    return sources.write(folder / "source", values, sources.config(), **options)


def text(name: str, new: str | bytes) -> Mutation:
    """Replaces a file's content."""
    encoded = new.encode() if isinstance(new, str) else new
    return lambda folder: (folder / name).write_bytes(encoded)


def config(**changes: Any) -> Mutation:
    return text("config.json", json.dumps(sources.config(**changes)))


def index(change: Callable[[dict[str, str]], Any]) -> Mutation:
    """Changes the weight_map."""

    def run(folder: Path) -> None:
        weight_map = sources.read_index(folder)
        change(weight_map)
        sources.write_index(folder, weight_map)

    return run


def weight_map(new: Any) -> Mutation:
    return text(INDEX, json.dumps({"weight_map": new}))


def header(change: Callable[[dict[str, Any], list[dict[str, Any]]], Any]) -> Mutation:
    """Changes the header of the first shard; gets it and its tensors in the order of their data."""

    def run(folder: Path) -> None:
        head, data = sources.read_raw(folder / FIRST)
        rows = [row for name, row in head.items() if name != "__metadata__"]
        change(head, sorted(rows, key=lambda row: row["data_offsets"]))
        sources.write_raw(folder / FIRST, head, data)

    return run


def field(key: str, value: Any) -> Mutation:
    return header(lambda head, rows: rows[0].update({key: value}))


def raw_header(new: bytes) -> Mutation:
    return lambda folder: sources.write_raw(folder / FIRST, new, b"")


def content(name: str, change: Callable[[bytes], bytes]) -> Mutation:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def truncated(keep: int) -> Mutation:
    return content(SECOND, lambda old: old[:keep])


def length(claimed: int) -> Mutation:
    return content(FIRST, lambda old: claimed.to_bytes(8, "little") + old[8:])


def pipe(name: str) -> Mutation:
    """Nobody writes into it: a reader would wait forever."""

    def run(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return run


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


LN, WTE = f"{PREFIX}ln_f.weight", f"{PREFIX}wte.weight"
CORRUPT = f"{FIRST} is truncated or corrupt: "
MUTATIONS: list[tuple[Mutation, str]] = [
    (no_weights, "holds no weights"),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (text("config.json", "{"), "config.json is not valid JSON"),
    (text("config.json", "[]"), "config.json does not hold a JSON object"),
    (text("config.json", "[" * 100_000), "config.json is not valid JSON"),
    (text("config.json", '{"d_model": 1, "d_model": 2}'), "config.json repeats the key 'd_model'"),
    (text("config.json", b"\xff"), "config.json is not UTF-8 text: byte 0"),
    (config(include_bias=True), "include_bias=True"),
    (config(n_layers=10**12), "n_layers must be a positive integer below 2**31"),
    (config(n_layers=3), f"missing '{PREFIX}blocks.2.attn_norm.weight'"),
    (config(n_layers=1), f"unknown '{PREFIX}blocks.1.attn_norm.weight'"),
    (config(d_model=24 * 10**9), "d_model must be a positive integer below 2**31, got 24000000000"),
    (config(embedding_size=10**15), "embedding_size must be a positive integer below 2**31"),
    (config(mlp_hidden_size=41), "[41, 24] by config.json"),
    (config(n_kv_heads=4), f"misshaped '{PREFIX}blocks.0.k_proj.weight'"),
    (config(weight_tying=True), f"differs from '{WTE}'"),
    # the index
    (lambda folder: (folder / SECOND).unlink(), f"index.json names absent files: '{SECOND}'"),
    (index(lambda m: m.update({LN: f"../source/{FIRST}"})), "names a file outside of the folder"),
    (index(lambda m: m.update({LN: f"/{FIRST}"})), "names a file outside of the folder"),
    (index(lambda m: m.update({WTE: SECOND})), f"'{WTE}' is not in {SECOND}, where the index"),
    (index(lambda m: m.update(ghost=FIRST)), f"'ghost' is not in {FIRST}, where the index"),
    (index(lambda m: m.pop(LN)), f"'{LN}' is in"),
    (text(INDEX, "{}"), "has no weight_map"),
    (weight_map({}), "has no weight_map"),
    (weight_map({"a": 1}), "names no file for tensor 'a': 1"),
    (text(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), "repeats the key 'a'"),
    (weight_map({"a": ""}), "names absent files: ''"),
    (weight_map({"a": "x" * 300}), "names absent files: 'xxx"),
    (weight_map({"a": "\0"}), r"names absent files: '\x00'"),
    (text(INDEX, "nonsense"), "is not valid JSON"),
    (text("model.safetensors", ""), "index.json, which does not name it"),
    (pipe(INDEX), f"{INDEX} is not a regular file"),
    (pipe("config.json"), "config.json is not a regular file"),
    (pipe(FIRST), f"index.json names absent files: '{FIRST}'"),
    # safetensors
    *((truncated(keep), f"{SECOND} is an incomplete download: ") for keep in (5, 8, 100, -1)),
    (truncated(0), f"{SECOND} is empty, an incomplete download"),
    *((length(claimed), CORRUPT) for claimed in (2**63, 2**40, 200_000_000)),
    (field("data_offsets", [0, 10**15]), CORRUPT),
    (field("data_offsets", [-4, 0]), CORRUPT),
    (field("data_offsets", [0]), CORRUPT),
    (field("shape", [10**9, 10**9]), CORRUPT),
    (field("shape", [-1, -24]), CORRUPT),
    (field("shape", "24"), CORRUPT),
    (field("dtype", "BF16"), CORRUPT),
    (field("dtype", "Q4"), CORRUPT),
    (header(lambda head, rows: rows[0].update(data_offsets=rows[1]["data_offsets"])), CORRUPT),
    (header(lambda head, rows: rows[-1].update(data_offsets=[10**6, 10**6 + 96])), "incomplete"),
    (header(lambda head, rows: head.update(__metadata__={"format": 1})), CORRUPT),
    (raw_header(b"not json"), CORRUPT),
    (raw_header(b"\xff\xfe"), CORRUPT),
    (raw_header(b"{" * 50_000), CORRUPT),
    (content(FIRST, lambda old: old + b"1234"), CORRUPT),
]


@pytest.mark.parametrize(("mutate", "expected"), MUTATIONS)
def test_bad_checkpoint_is_refused(
    source: Path, tmp_path: Path, mutate: Mutation, expected: str
) -> None:
    mutate(source)
    message = refusal(source, tmp_path)
    assert expected in message
    assert "source" in message or "=" in message  # the folder, or a setting of config.json


def test_good_source_is_accepted(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "converted").tensors == 21


def test_same_entry_twice_in_one_header(source: Path, tmp_path: Path) -> None:
    """It means the same tensor; any other repetition leaves a hole, which the library refuses."""
    values = sources.read_folder(source)
    head, data = sources.read_raw(source / FIRST)
    name = next(key for key in head if key != "__metadata__")
    repeated = json.dumps(head)[:-1] + f", {json.dumps(name)}: {json.dumps(head[name])}}}"
    sources.write_raw(source / FIRST, repeated.encode(), data)
    convert(source, tmp_path / "converted")
    sources.assert_converted(tmp_path / "converted", values)


def test_report_lists_every_problem_at_once(tmp_path: Path) -> None:
    values = sources.tensors(sources.config())
    del values[LN]
    del values[f"{PREFIX}blocks.1.up_proj.weight"]
    values["model.extra"] = np.zeros(3, np.float32)
    values[f"{PREFIX}blocks.0.q_proj.bias"] = np.zeros(24, np.float32)
    values[WTE] = np.zeros((52, 25), np.float32)
    values[f"{PREFIX}blocks.0.ff_proj.weight"] = np.zeros((24, 40), np.float32)
    values[f"{PREFIX}blocks.0.ff_norm.weight"] = np.zeros(24, np.float64)
    folder = write(tmp_path, values, shards=2)
    name = f"{PREFIX}attn.weight"
    for file in (FIRST, SECOND):
        part = {key: values[key] for key in sources.read_raw(folder / file)[0] if key in values}
        save_file({**part, name: np.zeros(2, np.float32)}, folder / file)
    sources.write_index(folder, {**sources.read_index(folder), name: FIRST})

    message = refusal(folder, tmp_path)

    assert "has 9 problems" in message
    for expected in (
        f"duplicate '{name}' in {FIRST} and {SECOND}",
        f"missing '{LN}'",
        f"missing '{PREFIX}blocks.1.up_proj.weight'",
        "unknown 'model.extra'",
        f"unknown '{PREFIX}blocks.0.q_proj.bias'",
        f"unknown '{name}'",
        f"misshaped '{WTE}': [52, 25]",
        f"misshaped '{PREFIX}blocks.0.ff_proj.weight': [24, 40]",
        f"unsupported dtype of '{PREFIX}blocks.0.ff_norm.weight': F64",
    ):
        assert expected in message


def test_names_stay_on_one_line(tmp_path: Path) -> None:
    values = {**sources.tensors(sources.config()), "a\nerror: b": np.zeros(1, np.float32)}
    assert r"unknown 'a\nerror: b'" in refusal(write(tmp_path, values), tmp_path)


def test_links_of_the_hugging_face_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(source.iterdir()):
        os.rename(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    assert convert(snapshot, tmp_path / "converted").tensors == 21
    assert not (tmp_path / "converted" / "tokenizer.json").is_symlink()


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("output", ["keep", "float32"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: str, output: str) -> None:
    values = sources.tensors(sources.config(), dtype)
    name = f"{PREFIX}blocks.1.ff_out.weight"
    values[name].reshape(-1)[777] = value
    message = refusal(write(tmp_path, values, shards=2), tmp_path, dtype=output)
    assert f"tensor '{name}' has a value that is NaN or infinite (element 777)" in message


def test_largest_finite_values_are_accepted(tmp_path: Path) -> None:
    for dtype, kind in sources.DTYPES.items():
        values = sources.tensors(sources.config(), dtype)
        largest = ml_dtypes.finfo(kind).max
        values[LN][:] = largest
        values[f"{PREFIX}blocks.0.ff_norm.weight"][:] = -largest
        convert(write(tmp_path / dtype, values), tmp_path / f"{dtype}-converted", verify=True)


def test_value_too_large_for_the_output(tmp_path: Path) -> None:
    values = sources.tensors(sources.config())
    values[LN][3] = np.finfo(np.float32).max
    message = refusal(write(tmp_path, values), tmp_path, dtype="bfloat16")
    assert "is too large for bfloat16 (element 3)" in message


# --- PyTorch's .bin ----------------------------------------------------------------------------


class _Payload:
    """Unpickled freely, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_bin(folder: Path, content: Any, **options: Any) -> Path:
    torch = pytest.importorskip("torch")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sources.config()))
    torch.save(content, folder / "pytorch_model.bin", **options)
    return folder


def torch_tensors() -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {k: torch.from_numpy(v) for k, v in sources.tensors(sources.config()).items()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "holds a list, not a dict of tensors"),
        ({"a": 1}, "entry 'a' is not a tensor"),
        ({"state": {"a": 1}}, "entry 'state' is not a tensor"),
    ],
)
def test_bin_that_holds_something_else(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal(write_bin(tmp_path / "source", content), tmp_path)


def test_bin_never_runs_a_pickle(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "source", {"a": _Payload(tmp_path / "executed")})
    assert "pytorch_model.bin does not hold plain weights: " in refusal(folder, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1000, -30])
def test_truncated_bin(tmp_path: Path, keep: int) -> None:
    folder = write_bin(tmp_path / "source", torch_tensors())
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    assert "an incomplete download" in refusal(folder, tmp_path)


def test_bin_in_the_old_format(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "source", {}, _use_new_zipfile_serialization=False)
    assert "format from before 1.6" in refusal(folder, tmp_path)


def test_bin_with_a_tensor_that_is_not_finite(tmp_path: Path) -> None:
    values = torch_tensors()
    values[WTE][2, 3] = float("inf")
    message = refusal(write_bin(tmp_path / "source", values), tmp_path)
    assert f"'{WTE}' has a value that is NaN or infinite (element 51)" in message


def test_bin_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bin(tmp_path / "source", torch_tensors())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch to be read: pip install 'pdllm-jax[torch]'" in refusal(folder, tmp_path)
