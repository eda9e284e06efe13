"""lm-eval's `model_args` and `generation_kwargs`, as its own model wrappers take them.

A name is a setting of this library, an alias of one, without effect here, or neutral: accepted at
the values that change nothing. Any other is refused by its name.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.evaluation.prompts import fitting_block
from pdllm_jax.rules import is_index, require

_LENGTH_SETTINGS = ("gen_length", "block_length")
# The configs' settings but the response's length and its blocks, which a task gives.
CHUNKING, SELECTION, DECODING = (
    [name for name in inspect.signature(config).parameters if name not in _LENGTH_SETTINGS]
    for config in (ChunkConfig, SelectionConfig, DecodeConfig)
)
# `top_k` is the number of chunks; `alg` chooses a published generation of Dream.
DECODING = ["sample_top_k" if name == "top_k" else name for name in DECODING] + ["alg"]
_UNMASKING = ("threshold", "factor", "steps", "unmask")  # one of them says what a step unmasks

# Names of the hf, vllm and API wrappers, of LLaDA's eval_llada.py and of Dream's evaluation.
_ALIASES = {
    "model_path": "pretrained",
    "add_bos_token": "bos",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "diffusion_steps": "steps",
    "alg_temp": "order_temperature",
    "sample_top_p": "top_p",
}
_MODEL_ALIASES = {**_ALIASES, "max_new_tokens": "gen_length"}
# Requests go one by one, to JAX's device; no code of a checkpoint is ever executed.
_NO_EFFECT = (
    *("batch_size", "max_batch_size", "device", "trust_remote_code", "use_fast_tokenizer"),
    *("logits_cache", "truncation", "low_cpu_mem_usage", "attn_implementation", "offload_folder"),
    *("gpu_memory_utilization", "tokenizer_mode", "tokenizer_revision", "show_speed"),
)
# The values at which a name changes nothing, None beside them.
_NEUTRAL_ARGS: dict[str, tuple[Any, ...]] = {
    "revision": ("main",),
    "subfolder": ("",),
    "backend": ("default", "causal"),
    **dict.fromkeys(("tensor_parallel_size", "data_parallel_size"), (1,)),
    **dict.fromkeys(("parallelize", "autogptq", "gptqmodel", "load_in_8bit", "load_in_4bit"), (0,)),
    **dict.fromkeys(
        ("peft", "delta", "gguf_file", "quantization", "lora_local_path", "tp_plan"), ()
    ),
    **dict.fromkeys(("tokenizer", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype"), ()),
    **dict.fromkeys(("think_end_token", "max_memory_per_gpu", "max_cpu_memory"), ()),
    **dict.fromkeys(("enable_thinking", "chat_template_args"), ()),
    "escape_until": (False,),  # of Dream's evaluation; if true, stop texts end no response
}
_DTYPES = ("bfloat16", "float16", "float32")

# Names of the response's length; the first one that is given counts, as in lm-eval.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "gen_length")
_TRUNCATED_SAMPLING = {"min_p": (0,), "typical_p": (1,)}
_NEUTRAL_KWARGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "n", "best_of"), (1,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "no_repeat_ngram_size"), (0,)),
}
_NO_EFFECT_KWARGS = (
    *("early_stopping", "use_cache", "pad_token_id", "eos_token_id"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
    "seed",  # read by the adapter
)


def _require_neutral(kind: str, name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    accepted = " or ".join(map(repr, (None, *neutral)))
    valid = value is None or value in neutral
    require(valid, f"{kind} {name}={value!r:.60} is not implemented, only {accepted}")


def read_model_args(given: Mapping[str, Any], allowed: Container[str]) -> dict[str, Any]:
    """Returns model_args by this library's names, those without effect left out.

    allowed: names of the settings.

    Raises:
      ConfigError: a name that is not known, a value that is not implemented, a setting given twice.
    """
    settings: dict[str, Any] = {}
    names = [*allowed, *_MODEL_ALIASES, *_NO_EFFECT, *_NEUTRAL_ARGS]  # type: ignore[misc]
    unknown = ", ".join(sorted(set(given) - set(names)))
    require(not unknown, f"model_args not known: {unknown}; allowed: {', '.join(sorted(names))}")
    for name, value in given.items():
        if name in _NEUTRAL_ARGS:
            _require_neutral("model_args", name, value, _NEUTRAL_ARGS[name])
        elif name not in _NO_EFFECT:
            setting = _MODEL_ALIASES.get(name, name)
            require(setting not in settings, f"model_args give {setting} twice, also as {name}")
            settings[setting] = value
    return settings


def read_dtype(value: Any) -> Any:
    """Returns the dtype of the weights; None for "auto", the checkpoint's."""
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    valid = name in ("auto", *_DTYPES)
    require(valid, f"dtype {value!r} is not supported (auto, {', '.join(_DTYPES)} are)")
    return None if name == "auto" else name


