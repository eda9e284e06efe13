"""The published generation algorithms for LLaDA, in PyTorch, greedy (temperature 0).

`plain` is LLaDA's (arXiv 2502.09992, section 2.4 and appendix), `prefix_cache` and `dual_cache` are
Fast-dLLM's (arXiv 2505.22618, sections 3.2 and 3.3). The caches need keys and values in and out, so
the network's layers are written out here, from the definitions, a third time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

Forward = Callable[[torch.Tensor], torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Network:
    """LLaDA's layers with explicit keys and values.

    tensors: LLaDA checkpoint names -> tensors; config: the contents of config.json, without
    rope_scaling. Everything is computed in `dtype`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert not config.get("rope_scaling"), "only plain RoPE is written out here"
        self.weights = {
            name.removeprefix("model.transformer.").removesuffix(".weight"): tensor.to(dtype)
            for name, tensor in tensors.items()
        }
        self.config = config
        self.heads = config["n_heads"]
        self.kv_heads = config.get("n_kv_heads") or self.heads
        self.head_dim = config["d_model"] // self.heads

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[name]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turns the pairs (i, i + D/2) of x [B, H, T, D] by position * theta^(-2i/D)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = positions[:, None].double() * self.config["rope_theta"] ** -exponents
        pairs = torch.complex(*(half.double() for half in x.chunk(2, dim=-1)))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)

    def _project(self, x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        y = x @ self.weights[name].T + self.weights.get(f"{name}.bias", 0.0)
        return y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    @torch.no_grad()
    def rows(
        self, ids: torch.Tensor, start: int, cache: Cache | None
    ) -> tuple[torch.Tensor, Cache]:
        """Recomputes the rows start .. start + T of a sequence whose other rows are in `cache`.

        ids [B, T]. Rows attend to everything before them in the cache, to themselves, and to what
        the cache holds after them. Returns logits [B, T, E] and the keys and values of all rows.
        """
        stop = start + ids.shape[1]
        positions = torch.arange(start, stop)
        x = self.weights["wte"][ids]
        updated: Cache = []
        for i in range(self.config["n_layers"]):
            block = f"blocks.{i}."
            h = self._norm(x, block + "attn_norm")
            q = self._project(h, block + "q_proj", self.heads)
            k = self._project(h, block + "k_proj", self.kv_heads)
            v = self._project(h, block + "v_proj", self.kv_heads)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            if cache is not None:
                old_k, old_v = cache[i]
                k = torch.cat((old_k[:, :, :start], k, old_k[:, :, stop:]), dim=2)
                v = torch.cat((old_v[:, :, :start], v, old_v[:, :, stop:]), dim=2)
            updated.append((k, v))
            groups = self.heads // self.kv_heads
            scores = q @ k.repeat_interleave(groups, dim=1).mT / math.sqrt(self.head_dim)
            mixed = F.softmax(scores, dim=-1) @ v.repeat_interleave(groups, dim=1)
            x = x + mixed.transpose(1, 2).flatten(2) @ self.weights[block + "attn_out"].T
            h = self._norm(x, block + "ff_norm")
            gate = F.silu(h @ self.weights[block + "ff_proj"].T)
            up = h @ self.weights[block + "up_proj"].T
            x = x + (gate * up) @ self.weights[block + "ff_out"].T
        head = self.weights["wte" if self.config.get("weight_tying") else "ff_out"]
        return self._norm(x, "ln_f") @ head.T, updated

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> logits [B, T, E], nothing cached."""
        return self.rows(ids, 0, None)[0]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How many predictions become final in one evaluation.

    Without threshold and factor: the linear schedule over `steps` evaluations of a block.
    """

    steps: int
    threshold: float | None = None
    factor: float | None = None

    def schedule(self, masked: int, step: int) -> int:
        """Tokens due at evaluation `step` of a block that began with `masked` masks."""
        return masked // self.steps + (step < masked % self.steps)

    def goes_on(self, is_masked: torch.Tensor, masked: list[int], step: int) -> bool:
        """Whether `plain` gives a block its evaluation `step`; `masked`: its masks at the start."""
        if self.threshold is None and self.factor is None:
            return any(self.schedule(n, step) for n in masked) and step < self.steps
        assert step <= is_masked.shape[1], "mask tokens predicted: the published loop never ends"
        return bool(is_masked.any())

    def count(self, confidences: list[float], due: int) -> int:
        """How many of the candidates, whose confidences are in falling order, become final."""
        candidates = len(confidences)
        if candidates == 0:
            return 0
        if self.threshold is not None:
            return max(1, sum(c >= self.threshold for c in confidences))
        if self.factor is not None:
            # Candidate i (from 1) may join while its confidence is at least 1 - factor / (i + 1);
            # the published loop starts with the second and treats the ends of the list like this.
            fails = (
                i for i, c in enumerate(confidences) if i > 0 and c < 1 - self.factor / (i + 2)
            )
            count = next(fails, candidates - 1)
            return count + 1 if count in (0, candidates - 1) else count
        return min(due, candidates)


class Generated:
    """A response, all masks at first, that evaluations fill block by block.

    tokens [B, prompt + gen_length]; evaluations, of which a guided pair counts as one.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        *,
        steps: int,
        gen_length: int,
        block_length: int,
        mask_id: int,
        threshold: float | None = None,
        factor: float | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
        eos_id: int = 126081,
        eot_id: int = 126348,
    ) -> None:
        assert gen_length % block_length == 0
        n_blocks = gen_length // block_length
        assert steps % n_blocks == 0
        self.rule = Rule(steps // n_blocks, threshold, factor)
        self.mask_id, self.evaluations = mask_id, 0
        # LLaDA's evaluation code: logits that are -inf for the prediction, and for its confidence.
        self.never = [eos_id] if logits_eos_inf else []
        self.unsure = [eos_id, eot_id] if confidence_eos_eot_inf else []
        masks = torch.full((prompt.shape[0], gen_length), mask_id)
        self.tokens = torch.cat((prompt, masks), dim=1)
        starts = range(prompt.shape[1], self.tokens.shape[1], block_length)
        self.blocks = [(start, start + block_length) for start in starts]

    def is_masked(self, start: int, stop: int) -> torch.Tensor:
        """Which slots are masked, bool [B, stop - start]."""
        return self.tokens[:, start:stop] == self.mask_id

    def take(self, logits: torch.Tensor, first: int, stop: int, due: list[int]) -> None:
        """Replaces the most confident masks before `stop` by their predictions.

        logits [B, T, E] of the rows first .. first + T; due: scheduled tokens of every sequence.
        """
        candidates = self.is_masked(first, first + logits.shape[1])
        candidates[:, stop - first :] = False
        logits = logits.clone()
        logits[..., self.never] = -torch.inf
        prediction = logits.argmax(-1)
        logits[..., self.unsure] = -torch.inf
        probabilities = F.softmax(logits.double(), dim=-1)
        confidence = probabilities.gather(-1, prediction[..., None])[..., 0]
        for b in range(len(due)):
            slots = candidates[b].nonzero()[:, 0].tolist()
            slots.sort(key=lambda slot: -confidence[b, slot].item())
            n = self.rule.count([confidence[b, slot].item() for slot in slots], due[b])
            self.tokens[b, [first + slot for slot in slots[:n]]] = prediction[b, slots[:n]]
        self.evaluations += 1


def plain(
    forward: Forward, prompt: torch.Tensor, *, cfg_scale: float = 0.0, **settings: Any
) -> Generated:
    """LLaDA's generation with low-confidence remasking: every evaluation runs the whole sequence.

    With the fixed schedule a block gets all its evaluations. Where the prediction is the mask
    token, a slot stays masked and a later evaluation, of a later block too, may fill it. Left
    out are those in which nothing is due. Threshold and factor are Fast-dLLM's, without its caches,
    and go on until the block is full. settings: of `Generated`.
    """
    run = Generated(prompt, **settings)
    rule, mask_id = run.rule, run.mask_id
    is_prompt = torch.zeros_like(run.tokens, dtype=torch.bool)
    is_prompt[:, : prompt.shape[1]] = prompt != mask_id
    for start, stop in run.blocks:
        masked = run.is_masked(start, stop).sum(1).tolist()
        step = 0
        while rule.goes_on(run.is_masked(start, stop), masked, step):
            logits = forward(run.tokens)
            if cfg_scale > 0:
                without = forward(torch.where(is_prompt, mask_id, run.tokens))
                logits = without + (cfg_scale + 1) * (logits - without)
            run.take(logits, 0, stop, [rule.schedule(n, step) for n in masked])
            step += 1
    return run


def _cached(network: Network, prompt: torch.Tensor, suffix: bool, settings: Any) -> Generated:
    run = Generated(prompt, **settings)
    for start, stop in run.blocks:
        masked = run.is_masked(start, stop).sum(1).tolist()
        logits, cache = network.rows(run.tokens, 0, None)
        run.take(logits, 0, stop, [run.rule.schedule(n, 0) for n in masked])
        step = 1
        end = run.tokens.shape[1] if suffix else stop
        while run.is_masked(start, stop).any():
            # Always from the block's first cache: what later evaluations computed is not kept.
            logits, _ = network.rows(run.tokens[:, start:end], start, cache)
            run.take(logits, start, stop, [run.rule.schedule(n, step) for n in masked])
            step += 1
            assert step <= stop - start, "mask tokens predicted: the published loop never ends"
    return run


def prefix_cache(network: Network, prompt: torch.Tensor, **settings: Any) -> Generated:
    """Fast-dLLM's prefix cache; settings: of `Generated`.

    A block's first evaluation runs the whole sequence and keeps the keys and values before the
    block; the others recompute everything from the block's start to the end.
    """
    return _cached(network, prompt, True, settings)


def dual_cache(network: Network, prompt: torch.Tensor, **settings: Any) -> Generated:
    """Fast-dLLM's dual cache: as the prefix cache, but only the block itself is recomputed.

    The masks after the block keep the keys and values of the block's first evaluation.
    """
    return _cached(network, prompt, False, settings)
