"""LoRA adapters of the peft library, merged into the weights: W + scale * B A."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.folders import check_links, snapshot_folder
from convert.names import layout, module_name, several_prefixes
from convert.sources import WEIGHT_FILES, Source, SourceTensor, open_files
from pdllm_jax.rules import SIZE, is_number, listed
from pdllm_jax.storage.checkpoint import DTYPES
from pdllm_jax.storage.manifest import CheckpointError, errors_as, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Keys of adapter_config.json that are read, and those that only matter in training.
_READ = """
peft_type r lora_alpha use_rslora rank_pattern alpha_pattern modules_to_save bias
base_model_name_or_path init_lora_weights
"""
_TRAINING = """
task_type auto_mapping revision inference_mode peft_version target_modules exclude_modules
lora_dropout layers_to_transform layers_pattern fan_in_fan_out megatron_core loftq_config eva_config
runtime_config qalora_group_size ensure_weight_tying
"""
_KNOWN = frozenset(f"{_READ} {_TRAINING}".split())
# Other ways to start change the base weights.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_NAME = layout(
    r"(?:(?P<linear>lora_[AB])(?:\.\w+)?\.weight|(?P<embedding>lora_embedding_[AB])(?:\.\w+)?"
    r"|(?:base_layer\.|modules_to_save\.(?:\w+\.)?)?weight)"
)


@dataclasses.dataclass(frozen=True)
class MergedTensor(SourceTensor):
    """A tensor of the checkpoint with an adapter's changes; loads as float32.

    Args:
      base: the tensor, or the adapter's own that replaces it.
      factors: A and B, or none.
      transposed: the change is (B A)^T, as for an embedding.
    """

    base: SourceTensor
    factors: tuple[SourceTensor, ...] = ()
    scale: float = 1.0
    transposed: bool = False

    def load(self) -> NDArray[Any]:
        """Returns W + scale * B A, computed in float32."""
        weight, *factors = (x.load().astype(np.float32) for x in (self.base, *self.factors))
        if not factors:
            return weight
        with np.errstate(all="ignore"):  # values that are not finite are refused by name
            change = factors[1] @ factors[0] * np.float32(self.scale)
            return weight + (change.T if self.transposed else change)


def check_adapter_files(folder: Path, adapter: Path | None) -> None:
    """Raises CheckpointError for an adapter in a checkpoint's folder that nobody asked to merge."""
    if not (names := [x for x in (ADAPTER_CONFIG, *ADAPTER_FILES) if (folder / x).exists()]):
        return
    if not any(os.path.lexists(folder / name) for name in WEIGHT_FILES):
        base = ""
        if ADAPTER_CONFIG in names:
            base = f" {read_json(folder / ADAPTER_CONFIG).get('base_model_name_or_path')!r:.200}"
        advice = f"convert its base model{base} with --adapter {folder}"
        raise CheckpointError(f"{folder} holds a LoRA adapter, not a checkpoint: {advice}")
    if adapter is None or os.path.realpath(adapter) != os.path.realpath(folder):
        advice = f"--adapter {folder} merges it; move it away to convert the weights alone"
        problem = f"holds an adapter beside weights ({listed(names)})"
        raise CheckpointError(f"{folder} {problem}: {advice}")


def refuse_unmerged(source: Source) -> None:
    """Raises CheckpointError for LoRA's tensors among those of a checkpoint."""
    if found := [repr(name) for name in source.tensors if ".lora_" in name]:
        advice = "merge the adapter before the checkpoint is saved, or give it with --adapter"
        raise CheckpointError(f"{source.folder} holds LoRA tensors ({listed(found[:2])}): {advice}")


