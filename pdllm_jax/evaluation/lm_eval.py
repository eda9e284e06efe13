"""The adapter for lm-eval (EleutherAI's lm-evaluation-harness): importing this registers `pdllm`.

    python -m pdllm_jax.evaluation.lm_eval --model pdllm --model_args pretrained=llada-8b ...

is lm-eval's own command line with the model registered; docs/evaluation.md describes it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
from pdllm_jax.config import ChunkConfig, DecodeConfig, Recompute, SelectionConfig
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.evaluation.arguments import (
    CHUNKING,
    DECODING,
    SELECTION,
    decode_config,
    read_dtype,
    read_generation,
    read_model_args,
    require_positive,
    sample_seed,
)
from pdllm_jax.evaluation.chat import ChatPrompts
from pdllm_jax.evaluation.prompts import PromptIds, SplitPrompt, TaskPrompt
from pdllm_jax.method.caches import Method, cache_method
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.likelihood import (
    KeptContext,
    answer_log_likelihood,
    answer_log_likelihood_kept,
    keep_context,
)
from pdllm_jax.network.config import WeightFormat
from pdllm_jax.randomness import random_key
from pdllm_jax.rules import ConfigError, require
from pdllm_jax.storage.checkpoint import load_config, load_model
from pdllm_jax.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)


@register_model("pdllm")
class PrefillingLM(LM):
    """A converted checkpoint as a model of lm-eval.

    The arguments come from `--model_args`:
      pretrained: a converted checkpoint's folder.
      method: "prefilling", or a method on the full prompt: "plain", "dual-cache" and the others of
        `CACHE_METHODS`. NAME, or NAME:SETTING=VALUE:SETTING=VALUE.
      document: field of a task's examples that is the document, for tasks where it is not clear.
      gen_length: response tokens, instead of the task's; max_gen_toks: where the task says nothing.
      block_length: longest block; blocks divide the response.
      max_length: longest prompt of a baseline, chat template apart. A longer one loses its middle.
        None: what the model's max_sequence_length leaves.
      bos: BOS before prompts without a chat template.
      mc_num, mc_batch: Monte Carlo samples of a log-likelihood; how many go through the network
        together.
      is_check_greedy: loglikelihood also checks whether greedy decoding, one token a step, gives
        the answer. Without it the result is False, which few metrics read.
      seed: of sampling and of the Monte Carlo samples.
      dtype: of weights and activations; None and "auto" keep the checkpoint's.
      weights: of the layers, "full", "fp8" or "int8"; None keeps the checkpoint's.
      mask_id: must be the checkpoint's mask token.
      implementation: as for `Engine`.
      settings: fields of `ChunkConfig`, `SelectionConfig` and `DecodeConfig`, with their defaults,
        but a threshold of 0.9 where no threshold, factor, steps or unmask is given (0: one token a
        step); `sample_top_k` is that of `DecodeConfig`. `alg` chooses `DecodeConfig.dream` (method
        "plain") or `fast_dllm_dream`. `temperature` replaces the task's. docs/evaluation.md lists
        the arguments of lm-eval's own wrappers, accepted where they change nothing.

    Raises:
      ConfigError: an argument that is not known or not implemented.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        method: Method = "prefilling",
        *,
        document: str | None = None,
        gen_length: int | None = None,
        max_gen_toks: int = 256,
        block_length: int = 32,
        max_length: int | None = None,
        mc_num: int = 128,
        mc_batch: int = 16,
        is_check_greedy: bool = False,
        seed: int = 0,
        dtype: str | None = None,
        weights: WeightFormat | None = None,
        mask_id: int | None = None,
        implementation: Implementation | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        enable_compilation_cache()
        configs = *CHUNKING, *SELECTION, *DECODING
        if settings.get("tokenizer") == pretrained:  # RULER's tasks ask for it
            settings.pop("tokenizer", None)
        settings = read_model_args(settings, {"pretrained", "bos", *configs, *_OWN})
        pretrained = settings.pop("pretrained", pretrained)
        gen_length = settings.pop("gen_length", gen_length)
        require(pretrained is not None, "model_args need pretrained=FOLDER")
        numbers = {"max_gen_toks": max_gen_toks, "block_length": block_length, "mc_num": mc_num}
        require_positive(numbers | {"mc_batch": mc_batch})
        require_positive({"gen_length": gen_length, "max_length": max_length}, optional=True)
        self.gen_length, self.max_gen_toks = gen_length, max_gen_toks
        self.max_length, self.block_length = max_length, block_length
        bos, self.seed = settings.pop("bos", None), int(seed)
        random_key(self.seed)  # refuses a wrong one before the checkpoint is read
        self.document, self.is_check_greedy = document, is_check_greedy
        chunking = ChunkConfig(**_take(settings, CHUNKING))
        self.decoding, cache = _take(settings, DECODING), cache_method(method)
        self.estimate: dict[str, Any] = {"samples": mc_num, "group": mc_batch, "seed": self.seed}
        self.estimate["guidance"] = self.decoding.get("guidance", 0.0)
        selection = SelectionConfig(**settings)
        length = gen_length or self.decoding.get("steps") or max_gen_toks
        self._decode_config = functools.partial(decode_config, blocks=cache.name != "plain")
        cache.decode_config(self._decode_config(length, block_length, self.decoding, {}))
        self.folder, dtype = Path(str(pretrained)), read_dtype(dtype)
        config = load_config(self.folder)
        selection = selection.calibrated(self.folder)
        selection.scorer.check(config)
        same = mask_id is None or mask_id == config.mask_token_id
        require(same, f"mask_id is {mask_id}, the checkpoint's mask token {config.mask_token_id}")
        self.tokenizer = Tokenizer.load(self.folder, config)
        self.prompts = ChatPrompts(self.tokenizer, bos is None or bool(bos))
        self.decoding.setdefault("stop_ids", self.tokenizer.stop_ids)
        self.model = load_model(self.folder, dtype=dtype, weights=weights)
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
        self._asked: Counter[tuple[str | None, str]] = Counter()  # samples of each prompt
        self._kept: tuple[PromptIds, KeptContext] | None = None

    # What lm-eval asks a model with a chat template.

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the checkpoint's template, which lm-eval keeps with the results."""
        require(not isinstance(chat_template, str), "apply_chat_template takes no template's name")
        return str(self.tokenizer.renderer.chat_template) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Fills in the checkpoint's template. Without a generation prompt the last turn is open.

        A template that refuses a system turn gets the others, as in lm-eval's own wrappers.

        Raises:
          ConfigError: the checkpoint has no template, or it cannot be filled in.
        """
        try:
            return self.prompts.render(chat_history, ends=add_generation_prompt)
        except ConfigError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            if len(turns) == len(chat_history):
                raise
            text = self.prompts.render(turns, ends=add_generation_prompt)
            _logger.warning("the chat template refuses the system turn, which is left out")
            return text

    # Prompts.

    def _split(self, prompt: str, instance: Instance) -> tuple[SplitPrompt | None, str]:
        """A prompt in three parts, and how it was cut; see `TaskPrompt.cut`."""
        turn = self.prompts.turn(prompt)
        doc = instance.doc if isinstance(instance.doc, Mapping) else {}
        task = TaskPrompt(prompt, turn or (0, len(prompt)), doc, instance.task_name or "")
        return task.cut(self.document, fields_only=turn is None)

    def _request(self, prompt: str, instance: Instance) -> PromptIds | None:
        """A prompt in three parts; None where it goes to the dual cache in one part."""
        split, cut = None, "short"
        if self._is_long(prompt):
            split, cut = self._split(prompt, instance)
        self.cuts[cut] += 1
        if split is None:
            return None
        start = len(split.before)
        stop = start + len(split.context)
        before, after = self.prompts.encode(prompt, 0, start), self.prompts.encode(prompt, stop)
        size, limit = len(before) + len(after), self.model.config.max_sequence_length
        if size >= limit:
            reason = f"{size} tokens around its document, max_sequence_length is {limit}"
            raise ConfigError(f"task {instance.task_name!r}: {reason}; lower num_fewshot")
        return PromptIds(before, self.tokenizer.encode(split.context), after)

    def _is_long(self, prompt: str) -> bool:
        """Whether a prompt has more than a chunk of tokens."""
        return len(self.tokenizer.encode(prompt)) > self.engine.chunking.chunk_size

    def _dense(self, prompt: str, response: int) -> list[int]:
        """All ids of a prompt; a prompt that is too long loses its middle."""
        room = self.model.config.max_sequence_length - response
        self._require_room(response, room)
        ids, cut = self.prompts.truncated(prompt, room, self.max_length)
        if cut and not self.truncated:
            _logger.warning("prompts are longer than max_length: their middle is dropped")
        self.truncated += cut
        return ids

    def _require_room(self, response: int, room: int) -> None:
        """Raises ConfigError unless a response leaves room for a prompt."""
        limit = self.model.config.max_sequence_length
        require(
            room >= 2,
            f"{response} response tokens (max_gen_toks) leave no room for a prompt: the model's "
            f"max_sequence_length is {limit}; give gen_length in model_args",
        )

    def _each(
        self, kind: str, requests: Sequence[Instance], disable: bool, call: Callable[..., Any]
    ) -> list[Any]:
        """Calls with the arguments of each request; says at the end how prompts were cut."""
        for instance in {id(instance): instance for instance in requests}.values():
            self._check(instance, *instance.args)
        self._asked.clear()
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

    def _check(self, instance: Instance, prompt: str, asked: str | Mapping[str, Any]) -> None:
        """Raises ConfigError for what a task asks, before anything is computed."""
        if isinstance(asked, Mapping):
            decoding, _ = self._generation(asked)
            if cache_method(self.engine.method).longest is not None:
                engine = dataclasses.replace(self.engine, decoding=decoding)
                engine.check([Request([], self._dense(prompt, decoding.gen_length), [])])
        if self._uses_chunks:
            try:
                self._split(prompt, instance)
            except ConfigError:
                if self._is_long(prompt):
                    raise

    # Generation.

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response up to the first of the task's stop texts, or to the end of its turn.

        Of the same prompt several times (a task's `repeats`) every sample gets noise of its own.
        """
        return self._each("generate_until", requests, disable_tqdm, self._generate)

    def _generation(self, given: Mapping[str, Any]) -> tuple[DecodeConfig, list[str]]:
        """What a task's generation_kwargs ask: decoding settings and stop texts."""
        asked = read_generation(given, DECODING)
        length = self.gen_length or asked.length or self.max_gen_toks
        self._require_room(length, self.model.config.max_sequence_length - length)
        settings = asked.settings
        if "temperature" not in self.decoding:
            settings = {"temperature": asked.temperature, **settings}
        config = self._decode_config(length, self.block_length, self.decoding, settings)
        return config, asked.until

    def _generate(self, instance: Instance, prompt: str, given: Mapping[str, Any]) -> str:
        decoding, until = self._generation(given)
        text = self.tokenizer.decode(self._respond(prompt, decoding, instance))
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _seed(self, prompt: str, decoding: DecodeConfig, instance: Instance) -> int:
        """The seed of a sample: of seed, prompt and how often it was asked; greedily the seed."""
        given = instance.args[1] if len(instance.args) > 1 else None
        seed = given.get("seed") if isinstance(given, Mapping) else None
        seed = self.seed if seed is None else int(seed)
        if not decoding.samples:
            return seed
        asked = instance.task_name, prompt
        self._asked[asked] += 1
        return sample_seed(seed, prompt, self._asked[asked])

    def _respond(self, prompt: str, decoding: DecodeConfig, instance: Instance) -> list[int]:
        """The tokens of a response."""
        method, parts = self.engine.method, None
        if self._uses_chunks and (parts := self._request(prompt, instance)) is None:
            method = "dual-cache"
        if parts is None:
            parts = PromptIds([], [], self._dense(prompt, decoding.gen_length))
        engine = dataclasses.replace(self.engine, method=method, decoding=decoding)
        seed = self._seed(prompt, decoding, instance)
        return engine.answer(**parts._asdict(), seed=seed).tokens

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
        if spaces and not self.prompts.templated(context):  # as lm-eval and LLaDA's harness do
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        prompt = self.prompts.encode(context)
        answer = self.prompts.encode(context + continuation)[len(prompt) :]
        if not answer:
            raise ValueError(f"continuation {continuation!r} adds no token to its context")
        parts = None
        if self._uses_chunks and context:
            parts = self._request(context, instance)
        if parts is None:
            prompt = self._dense(context, len(answer)) if context else prompt
            value = answer_log_likelihood(self.model, prompt, answer, **self.estimate)
        else:
            value = answer_log_likelihood_kept(
                self.model,
                self._kept_for(parts),
                parts.question,
                answer,
                implementation=self.engine.implementation,
                **self.estimate,
            )
        if not self.is_check_greedy:
            return value, False
        length, guidance = len(answer), self.estimate["guidance"]
        recompute: Recompute = "response" if guidance else "block"
        decoding = DecodeConfig(length, length, guidance=guidance, recompute=recompute)
        return value, list(self._respond(context, decoding, instance)) == answer

    def _kept_for(self, parts: PromptIds) -> KeptContext:
        """The chunks kept for a question; the choices of one question follow each other."""
        if self._kept is None or self._kept[0] != parts:
            ids = self.engine.token_ids(Request(**parts._asdict()))
            prompt = chunk_prompt(*ids, self.engine.chunking, bos_id=self.tokenizer.bos_id)
            self._kept = (
                parts,
                keep_context(self.model, prompt, self.engine.selection, seed=self.seed),
            )
        return self._kept[1]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Not implemented: LLaDA's estimate is of an answer, not of a text in windows."""
        names = ", ".join(sorted({str(instance.task_name) for instance in requests}))
        raise ConfigError(f"task {names}: pdllm has no loglikelihood_rolling (perplexity of texts)")


_OWN = [name for name in inspect.signature(PrefillingLM).parameters if name != "settings"]


def _take(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Removes the named settings and returns them."""
    return {name: settings.pop(name) for name in names if name in settings}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
