"""The families of models: what differs between them, and how a config.json says it.

All are LLaMA decoders without the causal mask. A family is one row of FAMILIES; `ModelConfig` reads
it by the family's name. The names of its tensors are in convert/mapping.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pdllm_jax.rules import is_index, listed, require

# Names that transformers gives to sizes, beside LLaDA's or in their place.
_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
}
_OTHERS = {
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
# Keys whose default is the value of another key.
_DEFAULTS = {
    "n_kv_heads": "n_heads",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "eos_token_id": "pad_token_id",
    "pad_token_id": "eos_token_id",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    name: as in `ModelConfig.family`.
    model_type, architecture: what its config.json says.
    qkv_bias: the projections to q, k and v have a bias.
    logit_shift: the token of a position is predicted by the row in front of it, as in a model that
      was adapted from an autoregressive one; position 0 by its own row. Otherwise by its own row.
    rms_norm_eps: where config.json has none.
    keys: those of config.json by the names of ModelConfig, where they differ.
    windowed: a sliding_window is in use unless use_sliding_window is false. If windowed is false,
      it is in use only if use_sliding_window is true.
    """

    name: str
    model_type: str
    architecture: str
    qkv_bias: bool
    logit_shift: bool
    rms_norm_eps: float
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    windowed: bool = True

    def key(self, name: str) -> str:
        """Returns the key of config.json for a field of ModelConfig."""
        return self.keys.get(name, name)

    def read(self, raw: Mapping[str, Any], integers: Iterable[str]) -> dict[str, Any]:
        """Returns a config.json of any version of transformers under the names of ModelConfig.

        Drops null, reads 32.0 as 32 and other names of sizes, takes rope_theta and rope_scaling
        out of rope_parameters, and fills in keys whose default is another key.

        Args:
          raw: the contents of config.json.
          integers: names of ModelConfig whose values are integers.

        Raises:
          ConfigError: two keys contradict each other, or a key has a value that is not implemented.
            The message names every such key.
        """
        values = {key: value for key, value in raw.items() if value is not None}
        aliases = {**_SIZES, **self.keys}
        for key in [*integers, *aliases.values(), "head_dim"]:
            if key in values:
                values[key] = whole(values[key])
        for key, alias in aliases.items():
            if alias in values:
                _set(values, key, alias, values[alias])
        _flatten_rope(values)
        stated = [
            f"{key!s:.80}={value!r:.200}{self._contradiction(key, value)}"
            for key, value in values.items()
            if self._contradiction(key, value) or self._refuses(key, value, values)
        ]
        require(not stated, f"config.json asks for what is not implemented: {listed(stated)}")
        for key, source in _DEFAULTS.items():
            if key not in values and source in values:
                values[key] = values[source]
        values.setdefault("rms_norm_eps", self.rms_norm_eps)
        return values

    def _contradiction(self, key: str, value: Any) -> str:
        """Says what a flag of biases or of the shift has to be, if it is not that; else ""."""
        for pattern, wanted in ((_BIAS, self.qkv_bias), (_SHIFT, self.logit_shift)):
            if pattern.fullmatch(key) and value is not wanted:
                return f" (the family {self.name} has {wanted})"
        return ""

    def _refuses(self, key: str, value: Any, raw: Mapping[str, Any]) -> bool:
        """Returns whether a key of config.json asks for what is not implemented."""
        if key == "architectures":
            return bool(value != [self.architecture])
        if key in _FIXED:
            return value not in _FIXED[key]
        if key == "layer_types" and isinstance(value, list):
            return not set(map(str, value)) <= {"full_attention"}
        if key == "head_dim":
            sizes = (value, raw.get("d_model"), raw.get("n_heads"))
            return not all(map(is_index, sizes)) or value * raw["n_heads"] != raw["d_model"]
        if key == "hidden_act":
            return bool(value != "silu")
        if key == "sliding_window" and raw.get("use_sliding_window", self.windowed) is False:
            return False
        computes = _COMPUTES.search(key) is not None and _COMPUTES_NOT.fullmatch(key) is None
        neutral = value is not True and value in (0, 1, [], {}, "")
        return computes and not neutral and not (_BIAS.fullmatch(key) or _SHIFT.fullmatch(key))


def whole(value: Any) -> Any:
    """Returns a float without a fraction as an int; every other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flatten_rope(values: dict[str, Any]) -> None:
    """Takes rope_theta and rope_scaling out of rope_parameters, where newer versions have them."""
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return
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


def _set(values: dict[str, Any], key: str, other: str, value: Any) -> None:
    """Sets a key; raises ConfigError if it has another value already."""
    stated = values.setdefault(key, value)
    require(stated == value, f"{key} {stated!r:.200} is not {other} {value!r:.200}")


# Flags of biases and of the shift, under the names that they have in several code bases.
_BIAS = re.compile(r"(?:include_|use_)?(?:qkv|attention)_bias")
_SHIFT = re.compile(r"(?:\w+_)?shift(?:ed)?(?:_\w+)?")
# The values of config.json that are implemented; a key may be absent or null. Others are refused.
_ON = ("layer_norm_with_affine", "rope", "rope_full_precision")
_OFF = (
    *("include_bias", "bias_for_layer_norm", "attention_layer_norm"),
    *("input_emb_norm", "alibi", "scale_logits", "multi_query_attention"),
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    **dict.fromkeys(_ON, (True,)),
    **dict.fromkeys(_OFF, (False,)),
    "clip_qkv": (),
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

LLADA = Family(
    "llada",
    model_type="llada",
    architecture="LLaDAModelLM",
    qkv_bias=False,
    logit_shift=False,
    rms_norm_eps=1e-5,
)
DREAM = Family(
    "dream",
    model_type="Dream",
    architecture="DreamModel",
    qkv_bias=True,
    logit_shift=True,
    rms_norm_eps=1e-6,
    keys={**_SIZES, **_OTHERS},
    windowed=False,
)
FAMILIES = {family.name: family for family in (LLADA, DREAM)}


def family_of(raw: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json: by model_type, else by architectures, else LLaDA's.

    Raises:
      ConfigError: model_type is not known.
    """
    known = {family.model_type: family for family in FAMILIES.values()}
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type is None:
        return next((x for x in known.values() if architectures == [x.architecture]), LLADA)
    message = f"model_type={model_type!r:.200} ({' and '.join(known)} are)"
    require(
        isinstance(model_type, str) and model_type in known,
        f"config.json asks for what is not implemented: {message}",
    )
    return known[model_type]
