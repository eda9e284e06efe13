"""Small files that campaigns start from: a checkpoint of random weights, a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from convert.mapping import targets
from pdllm_jax.network.config import ModelConfig

SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
SENTENCES = "Anne lives at Kellynch Hall. The sea at Lyme is blue, and Louisa jumps. "


def config(**changes: Any) -> dict[str, Any]:
    """config.json: two layers, grouped KV heads, 256 bytes and the special tokens."""
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_heads": 4,
        "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "mlp_ratio": 4,
        "activation_type": "silu", "block_type": "llama", "rope": True, "rope_theta": 10000.0,
        "rope_full_precision": True, "alibi": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "rms_norm_eps": 1e-5, "max_sequence_length": 256,
        "vocab_size": 264, "embedding_size": 264, "weight_tying": False, "include_bias": False,
        "include_qkv_bias": False, "multi_query_attention": None, "mask_token_id": 258,
        "eos_token_id": 257, "pad_token_id": 257, "bos_token_id": 256,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128,
            "beta_fast": 32.0, "beta_slow": 1.0,
        },
        **changes,
    }  # fmt: skip


def tensors(settings: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the published names; logits have a standard deviation of about 3."""
    rng = np.random.default_rng(seed)
    found = {}
    for row in targets(ModelConfig.from_dict(settings)).values():
        values = rng.standard_normal(row.shape, np.float32)
        if len(row.shape) == 1:
            values = 1 + 0.2 * values
        else:
            outer = row.source.endswith(("wte.weight", "transformer.ff_out.weight"))
            values *= (3.0 if outer else 1.5) / row.shape[1] ** 0.5
        found[row.source] = values.astype(np.float32)
    return found


def write_checkpoint(
    folder: Path,
    *,
    shards: int = 1,
    seed: int = 0,
    stem: str = "model",
    suffix: str = ".safetensors",
    **changes: Any,
) -> Path:
    """A PyTorch checkpoint with a tokenizer; several shards have an index.

    stem, suffix: of the files of weights; "pytorch_model" and ".bin" need PyTorch.
    """
    folder.mkdir(parents=True)
    settings = config(**changes)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    values = tensors(settings, seed)
    if shards == 1:
        _write_tensors(folder / f"{stem}{suffix}", values)
    else:
        weight_map = {}
        for shard in range(shards):
            name = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
            part = list(values)[shard::shards]
            _write_tensors(folder / name, {key: values[key] for key in part})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    return folder


def _write_tensors(path: Path, values: dict[str, np.ndarray]) -> None:
    if path.suffix == ".bin":
        import torch

        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    else:
        save_file(values, path, metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """Ids 0 to 255 are bytes, then come the special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "mask_token": SPECIAL[2]}
    settings = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
