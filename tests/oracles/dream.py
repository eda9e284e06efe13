"""The published generation algorithms for Dream, in PyTorch, one prompt at a time.

`generate` is Dream's `diffusion_generate` (arXiv 2508.15487); `prefix_cache` and `dual_cache` are
Fast-dLLM's for Dream (arXiv 2505.22618 and its public code). In all of them the token of slot j is
read from the logits of row j - 1, and row 0 also predicts itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tests.oracles import generation
from tests.oracles.checkpoints import LAYER_NAMES


class Network(generation.Network):
    """Dream's layers with explicit keys and values: LLaDA's, with biases of q, k and v."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        names = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
        for i in range(config["num_hidden_layers"]):
            for part, name in LAYER_NAMES["Dream"].items():
                names[f"model.layers.{i}.{name}"] = f"blocks.{i}.{LAYER_NAMES['llada'][part]}"
        renamed = {}
        for name, tensor in tensors.items():
            path, kind = name.rsplit(".", 1)
            renamed[names[path] + (".bias" if kind == "bias" else "")] = tensor
        translated = {
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"],
            "d_model": config["hidden_size"],
            "weight_tying": config["tie_word_embeddings"],
            **{name: config[name] for name in ("rms_norm_eps", "rope_theta")},
            "rope_scaling": config.get("rope_scaling"),
        }
        super().__init__(renamed, translated, dtype)


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """Rows that predict: [T, V] -> [T, V], the first one repeated."""
    return torch.cat((logits[:1], logits[:-1]))


