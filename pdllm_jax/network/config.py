"""The model's architecture: frozen, validated, hashable, read from config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that is malformed or asks for what is not implemented."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive_int(name: str, value: Any) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value > 0,
        f"{name} must be a positive integer, got {value!r}",
    )


def size(name: str, value: Any) -> None:
    """Raises ConfigError unless value is a positive integer of at most 31 bits."""
    positive_int(name, value)
    require(value < 1 << 31, f"{name} must be less than 2**31, got {value}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the trained one.

    kind:
      "linear": positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
      "ntk": base raised to theta * factor^(D / (D - 2)), whatever the length (NTK-aware, static).
      "yarn": per-frequency blend of both, with attention temperature (Peng et al. 2023,
        arXiv 2309.00071).
    factor: stretch, >= 1.
    original_max_position: trained context length; used by "yarn".
    attention_factor: multiplies cos and sin; None means yarn's 0.1 ln(factor) + 1.
    beta_fast, beta_slow: yarn's ramp, in rotations over the trained context.
    """

    kind: Literal["linear", "ntk", "yarn"]
    factor: float
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.kind in ("linear", "ntk", "yarn"),
            f"rope scaling {self.kind!r} is not implemented (linear, ntk, yarn are)",
        )
        require(
            is_number(self.factor) and math.isfinite(self.factor) and self.factor >= 1.0,
            f"rope scaling factor must be a number >= 1, got {self.factor!r}",
        )
        if self.kind == "yarn":
            positive_int("rope scaling original_max_position", self.original_max_position)
            for name in ("beta_fast", "beta_slow"):
                value = getattr(self, name)
                require(
                    is_number(value) and math.isfinite(value) and value > 0,
                    f"rope scaling {name} must be a positive number, got {value!r}",
                )
            require(
                self.attention_factor is None
                or (is_number(self.attention_factor) and 0 < self.attention_factor < math.inf),
                f"rope scaling attention_factor must be positive, got {self.attention_factor!r}",
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], max_sequence_length: int) -> RopeScaling | None:
        """Reads the `rope_scaling` entry of a config.json; None where it asks for none."""
        require(isinstance(raw, Mapping), f"rope_scaling must be an object, got {raw!r}")
        kind = raw.get("rope_type", raw.get("type"))
        if kind in (None, "default"):
            return None
        known = {
            "rope_type", "type", "factor", "original_max_position_embeddings",
            "attention_factor", "beta_fast", "beta_slow", "rope_theta",
        }  # fmt: skip
        unknown = sorted(k for k in set(raw) - known if raw[k] is not None)
        require(not unknown, f"rope_scaling keys not implemented: {', '.join(map(repr, unknown))}")
        require("factor" in raw, "rope_scaling lacks its factor")
        optional = {
            k: raw[k]
            for k in ("attention_factor", "beta_fast", "beta_slow")
            if raw.get(k) is not None
        }
        original = raw.get("original_max_position_embeddings") or max_sequence_length
        return cls(kind=kind, factor=raw["factor"], original_max_position=original, **optional)


def is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63  # beyond any setting's sense, and at last beyond float
    return isinstance(value, float)


