"""Checkpoints as they are met: unfinished downloads, quantisations, prefixes, caches, links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert, converted
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.manifest import CheckpointError
from tests.support import convert_sources as sources

PREFIX = sources.PREFIX
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4965836568\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>504 Gateway Time-out</title></head></html>"
MARK = b"\xef\xbb\xbf"
Change = Callable[[Path], Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards with an index."""
    sources.make(tmp_path, shards=2)
    return tmp_path / "source"


def refusal(folder: Path, tmp_path: Path, **options: Any) -> str:
    """Converts a folder and returns the one line with which that is refused."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        convert(folder, tmp_path / "out", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    assert not (tmp_path / "out").exists()
    return message


# --- files that are not what their names say ------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LFS, "is a Git LFS pointer, not the file: run `git lfs pull`"),
        (f"\ufeff{LFS}", "is a Git LFS pointer"),
        (PAGE, "holds a server's error page, not the file: download it again"),
        ("<HTML><body>Not Found", "holds a server's error page"),
        ('<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "holds a server's error page"),
        ('{"error":"Repository not found"}', "holds a server's error page"),
        ("", "is empty, an incomplete download: download it again"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX, SECOND, "bin"]
)
def test_files_of_failed_downloads(
    tmp_path: Path, source: Path, content: str, expected: str, name: str
) -> None:
    if name == "bin":
        name = "pytorch_model.bin"
        for path in source.glob("model*"):
            path.unlink()
    (source / name).write_text(content)
    assert f"{name} {expected}" in refusal(source, tmp_path)


@pytest.mark.parametrize("text", ["Entry not found", "Invalid username or password.\n"])
def test_text_in_place_of_weights(tmp_path: Path, source: Path, text: str) -> None:
    (source / SECOND).write_text(text)
    assert f"holds text ({text.strip()}), not weights: download" in refusal(source, tmp_path)


def drop(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def add(name: str, content: bytes = b"123") -> Change:
    def run(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return run


def cut(folder: Path) -> None:
    os.truncate(folder / SECOND, 9_000)


CACHE = ".cache/huggingface/download/abc.incomplete"
UNFINISHED: list[tuple[Change, str]] = [
    (cut, f"{SECOND} is an incomplete download: 9000 of 19744 bytes: download it again"),
    (drop(SECOND), f"names absent files: '{SECOND}': download them"),
    (both(drop(SECOND), add(f"{SECOND}.part")), f"'{SECOND}' (unfinished: {SECOND}.part)"),
    (both(drop(FIRST, SECOND), add(CACHE)), "(unfinished: abc.incomplete): download them"),
    (add(f"{SECOND}.aria2"), f"{SECOND} is an incomplete download of aria2"),
    (drop(INDEX), f"holds shards without their index: it lacks '{INDEX}': download them"),
    (drop(INDEX, FIRST), f"it lacks '{INDEX}', '{FIRST}': download them"),
    (both(drop(INDEX, FIRST, SECOND), add(f"{SINGLE}.incomplete")), "an incomplete download"),
    (both(drop(INDEX, FIRST, SECOND), add("a.pth")), "holds no weights: no model.safetensors"),
    (both(drop(INDEX, FIRST, SECOND), add("m-Q4_K.gguf")), "quantised weights in GGUF (m-Q4_K"),
    (both(drop(INDEX, FIRST, SECOND), add(SINGLE, b"GGUF\3\0\0\0")), "quantised weights in GGUF"),
]


@pytest.mark.parametrize(("change", "expected"), UNFINISHED)
def test_unfinished_downloads(tmp_path: Path, source: Path, change: Change, expected: str) -> None:
    change(source)
    assert expected in refusal(source, tmp_path)


def test_a_file_in_place_of_its_folder(tmp_path: Path, source: Path) -> None:
    assert "is a file: give the folder that holds it" in refusal(source / FIRST, tmp_path)


def test_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    """Every JSON and text file of the folder may begin with one."""
    values = sources.make(tmp_path, shards=2)
    source, contents = tmp_path / "source", {}
    for name in ("config.json", INDEX, *sources.TOKENIZER):
        contents[name] = (source / name).read_bytes()
        (source / name).write_bytes(MARK + contents[name])
    convert(source, tmp_path / "out")
    sources.assert_converted(tmp_path / "out", values)
    del contents[INDEX]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in contents} == contents


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_files_that_are_not_utf8(tmp_path: Path, source: Path, name: str) -> None:
    content = (source / name).read_text()
    (source / name).write_bytes(content.encode("utf-16"))
    assert f"{name} is not UTF-8 text: byte 0" in refusal(source, tmp_path)


# --- quantised weights ----------------------------------------------------------------------------


BIG = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("key", "settings", "expected"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", BIG, "bitsandbytes', load_in_4bit True"),
        ("quantization_config", {"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization_config", {"quant_method": "eetq"}, "eetq"),
        ("quantization_config", {"quant_method": "hqq"}, "hqq"),
        ("quantization_config", {"quant_algo": "NVFP4"}, "NVFP4"),
        ("quantization_config", "int8", "int8"),
        ("compression_config", {"format": "x"}, "without a method"),
        ("quantization", {"bits": 4, "group_size": 64}, "bits 4"),
    ],
)
def test_quantised_by_config(tmp_path: Path, key: str, settings: Any, expected: str) -> None:
    sources.make(tmp_path, **{key: settings})
    message = refusal(tmp_path / "source", tmp_path)
    assert f"config.json: {key} (" in message
    assert expected in message
    assert "quantised weights" in message


def test_quantisation_that_is_switched_off(tmp_path: Path) -> None:
    for key, value in (("a", {}), ("b", None), ("c", {**BIG, "load_in_4bit": False})):
        (tmp_path / key).mkdir()
        sources.make(tmp_path / key, quantization_config=value)
        assert convert(tmp_path / key / "source", tmp_path / key / "out").tensors == 21


# What each library stores in place of a weight [out, in]: dtype of safetensors, and shape.
STORED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "GPTQ": {"qweight": ("I32", (3, 40)), "scales": ("F16", (1, 40)), "g_idx": ("I32", (24,))},
    "GPTQ:": {"qweight": ("I32", (3, 40)), "scales": ("F16", (1, 40))},
    "AWQ": {"qweight": ("I32", (24, 5)), "qzeros": ("I32", (1, 5)), "scales": ("F16", (1, 40))},
    "bitsandbytes nf4": {
        "weight": ("U8", (480, 1)),
        "weight.absmax": ("F32", (15,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
    },
    "bitsandbytes, 4 bits": {"weight": ("U8", (480, 1)), "weight.absmax": ("F32", (15,))},
    "bitsandbytes int8": {"weight": ("I8", (40, 24)), "SCB": ("F32", (40,))},
    "FP8": {"weight": ("F8_E4M3", (40, 24))},
    "FP8:": {"weight": ("F8_E5M2", (40, 24)), "weight_scale": ("F32", (1,))},
    "FP8, a scale for each block": {
        "weight": ("F8_E4M3", (40, 24)),
        "weight_scale_inv": ("F32", (1, 1)),
    },
    "compressed-tensors": {"weight_packed": ("I32", (40, 3)), "weight_scale": ("BF16", (40, 1))},
    "compressed-tensors, int8": {"weight": ("I8", (40, 24)), "weight_scale": ("BF16", (40, 1))},
    "NVFP4": {"weight": ("U8", (40, 12)), "weight_scale_2": ("F32", (1,))},
    "EETQ": {"weight": ("I8", (24, 40)), "weight_scales": ("F16", (40,))},
    "HQQ": {"W_q": ("U8", (480,)), "meta": ("F16", (1,))},
    "Quanto": {"weight._data": ("I8", (40, 24)), "weight._scale": ("F32", (40,))},
    "unknown scheme": {"weight": ("I8", (40, 24))},
}
BYTES = {"U8": 1, "I8": 1, "I32": 4, "F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1}


@pytest.mark.parametrize("scheme", STORED)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_quantised_by_tensors(tmp_path: Path, scheme: str, prefix: str) -> None:
    """Eight layers without a word in config.json; norms and embeddings stay as they are."""
    head: dict[str, Any] = {}
    end = 0
    for name, value in sources.tensors(sources.config(n_layers=8)).items():
        rows = {name: ("F32", value.shape)}
        if "blocks" in name and "norm" not in name:
            stem = name.removesuffix("weight")
            rows = {f"{stem}{part}": row for part, row in STORED[scheme].items()}
        for key, (dtype, shape) in rows.items():
            start, end = end, end + int(np.prod(shape)) * BYTES[dtype]
            row = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            head[f"{prefix}{key}"] = row
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sources.config(n_layers=8)))
    sources.write_raw(folder / SINGLE, head, bytes(end))
    assert f"is quantised ({scheme.rstrip(':')}: tensor " in refusal(folder, tmp_path)


def test_reports_are_cut(tmp_path: Path) -> None:
    """32 layers of names that mean nothing: the first problems, then a count."""
    settings = sources.config(n_layers=32)
    values = {f"layers{i}": np.zeros(1, np.float32) for i in range(290)}
    sources.write(tmp_path / "source", values, settings)
    assert refusal(tmp_path / "source", tmp_path).endswith("and 571 more")  # 291 and 290, less 10


# --- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        *("transformer.", "", "module.model.transformer.", "_orig_mod.model.transformer."),
        *("base_model.model.model.transformer.", "_orig_mod.module.transformer."),
        *("module._orig_mod.base_model.model.model.transformer.", "llada.transformer."),
        "model.transformer._orig_mod.",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_one_prefix_of_all_names(tmp_path: Path, prefix: str, tied: bool) -> None:
    settings = sources.config(weight_tying=tied)
    values = sources.tensors(settings)
    renamed = {prefix + name.removeprefix(PREFIX): value for name, value in values.items()}
    sources.write(tmp_path / "source", renamed, settings, shards=2)
    report = convert(tmp_path / "source", tmp_path / "out", verify=True)
    sources.assert_converted(tmp_path / "out", values)
    assert report.notes == (f"read with the prefix {prefix!r} in place of {PREFIX!r}",)


def test_wrappers_around_layers(tmp_path: Path) -> None:
    values = sources.tensors(sources.config())
    renamed = {name.replace("blocks.1.", "blocks.1._orig_mod."): x for name, x in values.items()}
    renamed = {name.replace("q_proj.", "q_proj.module."): x for name, x in renamed.items()}
    sources.write(tmp_path / "source", renamed, sources.config())
    convert(tmp_path / "source", tmp_path / "out", verify=True)
    sources.assert_converted(tmp_path / "out", values)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("module.model.transformer.", "prefixes in place of one: 'model.transformer.' (21), 'mod"),
        ("ema.", "'ema.' (1)"),
        ("model.transformer._orig_mod.", "several prefixes"),
    ],
)
def test_several_prefixes_are_named(tmp_path: Path, extra: str, expected: str) -> None:
    values = sources.tensors(sources.config())
    values[f"{extra}ln_f.weight"] = np.zeros(24, np.float32)
    sources.write(tmp_path / "source", values, sources.config())
    assert expected in refusal(tmp_path / "source", tmp_path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    values = sources.tensors(sources.config())
    name = f"{PREFIX}blocks.0.q_proj.weight"
    values[name.replace("q_proj", "_orig_mod.q_proj")] = values[name]
    sources.write(tmp_path / "source", values, sources.config())
    assert "are the same tensor" in refusal(tmp_path / "source", tmp_path)


# --- caches and links -----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, source: Path) -> Path:
    """The root of a model in Hugging Face's cache, with the snapshot 0a1b."""
    root = tmp_path / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct"
    snapshot = root / "snapshots" / "0a1b"
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, root / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return root


