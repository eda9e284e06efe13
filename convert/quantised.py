"""Quantised checkpoints, which are refused: by config.json, or by their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.sources import Source, SourceTensor
from pdllm_jax.storage.checkpoint import CONFIG
from pdllm_jax.storage.manifest import CheckpointError

_KEYS = ("quantization_config", "compression_config", "quantization")
_METHOD = ("quant_method", "quant_algo", "quant_type", "load_in_8bit", "load_in_4bit", "bits")
# What a scheme calls its tensors, at the end of their names. The first that fits is the scheme.
_NAMES = {
    "bitsandbytes {}": r"quant_state\.bitsandbytes__(nf4|fp4)",
    "bitsandbytes, 4 bits": r"(?:nested_)?(?:absmax|quant_map)",
    "bitsandbytes int8": r"SCB|weight_format",
    "GPTQ": r"g_idx",
    "NVFP4": r"weight_scale_2",
    "compressed-tensors": r"weight_(?:packed|shape|zero_point)",
    "HQQ": r"W_q",
    "EETQ": r"weight_scales",
    "AQLM": r"codebooks",
    "VPTQ": r"centroids(?:\.weight)?",
    "EXL2": r"q_(?:weight|invperm|groups)",
    "QuIP#": r"Qidxs\w*",
    "Quanto": r"weight\._(?:data|scale)",
    "FP8, a scale for each block": r"weight_scale_inv",
    "MXFP4": r"\w+_blocks",
}
_PATTERNS = {scheme: re.compile(rf"(?:.*\.)?(?:{end})") for scheme, end in _NAMES.items()}
_FLOATS = re.compile(r"(?:F|float)([468])(?:_.*)?")
_INTEGERS = re.compile(r"[IU]\d+|u?int\d+|BOOL|bool")
_ADVICE = "only bfloat16, float16 and float32 convert: take the checkpoint that it was made from"


def refuse_quantised(raw: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError for a config.json that says that the weights are quantised."""
    for key in _KEYS:
        settings = raw.get(key)
        if not settings:
            continue
        says = f"{settings!r:.60}"
        if isinstance(settings, Mapping):
            loads = [settings.get(name) for name in ("load_in_8bit", "load_in_4bit")]
            if False in loads and not any(loads):  # bitsandbytes, switched off
                continue
            stated = [f"{name} {settings[name]!r:.40}" for name in _METHOD if settings.get(name)]
            says = ", ".join(stated) or "without a method"
        raise CheckpointError(f"{folder / CONFIG}: {key} ({says}): quantised weights. {_ADVICE}")


def refuse_quantised_tensors(source: Source) -> None:
    """Raises CheckpointError, with the scheme's name, for tensors that belong to a quantisation."""
    tensors = source.tensors
    for scheme, pattern in _PATTERNS.items():
        for name, tensor in tensors.items():
            if found := pattern.fullmatch(name):
                _refuse(source, scheme.format(*found.groups()), tensor)
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name.removesuffix('qweight')}scales")
        if name.endswith(".qweight") and scales is not None:
            # AWQ packs rows of outputs, GPTQ columns of inputs.
            _refuse(source, "GPTQ" if tensor.shape[-1:] == scales.shape[-1:] else "AWQ", tensor)
        if bits := _FLOATS.fullmatch(tensor.dtype):
            _refuse(source, f"FP{bits[1]}", tensor)
    for name, tensor in tensors.items():
        if _INTEGERS.fullmatch(tensor.dtype) and name.endswith((".weight", ".qweight")):
            scaled = f"{name}_scale" in tensors
            _refuse(source, "compressed-tensors, int8" if scaled else "unknown scheme", tensor)
        if name.endswith((".weight_scale", ".input_scale")):
            _refuse(source, "FP8 or compressed-tensors", tensor)


def _refuse(source: Source, scheme: str, tensor: SourceTensor) -> None:
    example = f"tensor {tensor.name!r:.200} of dtype {tensor.dtype} in {tensor.file.name}"
    raise CheckpointError(f"{source.folder} is quantised ({scheme}: {example}). {_ADVICE}")
