"""Long prompts as text: where the document lies in them, and how they become token ids.

The method needs a prompt in three parts, prefix, context and query; the dense baselines take it
whole and drop its middle where it is too long. Both are made here, so that whoever evaluates them
gives all methods the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pdllm_jax.engine.engine import Request
from pdllm_jax.tokenizer import Tokenizer

# Of `split_by_rule`, in characters: the longest first paragraph that is taken for an instruction,
# and how much is taken for the question.
_LONGEST_INSTRUCTION = 1000
_SHORTEST_QUESTION, _LONGEST_TAKEN_ALONG, _LONGEST_QUESTION = 64, 500, 2000

# RULER (arXiv 2404.06654) hands out whole prompts. For each kind of task: how the text before the
# document ends, and how the text after it begins.
_RULER_MARKS: Mapping[str, tuple[str, str]] = {
    "niah": (
        r"quiz you about the [^\n]*? afterwards\.\n",
        r"\nWhat (?:is|are all) the special magic ",
    ),
    "vt": (r"hidden in the following text\.\s+", r"\nQuestion: Find all variables "),
    "cwe": (r"Memorize the ones that appear most often\.\n", r"\nQuestion: What are the 10 most "),
    "fwe": (r"most frequently appeared coded words\.\s", r"\nQuestion: Do not provide any "),
    "qa": (
        r"The following are given documents\.\n\n",
        r"\n\nAnswer the question based on the given ",
    ),
}


class SplitPrompt(NamedTuple):
    """A prompt's text in three parts; together, in this order, they are the prompt."""

    before: str
    context: str
    after: str


def split_template(template: str, fields: Mapping[str, object]) -> SplitPrompt:
    """A template (`str.format`) filled in, cut where its {context} was.

    Raises:
      ValueError: no {context} or several, or a field that `fields` lacks.
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
    """A filled-in prompt cut around the document it was made from; None unless it is there once."""
    if not context or prompt.count(context) != 1:
        return None
    before, _, after = prompt.partition(context)
    return SplitPrompt(before, context, after)


def split_ruler(task: str, prompt: str) -> SplitPrompt | None:
    """A RULER prompt cut where its template has {context}; None where the text is another.

    task: "niah_single_1", "vt", "qa_2" and so on. With an example in front (vt, cwe) that example
    is a part of the context.
    """
    name = task.lower().removeprefix("ruler_")
    kind = next((kind for kind in _RULER_MARKS if name.startswith(kind)), None)
    if kind is None:
        return None
    head, tail = _RULER_MARKS[kind]
    first = re.search(head, prompt)
    last = None
    for last in re.finditer(tail, prompt):  # noqa: B007 (the last one is wanted)
        pass
    if first is None or last is None or first.end() >= last.start():
        return None
    return SplitPrompt(
        prompt[: first.end()], prompt[first.end() : last.start()], prompt[last.start() :]
    )


def split_by_rule(prompt: str) -> SplitPrompt | None:
    """A prompt whose template is not known, cut by its paragraphs; None if no document is left.

    Paragraphs end with a blank line; where there is none, with the line. The first paragraph is
    the prefix if it has at most 1,000 characters, or there is no prefix. The query is the last
    paragraph, and where it has less than 64 characters, those before it until there are as many,
    as long as no more than 500 come together. Where it has more than 2,000, the same goes for
    lines, and where that is still too much, it is the last 2,000 characters.
    """
    separator = "\n\n" if "\n\n" in prompt else "\n"
    first, found, _ = prompt.partition(separator)
    head = first + found if found and len(first) <= _LONGEST_INSTRUCTION else ""
    rest = prompt[len(head) :]
    after = ""
    for cut in (separator, "\n"):
        after = _last_parts(rest, cut)
        if len(after) <= _LONGEST_QUESTION:
            break
    after = after[-_LONGEST_QUESTION:]
    context = rest[: len(rest) - len(after)]
    return SplitPrompt(head, context, after) if context.strip() else None


def _last_parts(text: str, separator: str) -> str:
    """The last part of a text that is not blank, with those before it that it takes along."""
    start = len(text)
    while start > 0:
        earlier = max(text.rfind(separator, 0, start), 0)
        if text[start:].strip() and len(text) - earlier > _LONGEST_TAKEN_ALONG:
            break
        start = earlier
        if len(text[start:].strip()) >= _SHORTEST_QUESTION:
            break
    return text[start:]


def _halves(ids: Sequence[int], max_length: int) -> tuple[list[int], list[int]]:
    """What is kept of too long a prompt; the second part is empty where all of it is."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if len(ids) <= max_length:
        return list(ids), []
    half = max_length // 2
    return list(ids[:half]), list(ids[-half:])


def truncate_middle(ids: Sequence[int], max_length: int) -> list[int]:
    """The first and the last max_length // 2 tokens of what is longer, as LongBench does."""
    first, last = _halves(ids, max_length)
    return first + last


def dense_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    max_length: int,
    *,
    chat: bool = True,
    response: str = "",
) -> tuple[list[int], bool]:
    """The token ids that a dense baseline gets of a prompt, and whether its middle was dropped.

    LongBench's order: tokenise the prompt, keep the first and last half of `max_length` if it is
    longer, decode, and only then apply the chat template, which is not counted.
    """
    first, last = _halves(tokenizer.encode(prompt), max_length)
    if last:
        prompt = "".join(
            tokenizer.backend.decode(part, skip_special_tokens=True) for part in (first, last)
        )
    prefix, query = tokenizer.around(prompt, "", chat=chat, response=response)
    return prefix + query, bool(last)


def split_request(
    tokenizer: Tokenizer, prompt: SplitPrompt, *, chat: bool = True, response: str = ""
) -> Request:
    """The token ids that the method gets of a prompt, each part encoded by itself."""
    prefix, query = tokenizer.around(prompt.before, prompt.after, chat=chat, response=response)
    return Request(tokenizer.encode(prompt.context), query, prefix=prefix)


def fitting_block(gen_length: int, most: int) -> int:
    """The longest block of at most `most` tokens that responses of this length can be cut into."""
    return next(n for n in range(min(most, gen_length), 0, -1) if gen_length % n == 0)