# What a config.json may say only in one way; any other value is refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llada",),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_parameters": (),  # transformers' newer spelling of rope_theta and rope_scaling in one
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "clip_qkv": (),
    "layer_norm_with_affine": (True,),
    "block_group_size": (1,),
    "multi_query_attention": (False,),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """LLaDA's architecture: a LLaMA decoder without the causal mask.

    d_model, n_layers, n_heads, n_kv_heads, mlp_hidden_size: sizes; head size is d_model / n_heads.
    vocab_size: ids that mean something; embedding_size: rows of the embedding (>= vocab_size).
    weight_tying: the embedding is the LM head too.
    bos_token_id: None where config.json does not tell (LLaDA's does not; its tokenizer does).
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

    def __post_init__(self) -> None:
        for name in (
            "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size",
            "vocab_size", "embedding_size", "max_sequence_length",
        ):  # fmt: skip
            positive_int(name, getattr(self, name))
        require(
            self.d_model % self.n_heads == 0,
            f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}",
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head size {self.head_dim} must be even for RoPE")
        require(
            self.embedding_size >= self.vocab_size,
            f"embedding_size {self.embedding_size} is smaller than vocab_size {self.vocab_size}",
        )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            require(
                is_number(value) and math.isfinite(value) and value > 0,
                f"{name} must be a positive number, got {value!r}",
            )
        require(isinstance(self.weight_tying, bool), "weight_tying must be true or false")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            if name == "bos_token_id" and value is None:
                continue
            require(
                isinstance(value, int)
                and not isinstance(value, bool)
                and 0 <= value < self.embedding_size,
                f"{name} {value!r} is outside the embedding of {self.embedding_size} rows",
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def llada_8b(cls) -> ModelConfig:
        """LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5."""
        return cls(
            d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
            vocab_size=126464, embedding_size=126464, bos_token_id=126080,
        )  # fmt: skip

    @classmethod
    def ultrallada_8b(cls) -> ModelConfig:
        """LLaDA-8B stretched to 131,072 tokens by UltraLLaDA's diffusion-aware NTK base.

        Base = (T' / 2pi)^(D / d_crit), d_crit = 2 ceil(D/2 log_b(T / 2pi)), with T = 2 * 4096 and
        T' = 2 * 131072: attention sees both directions, so each length counts twice
        (arXiv 2510.10481). A checkpoint's own config.json takes precedence.
        """
        base = cls.llada_8b()
        trained, target = 2 * base.max_sequence_length, 2 * 131_072
        half = base.head_dim / 2
        critical = 2 * math.ceil(half * math.log(trained / (2 * math.pi), base.rope_theta))
        theta = (target / (2 * math.pi)) ** (base.head_dim / critical)
        return dataclasses.replace(base, rope_theta=theta, max_sequence_length=131_072)

    @classmethod
    def tiny(cls) -> ModelConfig:
        """Two layers with grouped KV heads, for tests and examples."""
        return cls(
            d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=96,
            vocab_size=256, embedding_size=256, rope_theta=10_000.0, max_sequence_length=512,
            mask_token_id=255, eos_token_id=254, pad_token_id=254, bos_token_id=253,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from the contents of a LLaDA config.json.

        Raises ConfigError that names every key whose value is not implemented, or the missing key.
        """
        require(isinstance(raw, Mapping), "config.json must hold an object")
        refused = [
            f"{key}={raw[key]!r}"
            for key, allowed in _FIXED.items()
            if raw.get(key) is not None and raw[key] not in allowed
        ]
        architectures = raw.get("architectures")
        if architectures is not None and architectures != ["LLaDAModelLM"]:
            refused.append(f"architectures={architectures!r}")
        require(not refused, f"config.json asks for what is not implemented: {', '.join(refused)}")

        def get(key: str) -> Any:
            require(raw.get(key) is not None, f"config.json lacks {key}")
            return raw[key]

        d_model, n_heads = get("d_model"), get("n_heads")
        mlp_hidden = raw.get("mlp_hidden_size")
        if mlp_hidden is None:
            ratio = get("mlp_ratio")
            positive_int("d_model", d_model)
            require(
                is_number(ratio) and math.isfinite(ratio),
                f"mlp_ratio must be a number, got {ratio!r}",
            )
            mlp_hidden = int(ratio * d_model)
        vocab_size = get("vocab_size")
        embedding_size, n_kv_heads = raw.get("embedding_size"), raw.get("n_kv_heads")
        max_length = get("max_sequence_length")
        positive_int("max_sequence_length", max_length)
        scaling = raw.get("rope_scaling")
        if isinstance(scaling, Mapping):
            require(
                scaling.get("rope_theta") in (None, get("rope_theta")),
                f"rope_scaling's rope_theta {scaling.get('rope_theta')!r} is not the model's",
            )
        eos = raw.get("eos_token_id")
        eos = get("pad_token_id") if eos is None else eos
        pad = raw.get("pad_token_id")
        return cls(
            d_model=d_model,
            n_layers=get("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            mlp_hidden_size=mlp_hidden,
            vocab_size=vocab_size,
            embedding_size=vocab_size if embedding_size is None else embedding_size,
            rope_theta=get("rope_theta"),
            rope_scaling=None if scaling is None else RopeScaling.from_dict(scaling, max_length),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
            max_sequence_length=max_length,
            weight_tying=raw.get("weight_tying", False),
            mask_token_id=get("mask_token_id"),
            eos_token_id=eos,
            pad_token_id=eos if pad is None else pad,
            bos_token_id=raw.get("bos_token_id"),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads config.json; raises ConfigError for what is wrong with it, OSError."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # ValueError: too many digits, too
            raise ConfigError(f"{Path(path).name} is not valid JSON: {error}") from None
        return cls.from_dict(raw)
