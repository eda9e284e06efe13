"""Long prompts as text: where the document lies in them, and how they become token ids.

The method needs a prompt in three parts: prefix, context and query. The dense baselines take all of
it and drop its middle where it is too long. Both forms are made here, so that every method of an
evaluation gets the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pdllm_jax.engine.engine import Request
from pdllm_jax.tokenizer import Tokenizer

# Limits of `split_by_rule`, in characters: the longest first paragraph that counts as an
# instruction, the shortest and the longest question, and how much joins a short question.
_LONGEST_INSTRUCTION = 1000
_SHORTEST_QUESTION, _LONGEST_JOINED, _LONGEST_QUESTION = 64, 500, 2000

# RULER (arXiv 2404.06654) gives complete prompts. For each kind of task: how the text before the
# document ends, and how the text after it begins.
_RULER_MARKS = {
    "niah": (
        r"quiz you about the [^\n]*? afterwards\.\n",
        r"\nWhat (?:is|are all) the special magic ",
    ),
    "vt": (r"hidden in the following text\.\s+", r"\nQuestion: Find all variables "),
    "cwe": (r"Memorize the ones that appear most often\.\n", r"\nQuestion: What are the 10 most "),
    "fwe": (r"most frequently appeared coded words\.\s", r"\nQuestion: Do not provide any "),
    "qa": (r"are given documents\.\n\n", r"\n\nAnswer the question based on the given "),
}


class SplitPrompt(NamedTuple):
    """A prompt's text in three parts; together, in this order, they are the prompt."""

    before: str
    context: str
    after: str


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
    except (IndexError, ValueError) as error:
        raise ValueError(f"the template cannot be filled in: {error}") from None


def split_at_context(prompt: str, context: str) -> SplitPrompt | None:
    """Cuts a prompt around its document; None unless the document occurs in it exactly once."""
    if not context or prompt.count(context) != 1:
        return None
    before, _, after = prompt.partition(context)
    return SplitPrompt(before, context, after)


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
    characters takes the paragraphs before it along, up to 500 characters in all. A query of more
    than 2,000 is cut by lines, then by characters.
    """
    separator = "\n\n" if "\n\n" in prompt else "\n"
    first, ending, _ = prompt.partition(separator)
    head = first + ending if ending and len(first) <= _LONGEST_INSTRUCTION else ""
    rest = prompt[len(head) :]
    after = _last_parts(rest, separator)
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


def dense_prompt(
    tokenizer: Tokenizer, prompt: str, max_length: int, *, chat: bool = True, response: str = ""
) -> tuple[list[int], bool]:
    """Returns a dense baseline's token ids of a prompt, and whether its middle was dropped.

    LongBench's order: tokenise the prompt, keep the first and last half of `max_length` if it is
    longer, decode, and only then apply the chat template, which is not counted. chat and response:
    see `Tokenizer.encode_prompt`.
    """
    ids = tokenizer.encode(prompt)
    kept = truncate_middle(ids, max_length)
    cut, half = len(kept) < len(ids), len(kept) // 2
    if cut:
        prompt = "".join(map(tokenizer.backend.decode, (kept[:half], kept[half:])))
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
