"""Tokenizers without a tokenizer.json, as Dream is published, against transformers' Qwen2."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.tokenizer import Tokenizer, TokenizerError
from tests.oracles.dream_tokenizer import SPECIAL_TOKENS, write_dream_tokenizer

MERGES = 40
FIRST = 256 + MERGES  # id of the first added token
IDS = {name: FIRST + i for i, name in enumerate(SPECIAL_TOKENS)}
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
WORDS = (
    *(
        "It's",
        "the",
        " then",
        "1,234",
        "3.14",
        "阅读文档",
        "naïve",
        "nai\u0308ve",
        "über",
        "\U0001f600",
    ),
    *("\n", "\r\n", "\n\n  ", "\t", "   ", " ", "'LL", "...", "\u00a0", "\u2028", "f(x):", "-->"),
    *(*SPECIAL_TOKENS, "<|im_start", "<tool_call>", "\x00", "한국어", "한글", "a" * 40),
)


def write(folder: Path, **options: Any) -> Path:
    write_dream_tokenizer(folder, **{"merges": MERGES, "plain": ("<tool_call>",)} | options)
    return folder


def load(folder: Path, **changes: Any) -> Tokenizer:
    sizes = {"vocab_size": FIRST + 10, "embedding_size": FIRST + 10, "bos_token_id": FIRST}
    ids = {"mask_token_id": IDS["<|mask|>"], "eos_token_id": FIRST, "pad_token_id": FIRST}
    config = dataclasses.replace(ModelConfig.tiny(), **sizes | ids | changes)
    return Tokenizer.load(folder, config)


def qwen(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.Qwen2Tokenizer.from_pretrained(str(folder), **options)


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content))


def test_ids_are_those_of_qwen2(tmp_path: Path) -> None:
    """Special tokens stay text, <tool_call> is not one; the text comes back as NFC."""
    ours, theirs = load(write(tmp_path)), qwen(tmp_path, split_special_tokens=True)
    draw = np.random.default_rng(0)
    merged = set[int]()
    for _ in range(300):
        text = "".join(draw.choice(WORDS, draw.integers(1, 12)))
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert not set(ids) & set(IDS.values())
        assert ours.decode(ids) == unicodedata.normalize("NFC", text)
        merged |= {i for i in ids if i >= 256}
    assert len(merged) > 10
    assert IDS["<|im_end|>"] + 3 in merged


def test_special_ids(tmp_path: Path) -> None:
    """BOS is the tokenizer's: config.json of Dream-v0-Base gives the id of <|endoftext|>."""
    tokenizer = load(write(tmp_path))
    assert (tokenizer.bos_id, tokenizer.mask_id, tokenizer.eos_id) == (FIRST + 3, FIRST + 4, FIRST)
    assert tokenizer.stop_ids == (FIRST, IDS["<|im_end|>"])
    assert tokenizer.encode_message("a", chat=False)[:-1] == [tokenizer.bos_id]


def test_padding_ends_the_text(tmp_path: Path) -> None:
    """As DiffuCoder's, whose padding is a token of its own."""
    special = (*SPECIAL_TOKENS, "<|dlm_pad|>")
    tokenizer = load(write(tmp_path, special=special, plain=(), pad_token="<|dlm_pad|>"))
    assert tokenizer.stop_ids == (FIRST, IDS["<|im_end|>"], FIRST + 5)
    assert tokenizer.eot_id == IDS["<|im_end|>"]
    assert tokenizer.decode([*tokenizer.encode("yes"), FIRST + 5, 3]) == "yes"


@pytest.mark.parametrize("named", [True, False])
def test_tokens_that_no_file_names(tmp_path: Path, named: bool) -> None:
    """An older folder: ids in added_tokens.json alone, BOS and mask known by their usual names."""
    absent = dict.fromkeys(("added_tokens_decoder", "bos_token", "mask_token", "chat_template"))
    write(tmp_path, **absent)
    if not named:
        (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.mask_id) == (FIRST + 3, FIRST + 4)
    assert tokenizer.template is not None
    assert "You are a helpful assistant." in tokenizer.template[0]


