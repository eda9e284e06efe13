"""config.json of published models."""

from __future__ import annotations

import json
from typing import Any

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


# Dream-v0-Instruct-7B's config.json: Qwen2's keys and those of the mask and the padding.
DREAM_7B_CONFIG: dict[str, Any] = json.loads("""
{"architectures": ["DreamModel"], "attention_dropout": 0.0,
"auto_map": {"AutoConfig": "configuration_dream.DreamConfig",
 "AutoModel": "modeling_dream.DreamModel"},
"bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
"initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666,
"max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream",
"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
"pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
"sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"transformers_version": "4.46.2", "use_cache": true, "use_mrope": false,
"use_sliding_window": false, "vocab_size": 152064}
""")
