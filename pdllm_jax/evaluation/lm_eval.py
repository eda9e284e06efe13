"""The adapter for lm-eval (EleutherAI's lm-evaluation-harness): importing this registers `pdllm`.

    python -m pdllm_jax.evaluation.lm_eval --model pdllm --model_args pretrained=llada-8b ...

is lm-eval's own command line with the model registered; docs/evaluation.md describes it.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    message = "the adapter needs lm-eval: pip install 'pdllm-jax[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {message}")
    raise ImportError(message, name="lm_eval") from None
from tqdm import tqdm

from pallas_kernels import Implementation
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.evaluation.prompts import (
    SplitPrompt,
    dense_prompt,
    fitting_block,
    split_at_context,
    split_by_rule,
    split_ruler,
    truncate_middle,
)
from pdllm_jax.method.cache import Positions
from pdllm_jax.method.cache_methods import Method
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.encodings import Encoding
from pdllm_jax.method.likelihood import (
    KeptContext,
    answer_log_likelihood,
    answer_log_likelihood_kept,
    keep_context,
)
from pdllm_jax.method.scorers import Scorer
from pdllm_jax.network.config import ConfigError
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

# Settings of a task that greedy decoding does not read.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "num_beams", "early_stopping")
# How a prompt was cut, for the report at the end of a run.
Cut = Literal["context", "ruler", "rule", "short", "whole"]


@register_model("pdllm")
class PrefillingLM(LM):
    """A converted checkpoint as a model of lm-eval.

    Arguments are `--model_args`, all with the library's names and defaults where it has them:
      pretrained: a converted checkpoint's folder.
      method: "prefilling", or a baseline on whole prompts: "plain", "prefix-cache", "dual-cache".
      gen_length: response tokens, instead of the task's max_gen_toks; block_length: at most.
      threshold: of parallel decoding; 0 takes one token a step.
      max_length: longest prompt of a baseline, chat template apart, whose middle is dropped;
        None: what the model's max_sequence_length leaves.
      bos: BOS before prompts without a chat template.
      mc_num, mc_batch: Monte Carlo samples of a log-likelihood; how many go through the network
        together.
      is_check_greedy: whether loglikelihood also finds out if greedy decoding gives the answer, one
        token a step; without it the answer is False, which few metrics read.
      dtype: None keeps the checkpoint's.
    lm-eval's batch_size and device have no effect: requests go one by one, to JAX's device.
    """

    def __init__(
        self,
        pretrained: str,
        method: Method = "prefilling",
        chunk_size: int = 1024,
        overlap: int = 0,
        anchors: bool = True,
        top_k: int = 4,
        scorer: str | Scorer = "draft",
        encoding: str | Encoding = "joint",
        positions: Positions = "continuous",
        encode_batch: int = 8,
        gen_length: int | None = None,
        block_length: int = 32,
        threshold: float = 0.9,
        max_length: int | None = None,
        bos: bool = True,
        mc_num: int = 128,
        mc_batch: int = 16,
        is_check_greedy: bool = False,
        seed: int = 0,
        dtype: str | None = None,
        implementation: Implementation | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        enable_compilation_cache()
        self.method, self.max_length, self.bos, self.seed = method, max_length, bos, int(seed)
        self.gen_length, self.block_length = gen_length, block_length
        self.threshold = threshold or None
        self.mc_num, self.mc_batch, self.is_check_greedy = mc_num, mc_batch, is_check_greedy
        self.implementation = implementation
        self.chunking = ChunkConfig(chunk_size, anchors=anchors, overlap=overlap)
        self.selection = SelectionConfig(
            top_k=top_k, scorer=scorer, encoding=encoding, positions=positions,
            encode_batch=encode_batch,
        )  # fmt: skip
        self.folder = Path(pretrained)
        self.tokenizer = Tokenizer.load(self.folder, load_config(self.folder))
        self.model = load_model(self.folder, dtype=dtype)
        self.engine = Engine(
            self.model,
            self.tokenizer,
            chunking=self.chunking,
            selection=self.selection,
            method=method,
            implementation=implementation,
        )
        self.cuts: Counter[Cut] = Counter()
        self.truncated = 0
        self._kept: tuple[Request, KeptContext] | None = None

    # What lm-eval asks a model with a chat template.

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Fills in the checkpoint's template. Without a generation prompt the last turn is open."""
        return self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    # Prompts.

    def _turn(self, prompt: str) -> tuple[int, int] | None:
        """Where the user's text lies in a prompt that is one turn of the chat template."""
        head, tail = self.tokenizer.template or ("", "")
        end = prompt.rfind(tail)
        if not head or not prompt.startswith(head) or end < len(head):
            return None
        return len(head), end

    def _templated(self, text: str) -> bool:
        """Whether a text begins as the chat template does."""
        template = self.tokenizer.template
        return template is not None and text.startswith(template[0][:8])

    def _encode(self, text: str) -> list[int]:
        """Prompt text; special tokens count as such behind a chat template alone."""
        if self._templated(text):
            return self.tokenizer.encode_marked(text)
        return [*([self.tokenizer.bos_id] if self.bos else []), *self.tokenizer.encode(text)]

    def _split(self, prompt: str, instance: Instance) -> tuple[SplitPrompt | None, Cut]:
        """Where the document lies: by the task's own fields, by RULER's templates, or by rule."""
        for context in _documents(instance.doc, prompt):
            found = split_at_context(prompt, context)
            if found is not None and found.after.strip():
                return found, "context"
        if instance.task_name and (found := split_ruler(instance.task_name, prompt)):
            return found, "ruler"
        start, end = self._turn(prompt) or (0, len(prompt))
        found = split_by_rule(prompt[start:end])
        if found is None:
            return None, "whole"
        return found._replace(
            before=prompt[:start] + found.before, after=found.after + prompt[end:]
        ), "rule"

    def _request(self, prompt: str, instance: Instance) -> Request | None:
        """A prompt in three parts; None where it goes to the dual cache whole."""
        if len(self.tokenizer.encode(prompt)) <= self.chunking.chunk_size:
            self.cuts["short"] += 1
            return None
        split, cut = self._split(prompt, instance)
        self.cuts[cut] += 1
        if split is None:
            return None
        templated = self._templated(prompt)
        after = (
            self.tokenizer.encode_marked(split.after)
            if templated
            else self.tokenizer.encode(split.after)
        )
        before = self._encode(split.before)
        return Request(self.tokenizer.encode(split.context), after, prefix=before)

    def _dense(self, prompt: str, response: int) -> list[int]:
        """All ids of a prompt; too long a one loses its middle."""
        room = self.model.config.max_sequence_length - response
        turn, (head, tail) = self._turn(prompt), self.tokenizer.template or ("", "")
        if turn is not None and head.strip() not in (text := prompt[slice(*turn)]):
            begins = prompt[turn[1] + len(tail) :]
            template, _ = dense_prompt(self.tokenizer, "", 2, response=begins)
            ids, cut = dense_prompt(
                self.tokenizer, text, self.max_length or room - len(template),
                response=begins,
            )  # fmt: skip
        elif not self._templated(prompt):
            ids, cut = dense_prompt(
                self.tokenizer, prompt, self.max_length or room - self.bos, chat=False
            )
            ids = ids[not self.bos :]
        else:
            whole = self._encode(prompt)
            ids = truncate_middle(whole, self.max_length or room)
            cut = len(ids) < len(whole)
        if cut and not self.truncated:
            _logger.warning("prompts are longer than max_length: their middle is dropped")
        self.truncated += cut
        return ids

    # Generation.

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response up to the first of the task's stop texts, or to the end of its turn."""
        answers = []
        for instance in tqdm(requests, desc="pdllm", disable=disable_tqdm):
            prompt, settings = instance.args
            text = self._generate(prompt, dict(settings), instance)
            self.cache_hook.add_partial("generate_until", instance.args, text)
            answers.append(text)
        self._report()
        return answers

    def _generate(self, prompt: str, settings: dict[str, Any], instance: Instance) -> str:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        length = self.gen_length or int(settings.pop("max_gen_toks", 256))
        settings.pop("max_gen_toks", None)
        temperature = 0.0
        if settings.pop("do_sample", False):
            temperature = float(settings.pop("temperature", 1.0))
            if settings:
                raise ConfigError(f"sampling with {', '.join(settings)} is not implemented")
        elif unknown := sorted(set(settings) - set(_SAMPLING)):
            raise ConfigError(f"generation_kwargs {', '.join(unknown)} are not known")
        decode = DecodeConfig(
            gen_length=length,
            block_length=fitting_block(length, self.block_length),
            threshold=self.threshold,
            temperature=temperature,
            stop_ids=self.tokenizer.stop_ids,
        )
        text = self.tokenizer.decode(self._respond(prompt, decode, instance))
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _respond(self, prompt: str, decoding: DecodeConfig, instance: Instance) -> list[int]:
        method, request = self.method, None
        if method == "prefilling":
            request = self._request(prompt, instance)
            method = "prefilling" if request else "dual-cache"
        if request is None:
            request = Request([], self._dense(prompt, decoding.gen_length), prefix=[])
        engine = dataclasses.replace(self.engine, method=method, decoding=decoding)
        return engine.answer(
            request.context, request.question, prefix=request.prefix, seed=self.seed
        ).tokens

    # Log-likelihood.

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """LLaDA's Monte Carlo estimate, natural logarithm, and whether greedy decoding agrees."""
        found = []
        for instance in tqdm(requests, desc="pdllm", disable=disable_tqdm):
            context, continuation = instance.args
            one = self._likelihood(context, continuation, instance)
            self.cache_hook.add_partial("loglikelihood", instance.args, one)
            found.append(one)
        self._report()
        return found

    def _likelihood(
        self, context: str, continuation: str, instance: Instance
    ) -> tuple[float, bool]:
        spaces = len(context) - len(context.rstrip())
        if spaces and not self._templated(context):  # as lm-eval and LLaDA's harness do
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        prompt = self._encode(context)
        answer = self._encode(context + continuation)[len(prompt) :]
        if not answer:
            raise ValueError(f"continuation {continuation!r} has no token of its own")
        estimate = {"samples": self.mc_num, "group": self.mc_batch, "seed": self.seed}
        request = None
        if self.method == "prefilling" and context:
            request = self._request(context, instance)
        if request is None:
            prompt = self._dense(context, len(answer)) if context else prompt
            value = answer_log_likelihood(self.model, prompt, answer, **estimate)
        else:
            value = answer_log_likelihood_kept(
                self.model, self._kept_for(request), self.engine.token_ids(request)[2], answer,
                implementation=self.implementation, **estimate,
            )  # fmt: skip
        greedy = False
        if self.is_check_greedy:
            n = len(answer)
            greedy = self._respond(context, DecodeConfig(n, n), instance) == answer
        return value, greedy

    def _kept_for(self, request: Request) -> KeptContext:
        """The chunks kept for a question; the choices of one question follow each other."""
        if self._kept is None or self._kept[0] != request:
            parts = self.engine.token_ids(request)
            prompt = chunk_prompt(*parts, self.chunking, bos_id=self.tokenizer.bos_id)
            self._kept = request, keep_context(self.model, prompt, self.selection)
        return self._kept[1]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Not implemented: LLaDA's estimate is of an answer, not of a text in windows."""
        raise NotImplementedError("pdllm has no loglikelihood_rolling (perplexity of whole texts)")

    def _report(self) -> None:
        """Says how prompts were cut, and how many lost their middle."""
        if self.cuts:
            told = ", ".join(f"{cut} {n}" for cut, n in sorted(self.cuts.items()))
            _logger.info("prompts were cut by: %s (short, whole: dual cache)", told)
        if self.truncated:
            _logger.warning("%d prompts lost their middle", self.truncated)


def _documents(doc: Mapping[str, Any] | None, prompt: str) -> list[str]:
    """Fields of a task's example that may be its document, `context` first, then by length.

    Others than `context` must make up more than half of the prompt.
    """
    fields = {k: v for k, v in (doc or {}).items() if isinstance(v, str)}
    first = [fields.pop("context")] if "context" in fields else []
    rest = sorted((v for v in fields.values() if 2 * len(v) > len(prompt)), key=len, reverse=True)
    return first + rest


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
