"""Random tiny LLaDA checkpoints in the layout that LLaDA is published in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# As LLaDA's: header, blank line, text, end of turn; then the assistant's header.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
N_BYTES = 256

# LLaDA-8B's config.json, whole: the keys that it inherited from OLMo are part of the format.
LLADA_8B_CONFIG: dict[str, Any] = json.loads("""
{"activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0,
"architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": false,
"attention_layer_norm_with_affine": true,
"auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
 "AutoModel": "modeling_llada.LLaDAModelLM",
 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
"bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
"embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081,
"flash_attention": false, "include_bias": false, "include_qkv_bias": false,
"init_cutoff_factor": null, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
"input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true,
"mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4,
"model_type": "llada", "multi_query_attention": null, "n_heads": 32, "n_kv_heads": 32,
"n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0,
"rms_norm_eps": 1e-05, "rope": true, "rope_full_precision": true, "rope_theta": 500000.0,
"scale_logits": false, "transformers_version": "4.46.3", "use_cache": false, "vocab_size": 126464,
"weight_tying": false}
""")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json with LLaDA-8B's keys and tiny sizes.

    The vocabulary is 256 bytes, the special tokens, and rows that no token uses.
    """
    eos, mask = (N_BYTES + SPECIAL_TOKENS.index(x) for x in ("<|endoftext|>", "<|mdm_mask|>"))
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96}
    tokens = {"vocab_size": 272, "embedding_size": 272, "max_sequence_length": 256}
    special = {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": eos}
    return {**LLADA_8B_CONFIG, "rope_theta": 10000.0, **sizes, **tokens, **special, **changes}


def random_tensors(
    config: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gain: float = 1.5,
) -> dict[str, torch.Tensor]:
    """Tensors for `config` under LLaDA's names, in the order of a published checkpoint.

    Norm weights differ from one, so that they matter. `gain` is how much a linear map of a block
    grows what goes through it: with 1.5 attention is sharp and masked slots predict different
    tokens; bfloat16's rounding errors grow with it too. The LM head makes logits with a standard
    deviation of about 3: the best token is clear, and no comparison hinges on a tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm_weight(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    model, mlp = config["d_model"], config["mlp_hidden_size"]
    head_dim = model // config["n_heads"]
    kv = (config.get("n_kv_heads") or config["n_heads"]) * head_dim
    tied = config.get("weight_tying", False)

    prefix = "model.transformer."
    embedding = normal(config["embedding_size"], model, gain=3.0)
    tensors = {f"{prefix}wte.weight": embedding}
    for i in range(config["n_layers"]):
        block = f"{prefix}blocks.{i}."
        tensors[f"{block}attn_norm.weight"] = norm_weight(model)
        tensors[f"{block}q_proj.weight"] = normal(model, model, gain)
        tensors[f"{block}k_proj.weight"] = normal(kv, model, gain)
        tensors[f"{block}v_proj.weight"] = normal(kv, model, gain)
        tensors[f"{block}attn_out.weight"] = normal(model, model, gain)
        tensors[f"{block}ff_norm.weight"] = norm_weight(model)
        tensors[f"{block}ff_proj.weight"] = normal(mlp, model, gain)
        tensors[f"{block}up_proj.weight"] = normal(mlp, model, gain)
        tensors[f"{block}ff_out.weight"] = normal(model, mlp, gain)
    tensors[f"{prefix}ln_f.weight"] = norm_weight(model)
    if not tied:
        tensors[f"{prefix}ff_out.weight"] = normal(config["embedding_size"], model, gain=3.0)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    shards: int = 1,
    format: Literal["safetensors", "bin"] = "safetensors",
    tokenizer: bool = False,
) -> Path:
    """Writes a checkpoint folder: config.json, one file or `shards` files with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stem, extension = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[
        format
    ]
    names = list(tensors)
    index: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        number = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"{stem}{number}.{extension}"
        index |= dict.fromkeys(part, file)
        contents = {name: tensors[name].clone() for name in part}
        if format == "safetensors":
            save_file(contents, folder / file, metadata={"format": "pt"})
        else:
            torch.save(contents, folder / file)
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        (folder / f"{stem}.{extension}.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        )
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> None:
    """A byte-level tokenizer: ids 0..255 are bytes, then come the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    named = {key: token for key, token in names.items() if token in special_tokens}
    if "<|mdm_mask|>" in special_tokens:
        named["mask_token"] = "<|mdm_mask|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2))
    settings = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
