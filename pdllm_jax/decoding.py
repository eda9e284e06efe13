"""Frozen, validated settings of decoding: how a response is denoised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pdllm_jax.method.caches import CACHE_METHODS, RECOMPUTE, CacheMethod
from pdllm_jax.method.sampling import CONFIDENCES, Origin
from pdllm_jax.method.unmasking import (
    UNMASKING,
    Chance,
    Custom,
    Factor,
    Schedule,
    Threshold,
    TimeSchedule,
    Unmasking,
    unmasking_rule,
)
from pdllm_jax.rules import (
    AT_LEAST_0,
    POSITIVE,
    SHARE,
    SIZE,
    SWITCH,
    TOKEN,
    UNIT,
    is_index,
    one_of,
    require,
    validate,
)

Recompute = Literal["block", "suffix", "response"]
ScheduleName = Literal["even", "time"]

# Dream's names of the confidence rules.
_ALGORITHMS = {
    "origin": "origin",
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
}


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the response is denoised (algorithm step 6).

    gen_length: response tokens, G; block_length: tokens of a block, divides gen_length.
    steps: evaluations over the whole response, divided among the blocks; None means one per token.
      Not used by the threshold and factor rules, which take what they need.
    schedule: how many slots a step unmasks. "even" spreads a block's slots over its steps (LLaDA);
      steps is then a multiple of the number of blocks. "time" is Dream's: times fall evenly from 1
      to `eps` over a block's steps. The step from t to s takes the share 1 - s / t of the masks
      that are left, rounded down; the last step takes all. A block has steps // blocks steps.
    eps: the time after the last step of schedule "time".
    temperature: of sampling; 0 is greedy.
    top_p, top_k: filters of logits / temperature before a prediction, top_p first. top_p keeps the
      likeliest tokens, each if those before it have at most the probability top_p together; top_k
      keeps the k likeliest. None keeps all.
    scaled_confidence: computes the confidence from the scaled, filtered logits (Dream), not from
      the logits as they are (LLaDA).
    remasking: which predictions are kept: the most confident ones, by the token's probability
      ("low_confidence"), by the lead of the best token over the second ("margin", p1 - p2) or by
      exp(-entropy) of the prediction ("entropy"); or random ones ("random"); or, with schedule
      "time", each with the probability 1 - s / t ("origin"). Or a function
      (logits [T, V], tokens [T], PRNG keys [T]) -> log confidence [T], finite.
    order_temperature: Dream's alg_temp. A schedule's n slots are drawn without replacement from
      softmax(confidence / order_temperature); 0 takes the n most confident.
    first_slot_alone: a block's first evaluation unmasks the first slot of the block and no other,
      at any confidence (Fast-dLLM on Dream). It counts as the first step of a schedule.
    threshold: unmask every slot with at least this confidence, and always the best one.
    factor: Fast-dLLM's factor rule (arXiv 2505.22618); excludes threshold.
    unmask: a rule that replaces steps, threshold and factor: an `Unmasking`, or a text that names
      one: "eb", "klass", "wino", "credit", with settings "eb:gamma=0.1". Its class describes it;
      "klass" takes `steps` too. Or a
      function (log confidence [G], -inf for slots that are not candidates; evaluations made in the
      block, int32) -> bool [G]. A block ends when nothing is masked, or after block_length
      evaluations. This function and that of `remasking` are traced and static under jit: hashable,
      and the same object for the same rule, or every call compiles anew. A snapshot cannot hold
      them.
    guidance: classifier-free guidance scale; needs recompute "response" and no context cache.
    logits_eos_inf: EOS is never predicted. Of LLaDA's published evaluation, as the next one.
    confidence_eos_eot_inf: slots where EOS or EOT is predicted are unmasked last, under every rule.
      The confidence of others is computed without the two. (With temperature, the published code
      leaves EOS out of this, and `remasking` "random" all of it.)
    eot_token_id: EOT of confidence_eos_eot_inf; LLaDA's is 126348. None: the token that ends a turn
      in the tokenizer of the `Engine`. EOS is the model's.
    stop_ids: tokens (EOS, EOT) that end the text: a request is done with the block in which one of
      them appears, and the slots behind that block become EOS. One that fills a slot of an earlier
      block, which was left masked, does not end the request. None by default, as published.
    recompute: rows that a step recomputes while the rest of the live KV stays as it was at the
      block's start: "block" (dual cache), "suffix" (prefix cache), or "response" (none is stale).
      Or any other `CacheMethod` on a whole prompt.
    """

    gen_length: int = 32
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Any = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    guidance: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eot_token_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    recompute: Recompute | CacheMethod = "block"
    unmask: Any = None
    schedule: ScheduleName = "even"
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    scaled_confidence: bool = False
    order_temperature: float = 0.0
    first_slot_alone: bool = False

    def __post_init__(self) -> None:
        rules = dict.fromkeys(("gen_length", "block_length", "steps", "top_k"), SIZE)
        rules |= dict.fromkeys(("temperature", "guidance", "order_temperature"), AT_LEAST_0)
        rules |= {"threshold": SHARE, "factor": POSITIVE, "top_p": SHARE, "eps": UNIT}
        rules |= dict.fromkeys(("logits_eos_inf", "confidence_eos_eot_inf"), SWITCH)
        rules |= dict.fromkeys(("scaled_confidence", "first_slot_alone"), SWITCH)
        rules |= {"eot_token_id": TOKEN}
        if not isinstance(self.recompute, CacheMethod) or self.recompute.uses_chunks:
            rules |= {"recompute": one_of(RECOMPUTE)}
        for name, method in RECOMPUTE.items():
            if self.recompute == method:
                object.__setattr__(self, "recompute", name)
        rules |= {"schedule": one_of(get_args(ScheduleName))}
        if not callable(self.remasking):
            validate(self, {"remasking": one_of(CONFIDENCES)})
            object.__setattr__(self, "remasking", CONFIDENCES[self.remasking]())
        validate(self, rules)
        length, block, stops = self.gen_length, self.block_length, self.stop_ids
        require(length % block == 0, f"block_length {block} does not divide gen_length {length}")
        steps, blocks, by_time = self.steps or self.n_blocks, self.n_blocks, self.schedule == "time"
        require(
            by_time or steps % blocks == 0,
            f"steps {steps} is not a multiple of the number of blocks {blocks}",
        )
        require(steps >= blocks, f"steps {steps} is less than the number of blocks {blocks}")
        given = [x is not None for x in (self.steps, self.threshold, self.factor)]
        require(not all(given[1:]), "threshold and factor exclude each other")
        rule = self.unmask
        if isinstance(rule, str):
            rule = unmasking_rule(rule)
            object.__setattr__(self, "unmask", rule)
        if rule is not None:
            require(callable(rule), f"unmask must be a function, a rule or a name, got {rule!r}")
            reads_steps = isinstance(rule, Unmasking) and rule.reads_steps
            require(not any(given[reads_steps:]), "unmask excludes steps, threshold and factor")
            if self.unmasking.verifies:
                given_too = {"guidance": self.guidance > 0}
                given_too["first_slot_alone"] = self.first_slot_alone
                given_too[f"method {self.cache_method.name!r}"] = not self.cache_method.verifies
                for name, refused in given_too.items():
                    message = f"{name} is not implemented for unmask {self.unmasking.name!r}"
                    require(not refused, message)
        origin = isinstance(self.remasking, Origin)
        require(by_time or not origin, "remasking 'origin' needs schedule='time'")
        timed = {"remasking 'origin'": origin, "order_temperature": self.order_temperature > 0}
        for name, asked in timed.items():
            fits = self.scheduled or not asked
            require(fits, f"{name} excludes threshold, factor and unmask")
        ids = isinstance(stops, tuple) and all(map(is_index, stops))
        require(ids, f"stop_ids must be a tuple of token ids, got {stops!r}")
        plain = self.guidance == 0 or self.cache_method.guides
        require(plain, f"guidance needs recompute='response', got {self.recompute!r}")

    @classmethod
    def dream(
        cls,
        *,
        max_new_tokens: int = 20,
        steps: int = 512,
        alg: str = "origin",
        eps: float = 1e-3,
        alg_temp: float | None = None,
        **settings: Any,
    ) -> DecodeConfig:
        """Returns Dream's published generation (`diffusion_generate`), by its names and defaults.

        The response is one block, and every step recomputes all of it.

        Args:
          max_new_tokens: tokens of the response, `gen_length`.
          steps: evaluations. Where they are more than the tokens, some unmask nothing.
          alg: "origin", "maskgit_plus", "topk_margin" or "entropy"; see `remasking`.
          eps: the time after the last step.
          alg_temp: `order_temperature`, None for 0; not used by "origin".
          settings: temperature, top_p, top_k and any other field; replace what the others set.

        Raises:
          ConfigError: an `alg` that is not known, or a value that its field does not allow.
        """
        rule = _by_time(steps, alg, eps, alg_temp, _ALGORITHMS)
        rule |= {"gen_length": max_new_tokens, "block_length": max_new_tokens}
        return cls(**rule | {"recompute": "response"} | settings)

    @classmethod
    def fast_dllm_dream(
        cls,
        *,
        max_new_tokens: int = 32,
        block_length: int = 32,
        steps: int = 512,
        alg: str = "confidence_threshold",
        threshold: float = 0.9,
        dual_cache: bool = False,
        eps: float = 1e-3,
        alg_temp: float | None = None,
        **settings: Any,
    ) -> DecodeConfig:
        """Returns Fast-dLLM's generation with Dream (arXiv 2505.22618), by its names.

        Args:
          max_new_tokens: tokens of the response, `gen_length`.
          block_length: tokens of a block; divides max_new_tokens.
          steps: evaluations over all blocks, of "entropy".
          alg: "confidence_threshold", which reads neither steps, eps nor alg_temp; or "entropy",
            Dream's schedule over the steps of a block, which does not read threshold.
          threshold: every slot with at least this confidence is unmasked, and the best one.
          dual_cache: a step recomputes the block alone; otherwise all that is behind it too.
          eps: the time after a block's last step, of "entropy".
          alg_temp: `order_temperature` of "entropy", None for 0.
          settings: temperature, top_p, top_k and any other field; replace what the others set.

        Raises:
          ConfigError: an `alg` that is not known, or a value that its field does not allow.
        """
        if alg == "confidence_threshold":
            rule: dict[str, Any] = {"threshold": threshold, "scaled_confidence": True}
        else:
            known = {"confidence_threshold": "", "entropy": "entropy"}
            rule = _by_time(steps, alg, eps, alg_temp, known)
        rule |= {"gen_length": max_new_tokens, "block_length": block_length}
        rule |= {"recompute": "block" if dual_cache else "suffix", "first_slot_alone": True}
        return cls(**rule | settings)

    @property
    def n_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def cache_method(self) -> CacheMethod:
        """The method that `recompute` names."""
        method = self.recompute
        return method if isinstance(method, CacheMethod) else RECOMPUTE[method]

    @property
    def has_code(self) -> bool:
        """Whether a rule or method is the caller's, which JSON cannot hold."""
        tables = (CONFIDENCES, self.remasking), (CACHE_METHODS, self.cache_method)
        known = all(type(value) in table.values() for table, value in tables)
        return not known or type(self.unmask) not in (type(None), *UNMASKING.values())

    @property
    def samples(self) -> bool:
        """Whether tokens or their order are drawn, apart from `remasking` "random"."""
        by_chance = isinstance(self.remasking, Origin)
        return self.temperature > 0 or self.order_temperature > 0 or by_chance

    @property
    def scheduled(self) -> bool:
        """Whether a block takes a fixed number of evaluations."""
        return self.threshold is None and self.factor is None and self.unmask is None

    @property
    def steps_per_block(self) -> int:
        """Evaluations of a block with a schedule."""
        return self.block_length if self.steps is None else self.steps // self.n_blocks

    @property
    def prediction(self) -> dict[str, Any]:
        """The arguments of `sampling.predict` that are settings of the same meaning."""
        names = ("temperature", "top_p", "top_k", "scaled_confidence", "order_temperature")
        return {"confidence": self.remasking} | {name: getattr(self, name) for name in names}

    @property
    def step_limit(self) -> int:
        """Evaluations after which a block ends."""
        even = self.scheduled and self.schedule == "even"
        lacking = self.block_length if even and self.cache_method.may_lack else 0
        if self.scheduled or self.unmasking.reads_steps:
            return max(self.steps_per_block, lacking)
        # A rule that masks slots again ends by itself.
        slots = self.gen_length if self.unmasking.verifies else self.block_length
        return slots + self.first_slot_alone

    @property
    def unmasking(self) -> Unmasking:
        """The rule that takes the slots of a step."""
        if self.unmask is not None:
            return self.unmask if isinstance(self.unmask, Unmasking) else Custom(self.unmask)
        if self.threshold is not None:
            return Threshold(self.threshold)
        if self.factor is not None:
            return Factor(self.factor)
        if self.schedule == "time":
            rule = Chance if isinstance(self.remasking, Origin) else TimeSchedule
            return rule(self.steps_per_block, self.eps)
        return Schedule(self.block_length, self.steps_per_block)

    def to_flat(self) -> dict[str, Any]:
        """Returns all settings but code, rules and method by name, for JSON."""
        flat = dataclasses.asdict(dataclasses.replace(self, unmask=None))
        del flat["unmask"]
        if isinstance(self.recompute, CacheMethod):
            flat["recompute"]["method"] = self.recompute.name
        if type(self.unmask) in UNMASKING.values():
            flat["unmask"] = dataclasses.asdict(self.unmask) | {"rule": self.unmask.name}
        return flat | {"remasking": getattr(self.remasking, "name", "")}

    @classmethod
    def from_flat(cls, **settings: Any) -> DecodeConfig:
        """Returns the settings that `to_flat` gave, also after JSON made lists of tuples.

        Raises:
          ConfigError: a rule, method or value that is not known.
        """
        settings["stop_ids"] = tuple(settings.get("stop_ids", ()))
        tables = ("recompute", "method", CACHE_METHODS), ("unmask", "rule", UNMASKING)
        for field, key, table in tables:
            if isinstance(given := settings.get(field), dict):
                options = dict(given)
                name = options.pop(key, None)
                require(name in table, f"{key} {name!r} is not known ({', '.join(table)})")
                settings[field] = table[name](**options)
        return cls(**settings)


def _by_time(
    steps: int, alg: str, eps: float, alg_temp: float | None, known: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the fields that Dream's algorithms share."""
    require(alg in known, f"alg {alg!r} is not known ({', '.join(known)})")
    return {
        "steps": steps,
        "schedule": "time",
        "eps": eps,
        "remasking": known[alg],
        "order_temperature": 0.0 if alg == "origin" else alg_temp or 0.0,
        "scaled_confidence": True,
    }
