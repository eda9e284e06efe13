"""The families: what published config.json files say, and what contradicts them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pdllm_jax.network.config import PRESETS, ModelConfig, RopeScaling
from pdllm_jax.network.families import FAMILIES
from pdllm_jax.rules import ConfigError
from tests.oracles.config_json import DREAM_7B_CONFIG as DREAM
from tests.oracles.config_json import LLADA_8B_CONFIG as LLADA

# Of iLLaDA only these are published, under no certain names.
ILLADA = LLADA | {
    "n_kv_heads": 8, "mlp_hidden_size": 14336, "vocab_size": 155136, "embedding_size": 155136,
    "max_sequence_length": 8192, "weight_tying": True, "mask_token_id": 5, "eos_token_id": 2,
    "pad_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
ULTRA = LLADA | {"rope_theta": 280_968_985.7299, "max_sequence_length": 131_072}
# A window that is stated and off, as of Qwen2.5-7B; ids of Dream-Coder and DiffuCoder.
CODER = DREAM | {"max_position_embeddings": 32768, "sliding_window": 131072, "bos_token_id": 151665}
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    **dict.fromkeys(("LLaDA-8B-Base", "LLaDA-8B-Instruct", "LLaDA-1.5"), (LLADA, "llada-8b")),
    "UltraLLaDA": (ULTRA, "ultrallada-8b"),
    "iLLaDA-8B": (ILLADA, "illada-8b"),
    "iLLaDA-8B, transformers' key of tying": (
        {k: x for k, x in ILLADA.items() if k != "weight_tying"} | {"tie_word_embeddings": True},
        "illada-8b",
    ),
    **dict.fromkeys(("Dream-v0-Base-7B", "Dream-v0-Instruct-7B"), (DREAM, "dream-7b")),
    **dict.fromkeys(
        ("DiffuCoder-7B-Base", "DiffuCoder-7B-Instruct", "DiffuCoder-7B-cpGRPO"),
        (DREAM | {"pad_token_id": 151667}, "diffucoder-7b"),
    ),
    "Dream-Coder-v0-Base-7B": (CODER, "dream-coder-7b"),
    "Dream-Coder-v0-Instruct-7B": (CODER, "dream-coder-7b"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name: str) -> None:
    raw, preset = PUBLISHED[name]
    config, wanted = ModelConfig.from_dict(raw), ModelConfig.preset(preset)
    # Most config.json files leave the BOS token to the tokenizer, or state Qwen2's.
    assert config.rope_theta == pytest.approx(wanted.rope_theta, rel=1e-8)
    changes = {"bos_token_id": wanted.bos_token_id, "rope_theta": wanted.rope_theta}
    assert dataclasses.replace(config, **changes) == wanted
    shifted = config.family == "dream"
    assert config.qkv_bias == config.logit_shift == shifted


def test_presets_are_named() -> None:
    presets = [ModelConfig.preset(name) for name in PRESETS]
    assert len({*presets, ModelConfig.tiny()}) == len(PRESETS) + 1
    assert {preset.family for preset in presets} == {*FAMILIES}
    with pytest.raises(ConfigError, match=r"model 'dream' is not known \(llada-8b, .*dream-7b"):
        ModelConfig.preset("dream")
    with pytest.raises(ConfigError, match=r"family 'qwen' is not known \(llada, dream\)"):
        dataclasses.replace(ModelConfig.tiny(), family="qwen")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
THETA = {"rope_type": "default", "rope_theta": 1e6}
FULL = {"layer_types": ["full_attention"] * 28}
SAME: list[dict[str, Any]] = [
    {"dtype": "bfloat16", "torch_dtype": None},
    {"rope_theta": None, "rope_parameters": THETA},
    {"rope_theta": None, "rope_parameters": {"full_attention": THETA}, **FULL},
    {"rms_norm_eps": None, "tie_word_embeddings": None, "num_attention_heads": 28.0},
    {"sliding_window": 4096},
    {"sliding_window": 131072, "use_sliding_window": None, "max_window_layers": 21},
    {"attention_bias": True, "logit_shift": True, "mlp_bias": False, "head_dim": 128},
    {"model_type": None},
]


@pytest.mark.parametrize("changes", SAME)
def test_the_same_meaning_is_read(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(DREAM | changes) == ModelConfig.from_dict(DREAM)


def test_other_values_of_dream_are_read() -> None:
    changes = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "num_key_value_heads": None}
    config = ModelConfig.from_dict(DREAM | changes | {"rope_scaling": YARN})
    assert (config.weight_tying, config.rms_norm_eps, config.n_kv_heads) == (True, 1e-5, 28)
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 32768)


OTHER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        DREAM,
        {"use_sliding_window": True, "sliding_window": 4096},
        "sliding_window=4096, use_sliding_window=True",
    ),
    (DREAM, {"use_sliding_window": True}, "use_sliding_window=True"),
    (DREAM, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    (DREAM, {"use_mrope": True}, "use_mrope=True"),
    (DREAM, {"logit_shift": False}, "logit_shift=False (the family dream has True)"),
    (DREAM, {"shift_logits": 0}, "shift_logits=0 (the family dream has True)"),
    (DREAM, {"attention_bias": False}, "attention_bias=False (the family dream has True)"),
    (DREAM, {"include_qkv_bias": False}, "include_qkv_bias=False (the family dream has True)"),
    (DREAM, {"mlp_bias": True}, "mlp_bias=True"),
    (DREAM, {"use_qk_norm": True}, "use_qk_norm=True"),
    (DREAM, {"is_causal": True}, "is_causal=True"),
    (DREAM, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (DREAM, {"head_dim": 64}, "head_dim=64"),
    (DREAM, {"num_experts": 8}, "num_experts=8"),
    (DREAM, {"architectures": ["DreamForCausalLM"]}, "architectures=['DreamForCausalLM']"),
    (DREAM, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not known"),
    (DREAM, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope_section'"),
    (DREAM, {"rope_theta": None}, "config.json lacks rope_theta"),
    (DREAM, {"hidden_size": None, "mask_token_id": None}, "lacks hidden_size, mask_token_id"),
    (DREAM, {"max_position_embeddings": None}, "config.json lacks max_position_embeddings"),
    (DREAM, {"weight_tying": True}, "weight_tying True is not tie_word_embeddings False"),
    (DREAM, {"mask_token_id": 152064}, "mask_token_id 152064 is outside"),
    (DREAM, {"model_type": "dream_reasoner"}, "model_type='dream_reasoner' (llada and Dream are"),
    (DREAM, {"model_type": "llada"}, "architectures=['DreamModel']"),
    (LLADA, {"logit_shift": True}, "logit_shift=True (the family llada has False)"),
    (LLADA, {"include_qkv_bias": True}, "include_qkv_bias=True (the family llada has False)"),
    (LLADA, {"sliding_window": 4096}, "sliding_window=4096"),
    (LLADA, {"model_type": "Dream"}, "architectures=['LLaDAModelLM']"),
    (LLADA, {"model_type": "llada_moe"}, "model_type='llada_moe' (llada and Dream are)"),
    (ILLADA, {"qk_layernorm": True}, "qk_layernorm=True"),
]


@pytest.mark.parametrize(("raw", "changes", "expected"), OTHER)
def test_a_contradiction_is_one_line(
    raw: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw | changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
