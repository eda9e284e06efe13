"""Text to token ids and back, and the prompt around a document.

Reads tokenizer.json with the `tokenizers` library: data only, nothing from the folder is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from pdllm_jax.network.config import ModelConfig

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, END_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

INSTRUCTION = "Read the document and answer the question about it."


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or lacks a token that the method needs."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the ids of LLaDA's special tokens.

    chat: (start_header, end_header, end_of_turn) ids, or None for a base model without them.
    digest: SHA-256 of tokenizer.json, hexadecimal.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    mask_id: int
    eos_id: int
    chat: tuple[int, int, int] | None
    digest: str = ""

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig) -> Tokenizer:
        """Reads tokenizer.json (and tokenizer_config.json) of a checkpoint.

        Raises:
          TokenizerError: no readable tokenizer.json; no BOS or mask token; ids that disagree with
            the model's config.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path.name} is missing from the checkpoint: text needs it")
        with _refusing(f"{path.name} cannot be read"):
            content = path.read_bytes()
            backend = tokenizers.Tokenizer.from_buffer(content)
            _check_ids(backend, json.loads(content))
        named = _named_tokens(Path(folder) / "tokenizer_config.json")

        def find(role: str, default: str) -> int | None:
            return backend.token_to_id(named.get(role) or default)

        bos, mask, eos = find("bos_token", BOS), find("mask_token", MASK), find("eos_token", EOS)
        if bos is None:
            raise TokenizerError(
                f"the tokenizer has no BOS token ({named.get('bos_token') or BOS})"
            )
        if mask is None and "mask" in (backend.id_to_token(config.mask_token_id) or "").lower():
            mask = config.mask_token_id  # under a name of its own
        if mask is None:
            raise TokenizerError(
                f"the tokenizer has no mask token ({named.get('mask_token') or MASK})"
            )
        if mask != config.mask_token_id:
            raise TokenizerError(
                f"mask token: {mask} in the tokenizer, {config.mask_token_id} in config.json"
            )
        if backend.get_vocab_size() > config.embedding_size:
            raise TokenizerError(
                f"the tokenizer has {backend.get_vocab_size()} tokens, the model's embedding "
                f"{config.embedding_size}"
            )
        chat = [backend.token_to_id(name) for name in (START_HEADER, END_HEADER, END_TURN)]
        # Text is data: special tokens spelt out in a document stay ordinary text.
        backend.encode_special_tokens = True
        # All of it is read, and nothing is added, whatever lengths the file was last saved with.
        backend.no_truncation()
        backend.no_padding()
        return cls(
            backend=backend,
            bos_id=bos,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id if eos is None else eos,
            chat=None if None in chat else tuple(chat),  # type: ignore[arg-type]
            digest=hashlib.sha256(content).hexdigest(),
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End of text and, where there is one, end of turn."""
        return (self.eos_id, *(self.chat[2:] if self.chat else ()))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added. TokenizerError where the tokenizer breaks on it."""
        with _refusing("the tokenizer cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text up to the end of turn or of text, special tokens left out."""
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        with _refusing("the tokenizer cannot decode the tokens"):
            return self.backend.decode([int(i) for i in ids[:stop]], skip_special_tokens=True)

    def around_document(
        self, question: str, instruction: str = INSTRUCTION
    ) -> tuple[list[int], list[int]]:
        """(prefix ids, query ids): what comes before and after the document.

        LLaDA's chat template where its tokens exist: BOS, user header, instruction | document |
        question, end of turn, assistant header. Else BOS, instruction | document | question.
        """
        if self.chat is None:
            return self.around(f"{instruction}\n\n", f"\n\n{question}\n")
        return self.around(f"{instruction}\n\n", f"\n\n{question}")

    def around(
        self, before: str, after: str, *, chat: bool = True, response: str = ""
    ) -> tuple[list[int], list[int]]:
        """(prefix ids, query ids) of any text before and after a document, taken as it is.

        chat: one user's turn in LLaDA's chat template, where its tokens exist; else BOS comes
          first and nothing else is added.
        response: how the response begins, behind the assistant's header.
        """
        if self.chat is None or not chat:
            return [self.bos_id, *self.encode(before)], self.encode(after + response)
        start, end, end_of_turn = self.chat

        def header(role: str) -> list[int]:
            return [start, *self.encode(role), end]

        prefix = [self.bos_id, *header("user"), *self.encode(f"\n\n{before}")]
        query = [*self.encode(after), end_of_turn, *header("assistant")]
        return prefix, query + self.encode(f"\n\n{response}")


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns whatever the library raises into a TokenizerError of one line.

    It raises bare Exception, and where its own code panics a PanicException, which is none.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {' '.join(str(error).split())}") from None


def _check_ids(backend: tokenizers.Tokenizer, raw: Any) -> None:
    """The library numbers added tokens itself, whatever ids the file gives them."""
    for row in raw["added_tokens"]:
        found = backend.token_to_id(row["content"])
        if found != row["id"]:
            raise TokenizerError(
                f"token {row['content']!r} has the id {row['id']} in tokenizer.json but is read as "
                f"{found}: ids have gaps or are out of order"
            )


def _named_tokens(path: Path) -> dict[str, str]:
    """Special tokens by role from tokenizer_config.json, where it exists."""
    if not path.is_file():
        return {}
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: too many digits, too
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path.name} must hold an object")
    named = {}
    for role in ("bos_token", "eos_token", "mask_token"):
        value = raw.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise TokenizerError(f"{path.name}: {role} is no text: {value!r}")
            named[role] = value
    return named
