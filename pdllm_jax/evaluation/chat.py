"""Prompts that a chat template has made: the last user's text in them, and their token ids.

lm-eval hands over finished text. Special tokens count as such in the template's part of it, earlier
turns included; in the last user's text, which may hold a document, they are text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from pdllm_jax.evaluation.prompts import truncate_middle, truncate_text
from pdllm_jax.rules import ConfigError, require
from pdllm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ChatPrompts:
    """Reads prompts by a checkpoint's tokenizer. bos: BOS before prompts without a template."""

    tokenizer: Tokenizer
    bos: bool = True

    def render(self, turns: list[dict[str, str]], *, ends: bool = True) -> str:
        """Fills in the chat template.

        Args:
          ends: the response begins behind the last turn; otherwise the last turn is open.

        Raises:
          ConfigError: the checkpoint has no template, or it cannot be filled in.
        """
        require(self.tokenizer.template is not None, "the checkpoint has no chat template")
        renderer: Any = self.tokenizer.renderer
        try:
            return renderer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=ends, continue_final_message=not ends
            )
        except Exception as error:  # whatever the template raises
            reason = " ".join(str(error).split())
            raise ConfigError(f"the chat template cannot be filled in: {reason}") from None

    @functools.cached_property
    def _opening(self) -> str:
        """The chat template's text in front of every user's message."""
        assert self.tokenizer.template is not None
        places = "FIRST-MESSAGE", "ANSWER-TO-IT", "SECOND-MESSAGE"
        roles = zip(("user", "assistant", "user"), places, strict=True)
        text = self.render([{"role": role, "content": place} for role, place in roles])
        between = text.partition(places[1])[2].partition(places[2])[0]
        first = self.tokenizer.template[0]
        letters = zip(reversed(first), reversed(between), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], letters)
        return first[len(first) - sum(1 for _ in same) :] or first

    def templated(self, prompt: str) -> bool:
        """Returns whether a prompt begins as the chat template does."""
        template = self.tokenizer.template
        return template is not None and prompt.startswith(template[0][:8])

    def turn(self, prompt: str) -> tuple[int, int] | None:
        """Returns where the last user's text lies, all of a prompt without a template.

        None: the template has no such turn in the prompt.
        """
        if not self.templated(prompt):
            return 0, len(prompt)
        assert self.tokenizer.template is not None
        stop = prompt.rfind(self.tokenizer.template[1])
        start = prompt.rfind(self._opening, 0, max(stop, 0))
        return None if min(start, stop) < 0 else (start + len(self._opening), stop)

    def encode(self, prompt: str, start: int = 0, stop: int | None = None) -> list[int]:
        """Returns the token ids of prompt[start:stop]."""
        part = prompt[start:stop]
        if not self.templated(prompt):
            bos = [self.tokenizer.bos_id] if self.bos and start == 0 else []
            return [*bos, *self.tokenizer.encode(part)]
        first, last = (min(max(i - start, 0), len(part)) for i in self.turn(prompt) or (0, 0))
        return self.tokenizer.encode_marked(part, (first, last))

    def truncated(self, prompt: str, limit: int, max_length: int | None) -> tuple[list[int], bool]:
        """Returns a prompt's ids, and whether its middle was dropped because it is too long.

        The last user's text alone is cut, unless the turns around it leave no room for it.

        Args:
          limit: most tokens of the prompt.
          max_length: instead of it, most tokens of the prompt, the chat template apart.

        Raises:
          ValueError: less than 2 tokens are left for the prompt.
        """
        start, stop = self.turn(prompt) or (0, 0)
        before, text, after = prompt[:start], prompt[start:stop], prompt[stop:]
        most, around = max_length or limit, len(self.encode(before + after))
        template = self.tokenizer.template
        alone = template is None or len(before) <= len(template[0])
        room = most if max_length and alone else most - around
        if text and room > 1:
            text, cut = truncate_text(self.tokenizer, text, room)
            return self.encode(before + text + after), cut
        ids = self.encode(prompt)
        kept = truncate_middle(ids, most)
        return kept, len(kept) < len(ids)
