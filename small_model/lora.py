"""Reads, writes and applies the adapter: low-rank differences, norms and special tokens' rows.

The adapter is one safetensors file. For each linear map it has int8 A [r, in] and B [out, r], each
with r float32 scales, so that W = W0 + (B * b_scale) @ (A * a_scale). Norms and embedding rows are
float32. Names extend the checkpoint's: `<tensor>.lora_a`, `<tensor>.lora_a_scale`, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from small_model.network import LINEAR, NORMS, Params, tensor_name

_EMBEDDING = "model.transformer.wte.weight"
_FINAL_NORM = "model.transformer.ln_f.weight"


def _quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values and float32 scales [r]; axis: the axis of size r."""
    scale = np.abs(values).max(axis=1 - axis, keepdims=True) / 127
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale.ravel()


def from_trainable(trainable: Params, gain: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantizes trained parameters (see network.merge) to adapter tensors."""
    adapter: dict[str, np.ndarray] = {}
    for name in LINEAR:
        a, b = (np.asarray(trainable["lora"][name][side], np.float32) for side in "ab")
        for layer, values in enumerate(zip(a, b * gain[name][:, None, None], strict=True)):
            for axis, side in enumerate("ab"):
                target = f"{tensor_name(layer, name)}.lora_{side}"
                adapter[target], adapter[f"{target}_scale"] = _quantize(values[axis], axis)
    for name in NORMS:
        for layer, values in enumerate(np.asarray(trainable["norms"][name], np.float32)):
            adapter[tensor_name(layer, name)] = values
    adapter[_FINAL_NORM] = np.asarray(trainable["norms"]["final_norm"], np.float32)
    adapter[f"{_EMBEDDING}.rows"] = np.asarray(trainable["special"], np.float32)
    return adapter


def to_trainable(
    adapter: Mapping[str, np.ndarray], gain: Mapping[str, np.ndarray], n_layers: int
) -> Params:
    """Dequantizes an adapter to float32 parameters, to continue training."""
    lora = {}
    for name in LINEAR:
        pairs = [_factors(adapter, tensor_name(layer, name)) for layer in range(n_layers)]
        a, b = map(np.stack, zip(*pairs, strict=True))
        lora[name] = {"a": a, "b": b / gain[name][:, None, None]}
    norms = {
        name: np.stack([adapter[tensor_name(layer, name)] for layer in range(n_layers)])
        for name in NORMS
    }
    norms["final_norm"] = adapter[_FINAL_NORM]
    return {"lora": lora, "norms": norms, "special": adapter[f"{_EMBEDDING}.rows"]}


def _factors(adapter: Mapping[str, np.ndarray], target: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [r, in] and B [out, r] of a linear map, float32."""
    a = adapter[f"{target}.lora_a"] * adapter[f"{target}.lora_a_scale"][:, None]
    b = adapter[f"{target}.lora_b"] * adapter[f"{target}.lora_b_scale"][None, :]
    return a, b


def apply(
    tensors: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the base tensors (float32) with the adapter added; `tensors` is not modified.

    Raises ValueError if the base lacks a tensor of the adapter, or if shapes differ.
    """
    merged = dict(tensors)
    for name, values in adapter.items():
        target, weight, part = name.partition(".weight")
        target += weight
        if target not in tensors:
            raise ValueError(f"adapter tensor {name}: the base has no tensor {target}")
        if part == "":
            merged[target] = values
        elif part == ".rows":
            merged[target] = np.concatenate([values, tensors[target][len(values) :]])
        elif part == ".lora_a":
            a, b = _factors(adapter, target)
            shape = tensors[target].shape
            if (len(b), a.shape[1]) != shape:
                raise ValueError(f"adapter tensor {name} does not fit the base's shape {shape}")
            merged[target] = tensors[target] + b @ a
    return merged


def save(path: str | Path, adapter: Mapping[str, np.ndarray], note: Mapping[str, str]) -> None:
    """Writes an adapter file with `note` as its metadata."""
    arrays = {name: np.ascontiguousarray(values) for name, values in adapter.items()}
    save_file(arrays, path, metadata=dict(note))


def load_note(path: str | Path) -> dict[str, str]:
    """Returns the metadata of an adapter file: "rank" and "steps"."""
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Reads an adapter file."""
    return load_file(path)