class Draws:
    """The random numbers of a generation. Tests replace methods by draws that they know."""

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Numbers in [0, 1) for the masks at these positions."""
        return torch.rand(len(masks))

    def tokens(self, probabilities: torch.Tensor) -> torch.Tensor:
        """A token of each row of [n, V]."""
        return probabilities.multinomial(1)[:, 0]

    def slots(self, probabilities: torch.Tensor, count: int) -> torch.Tensor:
        """Different indices of [n]."""
        return probabilities.multinomial(count)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What masks predict, how sure, and which of them become final.

    order: "origin", "maskgit_plus", "topk_margin", "entropy", or "confidence_threshold", whose
    confidence is maskgit_plus'.
    """

    order: str
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float = 0.0
    draws: Draws = dataclasses.field(default_factory=Draws)

    def filtered(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities [n, V] from logits over temperature, of the top-p, then top-k tokens."""
        logits = logits / self.temperature if self.temperature > 0 else logits.clone()
        none = torch.finfo(logits.dtype).min
        if self.top_p is not None and self.top_p < 1:
            # A token stays while those before it hold at most top_p; so the best one always does.
            values, tokens = logits.sort(-1, descending=True)
            before = values.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0
            logits[
                torch.zeros_like(logits, dtype=bool).scatter(-1, tokens, before > self.top_p)
            ] = none
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits[logits < least] = none
        return logits.softmax(-1)

    def predict(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, V] -> tokens and confidences [n]."""
        p = self.filtered(logits)
        tokens = self.draws.tokens(p) if self.temperature > 0 and len(p) else p.argmax(-1)
        if self.order == "topk_margin":
            best = p.topk(2).values
            return tokens, best[:, 0] - best[:, 1]
        if self.order == "entropy":
            return tokens, (p * (p + 1e-10).log()).sum(-1)
        return tokens, p.gather(-1, tokens[:, None])[:, 0]


def due(masked: int, times: torch.Tensor, step: int) -> int:
    """Tokens due at a step of Dream's schedule: 1 - s / t of the masks, in float32."""
    if step == len(times) - 2:
        return masked
    return int(torch.tensor(float(masked)) * (1 - times[step + 1] / times[step]))


@dataclasses.dataclass
class Generated:
    """A response that is filled with predictions.

    tokens [prompt + gen_length]; evaluations whose logits were read. closest: the smallest gap of
    confidences that decided anything; rounding may decide where it is tiny, and torch.topk promises
    no order where it is 0.
    """

    tokens: torch.Tensor
    mask_id: int
    evaluations: int = 0
    closest: float = math.inf

    @classmethod
    def start(cls, prompt: torch.Tensor, gen_length: int, mask_id: int) -> Generated:
        assert (prompt != mask_id).all(), "a mask of the prompt would be filled"
        return cls(F.pad(prompt, (0, gen_length), value=mask_id), mask_id)

    def masks(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Positions of the masks in this span."""
        return start + (self.tokens[start:stop] == self.mask_id).nonzero()[:, 0]

    def fill(self, masks: torch.Tensor, prediction, count: int, sampler: Sampler) -> None:
        """Replaces the count most confident masks; drawn ones if alg_temp > 0.

        prediction: tokens and confidences of the masks.
        """
        tokens, confidence = prediction
        if sampler.alg_temp > 0 and count:
            share = (confidence / sampler.alg_temp).softmax(-1)
            chosen = sampler.draws.slots(share, count)
        else:
            values, order = confidence.sort(descending=True)
            chosen = order[:count]
            if 0 < count < len(order):
                self.closest = min(self.closest, float(values[count - 1] - values[count]))
        self.tokens[masks[chosen]] = tokens[chosen]


def generate(
    network: generation.Forward,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    steps: int,
    mask_id: int,
    alg: str = "origin",
    eps: float = 1e-3,
    **settings: Any,
) -> Generated:
    """Dream's generation: every step runs the whole sequence and fills masks anywhere in it.

    network: ids [B, T] -> logits [B, T, V], not shifted. prompt [P]. settings: of `Sampler`.
    """
    run, sampler = Generated.start(prompt, gen_length, mask_id), Sampler(alg, **settings)
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        masks = run.masks()
        if not len(masks):
            break
        logits = shifted(network(run.tokens[None])[0])[masks]
        run.evaluations += 1
        if alg == "origin":
            share = 1 - times[step + 1] / times[step] if step < steps - 1 else 1
            chosen = sampler.draws.uniform(masks) < share
            run.tokens[masks[chosen]] = sampler.predict(logits[chosen])[0]
        else:
            count = due(len(masks), times, step)
            run.fill(masks, sampler.predict(logits), count, sampler)
    return run


def _cached(
    network: Network,
    prompt: torch.Tensor,
    *,
    suffix: bool,
    gen_length: int,
    block_length: int,
    steps: int,
    mask_id: int,
    alg: str,
    threshold: float = 0.9,
    eps: float = 1e-3,
    **settings: Any,
) -> Generated:
    run, sampler = Generated.start(prompt, gen_length, mask_id), Sampler(alg, **settings)
    n_blocks = gen_length // block_length
    assert gen_length % block_length == 0
    assert steps % n_blocks == 0
    times = torch.linspace(1, eps, steps // n_blocks + 1)
    first = dataclasses.replace(sampler, order="maskgit_plus")
    for start in range(len(prompt), len(run.tokens), block_length):
        stop = start + block_length
        logits, cache = network.rows(run.tokens[None], 0, None)
        run.evaluations += 1
        run.tokens[start] = first.predict(shifted(logits[0])[start : start + 1])[0]
        step, end = 1, None if suffix else stop
        while len(masks := run.masks(start, stop)):
            if alg == "entropy" and step == len(times) - 1:
                break
            # What later passes compute of the block replaces its keys and values, and is replaced
            # by the next: the other rows stay as the block's first pass left them.
            logits, cache = network.rows(run.tokens[None, start:end], start, cache)
            run.evaluations += 1
            prediction = sampler.predict(shifted(logits[0])[masks - start])
            if alg == "entropy":
                count = due(len(masks), times, step)
            else:
                sure = prediction[1].sort(descending=True).values[1:] - threshold
                run.closest = min([run.closest, *sure.abs().tolist()])
                count = 1 + int((sure >= 0).sum())
            run.fill(masks, prediction, count, sampler)
            step += 1
            assert step <= block_length + steps, "masks predicted: the published loop never ends"
    return run


def prefix_cache(network: Network, prompt: torch.Tensor, **settings: Any) -> Generated:
    """Fast-dLLM's prefix cache for Dream.

    A block's first pass runs the whole sequence and sets the block's first slot alone. The others
    recompute block and suffix; their logits are shifted inside these rows.

    settings: gen_length, block_length, steps, mask_id; alg, "confidence_threshold" (the most
    confident mask, and all with at least `threshold`) or "entropy" (Dream's schedule over
    steps / blocks steps of a block, of which the first pass was step 0); eps; others of `Sampler`.
    """
    return _cached(network, prompt, suffix=True, **settings)


def dual_cache(network: Network, prompt: torch.Tensor, **settings: Any) -> Generated:
    """As `prefix_cache`, but only the block itself is recomputed."""
    return _cached(network, prompt, suffix=False, **settings)
