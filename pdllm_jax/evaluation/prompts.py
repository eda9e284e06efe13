"""Long prompts as text: where the document lies in them, and how they become token ids.

The method needs a prompt in three parts: prefix, context and query. The dense baselines take all of
it and drop its middle where it is too long. Both forms are made here, so that every method of an
evaluation gets the same text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pdllm_jax.engine.engine import Request
from pdllm_jax.rules import ConfigError
from pdllm_jax.tokenizer import Tokenizer

# Limits of `split_by_rule`, in characters: the longest first paragraph that counts as an
# instruction, the shortest and the longest question, and how much joins a short question.
_LONGEST_INSTRUCTION = 1000
_SHORTEST_QUESTION, _LONGEST_JOINED, _LONGEST_QUESTION = 64, 500, 2000
_LONGEST_CUE = 24  # "Next line of code:" asks nothing
_MOST_PLACES = 8  # of a document in its prompt
_LONGEST_PREFIX = 4000  # more than this in front of a document are examples with documents

# What lm-eval's tasks call the document and the question of an example. Other fields may hold the
# document too, if they make up more than half of the prompt.
_DOCUMENTS = ("context", "document", "passage", "article", "story", "report", "transcript")
_QUESTIONS = ("question", "query", "input", "problem", "instruction", "prompt")

# RULER (arXiv 2404.06654) gives complete prompts. For each kind of task: how the text before the
# document ends, and how the text after it begins. --remove_newline_tab makes line ends blanks.
_RULER_MARKS = {
    "niah": (
        r"quiz you about the [^\n]*? afterwards\.\s",
        r"\sWhat (?:is|are all) the special magic ",
    ),
    "vt": (r"hidden in the following text\.\s+", r"\sQuestion: Find all variables "),
    "cwe": (r"Memorize the ones that appear most often\.\s", r"\sQuestion: What are the 10 most "),
    "fwe": (r"most frequently appeared coded words\.\s", r"\sQuestion: Do not provide any "),
    "qa": (r"are given documents\.\s+", r"(?:\n\n|\s)Answer the question based on the given "),
}


class SplitPrompt(NamedTuple):
    """A prompt's text in three parts; together, in this order, they are the prompt."""

    before: str
    context: str
    after: str


class PromptIds(NamedTuple):
    """A prompt's token ids in three parts, by the names of `Request`."""

    prefix: list[int]
    context: list[int]
    question: list[int]


def split_template(template: str, fields: Mapping[str, object]) -> SplitPrompt:
    """Fills in a template (`str.format`) and cuts it where its {context} is.

    Raises:
      ValueError: {context} does not occur once, or `fields` lacks a field.
    """
    parts = template.split("{context}")
    if len(parts) != 2:
        raise ValueError(f"the template has {len(parts) - 1} places {{context}}, one is needed")
    try:
        before, after = (part.format(**fields) for part in parts)
        return SplitPrompt(before, str(fields["context"]), after)
    except KeyError as error:
        raise ValueError(f"the template needs the field {error}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the template cannot be filled in: {error}") from None


def find_last(prompt: str, text: str) -> tuple[int, int] | None:
    """Returns where a text occurs last in a prompt, its blanks aside; None if it does not."""
    start = prompt.rfind(text)
    if start >= 0:
        return start, start + len(text)
    solid = "".join(text.split())
    start = "".join(prompt.split()).rfind(solid)
    if start < 0 or not solid:
        return None
    places = [i for i, letter in enumerate(prompt) if not letter.isspace()]
    return places[start], places[start + len(solid) - 1] + 1


def _asks(text: str) -> bool:
    """Whether a text is more than the beginning of an answer, like "Summary:"."""
    text = text.strip()
    return len(text) >= _LONGEST_CUE or any(mark in text for mark in "?？")


