"""config.json as newer versions of transformers write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.checkpoint import load_config
from tests.support.convert_sources import config

PLAIN = ModelConfig.from_dict(config())
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
STRETCHED = ModelConfig.from_dict(config(rope_scaling=YARN))
SIZES = "d_model n_layers n_heads n_kv_heads mlp_hidden_size vocab_size embedding_size"
IDS = "max_sequence_length mask_token_id eos_token_id pad_token_id"
NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
}
RENAMED = {name: config()[key] for key, name in NAMES.items()}
THETA = {"rope_theta": 10000.0, "rope_type": "default"}
# Changes of the older spelling that say the same, None for keys that are left out.
SAME: list[tuple[dict[str, Any], ModelConfig]] = [
    ({"dtype": "bfloat16", "torch_dtype": "float32"}, PLAIN),
    ({key: float(config()[key]) for key in (SIZES + " " + IDS).split()}, PLAIN),
    ({"rope_theta": 10000}, PLAIN),
    (dict.fromkeys(("rope_scaling", "rope_parameters", "rms_norm_eps", "weight_tying")), PLAIN),
    (
        dict.fromkeys(("architectures", "block_type", "sliding_window", "quantization_config")),
        PLAIN,
    ),
    ({**RENAMED, "head_dim": 6, "hidden_act": "silu"}, PLAIN),
    ({**RENAMED, **dict.fromkeys(NAMES)}, PLAIN),
    ({"rope_theta": None, "rope_parameters": THETA}, PLAIN),
    ({"rope_theta": None, "rope_parameters": {"full_attention": THETA}}, PLAIN),
    ({"rope_parameters": {**THETA, "partial_rotary_factor": 1.0}}, PLAIN),
    ({"rope_parameters": {**THETA, **YARN}}, STRETCHED),
    ({"rope_parameters": {**YARN, "original_max_position_embeddings": 32.0}}, STRETCHED),
    ({"rope_parameters": YARN, "rope_scaling": YARN}, STRETCHED),
    ({"layer_types": ["full_attention"] * 2}, PLAIN),
    ({"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2}, PLAIN),
    ({"attention_bias": False, "mlp_bias": False, "num_experts": 0, "logit_scale": 1.0}, PLAIN),
    ({"attn_implementation": "sdpa", "output_attentions": True, "layer_norm_eps": 1e-5}, PLAIN),
    ({"id2label": {"0": "A"}, "tie_word_embeddings": True, "use_cache": True}, PLAIN),
]
OTHER: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ({"sliding_window": 512}, "sliding_window=512"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    (
        {"attention_bias": True, "mlp_bias": True},
        "attention_bias=True (the family llada has False), mlp",
    ),
    ({"use_qk_norm": True}, "use_qk_norm=True"),
    ({"embedding_multiplier": 12.0, "logits_scaling": 8}, "embedding_multiplier=12.0, logits_s"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"num_experts": 8}, "num_experts=8"),
    ({"head_dim": 8}, "head_dim=8"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"hidden_size": 32}, "d_model 24 is not hidden_size 32"),
    ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta 10000.0 is not rope_parameters'"),
    ({"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2}}, "rope_scaling {"),
    ({"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
    ({"rope_scaling": {"type": "default", "short_factor": [1]}}, "'short_factor'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
    ({"rope_parameters": {"full_attention": THETA, "sliding_attention": {}}}, "other than full"),
    ({"rope_parameters": 4}, "rope_parameters must be an object"),
    ({"n_layers": 2.5}, "n_layers must be a positive integer"),
]


@pytest.mark.parametrize(("changes", "expected"), SAME)
def test_the_same_meaning_is_read(changes: dict[str, Any], expected: ModelConfig) -> None:
    read = ModelConfig.from_dict(config(**changes))
    assert read == expected
    assert type(read.d_model) is type(read.mask_token_id) is int


def test_rope_parameters_by_hand() -> None:
    assert STRETCHED.rope_scaling == RopeScaling("yarn", 4.0, 32)


@pytest.mark.parametrize(("changes", "expected"), OTHER)
def test_another_computation_is_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config(**changes))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(config()))
    assert ModelConfig.from_file(path) == load_config(tmp_path) == PLAIN
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        ModelConfig.from_file(path)