def refs(root: Path, main: str) -> None:
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(main)


def test_the_snapshot_of_a_cache(tmp_path: Path, hub: Path) -> None:
    for name, folder in (("a", hub), ("b", hub / "snapshots"), ("c", hub / "snapshots" / "0a1b")):
        assert convert(folder, tmp_path / name).tensors == 21
    copy = shutil.copytree(hub / "snapshots" / "0a1b", hub / "snapshots" / "ffff", symlinks=True)
    (copy / "LICENSE").write_text("of ffff")
    both_named = r"has the snapshots 0a1b, ffff, and there is no refs/main: give the path of one"
    assert both_named in refusal(hub, tmp_path)
    refs(hub, "ffff\n")
    convert(hub, tmp_path / "d")
    assert (tmp_path / "d" / "LICENSE").read_text() == "of ffff"
    assert (converted(hub, tmp_path / "cache") / "LICENSE").read_text() == "of ffff"
    (hub / "refs" / "main").write_text("9999")
    assert "snapshots 0a1b, ffff, and refs/main names '9999'" in refusal(hub, tmp_path)
    models = "holds several models: give models--GSAI-ML--LLaDA-8B-Instruct in it"
    assert models in refusal(hub.parent, tmp_path)
    shutil.rmtree(hub / "snapshots")
    (hub / "snapshots").mkdir()
    assert "snapshots is empty: download the model again" in refusal(hub, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, FIRST, SECOND])
