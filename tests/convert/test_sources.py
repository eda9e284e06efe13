"""Bad checkpoints: each is refused by name, in one line, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert
from pdllm_jax.network.config import ConfigError
from pdllm_jax.storage.checkpoint import CheckpointError
from tests.support import convert_sources as sources

PREFIX = sources.PREFIX
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def settings() -> dict[str, Any]:
    return sources.config()


@pytest.fixture
def source(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """Two good shards with an index; tests spoil it."""
    return sources.write(tmp_path / "source", sources.tensors(settings), settings, shards=2)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Converts `source`, and returns the message with which that is refused."""

    def run(folder: Path, **options: Any) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            convert(folder, tmp_path / "converted", **options)
        assert sorted(tmp_path.iterdir()) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a safetensors header and nothing else."""
    header, data = sources.read_raw(path)
    change(header)
    sources.write_raw(path, header, data)


def entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    """Descriptions of the tensors, in the order of their data."""
    found = [value for key, value in header.items() if key != "__metadata__"]
    return sorted(found, key=lambda entry: entry["data_offsets"])


def test_good_source_is_accepted(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "converted").tensors == 21


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").endswith("nothing is not a folder")


def test_folder_without_weights(refused: Callable[..., str], source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    assert "holds no weights" in refused(source)


def test_missing_config(refused: Callable[..., str], source: Path) -> None:
    (source / "config.json").unlink()
    assert "config.json does not exist" in refused(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json does not hold a JSON object"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ('{"d_model": 1, "d_model": 2}', "config.json repeats the key 'd_model'"),
        ("\xff", "config.json is not valid JSON"),
    ],
)
def test_malformed_config(
    refused: Callable[..., str], source: Path, text: str, expected: str
) -> None:
    (source / "config.json").write_bytes(text.encode("latin-1"))
    assert expected in refused(source)


def test_unsupported_config(
    refused: Callable[..., str], source: Path, settings: dict[str, Any]
) -> None:
    (source / "config.json").write_text(json.dumps({**settings, "include_bias": True}))
    assert "include_bias=True" in refused(source)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n_layers", 10**12, "n_layers 1000000000000"),
        ("n_layers", 3, "missing 'model.transformer.blocks.2.attn_norm.weight'"),
        ("n_layers", 1, "unknown 'model.transformer.blocks.1.attn_norm.weight'"),
        ("d_model", 24 * 10**9, "misshaped 'model.transformer.ln_f.weight': [24]"),
        ("embedding_size", 10**15, "misshaped 'model.transformer.wte.weight': [52, 24]"),
        ("mlp_hidden_size", 41, "[41, 24] by config.json"),
        ("n_kv_heads", 4, "misshaped 'model.transformer.blocks.0.k_proj.weight'"),
        ("weight_tying", True, "differs from 'model.transformer.wte.weight'"),
    ],
)
def test_config_that_lies(
    refused: Callable[..., str],
    source: Path,
    settings: dict[str, Any],
    key: str,
    value: Any,
    expected: str,
) -> None:
    (source / "config.json").write_text(json.dumps({**settings, key: value}))
    assert expected in refused(source)


def test_report_lists_every_problem_at_once(
    refused: Callable[..., str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    values = sources.tensors(settings)
    del values[f"{PREFIX}ln_f.weight"]
    del values[f"{PREFIX}blocks.1.up_proj.weight"]
    values["model.extra"] = np.zeros(3, np.float32)
    values[f"{PREFIX}blocks.0.q_proj.bias"] = np.zeros(24, np.float32)
    values[f"{PREFIX}wte.weight"] = np.zeros((52, 25), np.float32)
    values[f"{PREFIX}blocks.0.ff_proj.weight"] = np.zeros((24, 40), np.float32)
    values[f"{PREFIX}blocks.0.ff_norm.weight"] = np.zeros(24, np.float64)
    folder = sources.write(tmp_path / "source", values, settings, shards=2)
    name = f"{PREFIX}attn.weight"
    for file in (FIRST, SECOND):
        content = {key: value for key, value in values.items() if key in _names(folder / file)}
        save_file({**content, name: np.zeros(2, np.float32)}, folder / file)
    sources.write_index(folder, {**sources.read_index(folder), name: FIRST})

    message = refused(folder)

    assert "has 9 problems" in message
    for expected in (
        f"duplicate '{name}' in {FIRST} and {SECOND}",
        f"missing '{PREFIX}ln_f.weight'",
        f"missing '{PREFIX}blocks.1.up_proj.weight'",
        "unknown 'model.extra'",
        f"unknown '{PREFIX}blocks.0.q_proj.bias'",
        f"unknown '{name}'",
        f"misshaped '{PREFIX}wte.weight': [52, 25]",
        f"misshaped '{PREFIX}blocks.0.ff_proj.weight': [24, 40]",
        f"unsupported dtype of '{PREFIX}blocks.0.ff_norm.weight': F64",
    ):
        assert expected in message


def _names(path: Path) -> set[str]:
    return set(sources.read_raw(path)[0])


# --- the index ---------------------------------------------------------------------------------


def test_index_naming_absent_files(refused: Callable[..., str], source: Path) -> None:
    (source / SECOND).unlink()
    assert f"index.json names absent files: '{SECOND}'" in refused(source)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "folder link"])
def test_index_leading_outside(
    refused: Callable[..., str], source: Path, tmp_path: Path, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    os.rename(source / FIRST, outside / FIRST)
    name = FIRST
    if kind == "parent":
        name = f"../outside/{FIRST}"
    elif kind == "absolute":
        name = str(outside / FIRST)
    elif kind == "link":
        (source / FIRST).symlink_to(outside / FIRST)
    else:
        (source / "folder").symlink_to(outside)
        name = f"folder/{FIRST}"
    index = sources.read_index(source)
    sources.write_index(source, {k: name if v == FIRST else v for k, v in index.items()})
    message = refused(source)
    if "link" in kind:
        assert message == f"{source / name} is a link that leads outside the folder"
    else:
        assert message == f"{source} names a file outside of itself: {name!r}"


def test_links_of_the_hugging_face_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(source.iterdir()):
        os.rename(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    assert convert(snapshot, tmp_path / "converted").tensors == 21
    assert not (tmp_path / "converted" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_companion_linked_to_elsewhere(
    refused: Callable[..., str], source: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    os.rename(source / name, secret)
    (source / name).symlink_to(secret)
    assert f"{name} is a link that leads outside the folder" in refused(source)


def test_index_misplacing_a_tensor(refused: Callable[..., str], source: Path) -> None:
    index = sources.read_index(source)
    name = next(name for name, file in index.items() if file == SECOND)
    sources.write_index(source, {**index, name: FIRST})
    assert f"'{name}' is not in {FIRST}, where the index places it" in refused(source)


def test_index_naming_a_tensor_that_is_nowhere(refused: Callable[..., str], source: Path) -> None:
    sources.write_index(source, {**sources.read_index(source), "ghost": FIRST})
    assert f"'ghost' is not in {FIRST}, where the index places it" in refused(source)


def test_tensor_that_the_index_leaves_out(refused: Callable[..., str], source: Path) -> None:
    index = sources.read_index(source)
    del index[f"{PREFIX}ln_f.weight"]
    sources.write_index(source, index)
    assert f"'{PREFIX}ln_f.weight' is in" in refused(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "names no file for tensor 'a': 1"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "repeats the key 'a'"),
        ('{"weight_map": {"a": ""}}', "outside of itself"),
        (json.dumps({"weight_map": {"a": "x" * 300}}), "names a file that can't be"),
        (json.dumps({"weight_map": {"a": "y/" * 3000}}), "names a file that can't be"),
        ('{"weight_map": {"a": "\\ud800"}}', "is not valid JSON"),
        ("nonsense", "is not valid JSON"),
    ],
)
def test_malformed_index(
    refused: Callable[..., str], source: Path, text: str, expected: str
) -> None:
    (source / "model.safetensors.index.json").write_text(text)
    message = refused(source)
    assert expected in message
    assert "source" in message


def test_single_file_beside_an_index_of_others(refused: Callable[..., str], source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"")
    assert "index.json, which does not name it" in refused(source)


# --- safetensors files -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_shard(refused: Callable[..., str], source: Path, keep: int) -> None:
    content = (source / SECOND).read_bytes()
    (source / SECOND).write_bytes(content[:keep])
    message = refused(source)
    assert f"{SECOND} is truncated: " in message
    if keep == -1:
        assert message.endswith(f"{len(content) - 1} bytes of {len(content)}")


def test_file_that_shrinks_while_it_is_read(
    refused: Callable[..., str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["convert.convert"]
    real = module.check_space

    def shrink(*arguments: Any) -> None:
        real(*arguments)
        os.truncate(source / SECOND, (source / SECOND).stat().st_size - 4)

    monkeypatch.setattr(module, "check_space", shrink)
    assert f"{SECOND} is truncated" in refused(source)


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000])
def test_enormous_header(refused: Callable[..., str], source: Path, length: int) -> None:
    content = (source / FIRST).read_bytes()
    (source / FIRST).write_bytes(length.to_bytes(8, "little") + content[8:])
    assert f"{FIRST} is corrupt: it claims a header of {length} bytes" in refused(source)


def _set(index: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        entries(header)[index][key] = value

    return change


def _overlap(header: dict[str, Any]) -> None:
    same_size = [e for e in entries(header) if e["shape"] == [24, 24]]
    same_size[0]["data_offsets"] = same_size[1]["data_offsets"]


def _beyond(header: dict[str, Any]) -> None:
    last = entries(header)[-1]
    last["data_offsets"] = [offset + 4096 for offset in last["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(0, "data_offsets", [0, 10**15]), "bytes"),
        (_set(0, "data_offsets", [-4, 0]), "has the offsets [-4, 0]"),
        (_set(0, "data_offsets", [0]), "has the offsets [0]"),
        (_set(0, "data_offsets", [0.0, 8.0]), "has the offsets"),
        (_set(0, "shape", [10**9, 10**9]), "claims F32[1000000000, 1000000000]"),
        (_set(0, "shape", [-1, -24]), "has the shape [-1, -24]"),
        (_set(0, "shape", "24"), "has the shape '24'"),
        (_set(0, "shape", [True]), "has the shape [True]"),
        (_set(0, "shape", [1] * 65), "has the shape [1, 1, "),
        (_set(0, "dtype", "BF16"), "claims BF16"),
        (_set(0, "dtype", "Q4"), "unknown dtype 'Q4'"),
        (_set(0, "dtype", ["F32"]), "unknown dtype ['F32']"),
        (lambda header: header.update({f"{PREFIX}ln_f.weight": 3}), "has no description"),
        (_overlap, "begins at byte"),
        (_beyond, "begins at byte"),
    ],
)
def test_header_that_lies(
    refused: Callable[..., str],
    source: Path,
    change: Callable[[dict[str, Any]], None],
    expected: str,
) -> None:
    rewrite(source / FIRST, change)
    message = refused(source)
    assert f"{FIRST} is corrupt: tensor 'model.transformer." in message
    assert expected in message


def test_duplicate_names_in_one_header(refused: Callable[..., str], source: Path) -> None:
    header, data = sources.read_raw(source / FIRST)
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    sources.write_raw(source / FIRST, text.encode(), data)
    assert f"{FIRST}: header repeats the key '{name}'" in refused(source)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b"\xff\xfe",
        b"{" * 50_000,
        b'{"\\ud800": {}}',
        b'{"a": NaN}',
    ],
)
def test_corrupt_header(refused: Callable[..., str], source: Path, header: bytes) -> None:
    sources.write_raw(source / FIRST, header, b"")
    assert f"{FIRST}: header" in refused(source)


@pytest.mark.parametrize("metadata", [[], "pt", None, {"format": 1}])
def test_metadata_that_is_no_map_of_strings(
    refused: Callable[..., str], source: Path, metadata: Any
) -> None:
    """As the safetensors library has it."""
    rewrite(source / FIRST, lambda header: header.update(__metadata__=metadata))
    assert f"{FIRST} is corrupt: its __metadata__" in refused(source)


def test_bytes_that_belong_to_no_tensor(refused: Callable[..., str], source: Path) -> None:
    with (source / FIRST).open("ab") as file:
        file.write(b"1234")
    assert f"{FIRST} is corrupt: 4 bytes belong to no tensor" in refused(source)


@pytest.mark.parametrize("name", [FIRST, "config.json", "model.safetensors.index.json"])
def test_pipe_instead_of_a_file(refused: Callable[..., str], source: Path, name: str) -> None:
    """Nobody writes into it: to open it would wait for ever."""
    (source / name).unlink()
    os.mkfifo(source / name)
    assert f"{name} is not a regular file" in refused(source)


def test_hostile_names_stay_on_one_line(
    refused: Callable[..., str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    values = {**sources.tensors(settings), "a\nerror: b": np.zeros(1, np.float32)}
    folder = sources.write(tmp_path / "source", values, settings)
    assert r"unknown 'a\nerror: b'" in refused(folder)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("output", ["keep", "float32"])
def test_values_that_are_not_finite(
    refused: Callable[..., str],
    tmp_path: Path,
    settings: dict[str, Any],
    value: float,
    dtype: str,
    output: str,
) -> None:
    values = sources.tensors(settings, dtype)
    name = f"{PREFIX}blocks.1.ff_out.weight"
    values[name].reshape(-1)[777] = value
    folder = sources.write(tmp_path / "source", values, settings, shards=2)
    message = refused(folder, dtype=output)
    assert f"tensor '{name}' has a value that is NaN or infinite (element 777)" in message


def test_largest_finite_values_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    for dtype, kind in sources.DTYPES.items():
        values = sources.tensors(settings, dtype)
        largest = ml_dtypes.finfo(kind).max
        values[f"{PREFIX}ln_f.weight"][:] = largest
        values[f"{PREFIX}blocks.0.ff_norm.weight"][:] = -largest
        folder = sources.write(tmp_path / dtype, values, settings)
        convert(folder, tmp_path / f"{dtype}-converted", verify=True)


def test_value_too_large_for_the_output(
    refused: Callable[..., str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    values = sources.tensors(settings)
    values[f"{PREFIX}ln_f.weight"][3] = np.finfo(np.float32).max
    folder = sources.write(tmp_path / "source", values, settings)
    assert "is too large for bfloat16 (element 3)" in refused(folder, dtype="bfloat16")


# --- PyTorch's .bin ----------------------------------------------------------------------------


@pytest.fixture
def bin_source(tmp_path: Path, settings: dict[str, Any]) -> Callable[[Any], Path]:
    """A folder whose pytorch_model.bin holds what it is called with."""
    torch = pytest.importorskip("torch")

    def make(content: Any, **options: Any) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        torch.save(content, folder / "pytorch_model.bin", **options)
        return folder

    return make


class _Payload:
    """Unpickled freely, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_bin_never_runs_a_pickle(
    refused: Callable[..., str], bin_source: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bin_source({"a": _Payload(tmp_path / "executed")})
    assert "pytorch_model.bin is corrupt or not a file of weights" in refused(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "holds a list, not a dict of tensors"),
        ({"a": 1}, "entry 'a' is not a tensor"),
        ({"state": {"a": 1}}, "entry 'state' is not a tensor"),
    ],
)
def test_bin_that_holds_something_else(
    refused: Callable[..., str], bin_source: Callable[..., Path], content: Any, expected: str
) -> None:
    assert expected in refused(bin_source(content))


