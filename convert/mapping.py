"""The table of LLaDA's tensors: PyTorch name, parameter path, shape. Pure data.

Weights keep PyTorch's [out, in] layout, so that conversion copies bytes. Axis letters: M d_model,
F mlp_hidden_size, Q query heads x head size, G KV heads x head size, E embedding_size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pdllm_jax.network.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row; `{i}` stands for the layer."""

    source: str
    path: str
    axes: str


EMBEDDING = Rule("model.transformer.wte.weight", "embedding.weight", "EM")
FINAL_NORM = Rule("model.transformer.ln_f.weight", "final_norm.weight", "M")
# Absent when weight_tying: the embedding serves as LM head.
LM_HEAD = Rule("model.transformer.ff_out.weight", "lm_head.weight", "EM")

_LAYER = "model.transformer.blocks.{i}."
BLOCK = (
    Rule(_LAYER + "attn_norm.weight", "blocks.{i}.attn_norm.weight", "M"),
    Rule(_LAYER + "q_proj.weight", "blocks.{i}.q_proj.weight", "QM"),
    Rule(_LAYER + "k_proj.weight", "blocks.{i}.k_proj.weight", "GM"),
    Rule(_LAYER + "v_proj.weight", "blocks.{i}.v_proj.weight", "GM"),
    Rule(_LAYER + "attn_out.weight", "blocks.{i}.attn_out.weight", "MQ"),
    Rule(_LAYER + "ff_norm.weight", "blocks.{i}.ff_norm.weight", "M"),
    Rule(_LAYER + "ff_proj.weight", "blocks.{i}.gate_proj.weight", "FM"),
    Rule(_LAYER + "up_proj.weight", "blocks.{i}.up_proj.weight", "FM"),
    Rule(_LAYER + "ff_out.weight", "blocks.{i}.down_proj.weight", "MF"),
)

# Rotary frequencies, which some tools store as a buffer: they follow from config.json.
IGNORED = re.compile(r"(?:.+\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one tensor goes."""

    source: str
    path: str
    shape: tuple[int, ...]


def targets(config: ModelConfig) -> dict[str, Target]:
    """Every tensor that a checkpoint of this config must hold, by PyTorch name."""
    rows = [_target(EMBEDDING, config)]
    rows += [_target(rule, config, i) for i in range(config.n_layers) for rule in BLOCK]
    rows.append(_target(FINAL_NORM, config))
    if not config.weight_tying:
        rows.append(lm_head(config))
    return {row.source: row for row in rows}


def lm_head(config: ModelConfig) -> Target:
    """The LM head, which a checkpoint with tied weights may hold or leave out."""
    return _target(LM_HEAD, config)


def _target(rule: Rule, config: ModelConfig, layer: int | None = None) -> Target:
    sizes = {
        "M": config.d_model,
        "F": config.mlp_hidden_size,
        "Q": config.n_heads * config.head_dim,
        "G": config.n_kv_heads * config.head_dim,
        "E": config.embedding_size,
    }
    return Target(
        rule.source.format(i=layer),
        rule.path.format(i=layer),
        tuple(sizes[axis] for axis in rule.axes),
    )


def tree(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """Nests values by dotted path as nnx.to_pure_dict does: layer numbers are integer keys."""
    root: dict[Any, Any] = {}
    for path, value in leaves.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return root
