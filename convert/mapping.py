"""The tables of tensors, one for each family: PyTorch name, parameter path, shape. Pure data.

Weights keep PyTorch's [out, in] layout, so that conversion copies bytes. Axis letters: M d_model,
F mlp_hidden_size, Q query heads x head size, G KV heads x head size, E embedding_size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pdllm_jax.network.config import ModelConfig


class Names(NamedTuple):
    """The published names of a family's modules.

    network: before the names of the modules of the network; of the head too, if it is inside.
    embedding, layers, final_norm: behind it; a layer's number comes after `layers`.
    head: the LM head, with all that is before it.
    layer: of each module of a layer: its name, its parameter path, its axes.
    """

    network: str
    embedding: str
    layers: str
    final_norm: str
    head: str
    layer: tuple[tuple[str, str, str], ...]

    @property
    def head_inside(self) -> bool:
        """Whether the head is a module of the network."""
        return self.head.startswith(self.network)


NAMES = {
    "llada": Names(
        network="model.transformer.",
        embedding="wte",
        layers="blocks",
        final_norm="ln_f",
        head="model.transformer.ff_out",
        layer=(
            ("attn_norm", "attn_norm", "M"),
            ("q_proj", "q_proj", "QM"),
            ("k_proj", "k_proj", "GM"),
            ("v_proj", "v_proj", "GM"),
            ("attn_out", "attn_out", "MQ"),
            ("ff_norm", "ff_norm", "M"),
            ("ff_proj", "gate_proj", "FM"),
            ("up_proj", "up_proj", "FM"),
            ("ff_out", "down_proj", "MF"),
        ),
    ),
    "dream": Names(
        network="model.",
        embedding="embed_tokens",
        layers="layers",
        final_norm="norm",
        head="lm_head",
        layer=(
            ("input_layernorm", "attn_norm", "M"),
            ("self_attn.q_proj", "q_proj", "QM"),
            ("self_attn.k_proj", "k_proj", "GM"),
            ("self_attn.v_proj", "v_proj", "GM"),
            ("self_attn.o_proj", "attn_out", "MQ"),
            ("post_attention_layernorm", "ff_norm", "M"),
            ("mlp.gate_proj", "gate_proj", "FM"),
            ("mlp.up_proj", "up_proj", "FM"),
            ("mlp.down_proj", "down_proj", "MF"),
        ),
    ),
}
_BIASED = ("q_proj", "k_proj", "v_proj")
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
    names = NAMES[config.family]
    rows = [(f"{names.network}{names.embedding}.weight", "embedding.weight", "EM")]
    for i in range(config.n_layers):
        for source, path, axes in names.layer:
            pair = f"{names.network}{names.layers}.{i}.{source}", f"blocks.{i}.{path}"
            rows.append((f"{pair[0]}.weight", f"{pair[1]}.weight", axes))
            if config.qkv_bias and path in _BIASED:
                rows.append((f"{pair[0]}.bias", f"{pair[1]}.bias", axes[0]))
    rows.append((f"{names.network}{names.final_norm}.weight", "final_norm.weight", "M"))
    if not config.weight_tying:
        rows.append((f"{names.head}.weight", "lm_head.weight", "EM"))
    result = [Target(name, path, tuple(sizes[x] for x in axes)) for name, path, axes in rows]
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