@pytest.mark.parametrize("keep", [0, 1000, -30])
def test_truncated_bin(
    refused: Callable[..., str],
    bin_source: Callable[..., Path],
    settings: dict[str, Any],
    keep: int,
) -> None:
    torch = pytest.importorskip("torch")
    values = {k: torch.from_numpy(v) for k, v in sources.tensors(settings).items()}
    folder = bin_source(values)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    assert "pytorch_model.bin is truncated, corrupt" in refused(folder)


def test_bin_in_the_old_format(
    refused: Callable[..., str], bin_source: Callable[..., Path]
) -> None:
    folder = bin_source({}, _use_new_zipfile_serialization=False)
    assert "format from before 1.6" in refused(folder)


def test_bin_with_a_tensor_that_is_not_finite(
    refused: Callable[..., str], bin_source: Callable[..., Path], settings: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    values = {k: torch.from_numpy(v) for k, v in sources.tensors(settings).items()}
    values[f"{PREFIX}wte.weight"][2, 3] = torch.inf
    message = refused(bin_source(values))
    assert f"'{PREFIX}wte.weight' has a value that is NaN or infinite (element 51)" in message


def with_index(path: Path, index: bytes) -> None:
    """A torch.save file with another data.pkl."""
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, index if name.endswith("/data.pkl") else old.read(name))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        # PyTorch's restricted reader hashes 2**60 tuples here, and allocates 2 GiB there.
        (b"\x80\x02})q\0" + b"h\0\x86q\0" * 60 + b"Ns.", "a tuple as a key"),
        (
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            "a call of 'builtins bytearray'",
        ),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "a call of 'os system'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02}", "an index that is no pickle (pickle exhausted"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02s.", "an index that takes what is not there"),
        (b"\x80\x04}.", "protocol 4, not 2"),
        (b"\x80\x02(q\0.", "an index whose marks do not match"),
        (b"\x80\x02}N\x86u.", "an index whose marks do not match"),
        (b"\x80\x02}K\1a.", "a dict where a list should be"),
        (b"\x80\x02}}.", "an index that goes on behind its end"),
        (b"\x80\x02ctorch\nFloatStorage\nQ.", "a reference that is no storage's"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\1\x88}\x87R.", "a parameter of a int"),
    ],
)
def test_bin_whose_index_is_a_program(
    refused: Callable[..., str], bin_source: Callable[..., Path], index: bytes, expected: str
) -> None:
    folder = bin_source({})
    with_index(folder / "pytorch_model.bin", index)
    assert f"pytorch_model.bin is corrupt or not a file of weights: {expected}" in refused(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[1:], "no data.pkl"),
        (lambda rows: [row for row in rows if not row[0].endswith("/version")], "no version"),
        (lambda rows: [*rows, ("elsewhere/a", b"")], "where nothing should be"),
        (lambda rows: [*rows, rows[0]], "'pytorch_model/data.pkl', twice"),
        (
            lambda rows: [(n, b"11" if n.endswith("/version") else x) for n, x in rows],
            "version b'11'",
        ),
        (lambda rows: [(n, b"big" if n.endswith("byteorder") else x) for n, x in rows], "endian"),
        (
            lambda rows: [(n, x + b"x" if "/data/" in n else x) for n, x in rows],
            "4 elements of F32",
        ),
        (lambda rows: [(rows[0][0], bytes(5 << 20)), *rows[1:]], "an index of 5242880 bytes"),
        (zipfile.ZIP_DEFLATED, "is compressed"),
        (b"more", "does not begin where the file does"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bin_whose_archive_is_not_pytorchs(
    refused: Callable[..., str], bin_source: Callable[..., Path], change: Any, expected: str
) -> None:
    torch = pytest.importorskip("torch")
    folder = bin_source({"a": torch.zeros(4)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        rows = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", change if isinstance(change, int) else 0) as archive:
        for name, content in change(rows) if callable(change) else rows:
            archive.writestr(name, content)
    if isinstance(change, bytes):
        path.write_bytes(change + path.read_bytes())
    assert expected in refused(folder)


@pytest.mark.parametrize(
    ("shape", "strides"), [((5,), (1,)), ((2, 2), (3, 1)), ((1 << 40,), (0,)), ((2,), (-1,))]
)
def test_bin_with_a_tensor_that_its_storage_does_not_hold(
    refused: Callable[..., str],
    bin_source: Callable[..., Path],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> None:
    """Rebuilt with other sizes than PyTorch would write."""
    torch = pytest.importorskip("torch")
    folder = bin_source({"a": torch.zeros(4)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        index = archive.read("pytorch_model/data.pkl")
    good = b"K\x04\x85q\x08K\x01\x85q\t"  # (4,), (1,)
    assert index.count(good) == 1
    # A tuple without the protocol before it and the end behind it.
    bad = b"".join(pickle.dumps(value, 2)[2:-1] for value in (shape, strides))
    with_index(path, index.replace(good, bad))
    assert "a tensor " in refused(folder)


def test_bin_without_torch(
    bin_source: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not needed, nor imported."""
    torch = pytest.importorskip("torch")
    values = {k: torch.from_numpy(v) for k, v in sources.tensors(settings).items()}
    folder = bin_source(values)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert(folder, tmp_path / "converted", verify=True).tensors == len(values)


def test_errors_are_checkpoint_errors(source: Path, tmp_path: Path) -> None:
    (source / FIRST).unlink()
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "converted")
