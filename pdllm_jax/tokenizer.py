"""Text to token ids and back, and the prompt around a document."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.vocabulary import TokenizerError, Vocabulary, refusing, require

if TYPE_CHECKING:
    import tokenizers

INSTRUCTION = "Read the document and answer the question about it."
# LLaDA's and Dream's special tokens, for checkpoints that do not say which token is which.
BOS, MASK = ("<|startoftext|>", "<|beginoftext|>"), ("<|mdm_mask|>", "<|mask|>")
# Their chat templates, for checkpoints that have the template's tokens but no template.
LLADA_TEMPLATE = (
    "{% for message in messages %}{{ ('<|startoftext|>' if loop.first else '')"
    " + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stand for the user's and the system's text while the template is rendered.
_PLACE, _SYSTEM = "Place-of-the-MESSAGE", "Place-of-the-SYSTEM-TEXT"
Ids = list[int]
Piece = tuple[str, bool]  # text, and whether special tokens in it count as such


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    All methods raise TokenizerError where the library cannot do what they ask.

    template: text of the chat template (before, after) a user's message; None for a base model.
    digest: SHA-256 of the files that say how text is tokenized, hexadecimal.
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

        The vocabulary is that of tokenizer.json; without it, of vocab.json and merges.txt as Dream
        is published. BOS and EOS are the tokenizer's, also where config.json has other ids.

        Raises:
          TokenizerError: no readable tokenizer; a template without the user's message; no BOS or
            mask token; ids that disagree with the model's config.
        """
        vocabulary = Vocabulary.load(Path(folder))
        loaded, backend = vocabulary.loaded, vocabulary.backend
        wanted, size, rows = config.mask_token_id, backend.get_vocab_size(), config.embedding_size
        names = (loaded.bos_token,) if loaded.bos_token else BOS
        if (bos := vocabulary.find(names)) is None:
            raise TokenizerError(f"the tokenizer has no BOS token ({' or '.join(names)})")
        names = (loaded.mask_token,) if loaded.mask_token else MASK
        mask = vocabulary.find(names)
        if mask is None and "mask" in (backend.id_to_token(wanted) or "").lower():
            mask = wanted
        require(mask is not None, f"the tokenizer has no mask token ({' or '.join(names)})")
        require(mask == wanted, f"mask token: {mask} in the tokenizer, {wanted} in config.json")
        require(size <= rows, f"the tokenizer has {size} tokens, the model's embedding {rows}")
        # Special tokens that are spelt out in a document stay text, the mask token in any
        # checkpoint: it would be a slot to fill. All of a document is read.
        backend.add_special_tokens([backend.id_to_token(wanted)])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        eos = vocabulary.find((loaded.eos_token,) if loaded.eos_token else ())
        eos = config.eos_token_id if eos is None else eos
        template = _template(loaded, backend)
        return cls(backend, bos, wanted, eos, template, vocabulary.digest, loaded)

    @functools.cached_property
    def _added(self) -> dict[str, tokenizers.AddedToken]:
        """The special tokens by their text."""
        added = self.backend.get_added_tokens_decoder().values()
        return {token.content: token for token in added if token.special}

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches a special token in text."""
        names = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @functools.cached_property
    def eot_id(self) -> int | None:
        """Id of the token that ends a user's turn; None without a template that has one."""
        end = None if self.template is None else self._special.search(self.template[1])
        return None if end is None else self.encode_marked(end.group())[0]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of end of text, of `eot_id`, and of padding where that is another token.

        DiffuCoder fills the rest of a response with padding.
        """
        pad = self._special.fullmatch(getattr(self.renderer, "pad_token", None) or "")
        ids = self.eos_id, self.eot_id, *(self.encode_marked(pad.group()) if pad else ())
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @refusing("the tokenizer cannot encode the text")
    def encode(self, text: str) -> Ids:
        """Returns the ids of plain text, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str, plain: tuple[int, int] = (0, 0)) -> Ids:
        """Returns the ids of a filled-in template, in which special tokens count as such.

        plain: where the user's text lies in it, in which they do not.
        """
        first, last = plain
        return self._encode_pieces(
            (text[:first], True), (text[first:last], False), (text[last:], True)
        )

    def _encode_pieces(self, *pieces: Piece) -> Ids:
        """Returns the ids of the joined text; pieces next to each other are tokenized together."""
        vocabulary: Any = self.backend
        text, ids, end = "".join(piece for piece, _ in pieces), list[int](), 0
        ends = [0, *itertools.accumulate(len(piece) for piece, _ in pieces)]
        spans = [span for span, (_, marked) in zip(pairwise(ends), pieces, strict=True) if marked]
        for token in self._special.finditer(text):
            if any(start <= token.start() and token.end() <= stop for start, stop in spans):
                added, plain = self._added[token.group()], text[end : token.start()]
                ids += self.encode(plain.rstrip() if added.lstrip else plain)
                ids.append(vocabulary.token_to_id(added.content))
                end = token.end()
                if added.rstrip:
                    end = len(text) - len(text[end:].lstrip())
        return ids + self.encode(text[end:])

    @refusing("the tokenizer cannot decode the tokens")
    def decode(self, ids: Ids) -> str:
        """Returns the text up to the first of `stop_ids`, special tokens left out."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.backend.decode([int(i) for i in ids[:end]], skip_special_tokens=True)

    def encode_prompt(
        self,
        before: str,
        document: str,
        after: str,
        *,
        chat: bool = True,
        system: str = "",
        response: str = "",
    ) -> tuple[Ids, Ids, Ids]:
        """Returns the ids of a prompt in three parts: prefix, document and query.

        Together they are the text that the chat template makes of `before + document + after`, with
        blanks trimmed where it trims them. Each part is tokenized by itself, so that no token lies
        in two of them. Special tokens count as such in the template's own text alone.

        Args:
          chat: the text is a user's turn in the chat template; without a template, or with False,
            BOS comes first and nothing else is added.
          system: text of a system turn before it, for a template that takes one.
          response: how the response begins.
        """
        if self.template is None or not chat:
            require(not system.strip(), "system text needs a chat template")
            ids, query = self.encode(document), self.encode(after + response)
            return [self.bos_id, *self.encode(before)], ids, query
        head, document, tail = self._fill(before, document, after, system)
        query = self._encode_pieces(*tail, (response, False))
        return self._encode_pieces(*head), self.encode(document), query

    def encode_message(
        self, text: str, *, chat: bool = True, system: str = "", response: str = ""
    ) -> Ids:
        """Returns the ids of a prompt tokenized in one part; arguments as of `encode_prompt`."""
        if self.template is None or not chat:
            return self.encode_prompt(text + response, "", "", chat=False, system=system)[0]
        head, _, tail = self._fill(text, "", "", system)
        return self._encode_pieces(*head, *tail, (response, False))

    @refusing("the chat template cannot be used")
    def _fill(
        self, before: str, document: str, after: str, system: str
    ) -> tuple[list[Piece], str, list[Piece]]:
        """The filled-in template in three parts: before, inside and after the document."""
        content, system = before + document + after, system.strip() and system

        def pieces(text: str) -> list[Piece]:
            first, place, last = text.partition(_SYSTEM)
            return [(first, True), (system.strip() if place else "", False), (last, True)]

        if not (core := content.strip()):  # no place where the text would be cut
            return pieces("".join(_render(self.renderer, content, system))), "", []
        blanks = content.split(core)
        bare = _render(self.renderer, _PLACE, system)
        head, tail = _render(self.renderer, _PLACE.join(blanks), system) if any(blanks) else bare
        kept = head.removeprefix(bare[0]), tail.removesuffix(bare[1])
        start = len(blanks[0]) - len(kept[0])
        stop = len(content) - len(blanks[1]) + len(kept[1])
        trimmed = blanks[0].endswith(kept[0]) and blanks[1].startswith(kept[1])
        require(trimmed, "the chat template changes more of a message than the blanks at its ends")
        ends = 0, len(before), len(before) + len(document), len(content)
        before, document, after = (content[max(a, start) : min(b, stop)] for a, b in pairwise(ends))
        return [*pieces(bare[0]), (before, False)], document, [(after, False), *pieces(bare[1])]

    def around(self, before: str, after: str, **turn: Any) -> tuple[Ids, Ids]:
        """Returns prefix and query around a document without blanks at its ends."""
        prefix, _, query = self.encode_prompt(before, _PLACE, after, **turn)
        return prefix, query

    def encode_document(
        self, document: str, instruction: str = INSTRUCTION, **turn: Any
    ) -> tuple[Ids, Ids]:
        """Returns the ids before a document and its own; `turn` as of `encode_prompt`."""
        return self.encode_prompt(f"{instruction}\n\n", document, _PLACE, **turn)[:2]

    def prefix(self, instruction: str = INSTRUCTION, **turn: Any) -> Ids:
        """Returns the ids before a document: the template's beginning and an instruction."""
        return self.encode_document(_PLACE, instruction, **turn)[0]

    def after_document(self, question: str, *, chat: bool = True) -> str:
        """Returns the text behind a document; without a template the question ends its line."""
        return f"\n\n{question}" if self.template and chat else f"\n\n{question}\n"

    def query(self, question: str, *, chat: bool = True, **turn: Any) -> Ids:
        """Returns the ids after a document: a question and the template's end."""
        return self.around("", self.after_document(question, chat=chat), chat=chat, **turn)[1]

    def around_document(
        self, question: str, instruction: str = INSTRUCTION, **turn: Any
    ) -> tuple[Ids, Ids]:
        """Returns `prefix` and `query`."""
        return self.prefix(instruction, **turn), self.query(question, **turn)


def _render(renderer: Any, content: str, system: str = "") -> tuple[str, str]:
    """The chat template's text before and after the place in a user's message, if it has one."""
    messages = [{"role": "user", "content": content}]
    if system:  # blanks at its ends are the template's to trim
        messages.insert(0, {"role": "system", "content": system.replace(system.strip(), _SYSTEM)})
    text = renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for name, place, wanted in (
        ("user's message", _PLACE, _PLACE in content),
        ("system text", _SYSTEM, bool(system)),
    ):
        count = text.count(place)
        require(count == wanted, f"the chat template has the {name} {count} times, not once")
    before, _, after = text.partition(_PLACE)
    return before, after


@refusing("the chat template cannot be used")
def _template(loaded: Any, backend: tokenizers.Tokenizer) -> tuple[str, str] | None:
    """The chat template's text around a user's message; LLaDA's or ChatML if its tokens exist."""
    for template in (LLADA_TEMPLATE, CHATML_TEMPLATE):
        tokens = re.findall(r"<\|\w+\|>", template)
        if loaded.chat_template is None and None not in map(backend.token_to_id, tokens):
            loaded.chat_template = template
    return None if loaded.chat_template is None else _render(loaded, _PLACE)
