"""PyTorch checkpoints for the converter's tests, made from NumPy alone, whole or broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
TOKENIZER = {
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": '{"a": 0}',
    "merges.txt": "#version: 0.2\n",
}
PREFIX = "model.transformer."
Tensors = dict[str, NDArray[Any]]


# Dream's keys for LLaDA's, and its modules for those of the library.
DREAM_KEYS = {
    "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
    "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings", "weight_tying": "tie_word_embeddings",
    "activation_type": "hidden_act", "embedding_size": "vocab_size",
}  # fmt: skip
DREAM_MODULES = {
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}  # fmt: skip


def dream_config(**changes: Any) -> dict[str, Any]:
    """The same sizes in a config.json of Dream; changes of sizes by LLaDA's keys."""
    settings = config(**changes)
    other = ["block_type", "rope", "rope_full_precision", "layer_norm_type", "include_bias"]
    kept = {key: x for key, x in settings.items() if key not in [*other, "include_qkv_bias"]}
    named = {DREAM_KEYS.get(key, key): x for key, x in kept.items()}
    return named | {"model_type": "Dream", "architectures": ["DreamModel"], "rope_scaling": None}


def config(**changes: Any) -> dict[str, Any]:
    """A small config.json: two layers, grouped KV heads, sizes that are all different."""
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 24, "n_heads": 4,
        "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 40, "activation_type": "silu",
        "block_type": "llama", "rope": True, "rope_theta": 10000.0, "rope_full_precision": True,
        "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "max_sequence_length": 64,
        "vocab_size": 50, "embedding_size": 52, "weight_tying": False, "include_bias": False,
        "include_qkv_bias": False, "mask_token_id": 49, "eos_token_id": 48, "pad_token_id": 48,
        **changes,
    }  # fmt: skip


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes by the published layout, written without the converter's table."""
    if settings["model_type"] == "Dream":
        plain = {key: settings[name] for key, name in DREAM_KEYS.items()} | {"model_type": "llada"}
        return dict(_dream_shapes(shapes(plain)))
    model, hidden = settings["d_model"], settings["mlp_hidden_size"]
    kv = settings["n_kv_heads"] * model // settings["n_heads"]
    rows = settings["embedding_size"]
    result: dict[str, tuple[int, ...]] = {f"{PREFIX}wte.weight": (rows, model)}
    for layer in range(settings["n_layers"]):
        block = f"{PREFIX}blocks.{layer}."
        result |= {
            f"{block}attn_norm.weight": (model,),
            f"{block}ff_norm.weight": (model,),
            f"{block}q_proj.weight": (model, model),
            f"{block}k_proj.weight": (kv, model),
            f"{block}v_proj.weight": (kv, model),
            f"{block}attn_out.weight": (model, model),
            f"{block}ff_proj.weight": (hidden, model),
            f"{block}up_proj.weight": (hidden, model),
            f"{block}ff_out.weight": (model, hidden),
        }
    result[f"{PREFIX}ln_f.weight"] = (model,)
    if not settings["weight_tying"]:
        result[f"{PREFIX}ff_out.weight"] = (rows, model)
    return result


def _dream_shapes(plain: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    outer = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    for name, shape in plain.items():
        path = parameter_path(name).removesuffix(".weight")
        _, _, module = path.rpartition(".")
        layer = path.split(".")[1] if "." in path else ""
        published = outer.get(path) or f"model.layers.{layer}.{DREAM_MODULES[module]}"
        yield f"{published}.weight", shape
        if module in ("q_proj", "k_proj", "v_proj"):
            yield f"{published}.bias", shape[:1]


def tensors(settings: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> Tensors:
    """Random values; every tensor differs from every other."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, np.float32).astype(DTYPES[dtype])
        for name, shape in shapes(settings).items()
    }


def bits(array: NDArray[Any]) -> bytes:
    """Dtype, shape and bytes, so that equality is exact and NaN equals itself."""
    return f"{array.dtype.name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()


def write(
    folder: Path,
    values: Mapping[str, NDArray[Any]],
    settings: Mapping[str, Any],
    *,
    shards: int | None = None,
    tokenizer: bool = True,
) -> Path:
    """A folder as Hugging Face tools write it: sharded with an index, or one file (None)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards is None:
        save_file(dict(values), folder / "model.safetensors")
    else:
        names = list(values)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = names[shard::shards]
            save_file({name: values[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        write_index(folder, weight_map)
    if tokenizer:
        for name, text in TOKENIZER.items():
            (folder / name).write_text(text)
    return folder


def make(
    folder: Path,
    dtype: str = "float32",
    seed: int = 0,
    shards: int | None = None,
    family: str = "llada",
    **changes: Any,
) -> Tensors:
    """Writes random values to folder/source and returns them; `changes` are of config.json."""
    settings = {"llada": config, "dream": dream_config}[family](**changes)
    values = tensors(settings, dtype, seed)
    write(folder / "source", values, settings, shards=shards)
    return values


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def read_folder(folder: Path) -> Tensors:
    """Returns all tensors of a folder with safetensors, through the safetensors library."""
    result: Tensors = {}
    for path in folder.glob("*.safetensors"):
        result |= load_file(path)
    return result


def read_params(folder: Path) -> Tensors:
    """Returns a converted folder's parameters by dotted path, through Orbax's plain API."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore((folder / "params").resolve())
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def parameter_path(name: str) -> str:
    """Translates a checkpoint's name as the documentation of the layout says."""
    path = name.removeprefix(PREFIX)
    if path == name:  # Dream's
        path = re.sub(r"^layers", "blocks", name.removeprefix("model."))
        for module, published in DREAM_MODULES.items():
            path = re.sub(rf"(blocks\.\d+)\.{published}\.", rf"\1.{module}.", path)
        return re.sub(r"^norm", "final_norm", re.sub(r"^embed_tokens", "embedding", path))
    path = re.sub(r"^(blocks\.\d+)\.ff_proj", r"\1.gate_proj", path)
    path = re.sub(r"^(blocks\.\d+)\.ff_out", r"\1.down_proj", path)
    path = re.sub(r"^ff_out", "lm_head", path)
    return re.sub(r"^ln_f", "final_norm", re.sub(r"^wte", "embedding", path))


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares names, dtypes, shapes and bits."""
    assert sorted(actual) == sorted(expected)
    assert not [k for k in expected if bits(actual[k]) != bits(expected[k])]


def assert_converted(folder: Path, expected: Mapping[str, Any]) -> None:
    """Compares a converted folder with the tensors of its source."""
    assert_same(read_params(folder), {parameter_path(k): v for k, v in expected.items()})
