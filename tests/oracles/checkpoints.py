"""Random tiny checkpoints of LLaDA and Dream, each in the layout that it is published in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.oracles.config_json import DREAM_7B_CONFIG, LLADA_8B_CONFIG

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
DREAM_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|beginoftext|>",
    "<|mask|>",
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

# Names of a layer's tensors in the order of a published checkpoint, by what they are.
LAYER_NAMES = {
    "llada": {
        "attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
        "ff_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
    },
    "Dream": {
        "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
        "v": "self_attn.v_proj", "o": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    },
}  # fmt: skip
# Names of the embedding, a layer, the last norm and the LM head, by model_type.
NAMES = {
    "llada": [f"model.transformer.{x}" for x in ("wte", "blocks.{}", "ln_f", "ff_out")],
    "Dream": ["model.embed_tokens", "model.layers.{}", "model.norm", "lm_head"],
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json with LLaDA-8B's keys and tiny sizes.

    The vocabulary is 256 bytes, the special tokens, and rows that no token uses.
    """
    eos, mask = (N_BYTES + SPECIAL_TOKENS.index(x) for x in ("<|endoftext|>", "<|mdm_mask|>"))
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96}
    tokens = {"vocab_size": 272, "embedding_size": 272, "max_sequence_length": 256}
    special = {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": eos}
    return {**LLADA_8B_CONFIG, "rope_theta": 10000.0, **sizes, **tokens, **special, **changes}


def tiny_dream_config(**changes: Any) -> dict[str, Any]:
    """A config.json with Dream-7B's keys and tiny sizes: two query heads share each KV head.

    The vocabulary is 256 bytes, DREAM_SPECIAL_TOKENS, and rows that no token uses.
    """
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 272}
    names = {"mask_token_id": "<|mask|>"}
    names |= dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), "<|endoftext|>")
    ids = {key: N_BYTES + DREAM_SPECIAL_TOKENS.index(token) for key, token in names.items()}
    other = {"max_position_embeddings": 256, "rope_theta": 10000.0}
    return {**DREAM_7B_CONFIG, **sizes, **ids, **other, **changes}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the embedding is the LM head."""
    return bool(config.get("weight_tying") or config.get("tie_word_embeddings"))


def random_tensors(
    config: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gain: float = 1.5,
) -> dict[str, torch.Tensor]:
    """Tensors for `config` under its family's names, in the order of a published checkpoint.

    Norm weights differ from one, so that they matter, and biases (Dream's) are not zero. `gain` is
    how much a linear map of a block grows what goes through it: with 1.5 attention is sharp and
    masked slots predict different tokens; bfloat16's rounding errors grow with it too. The LM head
    makes logits with a standard deviation of about 3: the best token is clear, and no comparison
    hinges on a tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm_weight(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    def size(*keys: str) -> Any:
        return next(config[key] for key in keys if config.get(key))

    family = config["model_type"]
    model, mlp = size("d_model", "hidden_size"), size("mlp_hidden_size", "intermediate_size")
    heads = size("n_heads", "num_attention_heads")
    kv = size("n_kv_heads", "num_key_value_heads", "n_heads") * (model // heads)
    rows, layers = size("embedding_size", "vocab_size"), size("n_layers", "num_hidden_layers")
    embedding, layer, last_norm, head = NAMES[family]
    names = LAYER_NAMES[family]
    shapes = {"q": (model, model), "k": (kv, model), "v": (kv, model), "o": (model, model)}
    shapes |= {"gate": (mlp, model), "up": (mlp, model), "down": (model, mlp)}

    tensors = {f"{embedding}.weight": normal(rows, model, gain=3.0)}
    for i in range(layers):
        for part, name in names.items():
            name = f"{layer.format(i)}.{name}"
            if part in shapes:
                tensors[f"{name}.weight"] = normal(*shapes[part], gain)
            else:
                tensors[f"{name}.weight"] = norm_weight(model)
            if family == "Dream" and part in "qkv":
                tensors[f"{name}.bias"] = normal(1, shapes[part][0], shapes[part][0] ** 0.5)[0]
    tensors[f"{last_norm}.weight"] = norm_weight(model)
    if not is_tied(config):
        tensors[f"{head}.weight"] = normal(rows, model, gain=3.0)
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