@dataclasses.dataclass(frozen=True)
class TaskPrompt:
    """A prompt of lm-eval, with what its task says about it.

    text: the prompt. turn: where the last user's text lies, all of it without a chat template.
    doc: the fields of the example. task: its name, for messages.
    """

    text: str
    turn: tuple[int, int]
    doc: Mapping[str, object]
    task: str

    def refusal(self, reason: str) -> ConfigError:
        """Returns the error that refuses the task for `method=prefilling`."""
        return ConfigError(
            f"task {self.task!r}: {reason}; name the field of its examples that is the document "
            "(document=FIELD), or take method=dual-cache"
        )

    def _is_large(self, text: str) -> bool:
        """Whether a text is more than half of the last user's."""
        return 2 * len(text) > self.turn[1] - self.turn[0]

    @functools.cached_property
    def _texts(self) -> dict[str, str]:
        """The fields that may be the document, those named so first, then by length."""
        texts = {k: v for k, v in self.doc.items() if isinstance(v, str) and v.strip()}
        large = [name for name in texts if self._is_large(texts[name])]
        large.sort(key=lambda name: len(texts[name]), reverse=True)
        return {name: texts[name] for name in (*_DOCUMENTS, *large) if name in texts}

    @functools.cached_property
    def _question(self) -> int | None:
        """Where the example's question begins at its last place; None where it is not known."""
        values = [self.doc.get(name) for name in _QUESTIONS]
        texts = [v for v in values if isinstance(v, str) and v.strip()]
        texts = [v for v in texts if len(v) <= _LONGEST_QUESTION and not self._is_large(v)]
        places = [find_last(self.text[: self.turn[1]], text) for text in texts]
        return max((place[0] for place in places if place is not None), default=None)

    def cut(
        self, field: str | None = None, *, fields_only: bool = False
    ) -> tuple[SplitPrompt | None, str]:
        """Cuts the prompt by the first of `split`, `split_ruler` and `split_by_rule` that can.

        Args:
          field: as of `split`.
          fields_only: tries `split` alone.

        Returns:
          The parts, None where there is no document; and which way was taken: "context", "ruler",
          "rule", or "whole" for none.

        Raises:
          ConfigError: as `split` and `split_by_rule`.
        """
        if split := self.split(field):
            return split, "context"
        if fields_only:
            return None, "whole"
        if split := self.split_ruler():
            return split, "ruler"
        split = self.split_by_rule()
        return split, "whole" if split is None else "rule"

    def split(self, field: str | None = None) -> SplitPrompt | None:
        """Cuts the prompt at the field that is its document; None where no field is.

        The question must follow: the example's own, or else a text that asks. Of a document that
        occurs several times (examples in front) the last such place counts.

        Args:
          field: the document's, whose place is not checked; by default it is looked for.

        Raises:
          ConfigError: the prompt has no such field, or nothing follows it.
        """
        if field is not None:
            text = self.doc.get(field)
            place = find_last(self.text, text) if isinstance(text, str) else None
            if place is None or not self.text[place[1] :].strip():
                raise self.refusal(f"no document {field!r} with a text behind it is in its prompt")
            return self._around(*place)
        for name, text in self._texts.items():
            for place in self._places(text):
                if self._is_asked(*place, named=name in _DOCUMENTS):
                    return self._around(*place)
        return None

    def _places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where a text occurs, the last place first; an earlier turn's if the last has none."""
        place, begin = find_last(self.text, text), 0
        for _ in range(_MOST_PLACES):
            if place is None or place[0] < begin:
                return
            yield place
            begin = self.turn[0]
            place = find_last(self.text[: place[1] - 1], text)

    def _is_asked(self, start: int, stop: int, *, named: bool) -> bool:
        """Whether a question follows the document in text[start:stop]."""
        if self._question is not None:
            return self._question >= stop
        after = self.text[max(stop, self.turn[0]) : self.turn[1]].strip()
        for name, value in self.doc.items():  # how the response begins
            if "prefix" in name and isinstance(value, str):
                after = after.removesuffix(value.strip()).strip()
        introduced = named and bool(self.text[self.turn[0] : start].strip())
        return bool(after) and (introduced or _asks(after))

    def _around(self, start: int, stop: int) -> SplitPrompt:
        """The prompt cut around its document, which long examples in front of it join."""
        first, turn = self.turn[0], self.text[self.turn[0] : start]
        if len(turn) > max(_LONGEST_PREFIX, (stop - start) // 2):
            head, ending, _ = turn.partition("\n\n")
            start = first + (len(head + ending) if len(head) <= _LONGEST_INSTRUCTION else 0)
        return SplitPrompt(self.text[:start], self.text[start:stop], self.text[stop:])

    def split_ruler(self) -> SplitPrompt | None:
        """Cuts the last user's text by `split_ruler`."""
        start, stop = self.turn
        split = split_ruler(self.task, self.text[start:stop])
        if split is None:
            return None
        before, context, after = split
        return SplitPrompt(self.text[:start] + before, context, after + self.text[stop:])

    def split_by_rule(self) -> SplitPrompt | None:
        """Cuts the last user's text by `split_by_rule`, with the example's question in the query.

        Raises:
          ConfigError: the question is in front of the document, or too far from the end.
        """
        start, stop = self.turn
        for name, text in self._texts.items():
            large = name in _DOCUMENTS and self._is_large(text)
            if large and find_last(self.text, text) is not None:
                raise self.refusal(f"no question follows its document {name!r} in the prompt")
        split = split_by_rule(self.text[start:stop])
        if split is None:
            return None
        begins, after = start + len(split.before), stop - len(split.after)
        if self._question is not None and self._question < after:
            line = self.text.rfind("\n", start, self._question)
            after = self._question if line < 0 else line
            if after <= begins or stop - after > _LONGEST_QUESTION:
                raise self.refusal("its question is not behind the document")
        return SplitPrompt(self.text[:begins], self.text[begins:after], self.text[after:])


def split_ruler(task: str, prompt: str) -> SplitPrompt | None:
    """Cuts a RULER prompt where its template has {context}; None for another template.

    task: "niah_single_1", "vt", "qa_2" and the like. An example in front (vt, cwe) is a part of the
    context.
    """
    name = task.lower().removeprefix("ruler_")
    for kind, (head, tail) in _RULER_MARKS.items():
        if name.startswith(kind):
            first = re.search(head, prompt)
            last = max(re.finditer(tail, prompt), key=re.Match.start, default=None)
            if first and last and first.end() < last.start():
                start, end = first.end(), last.start()
                return SplitPrompt(prompt[:start], prompt[start:end], prompt[end:])
    return None


def split_by_rule(prompt: str) -> SplitPrompt | None:
    """Cuts a prompt of an unknown template by its paragraphs; None if no document is left.

    A paragraph ends with a blank line; in a prompt without one, with the line. A first paragraph of
    at most 1,000 characters is the prefix. The last paragraph is the query. A query of less than 64
    characters takes the paragraphs before it along, up to 500 characters in all; one that asks
    nothing ("Answer:") takes lines, then characters. A query of more than 2,000 is cut by lines,
    then by characters.
    """
    separator = "\n\n" if "\n\n" in prompt else "\n"
    first, ending, _ = prompt.partition(separator)
    head = first + ending if ending and len(first) <= _LONGEST_INSTRUCTION else ""
    rest = prompt[len(head) :]
    after = _last_parts(rest, separator)
    if not _asks(after):
        after = max(after, _last_parts(rest, "\n"), key=len)
    if not _asks(after):
        after = rest[-_LONGEST_JOINED:]
    if len(after) > _LONGEST_QUESTION:
        after = _last_parts(rest, "\n")[-_LONGEST_QUESTION:]
    context = rest[: len(rest) - len(after)]
    return SplitPrompt(head, context, after) if context.strip() else None


def _last_parts(text: str, separator: str) -> str:
    """The last part of a text that is not blank, with the parts before it that it takes along."""
    start = len(text)
    while start > 0:
        earlier = max(text.rfind(separator, 0, start), 0)
        if text[start:].strip() and len(text) - earlier > _LONGEST_JOINED:
            break
        start = earlier
        if len(text[start:].strip()) >= _SHORTEST_QUESTION:
            break
    return text[start:]


def truncate_middle(ids: Sequence[int], max_length: int) -> list[int]:
    """The first and the last max_length // 2 of too many tokens, as LongBench does."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    half = max_length // 2
    return list(ids) if len(ids) <= max_length else [*ids[:half], *ids[-half:]]


def truncate_text(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[str, bool]:
    """Returns a text of at most `max_length` tokens, and whether its middle was dropped."""
    ids = tokenizer.encode(text)
    kept = truncate_middle(ids, max_length)
    if len(kept) == len(ids):
        return text, False
    halves = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    return "".join(map(tokenizer.backend.decode, halves)), True


def dense_prompt(
    tokenizer: Tokenizer, prompt: str, max_length: int, *, chat: bool = True, response: str = ""
) -> tuple[list[int], bool]:
    """Returns a dense baseline's token ids of a prompt, and whether its middle was dropped.

    LongBench's order: tokenise the prompt, keep the first and last half of `max_length` if it is
    longer, decode, and only then apply the chat template, which is not counted. chat and response:
    see `Tokenizer.encode_prompt`.
    """
    prompt, cut = truncate_text(tokenizer, prompt, max_length)
    return tokenizer.encode_message(prompt, chat=chat, response=response), cut


def split_request(
    tokenizer: Tokenizer, prompt: SplitPrompt, *, chat: bool = True, response: str = ""
) -> Request:
    """Returns the method's token ids of a prompt, each part encoded by itself."""
    prefix, context, query = tokenizer.encode_prompt(*prompt, chat=chat, response=response)
    return Request(context, query, prefix=prefix)


def fitting_block(gen_length: int, most: int) -> int:
    """Returns the longest block of at most `most` tokens that divides a response."""
    return next(n for n in range(min(most, gen_length), 0, -1) if gen_length % n == 0)
