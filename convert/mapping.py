"""The table of LLaDA's tensors: PyTorch name, parameter path, shape. Pure data.

Weights keep PyTorch's [out, in] layout, so that conversion copies bytes. Axis letters: M d_model,
F mlp_hidden_size, Q query heads x head size, G KV heads x head size, E embedding_size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pdllm_jax.network.config import ModelConfig

# Of each layer: PyTorch name, parameter path, axes.
_LAYER = (
    ("attn_norm", "attn_norm", "M"),
    ("q_proj", "q_proj", "QM"),
    ("k_proj", "k_proj", "GM"),
    ("v_proj", "v_proj", "GM"),
    ("attn_out", "attn_out", "MQ"),
    ("ff_norm", "ff_norm", "M"),
    ("ff_proj", "gate_proj", "FM"),
    ("up_proj", "up_proj", "FM"),
    ("ff_out", "down_proj", "MF"),
)
LAYER_NAMES = tuple(source for source, _, _ in _LAYER)
# Before the names of all tensors.
NETWORK = "model.transformer."
EMBEDDING, LM_HEAD = f"{NETWORK}wte.weight", f"{NETWORK}ff_out.weight"
# Rotary frequencies, which some tools store as a buffer: they follow from config.json.
IGNORED = re.compile(r"(?:.+\.)?rotary_emb\.inv_freq")


class Target(NamedTuple):
    """Where one tensor goes."""

    source: str
    path: str
    shape: tuple[int, ...]


def targets(config: ModelConfig) -> dict[str, Target]:
    """Returns the tensors of a checkpoint by PyTorch name, with tied weights without LM head."""
    sizes = {
        "M": config.d_model,
        "F": config.mlp_hidden_size,
        "Q": config.n_heads * config.head_dim,
        "G": config.n_kv_heads * config.head_dim,
        "E": config.embedding_size,
    }
    rows = [("wte", "embedding", "EM")]
    rows += [
        (f"blocks.{i}.{source}", f"blocks.{i}.{path}", axes)
        for i in range(config.n_layers)
        for source, path, axes in _LAYER
    ]
    rows.append(("ln_f", "final_norm", "M"))
    if not config.weight_tying:
        rows.append(("ff_out", "lm_head", "EM"))
    result = [
        Target(f"{NETWORK}{name}.weight", f"{path}.weight", tuple(sizes[x] for x in axes))
        for name, path, axes in rows
    ]
    return {target.source: target for target in result}


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