@pytest.mark.parametrize("file", [False, True])
def test_no_code_of_the_folder_is_executed(tmp_path: Path, file: bool) -> None:
    """tokenizer.json is read where there is one, whatever else the folder holds."""
    write(tmp_path)
    if file:
        qwen(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_text("not this one")
    assert load(tmp_path).bos_id == FIRST + 3
    assert not any("tokenization_dream" in name for name in sys.modules)


def test_special_tokens_in_front_of_the_vocabulary(tmp_path: Path) -> None:
    """As iLLaDA's ids: BOS 0, padding 1, EOS 2 and mask 5."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    names = ["<s>", "<pad>", "</s>", "<unk>", "<sep>", "<mask>"]
    symbols = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tokenizer = load(tmp_path, mask_token_id=5, eos_token_id=2, pad_token_id=1, bos_token_id=0)
    assert (tokenizer.bos_id, tokenizer.mask_id, tokenizer.stop_ids) == (0, 5, (2, 1))
    ids = tokenizer.encode("</s> a<mask>")
    assert min(ids) > 5
    assert tokenizer.decode([*ids, 1, 7]) == "</s> a<mask>"


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, name, **changes)


def without(*names: str, **settings: Any) -> Callable[[Path], object]:
    special = tuple(name for name in SPECIAL_TOKENS if name not in names)
    return lambda folder: write(folder, special=special, plain=(), **settings)


LFS = "version https://git-lfs.github.com/spec/v1\n"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no BOS": (without("<|beginoftext|>"), r"no BOS token \(<.startoftext.> or <.beginoftext.>\)"),
    "no mask": (without("<|mask|>"), r"no mask token \(<.mdm_mask.> or <.mask.>\)"),
    # transformers gives a token that is named and not listed the next free id.
    "unlisted BOS": (without("<|mask|>", bos_token="<s>"), r"has no BOS token \(<s>\)$"),
    "unlisted mask": (without("<|mask|>", mask_token="[M]"), r"has no mask token \(\[M\]\)$"),
    "other mask": (without("<|im_start|>"), f"mask token: {FIRST + 3} in the tokenizer, "),
    "gap": (change(ADDED, **{"<|mask|>": FIRST + 7}), f"<.mask.>' has the id {FIRST + 7} in added"),
    "merges": (lambda folder: (folder / "merges.txt").unlink(), "tokenizer.json is missing from"),
    "vocabulary": (change("vocab.json", Ġt=None), "cannot be read: .*out of vocabulary"),
    "pointer": (lambda folder: (folder / "merges.txt").write_text(LFS), "is a Git LFS pointer"),
    "class": (change(CONFIG, tokenizer_class="Other"), "'Other' needs a tokenizer.json; Dream"),
    "no class": (change(CONFIG, tokenizer_class=None), "None needs a tokenizer.json; Dream"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    damage(write(tmp_path))
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_json_that_needs_other_code(tmp_path: Path) -> None:
    qwen(write(tmp_path)).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, CONFIG, tokenizer_class="OtherTokenizer")
    with pytest.raises(TokenizerError, match="Python code from the checkpoint, which is never"):
        load(tmp_path)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=f"has {FIRST + 6} tokens, the model's embedding"):
        load(write(tmp_path), vocab_size=FIRST + 5, embedding_size=FIRST + 5)


def test_the_digest_covers_what_tokenization_depends_on(tmp_path: Path) -> None:
    first = load(write(tmp_path)).digest
    for path in tmp_path.glob("*.[jt]*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    edit_text = (tmp_path / "added_tokens.json").read_text()
    assert edit_text.startswith("\ufeff")
    assert load(tmp_path).digest == first
    assert load(write(tmp_path, chat_template="{{ messages[0].content }}")).digest == first
    others = [{"plain": ("<fim>",)}, {"special": (*SPECIAL_TOKENS, "<tool_call>"), "plain": ()}]
    digests = {load(write(tmp_path, **options)).digest for options in others}
    merges = write(tmp_path) / "merges.txt"
    merges.write_text("\n".join([*merges.read_text().splitlines()[:-1], ""]))
    assert len({first, *digests, load(tmp_path).digest}) == 4