def merge(
    folder: Path, tensors: Mapping[str, SourceTensor], *, follow_links: bool = False
) -> tuple[dict[str, SourceTensor], str]:
    """Merges an adapter into the tensors of a checkpoint.

    Args:
      folder: of the adapter, with adapter_config.json and its weights.
      tensors: of the checkpoint, by published name.

    Returns:
      The tensors, of which those that the adapter changes load merged, and a line about it.

    Raises:
      CheckpointError: the adapter is of another kind, or does not fit; lists what is wrong.
    """
    folder = snapshot_folder(folder)
    check_links(folder, (ADAPTER_CONFIG, *ADAPTER_FILES), follow_links)
    settings = read_json(folder / ADAPTER_CONFIG)
    _check_settings(folder / ADAPTER_CONFIG, settings)
    files = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if not files:
        raise CheckpointError(f"{folder} holds no weights: no {' or '.join(ADAPTER_FILES)}")
    parts, problems = _parts(open_files(folder, files[:1]))
    merged = dict(tensors)
    for module, kinds in parts.items():
        name = f"{module}.weight"
        if name not in tensors:
            problems.append(f"{name!r} is not in the checkpoint")
            continue
        try:
            merged[name] = _merged(tensors[name], kinds, settings)
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if not parts:
        problems.append("it changes no tensor")
    if problems:
        raise CheckpointError(f"adapter {folder} does not fit: {listed(problems, '; ')}")
    base = settings.get("base_model_name_or_path")
    return merged, f"merged {len(parts)} tensors of {folder}, an adapter for {base!r:.200}"


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wanted: list[tuple[str, tuple[Any, ...]]] = [
        ("peft_type", ("LORA",)),
        ("bias", (None, "none")),
        ("init_lora_weights", _STARTS),
        ("use_rslora", (None, False, True)),
    ]
    refused = [key for key, allowed in wanted if settings.get(key) not in allowed]
    refused += [key for key, value in settings.items() if value and key not in _KNOWN]
    if refused:
        values = listed([f"{key}={settings.get(key)!r:.60}" for key in refused])
        raise CheckpointError(f"{path} asks for what is not implemented: {values}")


def _parts(source: Source) -> tuple[dict[str, dict[str, SourceTensor]], list[str]]:
    """Returns tensors by module and kind ("weight" for a replacement), and problems."""
    parts: dict[str, dict[str, SourceTensor]] = {}
    problems, matches = list(source.problems), []
    for tensor in source.tensors.values():
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            problems.append(f"unknown {tensor.name!r}")
            continue
        matches.append(match)
        kinds = parts.setdefault(module_name(match), {})
        if tensor.dtype not in DTYPES:
            problems.append(f"unsupported dtype of {tensor.name!r}: {tensor.dtype}")
        kind = match["linear"] or match["embedding"] or "weight"
        if kinds.setdefault(kind, tensor) is not tensor:
            problems.append(f"{tensor.name!r} is there twice, under two names")
    if problem := several_prefixes(matches):
        problems.append(problem)
    return parts, problems


def _merged(
    base: SourceTensor, kinds: Mapping[str, SourceTensor], settings: Mapping[str, Any]
) -> MergedTensor:
    """Merges what an adapter holds for one module; ValueError says what does not fit."""
    plain = (base.name, base.shape, base.dtype, base.file, base.order)
    weight = kinds.get("weight", base)
    if weight.shape != base.shape:
        raise ValueError(f"shape {list(weight.shape)}, not {list(base.shape)}")
    names = sorted(kinds.keys() - {"weight"})
    if not names:
        return MergedTensor(*plain, weight)
    if names not in (list(_FACTORS[:2]), list(_FACTORS[2:])):
        raise ValueError(f"has {listed(names)} without the other factor")
    a, b = (kinds[name] for name in names)
    transposed = names[0] == _FACTORS[2]
    rank, alpha = (
        _setting(settings, f"{key}_pattern", module, default)
        for module in [base.name.removesuffix(".weight")]
        for key, default in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if not (SIZE.allows(rank) and is_number(alpha)):
        raise ValueError(f"rank {rank!r:.40} and alpha {alpha!r:.40} must be numbers")
    outputs, inputs = base.shape[::-1] if transposed else base.shape
    if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
        raise ValueError(f"factors {list(a.shape)}, {list(b.shape)} do not fit rank {rank}")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return MergedTensor(*plain, weight, (a, b), scale, transposed)


def _setting(settings: Mapping[str, Any], patterns: str, module: str, default: str) -> Any:
    """Returns the value of the first pattern that fits the end of a module's name, as peft does."""
    with errors_as(ValueError, f"{patterns} cannot be read"):
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
    # peft's own defaults
    return settings.get(default, 8)