def decode_config(
    length: int,
    block_length: int,
    model: Mapping[str, Any],
    task: Mapping[str, Any],
    *,
    blocks: bool = True,
) -> DecodeConfig:
    """Returns the decoding settings of the model's arguments, and over them a task's.

    blocks: `alg` is that of Fast-dLLM on Dream, block by block, and not of Dream.

    Raises:
      ConfigError: settings that DecodeConfig refuses, or both steps and threshold.
    """
    if any(name in task for name in _UNMASKING):
        model = {name: value for name, value in model.items() if name not in _UNMASKING}
    settings = {"temperature": 0.0, **model, **task}
    if "sample_top_k" in settings:
        settings["top_k"] = settings.pop("sample_top_k")
    block = fitting_block(length, block_length)
    if (alg := settings.pop("alg", None)) is not None:
        settings = {"max_new_tokens": length, "steps": length, "alg": alg, **settings}
        settings["alg_temp"] = settings.pop("order_temperature", None)
        if blocks:
            # The other methods replace the rows that a step recomputes; "prefilling" takes these.
            return DecodeConfig.fast_dllm_dream(block_length=block, dual_cache=True, **settings)
        return DecodeConfig.dream(**settings)
    if not any(name in settings for name in _UNMASKING):
        settings["threshold"] = 0.9
    settings["threshold"] = settings.get("threshold") or None
    twice = settings["threshold"] is not None and settings.get("steps") is not None
    require(not twice, "steps and threshold exclude each other: give one of them")
    if settings.get("guidance"):
        settings.setdefault("recompute", "response")
    return DecodeConfig(gen_length=length, block_length=block, **settings)


def sample_seed(seed: int, prompt: str, repeat: int) -> int:
    """Returns the seed of the repeat-th sample of a prompt, 63 bits."""
    digest = hashlib.sha256(f"{seed} {repeat} {prompt}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def require_positive(values: Mapping[str, Any], *, optional: bool = False) -> None:
    """Raises ConfigError unless every value is an integer of at least 1, or None if `optional`."""
    for name, value in values.items():
        valid = (optional and value is None) or (is_index(value) and value > 0)
        require(valid, f"{name} must be a positive integer, got {value!r:.60}")


class Generation(NamedTuple):
    """What a task asks of a response.

    until: texts that end it. length: tokens, None where the task does not say. settings: fields of
    `DecodeConfig`.
    """

    until: list[str]
    length: int | None
    temperature: float
    settings: dict[str, Any]


def read_generation(given: Mapping[str, Any], fields: Container[str]) -> Generation:
    """Reads a task's generation_kwargs by lm-eval's rules.

    Without `do_sample` a positive temperature samples; `do_sample` without a temperature samples at
    1; `do_sample=False` is greedy at any temperature. Empty stop texts are left out.

    Args:
      fields: names of the decoding settings that generation_kwargs may give.

    Raises:
      ConfigError: a name that is not known or not implemented.
    """
    kwargs = {_ALIASES.get(name, name): value for name, value in given.items()}
    stops = kwargs.pop("until", None)
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    valid = isinstance(stops, list | tuple) and all(isinstance(stop, str) for stop in stops)
    require(valid, f"generation_kwargs until must be a text or a list of texts, got {stops!r:.60}")
    lengths = [kwargs.pop(name, None) for name in _LENGTHS]
    length = next((int(value) for value in lengths if value is not None), None)
    require(length is None or length > 0, f"max_gen_toks must be at least 1, got {length}")
    samples, temperature = kwargs.pop("do_sample", None), kwargs.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    temperature = 0.0 if samples is False else float(temperature)
    neutral = _NEUTRAL_KWARGS | (_TRUNCATED_SAMPLING if temperature > 0 else {})
    settings = {}
    top_p, top_k = (kwargs.pop(name, None) for name in ("top_p", "top_k"))
    if temperature > 0 and top_p is not None:
        settings["top_p"] = top_p
    if temperature > 0 and top_k is not None:
        settings["sample_top_k"] = None if top_k in (0, -1) else top_k
    for name, value in kwargs.items():
        if name in neutral:
            _require_neutral("generation_kwargs", name, value, neutral[name])
        elif name in fields:
            settings[name] = value
        else:
            known = name in _NO_EFFECT_KWARGS or name in _TRUNCATED_SAMPLING
            require(known, f"generation_kwargs {name} is not known")
    return Generation([stop for stop in stops if stop], length, temperature, settings)
