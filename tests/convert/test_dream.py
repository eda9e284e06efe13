"""Dream's names: prefixes, biases, adapters, quantisations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert, converted
from pdllm_jax.storage.manifest import CheckpointError
from pdllm_jax.vocabulary import TokenizerError
from tests.oracles.dream_tokenizer import SPECIAL_TOKENS, write_dream_tokenizer
from tests.support import convert_sources as sources

CONFIG = sources.dream_config()
Q = "model.layers.1.self_attn.q_proj"
# Names as wrappers write them: what replaces "model.", and what stands before "lm_head.".
PREFIXES = {
    "": "",
    "module.model.": "module.",
    "_orig_mod.model.": "_orig_mod.",
    "base_model.model.model.": "base_model.model.",
    "model._orig_mod.": "",
    "language_model.model.": "language_model.",
}


def write(folder: Path, values: dict[str, Any], **changes: Any) -> Path:
    return sources.write(folder / "source", values, sources.dream_config(**changes), shards=2)


def refusal(folder: Path, values: dict[str, Any], **changes: Any) -> str:
    """Converts the tensors and returns the one line with which that is refused."""
    with pytest.raises(CheckpointError) as caught:
        convert(write(folder, values, **changes), folder / "out")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(("network", "head"), PREFIXES.items())
def test_one_prefix_of_all_names(tmp_path: Path, network: str, head: str) -> None:
    values = sources.tensors(CONFIG)
    renamed = {
        head + name if name.startswith("lm_head") else network + name.removeprefix("model."): value
        for name, value in values.items()
    }
    report = convert(write(tmp_path, renamed), tmp_path / "out", verify=True)
    sources.assert_converted(tmp_path / "out", values)
    assert report.notes == (f"read with the prefix {network!r} in place of 'model.'",)


def test_wrappers_and_stored_frequencies(tmp_path: Path) -> None:
    values = sources.tensors(CONFIG)
    renamed = {name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in values.items()}
    renamed = {name.replace("q_proj.", "q_proj.module."): x for name, x in renamed.items()}
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    renamed[frequencies] = np.ones(3, np.float32)
    report = convert(write(tmp_path, renamed), tmp_path / "out", verify=True)
    sources.assert_converted(tmp_path / "out", values)
    assert report.ignored == (frequencies,)


@pytest.mark.parametrize("extra", ["ema.lm_head.weight", "ema.model.norm.weight", "norm.weight"])
def test_several_prefixes_are_named(tmp_path: Path, extra: str) -> None:
    values = sources.tensors(CONFIG) | {extra: np.zeros(24, np.float32)}
    assert "names have several prefixes in place of one: 'model.' (" in refusal(tmp_path, values)


def test_biases_that_contradict_the_family(tmp_path: Path) -> None:
    values = sources.tensors(CONFIG)
    plain = {name: value for name, value in values.items() if not name.endswith("bias")}
    bias = "model.layers.0.self_attn.q_proj.bias"
    line = f"has 1 problem: missing 6 biases, such as '{bias}': config.json is of a family that n"
    assert line in refusal(tmp_path / "none", plain)
    one = {name: value for name, value in values.items() if name != bias}
    assert refusal(tmp_path / "one", one).endswith(f"has 1 problem: missing '{bias}'")
    more = {f"model.layers.{i}.self_attn.o_proj.bias": np.zeros(24, np.float32) for i in (0, 1)}
    assert "1 problem: unknown 2 biases, such as" in refusal(tmp_path / "more", values | more)
    folder = tmp_path / "llada"
    values = sources.tensors(sources.config())
    values |= {
        f"{sources.PREFIX}blocks.{i}.{name}.bias": np.zeros(8, np.float32)
        for i in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    sources.write(folder, values, sources.config())
    with pytest.raises(CheckpointError, match="has 1 problem: unknown 6 biases, such as"):
        convert(folder, tmp_path / "out")


def test_names_of_another_family(tmp_path: Path) -> None:
    values = sources.tensors(sources.config())
    line = (
        "config.json is of the family dream, but the names of the tensors are of the family llada"
    )
    assert line in refusal(tmp_path, values)


def test_tied_head(tmp_path: Path) -> None:
    """A tied head that is stored is left out if it is the embedding, else refused."""
    values = sources.tensors(CONFIG)
    embedding = values["model.embed_tokens.weight"]
    assert "'lm_head.weight' in model-" in refusal(tmp_path / "a", values, weight_tying=True)
    same = values | {"lm_head.weight": embedding}
    report = convert(write(tmp_path / "b", same, weight_tying=True), tmp_path / "out")
    assert report.ignored == ("lm_head.weight",)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    """LoRA on a module of a layer, and a saved head: what is before them differs."""
    values = sources.tensors(CONFIG)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-16, 17, shape).astype(np.float32) / 8 for shape in ((4, 24), (24, 4)))
    head = rng.standard_normal((52, 24), np.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model."
    parts = {f"{prefix}{Q}.lora_A.weight": a, f"{prefix}{Q}.lora_B.weight": b}
    parts[f"{prefix}lm_head.weight"] = head
    save_file(parts, folder / "adapter_model.safetensors")
    convert(write(tmp_path, values), tmp_path / "out", adapter=folder, verify=True)
    values[f"{Q}.weight"] = values[f"{Q}.weight"] + b @ a * np.float32(1.5)
    sources.assert_converted(tmp_path / "out", values | {"lm_head.weight": head})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_quantised_by_tensors(tmp_path: Path, prefix: str) -> None:
    codes = dict.fromkeys([f"{Q}.weight"], np.zeros((24, 24), np.int8))
    scales = {f"{Q}.weight_scale": np.zeros((24, 1), np.float32)}
    values = {f"{prefix}{name}": value for name, value in (codes | scales).items()}
    assert "is quantised (compressed-tensors, int8: tensor" in refusal(tmp_path, values)


def test_a_tokenizer_without_mask_is_named_before_weights_are_copied(tmp_path: Path) -> None:
    source, cache = write(tmp_path, sources.tensors(CONFIG)), tmp_path / "cache"
    (source / "tokenizer.json").unlink()
    write_dream_tokenizer(source, special=SPECIAL_TOKENS[:-1])
    with pytest.raises(TokenizerError, match="no mask token"):
        converted(source, cache, text=True)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert converted(source, cache).is_dir()  # for token ids
