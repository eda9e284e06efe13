"""The model's architecture, read from config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pdllm_jax.downloads import check_download
from pdllm_jax.rules import (
    AT_LEAST_1,
    COUNT,
    POSITIVE,
    SIZE,
    SWITCH,
    ConfigError,
    Rule,
    exact_share,
    is_index,
    is_number,
    listed,
    one_of,
    require,
    size,
    validate,
)
from pdllm_jax.text_files import read_text

RopeKind = Literal["linear", "ntk", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the trained one.

    kind:
      "linear": positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
      "ntk": base theta * factor^(D / (D - 2)) for every length (NTK-aware, static).
      "yarn": per-frequency blend of both, with attention temperature (Peng et al. 2023,
        arXiv 2309.00071).
    factor: stretch, at least 1.
    original_max_position: trained context length in tokens; used by "yarn".
    attention_factor: multiplies cos and sin; None means yarn's 0.1 ln(factor) + 1.
    beta_fast, beta_slow: yarn's ramp, in rotations over the trained context.
    """

    kind: RopeKind
    factor: float
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        rules = {"kind": one_of(get_args(RopeKind)), "factor": AT_LEAST_1}
        rules |= dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"), POSITIVE)
        rules["original_max_position"] = SIZE if self.kind == "yarn" else COUNT
        validate(self, rules, "rope scaling ")
        fast, slow = self.beta_fast, self.beta_slow
        require(fast >= slow, f"rope scaling beta_fast {fast} is less than beta_slow {slow}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], max_sequence_length: int) -> RopeScaling | None:
        """Reads the `rope_scaling` entry of a config.json; returns None for plain frequencies.

        Raises ConfigError for keys and values that are not implemented.
        """
        require(isinstance(raw, Mapping), f"rope_scaling must be an object, got {raw!r}")
        values = {key: value for key, value in raw.items() if value is not None}
        kind = values.get("rope_type", values.get("type"))
        for key in ("rope_type", "type", "rope_theta"):
            values.pop(key, None)
        if values.get("partial_rotary_factor") == 1:
            del values["partial_rotary_factor"]
        original = values.pop("original_max_position_embeddings", max_sequence_length)
        unknown = sorted(values.keys() - {"factor", "attention_factor", "beta_fast", "beta_slow"})
        require(not unknown, f"rope_scaling keys not implemented: {listed(map(repr, unknown))}")
        if kind in (None, "default"):
            return None
        original = _whole(original)
        require("factor" in values, "rope_scaling lacks factor")
        return cls(kind, original_max_position=original, **values)


# The values of config.json that are implemented; a key may be absent or null. Others are refused.
_ON = ("layer_norm_with_affine", "rope", "rope_full_precision")
_OFF = (
    *("include_bias", "include_qkv_bias", "bias_for_layer_norm", "attention_layer_norm"),
    *("input_emb_norm", "alibi", "scale_logits", "multi_query_attention"),
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llada",),
    "architectures": (["LLaDAModelLM"],),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    **dict.fromkeys(_ON, (True,)),
    **dict.fromkeys(_OFF, (False,)),
    "clip_qkv": (),
}
# Names that transformers gives to sizes, beside LLaDA's or in their place.
_ALIASES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
}
# Other keys that change what a model computes, by words in their names, and such that do not.
_COMPUTES = re.compile(
    r"softcap|multiplier|scal(?:e|ing|ar)|window|rotary|rope|norm|bias|expert|moe|sink|attention"
    r"|attn|causal|head_dim|hidden_act|layer_types|parallel|logit"
)
_COMPUTES_NOT = re.compile(
    r".*(?:dropout|init|implementation|output_|_eps$|flash|efficient|bidirectional).*"
    r"|max_window_layers|alibi_bias_max|attention_layer_norm_with_affine|rope_theta|rope_scaling"
    r"|num_attention_heads"
)
_SIZES = ["d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "max_sequence_length"]
_IDS = ["mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"]
# Keys that config.json must have, and those whose default is the value of another key.
_REQUIRED = [*_SIZES, "rope_theta", "mask_token_id", "eos_token_id"]
_DEFAULTS = {
    "n_kv_heads": "n_heads",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "eos_token_id": "pad_token_id",
    "pad_token_id": "eos_token_id",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """LLaDA's architecture: a LLaMA decoder without the causal mask.

    d_model, n_layers, n_heads, n_kv_heads, mlp_hidden_size: sizes; head size is d_model / n_heads.
    vocab_size: number of token ids; embedding_size: rows of the embedding, at least vocab_size.
    weight_tying: the embedding is the LM head too.
    qkv_bias: the projections to q, k and v have a bias.
    logit_shift: the token of a position is predicted by the row in front of it, as in a model that
      was adapted from an autoregressive one; position 0 by its own row. Otherwise by its own row.
    bos_token_id: None if config.json does not have it (LLaDA's does not; its tokenizer does).
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 4096
    weight_tying: bool = False
    qkv_bias: bool = False
    logit_shift: bool = False
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    pad_token_id: int = 126081
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        validate(self, dict.fromkeys([*_SIZES, "n_kv_heads", "embedding_size"], SIZE))
        validate(self, {"rope_theta": POSITIVE, "rms_norm_eps": POSITIVE, "weight_tying": SWITCH})
        validate(self, {"qkv_bias": SWITCH, "logit_shift": SWITCH})
        for name, divisor in (("d_model", "n_heads"), ("n_heads", "n_kv_heads")):
            a, b = getattr(self, name), getattr(self, divisor)
            require(a % b == 0, f"{name} {a} is not a multiple of {divisor} {b}")
        sizes = f"(d_model {self.d_model} / n_heads {self.n_heads})"
        require(self.head_dim % 2 == 0, f"head size {self.head_dim} must be even for RoPE {sizes}")
        kind = self.rope_scaling and self.rope_scaling.kind
        wide, turns = kind != "ntk" or self.head_dim > 2, kind != "yarn" or self.rope_theta > 1
        require(wide, f"rope scaling kind 'ntk' needs a head size of at least 4, not 2 {sizes}")
        require(turns, f"rope scaling kind 'yarn' needs rope_theta above 1, got {self.rope_theta}")
        rows, words = self.embedding_size, self.vocab_size
        require(rows >= words, f"embedding_size {rows} is smaller than vocab_size {words}")
        message = f"{{}} {{!r}} is outside the embedding of {rows} rows"
        validate(self, dict.fromkeys(_IDS, Rule(message, lambda x: is_index(x, rows))))

    @property
    def head_dim(self) -> int:
        """The size of a head, D."""
        return self.d_model // self.n_heads

    @classmethod
    def llada_8b(cls) -> ModelConfig:
        """Returns the config of LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5."""
        sizes: dict[str, Any] = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32}
        sizes |= {"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464}
        return cls(**sizes, bos_token_id=126080)

    @classmethod
    def ultrallada_8b(cls) -> ModelConfig:
        """Returns LLaDA-8B stretched to 131,072 tokens by UltraLLaDA's diffusion-aware NTK base.

        Base = (T' / 2pi)^(D / d_crit), d_crit = 2 ceil(D/2 log_b(T / 2pi)), with T = 2 * 4096 and
        T' = 2 * 131072: attention sees both directions, so each length counts twice
        (arXiv 2510.10481). The config.json of a checkpoint takes precedence.
        """
        base = cls.llada_8b()
        trained, target = (2 * length / (2 * math.pi) for length in (4096, 131_072))
        critical = 2 * math.ceil(base.head_dim / 2 * math.log(trained, base.rope_theta))
        theta = target ** (base.head_dim / critical)
        return dataclasses.replace(base, rope_theta=theta, max_sequence_length=131_072)

    @classmethod
    def tiny(cls) -> ModelConfig:
        """Returns two layers with grouped KV heads, for tests and examples."""
        sizes: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
        sizes |= {"mlp_hidden_size": 96, "vocab_size": 256, "embedding_size": 256}
        sizes |= {"rope_theta": 10_000.0, "max_sequence_length": 512}
        return cls(**sizes | dict(zip(_IDS, (255, 254, 254, 253), strict=True)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from the contents of a LLaDA config.json.

        Raises ConfigError that names every key whose value is not implemented, or the missing keys.
        """
        require(isinstance(raw, Mapping), "config.json must hold an object")
        raw = _modern(raw)
        refused = [key for key, allowed in _FIXED.items() if key in raw and raw[key] not in allowed]
        refused += [key for key, value in raw.items() if _changes(key, value, raw)]
        stated = listed(f"{key!s:.80}={raw[key]!r:.200}" for key in refused)
        require(not refused, f"config.json asks for what is not implemented: {stated}")
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: raw[name] for name in names if name in raw}
        for key, source in _DEFAULTS.items():
            if values.get(key) is None:
                values[key] = raw.get(source)
        ratio = raw.get("mlp_ratio")
        if values.get("mlp_hidden_size") is None and ratio is not None:
            require(is_number(ratio), f"mlp_ratio must be a number, got {ratio!r}")
            size("d_model", raw.get("d_model"))
            values["mlp_hidden_size"] = int(exact_share(ratio, raw["d_model"]))
        missing = ", ".join(key for key in _REQUIRED if values.get(key) is None)
        missing = missing.replace("mlp_hidden_size", "mlp_hidden_size or mlp_ratio")
        require(not missing, f"config.json lacks {missing}")
        scaling = values.get("rope_scaling")
        if scaling is not None:
            length = values["max_sequence_length"]
            size("max_sequence_length", length)
            values["rope_scaling"] = RopeScaling.from_dict(scaling, length)
            theta, wanted = scaling.get("rope_theta"), values["rope_theta"]
            message = f"rope_scaling's rope_theta {theta!r} is not the model's {wanted!r}"
            require(theta in (None, wanted), message)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads config.json; raises OSError, and ConfigError for malformed or refused contents."""
        try:
            check_download(Path(path))
            text = read_text(Path(path))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of too many digits: ValueError
            raise ConfigError(f"{Path(path).name} is not valid JSON: {error}") from None
        return cls.from_dict(raw)


def _whole(value: Any) -> Any:
    """Returns a float without a fraction as an int; every other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _modern(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json of any version of transformers in LLaDA's own spelling.

    Drops null, reads 32.0 as 32 and other names of sizes, and takes rope_theta and rope_scaling
    out of rope_parameters. Raises ConfigError for two statements that contradict each other.
    """
    values = {key: value for key, value in raw.items() if value is not None}
    for key in [*_SIZES, "n_kv_heads", "embedding_size", *_IDS, *_ALIASES.values(), "head_dim"]:
        if key in values:
            values[key] = _whole(values[key])
    for key, alias in _ALIASES.items():
        if alias in values:
            _set(values, key, alias, values[alias])
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return values
    require(isinstance(rope, Mapping), f"rope_parameters must be an object, got {rope!r:.200}")
    if any(isinstance(part, Mapping) for part in rope.values()):  # for each type of layer
        only = set(rope) == {"full_attention"}
        require(only, f"rope_parameters of other than full_attention: {sorted(rope)!r:.200}")
        rope = rope["full_attention"]
    rope = {key: value for key, value in rope.items() if value is not None}
    if "rope_theta" in rope:
        _set(values, "rope_theta", "rope_parameters' rope_theta", rope.pop("rope_theta"))
    if rope:
        _set(values, "rope_scaling", "rope_parameters", rope)
    return values


def _set(values: dict[str, Any], key: str, other: str, value: Any) -> None:
    """Sets a key; raises ConfigError if it has another value already."""
    stated = values.setdefault(key, value)
    require(stated == value, f"{key} {stated!r:.200} is not {other} {value!r:.200}")


def _changes(key: str, value: Any, raw: Mapping[str, Any]) -> bool:
    """Returns whether a key that is not read changes what the model computes."""
    if key == "layer_types" and isinstance(value, list):
        return not set(map(str, value)) <= {"full_attention"}
    if key == "head_dim":
        sizes = (value, raw.get("d_model"), raw.get("n_heads"))
        return not all(map(is_index, sizes)) or value * raw["n_heads"] != raw["d_model"]
    if key == "hidden_act":
        return bool(value != "silu")
    if key == "sliding_window" and raw.get("use_sliding_window") is False:
        return False
    unread = _COMPUTES.search(key) is not None and _COMPUTES_NOT.fullmatch(key) is None
    neutral = value is not True and value in (0, 1, [], {}, "")
    return unread and not neutral and key not in _FIXED
