"""The networks of both families as transformers' with a full attention mask.

LLaDA's is LlamaModel with renamed tensors, Dream's is Qwen2Model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from tests.oracles.checkpoints import NAMES, is_tied

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
PREFIX = "model.transformer."


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters for a config.json of LLaDA or Dream.

    NTK-aware scaling is a larger base, theta * factor^(D / (D - 2)), and nothing else.
    """
    theta = float(config["rope_theta"])
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default"})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if kind == "ntk":
        sizes = ("d_model", "n_heads"), ("hidden_size", "num_attention_heads")
        model, heads = sizes[config["model_type"] == "Dream"]
        head_dim = config[model] // config[heads]
        theta *= scaling["factor"] ** (head_dim / (head_dim - 2))
        return {"rope_type": "default", "rope_theta": theta}
    parameters = {"rope_type": kind, "rope_theta": theta, **scaling}
    if kind == "yarn":
        length = config.get("max_sequence_length") or config["max_position_embeddings"]
        parameters.setdefault("original_max_position_embeddings", length)
    return parameters


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The LlamaConfig that describes the same network as a LLaDA config.json."""
    return LlamaConfig(
        vocab_size=config["embedding_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        hidden_act="silu",
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=rope_parameters(config),
        pad_token_id=None,
        attn_implementation="eager",
    )


def rename(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaDA's tensor names -> LlamaModel's; the LM head is left out, LlamaModel has none."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        if parts[0] == "blocks":
            renamed[f"layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"] = tensor
        elif parts[0] != "ff_out":
            renamed[{"wte": "embed_tokens", "ln_f": "norm"}[parts[0]] + ".weight"] = tensor
    return renamed


def qwen_config(config: Mapping[str, Any]) -> Qwen2Config:
    """The Qwen2Config that describes the same network as a Dream config.json."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads max_position_embeddings rms_norm_eps"
    return Qwen2Config(
        **{name: config[name] for name in names.split()},
        hidden_act="silu",
        rope_parameters=rope_parameters(config),
        use_sliding_window=False,
        pad_token_id=None,
        attn_implementation="eager",
    )


class LlamaOracle:
    """Logits of all rows from transformers' network: LLaDA's from LlamaModel, Dream's from Qwen2's.

    Row j is what the network says at row j: under Dream's shift it predicts slot j + 1.

    tensors: published names -> PyTorch tensors; config: the contents of config.json.
    dtype: what the weights are cast to and the network runs in.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        embedding, _, _, head = NAMES[config["model_type"]]
        self.head = tensors[f"{embedding if is_tied(config) else head}.weight"].to(dtype)
        if config["model_type"] == "Dream":
            self.model = Qwen2Model(qwen_config(config)).eval()
            state = {
                name.removeprefix("model."): tensor
                for name, tensor in tensors.items()
                if not name.startswith(head)
            }
        else:
            self.model, state = LlamaModel(llama_config(config)).eval(), rename(tensors)
        # strict: a tensor that is missing or not used would make this a different network.
        self.model.load_state_dict(state, strict=True)
        self.model.to(dtype)
        self.dtype = dtype

    @torch.no_grad()
    def forward(
        self,
        ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids [B, T] int64 -> logits [B, T, E] in `dtype`.

        position_ids: [B, T] int64, 0 .. T-1 if None.
        mask: additive [B, 1, T, T], query rows by key columns; None lets all attend to all.
        """
        batch, length = ids.shape
        if mask is None:
            mask = torch.zeros(batch, 1, length, length)
        hidden = self.model(
            input_ids=ids,
            attention_mask=mask.to(self.dtype),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden @ self.head.T

    __call__ = forward
