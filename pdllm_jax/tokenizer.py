"""Text to token ids and back, and the prompt around a document.

`transformers.AutoTokenizer` reads the checkpoint's files; nothing in the folder is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdllm_jax.downloads import clean_tokenizer
from pdllm_jax.network.config import ModelConfig

if TYPE_CHECKING:
    import tokenizers

INSTRUCTION = "Read the document and answer the question about it."
# LLaDA's special tokens and chat template, for checkpoints that come without a template.
BOS, MASK = "<|startoftext|>", "<|mdm_mask|>"
LLADA_TEMPLATE = (
    "{% for message in messages %}{{ ('<|startoftext|>' if loop.first else '')"
    " + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_PLACE = "PLACE-OF-THE-MESSAGE"  # stands for the user's text while the template is rendered
Ids = list[int]


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or lacks a token that the method needs."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TokenizerError(message)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
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


def _check_template(path: Path) -> None:
    """Raises TokenizerError for a chat template that the library cannot read, with the reason."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _require(isinstance(settings, dict), f"{path.name} must hold an object")
    value = settings.get("chat_template")
    rows = value if isinstance(value, list) else []
    if all(isinstance(row, dict) and {"name", "template"} <= row.keys() for row in rows) and rows:
        value = {str(row["name"]): row["template"] for row in rows}
    texts = [value]
    if isinstance(value, dict) and "default" in value:
        texts = list(value.values())
    allowed = "text, or named texts with one called 'default'"
    valid = value is None or all(isinstance(text, str) for text in texts)
    _require(valid, f"chat_template in {path.name} must be {allowed}, got {value!r:.200}")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    All methods raise TokenizerError where the library cannot do what they ask.

    template: text of the chat template (before, after) a user's message; None for a base model.
    digest: SHA-256 of tokenizer.json, hexadecimal.
    renderer: the transformers tokenizer; backend: the tokenizers library's.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    mask_id: int
    eos_id: int
    template: tuple[str, str] | None
    digest: str = ""
    renderer: Any = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig) -> Tokenizer:
        """Reads the tokenizer and chat template of a checkpoint.

        Raises:
          TokenizerError: no readable tokenizer.json; a template without the user's message; no BOS
            or mask token; ids that disagree with the model's config.
        """
        path = Path(folder) / "tokenizer.json"
        _require(path.is_file(), f"{path.name} is missing from the checkpoint: text needs it")
        with _refusing("the tokenizer cannot be read"), clean_tokenizer(Path(folder)) as clean:
            import transformers  # takes seconds

            content = (clean / path.name).read_bytes()
            _check_template(clean / "tokenizer_config.json")
            loaded: Any = transformers.AutoTokenizer.from_pretrained(
                str(clean),
                config=transformers.PreTrainedConfig(),  # the model's type decides nothing
                local_files_only=True,
                trust_remote_code=False,
            )
            backend: tokenizers.Tokenizer = loaded.backend_tokenizer
            for row in json.loads(content)["added_tokens"]:
                token, index = row["content"], backend.token_to_id(row["content"])
                # The library numbers added tokens anew where their ids have gaps.
                wrong = f"token {token!r} has the id {row['id']} in tokenizer.json but is read as "
                _require(index == row["id"], f"{wrong}{index}: ids have gaps or are out of order")
            names = loaded.bos_token or BOS, loaded.mask_token or MASK
            bos, mask = map(backend.token_to_id, names)
            wanted, size = config.mask_token_id, backend.get_vocab_size()
            if mask is None and "mask" in (backend.id_to_token(wanted) or "").lower():
                mask = wanted
        if bos is None:
            raise TokenizerError(f"the tokenizer has no BOS token ({names[0]})")
        _require(mask is not None, f"the tokenizer has no mask token ({names[1]})")
        _require(mask == wanted, f"mask token: {mask} in the tokenizer, {wanted} in config.json")
        rows = config.embedding_size
        _require(size <= rows, f"the tokenizer has {size} tokens, the model's embedding {rows}")
        # Special tokens that are spelt out in a document stay text, the mask token in any
        # checkpoint: it would be a slot to fill. All of a document is read.
        backend.add_special_tokens([backend.id_to_token(wanted)])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        eos = config.eos_token_id if loaded.eos_token is None else loaded.eos_token_id
        digest = hashlib.sha256(content).hexdigest()
        return cls(backend, bos, wanted, eos, _template(loaded, backend), digest, loaded)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches a special token in text."""
        added = self.backend.get_added_tokens_decoder().values()
        names = sorted((t.content for t in added if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of end of text and, with a template, of the token that ends a user's turn."""
        end = None if self.template is None else self._special.search(self.template[1])
        return (self.eos_id, *([] if end is None else self.encode_marked(end.group())))

    @_refusing("the tokenizer cannot encode the text")
    def encode(self, text: str) -> Ids:
        """Returns the ids of plain text, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str, plain: tuple[int, int] = (0, 0)) -> Ids:
        """Returns the ids of a filled-in template, in which special tokens count as such.

        plain: where the user's text lies in it, in which they do not.
        """
        vocabulary: Any = self.backend
        ids, end = list[int](), 0
        for token in self._special.finditer(text):
            if plain[0] <= token.start() < plain[1]:
                continue
            ids += [*self.encode(text[end : token.start()]), vocabulary.token_to_id(token.group())]
            end = token.end()
        return ids + self.encode(text[end:])

    @_refusing("the tokenizer cannot decode the tokens")
    def decode(self, ids: Ids) -> str:
        """Returns the text up to the first of `stop_ids`, special tokens left out."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.backend.decode([int(i) for i in ids[:end]], skip_special_tokens=True)

    def prefix(self, instruction: str = INSTRUCTION) -> Ids:
        """Returns the ids before a document: the template's beginning and an instruction."""
        return self.around(f"{instruction}\n\n", "")[0]

    def query(self, question: str) -> Ids:
        """Returns the ids after a document: a question and the template's end."""
        return self.around("", f"\n\n{question}" if self.template else f"\n\n{question}\n")[1]

    def around_document(self, question: str, instruction: str = INSTRUCTION) -> tuple[Ids, Ids]:
        """Returns `prefix` and `query`."""
        return self.prefix(instruction), self.query(question)

    def around(
        self, before: str, after: str, *, chat: bool = True, response: str = ""
    ) -> tuple[Ids, Ids]:
        """Returns (prefix ids, query ids) of any text before and after a document.

        Args:
          chat: all three are a user's turn in the chat template; without a template, or with False,
            BOS comes first and nothing else is added.
          response: how the response begins.
        """
        if self.template is None or not chat:
            return [self.bos_id, *self.encode(before)], self.encode(after + response)
        head, tail = self.template
        # Text of the template next to the user's is tokenized together with it.
        start = max((token.end() for token in self._special.finditer(head)), default=0)
        spans = [token.span() for token in self._special.finditer(tail)]
        first, last = (spans[0][0], spans[-1][1]) if spans else (len(tail), len(tail))
        prefix = self.encode_marked(head[:start]) + self.encode(head[start:] + before)
        query = self.encode(after + tail[:first]) + self.encode_marked(tail[first:last])
        return prefix, query + self.encode(tail[last:] + response)


@_refusing("the chat template cannot be used")
def _template(loaded: Any, backend: tokenizers.Tokenizer) -> tuple[str, str] | None:
    """The chat template's text around a user's message; LLaDA's where its tokens exist."""
    if loaded.chat_template is None:
        if None in map(backend.token_to_id, re.findall(r"<\|\w+\|>", LLADA_TEMPLATE)):
            return None
        loaded.chat_template = LLADA_TEMPLATE
    message = [{"role": "user", "content": _PLACE}]
    text = loaded.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, *after = text.split(_PLACE)
    once = f"the chat template has the user's message {len(after)} times, not once"
    _require(len(after) == 1, once)
    return before, after[0]