def test_dangling_links_of_a_snapshot(tmp_path: Path, hub: Path, name: str) -> None:
    os.unlink(os.path.realpath(hub / "snapshots" / "0a1b" / name))
    message = refusal(hub, tmp_path)
    assert f"{name} is a link to " in message
    assert "does not exist: the download is incomplete, download it again" in message
    with pytest.raises(CheckpointError, match="the download is incomplete"):
        converted(hub, tmp_path / "cache")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", INDEX, FIRST])
def test_links_to_another_place(tmp_path: Path, source: Path, name: str) -> None:
    """They are read if the flag says so: a link may point at a file that is not to be copied."""
    values, place = sources.read_folder(source), tmp_path / "disk"
    place.mkdir()
    (source / "LICENSE").write_text("free")
    os.rename(source / name, place / name)
    (source / name).symlink_to(place / name)
    message = refusal(source, tmp_path)
    assert f"{name} is a link to {place / name}, outside of the folder" in message
    assert "--follow-links" in message
    arguments = [str(source), str(tmp_path / "out"), "--follow-links"]
    assert convert_checkpoint.main(arguments) == 0
    sources.assert_converted(tmp_path / "out", values)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_links_within_the_folder_and_to_it(tmp_path: Path, source: Path) -> None:
    (source / "shards").mkdir()
    os.rename(source / FIRST, source / "shards" / FIRST)
    (source / FIRST).symlink_to(f"shards/{FIRST}")
    (tmp_path / "link").symlink_to(source)
    assert convert(tmp_path / "link", tmp_path / "out").tensors == 21


def test_an_adapter_of_a_cache(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{PREFIX}ln_f.weight"
    save_file({name: np.full(24, 2, np.float32)}, folder / "adapter_model.safetensors")
    convert(source, tmp_path / "out", adapter=tmp_path / "models--a--b")
    assert sources.read_params(tmp_path / "out")["final_norm.weight"].tolist() == [2] * 24
