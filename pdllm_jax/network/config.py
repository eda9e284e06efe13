"""The model's architecture, read from config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pdllm_jax.downloads import check_download
from pdllm_jax.network.families import FAMILIES, family_of, whole
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
WeightFormat = Literal["full", "fp8", "int8"]


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
        original = whole(original)
        require("factor" in values, "rope_scaling lacks factor")
        return cls(kind, original_max_position=original, **values)


_SIZES = ["d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "max_sequence_length"]
_IDS = ["mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"]
# What config.json must say.
_REQUIRED = [*_SIZES, "rope_theta", "mask_token_id", "eos_token_id"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: a LLaMA decoder without the causal mask.

    family: "llada" or "dream"; says what all models of the family have in common.
    d_model, n_layers, n_heads, n_kv_heads, mlp_hidden_size: sizes; head size is d_model / n_heads.
    vocab_size: number of token ids; embedding_size: rows of the embedding, at least vocab_size.
    weight_tying: the embedding is the LM head too.
    bos_token_id: None if config.json does not have it (LLaDA's does not; its tokenizer does).
    weight_format: of the layers' products. "full": the model's dtype; "fp8", "int8": 8 bits and a
      scale for each output channel, while embedding, LM head, norms and biases have the dtype.
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
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    pad_token_id: int = 126081
    bos_token_id: int | None = None
    family: str = "llada"
    weight_format: WeightFormat = "full"

    def __post_init__(self) -> None:
        validate(self, dict.fromkeys([*_SIZES, "n_kv_heads", "embedding_size"], SIZE))
        validate(self, {"rope_theta": POSITIVE, "rms_norm_eps": POSITIVE, "weight_tying": SWITCH})
        formats = one_of(get_args(WeightFormat))
        validate(self, {"family": one_of(FAMILIES), "weight_format": formats})
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

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to q, k and v have a bias."""
        return FAMILIES[self.family].qkv_bias

    @property
    def logit_shift(self) -> bool:
        """Whether the row in front of a position predicts its token; see `Family`."""
        return FAMILIES[self.family].logit_shift

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
    def illada_8b(cls) -> ModelConfig:
        """Returns the config of iLLaDA-8B-Base and iLLaDA-8B-Instruct (arXiv 2606.25331).

        The base of RoPE and the eps of the norms are LLaDA's, which no published text confirms.
        The config.json of a checkpoint takes precedence.
        """
        sizes: dict[str, Any] = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}
        sizes |= {"mlp_hidden_size": 14336, "vocab_size": 155136, "embedding_size": 155136}
        sizes |= {"max_sequence_length": 8192, "weight_tying": True}
        return cls(**sizes | dict(zip(_IDS, (5, 2, 1, 0), strict=True)))

    @classmethod
    def dream_7b(cls) -> ModelConfig:
        """Returns the config of Dream-v0-Base-7B and Dream-v0-Instruct-7B: Qwen2.5-7B's sizes.

        The models were trained on 2,048 tokens; config.json allows 131,072 positions.
        """
        sizes: dict[str, Any] = {"d_model": 3584, "n_layers": 28, "n_heads": 28, "n_kv_heads": 4}
        sizes |= {"mlp_hidden_size": 18944, "vocab_size": 152064, "embedding_size": 152064}
        sizes |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_sequence_length": 131_072}
        sizes |= dict(zip(_IDS, (151666, 151643, 151643, 151665), strict=True))
        return cls(**sizes, family="dream")

    @classmethod
    def diffucoder_7b(cls) -> ModelConfig:
        """Returns the config of DiffuCoder-7B Base, Instruct and cpGRPO; pads with <|dlm_pad|>."""
        return dataclasses.replace(cls.dream_7b(), pad_token_id=151667)

    @classmethod
    def dream_coder_7b(cls) -> ModelConfig:
        """Returns the config of Dream-Coder-v0-Base-7B and Dream-Coder-v0-Instruct-7B."""
        return dataclasses.replace(cls.dream_7b(), max_sequence_length=32_768)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Returns the config of a published model by its name in PRESETS, such as "dream-7b".

        Raises ConfigError for other names.
        """
        require(name in PRESETS, f"model {name!r} is not known ({', '.join(PRESETS)})")
        config: ModelConfig = getattr(cls, name.replace("-", "_"))()
        return config

    @classmethod
    def tiny(cls) -> ModelConfig:
        """Returns two layers with grouped KV heads, for tests and examples."""
        sizes: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
        sizes |= {"mlp_hidden_size": 96, "vocab_size": 256, "embedding_size": 256}
        sizes |= {"rope_theta": 10_000.0, "max_sequence_length": 512}
        return cls(**sizes | dict(zip(_IDS, (255, 254, 254, 253), strict=True)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from the contents of a config.json, whose model_type names the family.

        Raises ConfigError that names every key whose value is not implemented, or the missing keys.
        """
        require(isinstance(raw, Mapping), "config.json must hold an object")
        family = family_of(raw)
        raw = family.read(raw, [*_SIZES, "n_kv_heads", "embedding_size", *_IDS])
        # config.json does not say how weights are stored; manifest.json does.
        names = [x.name for x in dataclasses.fields(cls) if x.name != "weight_format"]
        values = {name: raw[name] for name in names if name in raw} | {"family": family.name}
        ratio = raw.get("mlp_ratio")
        if values.get("mlp_hidden_size") is None and ratio is not None:
            require(is_number(ratio), f"mlp_ratio must be a number, got {ratio!r}")
            size("d_model", raw.get("d_model"))
            values["mlp_hidden_size"] = int(exact_share(ratio, raw["d_model"]))
        missing = ", ".join(family.key(key) for key in _REQUIRED if values.get(key) is None)
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


# Names of published models for command lines.
PRESETS = ("llada-8b", "ultrallada-8b", "illada-8b", "dream-7b", "diffucoder-7b", "dream-coder-7b")
