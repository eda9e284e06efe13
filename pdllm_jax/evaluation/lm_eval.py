"""The adapter for lm-eval (EleutherAI's lm-evaluation-harness): importing this registers `pdllm`.

    python -m pdllm_jax.evaluation.lm_eval --model pdllm --model_args pretrained=llada-8b ...

is lm-eval's own command line with the model registered; docs/evaluation.md describes it.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.evaluation import prompts
from pdllm_jax.evaluation.prompts import SplitPrompt
from pdllm_jax.method.cache_methods import Method, cache_method
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.likelihood import (
    KeptContext,
    answer_log_likelihood,
    answer_log_likelihood_kept,
    keep_context,
)
from pdllm_jax.method.randomness import random_key
from pdllm_jax.network.config import ConfigError
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

# Settings of a task that greedy decoding does not read.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "num_beams", "early_stopping")


@register_model("pdllm")
class PrefillingLM(LM):
    """A converted checkpoint as a model of lm-eval.

    The arguments come from `--model_args`:
      pretrained: a converted checkpoint's folder.
      method: "prefilling", or a baseline on the full prompt: "plain", "prefix-cache", "dual-cache".
      gen_length: response tokens, instead of the task's max_gen_toks.
      block_length: longest block; blocks divide the response.
      threshold: of parallel decoding; 0 takes one token a step.
      max_length: longest prompt of a baseline, chat template apart. A longer one loses its middle.
        None: what the model's max_sequence_length leaves.
      bos: BOS before prompts without a chat template.
      mc_num, mc_batch: Monte Carlo samples of a log-likelihood; how many go through the network
        together.
      is_check_greedy: loglikelihood also checks whether greedy decoding, one token a step, gives
        the answer. Without it the result is False, which few metrics read.
      seed: of sampling and of the Monte Carlo samples.
      dtype: of the weights; None keeps the checkpoint's.
      implementation: as for `Engine`.
      settings: fields of `ChunkConfig` and `SelectionConfig`, with their defaults. lm-eval's
        batch_size and device have no effect: requests go one by one, to JAX's device.
    """

    def __init__(
        self,
        pretrained: str,
        method: Method = "prefilling",
        *,
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
        **settings: Any,
    ) -> None:
        super().__init__()
        enable_compilation_cache()
        self.gen_length, self.block_length, self.threshold = gen_length, block_length, threshold
        self.max_length, self.bos, self.seed = max_length, bos, seed
        random_key(seed)  # refuses a wrong one before the checkpoint is read
        self.is_check_greedy = is_check_greedy
        self.estimate = {"samples": mc_num, "group": mc_batch, "seed": self.seed}
        for name in ("batch_size", "max_batch_size", "device"):
            settings.pop(name, None)
        names = [field.name for field in dataclasses.fields(ChunkConfig) if field.name in settings]
        chunking = ChunkConfig(**{name: settings.pop(name) for name in names})
        selection, cache = SelectionConfig(**settings), cache_method(method)
        self.folder = Path(pretrained)
        self.tokenizer = Tokenizer.load(self.folder, load_config(self.folder))
        self.model = load_model(self.folder, dtype=dtype)
        self.engine = Engine(
            self.model,
            self.tokenizer,
            chunking=chunking,
            selection=selection,
            method=cache,
            implementation=implementation,
        )
        self._uses_chunks = cache.uses_chunks
        self.cuts: Counter[str] = Counter()  # how prompts were cut
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
        return self.tokenizer.renderer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

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

    def _split(self, prompt: str, instance: Instance) -> tuple[SplitPrompt | None, str]:
        """Where the document lies: by the task's fields, by RULER's templates, or by rule."""
        for context in _documents(instance.doc, prompt):
            split = prompts.split_at_context(prompt, context)
            if split is not None and split.after.strip():
                return split, "context"
        if instance.task_name and (split := prompts.split_ruler(instance.task_name, prompt)):
            return split, "ruler"
        start, end = self._turn(prompt) or (0, len(prompt))
        split = prompts.split_by_rule(prompt[start:end])
        if split is None:
            return None, "whole"
        before, after = prompt[:start] + split.before, split.after + prompt[end:]
        return SplitPrompt(before, split.context, after), "rule"

    def _request(self, prompt: str, instance: Instance) -> Request | None:
        """A prompt in three parts; None where it goes to the dual cache in one part."""
        split, cut = None, "short"
        if len(self.tokenizer.encode(prompt)) > self.engine.chunking.chunk_size:
            split, cut = self._split(prompt, instance)
        self.cuts[cut] += 1
        if split is None:
            return None
        marked = self._templated(prompt)
        encode = self.tokenizer.encode_marked if marked else self.tokenizer.encode
        context, before = self.tokenizer.encode(split.context), self._encode(split.before)
        return Request(context, encode(split.after), prefix=before)

    def _dense(self, prompt: str, response: int) -> list[int]:
        """All ids of a prompt; a prompt that is too long loses its middle."""
        tokenizer, room = self.tokenizer, self.model.config.max_sequence_length - response
        turn, (head, tail) = self._turn(prompt), self.tokenizer.template or ("", "")
        if not self._templated(prompt):
            most = self.max_length or room - self.bos
            ids, cut = prompts.dense_prompt(tokenizer, prompt, most, chat=False)
            ids = ids[not self.bos :]
        elif turn is None or head.strip() in prompt[slice(*turn)]:  # several turns
            every = self._encode(prompt)
            ids = prompts.truncate_middle(every, self.max_length or room)
            cut = len(ids) < len(every)
        else:
            begins = prompt[turn[1] + len(tail) :]
            template, _ = prompts.dense_prompt(tokenizer, "", 2, response=begins)
            most = self.max_length or room - len(template)
            text = prompt[slice(*turn)]
            ids, cut = prompts.dense_prompt(tokenizer, text, most, response=begins)
        if cut and not self.truncated:
            _logger.warning("prompts are longer than max_length: their middle is dropped")
        self.truncated += cut
        return ids

    def _each(
        self, kind: str, requests: Sequence[Instance], disable: bool, call: Callable[..., Any]
    ) -> list[Any]:
        """Calls with the arguments of each request; says at the end how prompts were cut."""
        results = []
        for instance in tqdm(requests, desc="pdllm", disable=disable):
            results.append(call(instance, *instance.args))
            self.cache_hook.add_partial(kind, instance.args, results[-1])
        if self.cuts:
            counts = ", ".join(f"{cut} {n}" for cut, n in sorted(self.cuts.items()))
            _logger.info("prompts were cut by: %s (short, whole: dual cache)", counts)
        if self.truncated:
            _logger.warning("%d prompts lost their middle", self.truncated)
        return results

    # Generation.

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response up to the first of the task's stop texts, or to the end of its turn."""
        return self._each("generate_until", requests, disable_tqdm, self._generate)

    def _generate(self, instance: Instance, prompt: str, settings: dict[str, Any]) -> str:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        task_length = int(settings.pop("max_gen_toks", 256))
        length, temperature = self.gen_length or task_length, 0.0
        if settings.pop("do_sample", False):
            temperature = float(settings.pop("temperature", 1.0))
            if settings:
                raise ConfigError(f"sampling with {', '.join(settings)} is not implemented")
        elif unknown := sorted(set(settings) - set(_SAMPLING)):
            raise ConfigError(f"generation_kwargs {', '.join(unknown)} are not known")
        decoding = DecodeConfig(
            gen_length=length,
            block_length=prompts.fitting_block(length, self.block_length),
            threshold=self.threshold or None,
            temperature=temperature,
            stop_ids=self.tokenizer.stop_ids,
        )
        text = self._respond(instance, prompt, decoding).text or ""
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0]
        return text

    def _respond(self, instance: Instance, prompt: str, decoding: DecodeConfig) -> Answer:
        method, request = self.engine.method, None
        if self._uses_chunks and (request := self._request(prompt, instance)) is None:
            method = "dual-cache"
        if request is None:
            request = Request([], self._dense(prompt, decoding.gen_length), prefix=[])
        engine = dataclasses.replace(self.engine, method=method, decoding=decoding)
        return engine.answer(**request._replace(seed=self.seed)._asdict())

    # Log-likelihood.

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """LLaDA's Monte Carlo estimate, natural logarithm, and whether greedy decoding agrees."""
        return self._each("loglikelihood", requests, disable_tqdm, self._likelihood)

    def _likelihood(
        self, instance: Instance, context: str, continuation: str
    ) -> tuple[float, bool]:
        spaces = len(context) - len(context.rstrip())
        if spaces and not self._templated(context):  # as lm-eval and LLaDA's harness do
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        prompt = self._encode(context)
        answer = self._encode(context + continuation)[len(prompt) :]
        if not answer:
            raise ValueError(f"continuation {continuation!r} adds no token to its context")
        request = None
        if self._uses_chunks and context:
            request = self._request(context, instance)
        if request is None:
            prompt = self._dense(context, len(answer)) if context else prompt
            value = answer_log_likelihood(self.model, prompt, answer, **self.estimate)
        else:
            value = answer_log_likelihood_kept(
                self.model,
                self._kept_for(request),
                self.engine.token_ids(request)[2],
                answer,
                implementation=self.engine.implementation,
                **self.estimate,
            )
        if not self.is_check_greedy:
            return value, False
        decoding = DecodeConfig(len(answer), len(answer))
        return value, self._respond(instance, context, decoding).tokens == answer

    def _kept_for(self, request: Request) -> KeptContext:
        """The chunks kept for a question; the choices of one question follow each other."""
        if self._kept is None or self._kept[0] != request:
            engine = self.engine
            parts = engine.token_ids(request)
            prompt = chunk_prompt(*parts, engine.chunking, bos_id=self.tokenizer.bos_id)
            self._kept = request, keep_context(self.model, prompt, engine.selection, seed=self.seed)
        return self._kept[1]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Not implemented: LLaDA's estimate is of an answer, not of a text in windows."""
        raise NotImplementedError("pdllm has no loglikelihood_rolling (perplexity of whole texts)")


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
