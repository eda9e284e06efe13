"""Settings: what config.json may say, and which values the settings of the method may have."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.rules import ConfigError
from tests.oracles.config_json import DREAM_7B_CONFIG as DREAM_7B
from tests.oracles.config_json import LLADA_8B_CONFIG as LLADA_8B


def read(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**LLADA_8B, **changes})


def without(*keys: str) -> dict:
    return {key: value for key, value in LLADA_8B.items() if key not in keys}


def test_llada_8b_config_json_is_the_preset():
    config = ModelConfig.from_dict(LLADA_8B)  # leaves the BOS token to the tokenizer
    assert dataclasses.replace(config, bos_token_id=126080) == ModelConfig.llada_8b()
    assert config.head_dim == 128


def test_from_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLADA_8B))
    for name in (path, str(path)):
        assert ModelConfig.from_file(name) == ModelConfig.from_dict(LLADA_8B)


MALFORMED = {
    "empty": b"",
    "cut": b"{",
    "trailing comma": b'{"d_model": 4096,}',
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "list": b"[]",
    "null": b"null",
    "string": b'"text"',
    "digits": json.dumps(LLADA_8B)[:-1].encode() + b', "alibi_bias_max": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_file(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_bytes(MALFORMED[kind])
    with pytest.raises(ConfigError, match=r"config\.json (is not|must hold|is empty)") as error:
        ModelConfig.from_file(path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path / "config.json")


NORMS_AND_BIASES = "attention_layer_norm include_qkv_bias bias_for_layer_norm input_emb_norm"
# Values of config.json's keys that are not implemented.
NOT_IMPLEMENTED = {
    **dict.fromkeys([*NORMS_AND_BIASES.split(), "scale_logits", "multi_query_attention"], (True,)),
    **dict.fromkeys(["rope", "rope_full_precision", "layer_norm_with_affine"], (False,)),
    "model_type": ["llama", "dream", ["llada"]],
    "architectures": [["LlamaForCausalLM"], ["LLaDAModelLM", "Other"]],
    "block_type": ["sequential"],
    "activation_type": ["swiglu", "gelu"],
    "layer_norm_type": ["default", "gemma_rms"],
    # "false" and [] are not booleans: no LLaDA checkpoint says so.
    "alibi": [True, "false"],
    "include_bias": [True, []],
    "clip_qkv": [8.0],
    "block_group_size": [4],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in NOT_IMPLEMENTED.items() for value in values]
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"not implemented.*{key}="):
        read(**{key: value})


def test_all_refusals_come_at_once():
    with pytest.raises(ConfigError, match=r"alibi=.*block_type=.*include_bias="):
        read(alibi=True, include_bias=True, block_type="sequential")


REQUIRED = "d_model n_heads n_layers vocab_size mask_token_id max_sequence_length rope_theta"


@pytest.mark.parametrize("key", REQUIRED.split())
def test_missing_keys_are_named(key):
    for settings in (without(key), {**LLADA_8B, key: None}):
        with pytest.raises(ConfigError, match=key):
            ModelConfig.from_dict(settings)


def test_all_missing_keys_come_at_once():
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(without("n_layers", "rope_theta", "eos_token_id", "pad_token_id"))
    assert str(error.value) == "config.json lacks n_layers, rope_theta, eos_token_id"


DEFAULTS = {
    "embedding_size": 126464,
    "n_kv_heads": 32,
    "weight_tying": False,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 126081,
    "eos_token_id": 126081,
    "mlp_hidden_size": 16384,  # mlp_ratio 4 times d_model
}


@pytest.mark.parametrize(("key", "default"), DEFAULTS.items())
def test_keys_with_a_default(key, default):
    assert getattr(ModelConfig.from_dict(without(key)), key) == default
    assert getattr(read(**{key: None}), key) == default


def test_the_size_of_the_mlp_is_needed_in_one_of_two_ways():
    with pytest.raises(ConfigError, match="lacks mlp_hidden_size or mlp_ratio"):
        ModelConfig.from_dict(without("mlp_hidden_size", "mlp_ratio"))


NO_SIZES = [0, -1, 2.5, "8", True, [8], math.nan, 1 << 31]
SIZES = "d_model n_layers n_heads n_kv_heads mlp_hidden_size vocab_size embedding_size"
# Wrong values of single settings, by what reads them.
WRONG_VALUES = {
    read: {
        **dict.fromkeys([*SIZES.split(), "max_sequence_length"], NO_SIZES),
        "mask_token_id": [126464],
        "eos_token_id": [-1],
        "pad_token_id": ["x"],
        "bos_token_id": [1.5],
        "rope_theta": [0, "10000", math.inf, 10**400],
        "rms_norm_eps": [-1e-5, math.nan],
        "weight_tying": ["yes"],
    },
    ChunkConfig: {"chunk_size": [0, -4, 10.0, True], "overlap": [-1, 0.5, True]},
    SelectionConfig: {
        "top_k": [0, -1, 1.5],
        "max_k": [0],
        "margin": [-1.0, math.nan],
        "scorer": ["entropy", 3],
        "encoding": ["causal"],
        "positions": ["relative", ["reuse"]],
        "reselect": ["always"],
        "masked_copies": [0],
        "draft_length": [0],
        "draft_steps": [0],
        "encode_batch": [0],
        "keep_tokens": [0],
    },
    DecodeConfig: {
        "gen_length": [0, -32],
        "block_length": [0],
        "steps": [0],
        "temperature": [-0.1, math.nan, math.inf, "0"],
        "remasking": ["topk", ["random"]],
        "threshold": [0.0, 1.1, math.nan],
        "factor": [0.0, math.inf],
        "guidance": [-1.0],
        "stop_ids": [[1], (-1,), (True,)],
        "eot_token_id": [-1, "1", True],
        "logits_eos_inf": [1, "yes"],
        "confidence_eos_eot_inf": [0, None],
        "recompute": ["all"],
        "unmask": ["schedule"],
        "schedule": ["linear", None],
        "eps": [-0.1, 1.5, math.nan],
        "top_p": [0.0, 1.1, math.nan],
        "top_k": [0, 1.5],
        "order_temperature": [-1.0, math.inf],
        "scaled_confidence": [1],
        "first_slot_alone": [None],
    },
}


WRONG = [
    (make, key, value)
    for make, keys in WRONG_VALUES.items()
    for key, values in keys.items()
    for value in values
]


@pytest.mark.parametrize(("make", "key", "value"), WRONG)
def test_a_wrong_value_is_refused_with_its_name(make, key, value):
    with pytest.raises(ConfigError) as error:
        make(**{key: value})
    assert str(error.value).startswith(key + " ")
    assert repr(value) in str(error.value)


CONTRADICTIONS = [
    (read, {"n_heads": 33}, "d_model 4096 is not a multiple of n_heads 33"),
    (read, {"n_kv_heads": 5}, "n_heads 32 is not a multiple of n_kv_heads 5"),
    (read, {"n_kv_heads": 64}, "n_kv_heads 64"),
    (read, {"d_model": 32 * 33, "n_heads": 32}, "head size 33 must be even"),
    (read, {"embedding_size": 126463}, "embedding_size 126463 is smaller than vocab_size 126464"),
    (read, {"vocab_size": 126336, "embedding_size": 126336}, "mask_token_id 126336"),
    (read, {"mlp_hidden_size": None, "mlp_ratio": "4"}, "mlp_ratio"),
    (read, {"mlp_hidden_size": None, "mlp_ratio": math.inf}, "mlp_ratio"),
    (read, {"mlp_hidden_size": None, "mlp_ratio": 10**400}, "mlp_ratio"),
    (read, {"mlp_hidden_size": None, "mlp_ratio": -4}, "mlp_hidden_size"),
    (ChunkConfig, {"chunk_size": 1}, "chunk_size 1"),
    (ChunkConfig, {"chunk_size": 8, "overlap": 7}, "overlap of 7"),
    (ChunkConfig, {"chunk_size": 8, "overlap": 8, "anchors": False}, "overlap of 8"),
    (
        SelectionConfig,
        {"draft_length": 2, "draft_steps": 3},
        "draft_steps must be at most draft_length 2, got 3",
    ),
    (SelectionConfig, {"max_k": 2}, "max_k 2 is less than top_k 4"),
    (SelectionConfig, {"margin": 1.0}, "margin needs max_k"),
    (DecodeConfig, {"gen_length": 40}, "block_length 32 does not divide gen_length 40"),
    (DecodeConfig, {"gen_length": 16}, "block_length 32 does not divide gen_length 16"),
    (
        DecodeConfig,
        {"gen_length": 64, "steps": 7},
        "steps 7 is not a multiple of the number of blocks 2",
    ),
    (DecodeConfig, {"threshold": 0.9, "factor": 1.0}, "exclude each other"),
    (DecodeConfig, {"unmask": max, "steps": 32}, "unmask excludes steps"),
    (
        DecodeConfig,
        {"gen_length": 64, "steps": 1, "schedule": "time"},
        "steps 1 is less than the number of blocks 2",
    ),
    (DecodeConfig, {"remasking": "origin"}, "remasking 'origin' needs schedule='time'"),
    (
        DecodeConfig,
        {"remasking": "origin", "schedule": "time", "threshold": 0.9},
        "remasking 'origin' excludes threshold, factor and unmask",
    ),
    (
        DecodeConfig,
        {"order_temperature": 0.5, "factor": 1.0},
        "order_temperature excludes threshold, factor and unmask",
    ),
    (DecodeConfig.dream, {"alg": "random"}, "alg 'random' is not known (origin, maskgit_plus"),
    (
        DecodeConfig.fast_dllm_dream,
        {"alg": "origin"},
        "alg 'origin' is not known (confidence_threshold, entropy)",
    ),
    (DecodeConfig, {"guidance": -1.0, "recompute": "response"}, "guidance"),
    (DecodeConfig, {"guidance": 1.0}, "guidance needs recompute='response'"),
]


@pytest.mark.parametrize(("make", "settings", "message"), CONTRADICTIONS)
def test_contradictions_are_named(make, settings, message):
    with pytest.raises(ConfigError) as error:
        make(**settings)
    assert message in str(error.value)


def test_tying_and_grouping_are_read():
    for tying in (True, False):
        config = read(weight_tying=tying, n_kv_heads=8)
        assert (config.weight_tying, config.n_kv_heads) == (tying, 8)


def test_ultrallada_base_from_its_formula():
    """Twice 4096 and twice 131,072 tokens through b' = (T' / 2 pi)^(D / d_crit), by hand."""
    config = ModelConfig.ultrallada_8b()
    critical = 2 * math.ceil(64 * math.log(8192 / (2 * math.pi)) / math.log(500_000.0))
    assert critical == 70
    assert config.rope_theta == pytest.approx((262_144 / (2 * math.pi)) ** (128 / 70), rel=1e-12)
    assert config.max_sequence_length == 131_072


def test_presets_are_hashable_and_distinct():
    presets = {ModelConfig.llada_8b(), ModelConfig.ultrallada_8b(), ModelConfig.tiny()}
    assert len(presets) == 3


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


OF_LLADA = [*LLADA_8B, "rope_scaling", "clip_qkv", "bos_token_id", "logit_shift"]
KEYS = [(LLADA_8B, key) for key in OF_LLADA]
KEYS += [(DREAM_7B, key) for key in [*DREAM_7B, "rope_parameters", "attention_bias"]]


@given(st.sampled_from(KEYS), JSON_VALUES)
def test_any_value_is_read_or_refused_in_one_line(given, value):
    """A hostile config.json gets a ConfigError, never another exception."""
    raw, key = given
    message = ""
    try:
        hash(ModelConfig.from_dict({**raw, key: value}))
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "stride"),
    [((), 1023), ((1024, False), 1024), ((1024, True, 100), 923), ((2,), 1), ((1, False), 1)],
)
def test_chunk_stride(given, stride):
    assert ChunkConfig(*given).stride == stride


def test_selection_config_accepts_leave_one_out():
    assert SelectionConfig(masked_copies=None).scorer.masked_copies is None


def test_decode_config_counts():
    assert DecodeConfig(gen_length=96, block_length=32).n_blocks == 3
    assert DecodeConfig(gen_length=96, block_length=32).steps_per_block == 32
    assert DecodeConfig(gen_length=96, block_length=32, steps=12).steps_per_block == 4
    assert DecodeConfig(96, 32, steps=14, schedule="time").steps_per_block == 4


DREAM = {"schedule": "time", "scaled_confidence": True, "steps": 512}
PUBLISHED = [
    (DecodeConfig.dream(), DecodeConfig(20, 20, remasking="origin", recompute="response", **DREAM)),
    (
        DecodeConfig.dream(
            max_new_tokens=8, steps=3, alg="topk_margin", alg_temp=0.1, temperature=0.2, top_k=9
        ),
        DecodeConfig(
            *(8, 8),
            temperature=0.2,
            remasking="margin",
            top_k=9,
            order_temperature=0.1,
            recompute="response",
            **DREAM | {"steps": 3},
        ),
    ),
    (DecodeConfig.dream(alg="origin", alg_temp=0.1), DecodeConfig.dream()),
    (
        DecodeConfig.fast_dllm_dream(max_new_tokens=64, steps=7, alg_temp=0.1, top_p=0.9),
        DecodeConfig(
            *(64, 32),
            threshold=0.9,
            top_p=0.9,
            scaled_confidence=True,
            first_slot_alone=True,
            recompute="suffix",
        ),
    ),
    (
        DecodeConfig.fast_dllm_dream(alg="entropy", dual_cache=True, alg_temp=0.1, threshold=0.5),
        DecodeConfig(remasking="entropy", order_temperature=0.1, first_slot_alone=True, **DREAM),
    ),
]


@pytest.mark.parametrize(("published", "settings"), PUBLISHED)
def test_published_generations_of_dream(published, settings):
    assert published == settings
    flat = json.loads(json.dumps(settings.to_flat()))
    assert DecodeConfig.from_flat(**flat) == settings


SETTINGS = [ModelConfig.tiny(), RopeScaling("yarn", 2.0, 64)]
SETTINGS += [ChunkConfig(), SelectionConfig(), DecodeConfig()]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: type(config).__name__)
def test_settings_are_frozen_hashable_values(config):
    """They are static arguments of jitted functions: equal settings must not compile twice."""
    copy = dataclasses.replace(config)
    assert copy == config
    assert hash(copy) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)
