"""Tiny tokenizer folders in the layout that Dream is published in: no tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# In the order of their ids, which follow those of vocab.json.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
# As Qwen2.5's for turns of text: a default system text, and nothing is trimmed.
CHATML = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NAMES = {
    "bos_token": "<|beginoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
}
TEXT = """It's 1,234 tokens; don't ask THEM. the then there this that\n\n  阅读文档，回答问题。文档
def f(x):\n    return x  # naïve café\r\n\tThe document's answers: 3.14 and 2.71 — über\n"""


def write_dream_tokenizer(
    folder: Path,
    *,
    merges: int = 0,
    special: tuple[str, ...] = SPECIAL_TOKENS,
    plain: tuple[str, ...] = (),
    **settings: Any,
) -> None:
    """A byte-level BPE: ids 0..255 are bytes, then merged tokens, then the added ones.

    The class that tokenizer_config.json names ends the process when its module is imported.

    Args:
      merges: how many merged tokens vocab.json has.
      special: the special tokens, which come first among the added ones.
      plain: added tokens behind them that are not special, as Qwen's <tool_call>.
      settings: of tokenizer_config.json; None drops one.
    """
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator([TEXT] * 2, trainer)
    bpe = json.loads(model.to_str())["model"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    rows = [{"content": name, **flags, "special": name in special} for name in (*special, *plain)]
    first = len(bpe["vocab"])
    names = {key: name for key, name in NAMES.items() if name in special}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(first + i): row for i, row in enumerate(rows)},
        "additional_special_tokens": list(special),
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
        **names,
        **settings,
    }
    contents = {
        "vocab.json": bpe["vocab"],
        "added_tokens.json": {row["content"]: first + i for i, row in enumerate(rows)},
        "special_tokens_map.json": names,
        "tokenizer_config.json": {
            key: value for key, value in config.items() if value is not None or key == "unk_token"
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    merged = "".join(f"{pair}\n" for pair in pairs)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merged, encoding="utf-8")
    (folder / "tokenization_dream.py").write_text("raise SystemExit('this code was executed')\n")
