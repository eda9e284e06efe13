"""A tokenizer's files, read by transformers; nothing in the folder is executed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdllm_jax.downloads import clean_tokenizer, tokenizer_files

# Dream's Python class is Qwen2's byte-level BPE under another name.
DREAM_CLASS, QWEN_CLASSES = "DreamTokenizer", ("Qwen2Tokenizer", "Qwen2TokenizerFast")


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or lacks a token that the method needs."""


def require(condition: bool, message: str) -> None:
    """Raises TokenizerError with `message` unless the condition holds."""
    if not condition:
        raise TokenizerError(message)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns every error of the library into a TokenizerError of one line."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # A panic of its Rust code is a PanicException, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs Python code from the checkpoint, which is never executed"
        raise TokenizerError(f"{what}: {reason}") from None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a folder's files say.

    loaded: the transformers tokenizer; backend: the tokenizers library's.
    added: ids of the added tokens that the files list, by their text; where files contradict each
      other, tokenizer.json's.
    digest: SHA-256 of the files that say how text is tokenized, hexadecimal.
    """

    loaded: Any
    added: Mapping[str, int]
    digest: str

    @property
    def backend(self) -> Any:
        return self.loaded.backend_tokenizer

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Reads tokenizer.json; without it, vocab.json and merges.txt as Dream is published.

        Raises:
          TokenizerError: the files are missing or cannot be read, or the library would give tokens
            other ids than they do.
        """
        files = tokenizer_files(folder)
        absent = "tokenizer.json is missing from the checkpoint, and so are vocab.json"
        require(bool(files), f"{absent} with merges.txt: text needs one or the other")
        with refusing("the tokenizer cannot be read"), clean_tokenizer(folder) as clean:
            settings = _read_settings(clean / "tokenizer_config.json")
            loaded, added = _read_tokenizer(clean, files, settings), dict[str, int]()
            for name, text, index in _added_tokens(clean, settings):
                read = loaded.backend_tokenizer.token_to_id(text)
                if read == index:
                    added[text] = index
                elif len(files) > 1 or name == files[0].name:  # else tokenizer.json is right
                    # The library numbers added tokens anew where their ids have gaps.
                    wrong = f"token {text!r} has the id {index} in {name} but is read as {read}"
                    raise TokenizerError(f"{wrong}: ids have gaps or are out of order")
            contents = [(clean / path.name).read_bytes() for path in files]
            if len(files) > 1:  # tokenizer.json holds the added tokens, too
                contents.append(_digestible(loaded.backend_tokenizer))
        return cls(loaded, added, hashlib.sha256(b"\0".join(contents)).hexdigest())

    def find(self, names: Iterable[str]) -> int | None:
        """Returns the id of the first of these tokens that the files list.

        The library adds a token that tokenizer_config.json names and no file lists.
        """
        ids = (self.added.get(x, self.backend.model.token_to_id(x)) for x in names)
        return next((index for index in ids if index is not None), None)


def _read_settings(path: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json; TokenizerError for a chat template that cannot be read."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    require(isinstance(settings, dict), f"{path.name} must hold an object")
    value = settings.get("chat_template")
    rows = value if isinstance(value, list) else []
    if all(isinstance(row, dict) and {"name", "template"} <= row.keys() for row in rows) and rows:
        value = {str(row["name"]): row["template"] for row in rows}
    texts = [value]
    if isinstance(value, dict) and "default" in value:
        texts = list(value.values())
    allowed = "text, or named texts with one called 'default'"
    valid = value is None or all(isinstance(text, str) for text in texts)
    require(valid, f"chat_template in {path.name} must be {allowed}, got {value!r:.200}")
    return settings


def _read_tokenizer(folder: Path, files: Sequence[Path], settings: dict[str, Any]) -> Any:
    """Returns transformers' tokenizer of a folder.

    The class that the folder names chooses among transformers' own; it is not imported.
    """
    import transformers  # takes seconds

    name, options = settings.get("tokenizer_class"), {"local_files_only": True}
    if len(files) > 1:
        known = DREAM_CLASS, *QWEN_CLASSES
        message = f"tokenizer_class {name!r} needs a tokenizer.json; {', '.join(known)} do not"
        require(name in known, message)
        return transformers.Qwen2Tokenizer.from_pretrained(str(folder), **options)
    if name == DREAM_CLASS:
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
    return transformers.AutoTokenizer.from_pretrained(
        str(folder),
        config=transformers.PreTrainedConfig(),  # the model's type decides nothing
        trust_remote_code=False,
        **options,
    )


def _added_tokens(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yields the added tokens that a folder's files list: file, text and id."""
    if (path := folder / "tokenizer.json").is_file():
        for row in json.loads(path.read_bytes())["added_tokens"]:
            yield path.name, row["content"], row["id"]
    for index, row in settings.get("added_tokens_decoder", {}).items():
        yield "tokenizer_config.json", row["content"], int(index)
    if (path := folder / "added_tokens.json").is_file():
        for text, index in json.loads(path.read_bytes()).items():
            yield path.name, text, index


def _digestible(backend: Any) -> bytes:
    """Returns the added tokens, ids and flags, as bytes that depend on nothing else."""
    names = ["content", "special", "lstrip", "rstrip", "single_word", "normalized"]
    rows = sorted(backend.get_added_tokens_decoder().items())
    content = [[index, *(getattr(token, name) for name in names)] for index, token in rows]
    return json.dumps(content).encode()
