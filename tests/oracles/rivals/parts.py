"""What the definitions of sparse attention share: a layer in parts, and a record of a generation.

One request at a time, plain loops, PyTorch in the dtype of the network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

from tests.oracles import dream, generation


class Layers:
    """The layers of `generation.Network` (LLaDA) or `dream.Network` in parts; x is [T, M]."""

    def __init__(self, network: generation.Network):
        self.network = network
        self.count = network.config["n_layers"]
        self.shift = int(isinstance(network, dream.Network))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.weights["wte"][ids]

    def qkv(self, i: int, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v [H, T, D] of rows at these positions, rotated; each KV head once per query."""
        net = self.network
        h = net._norm(x, f"blocks.{i}.attn_norm")[None]
        sizes = {"q_proj": net.heads, "k_proj": net.kv_heads, "v_proj": net.kv_heads}
        q, k, v = (net._project(h, f"blocks.{i}.{name}", n) for name, n in sizes.items())
        q, k = net._rotate(q, positions), net._rotate(k, positions)
        k, v = (part.repeat_interleave(net.heads // net.kv_heads, dim=1) for part in (k, v))
        return q[0], k[0], v[0]

    def finish(self, i: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The stream behind the layer, from its input x and the heads' outputs [H, T, D]."""
        net, block = self.network, f"blocks.{i}."
        x = x + out.transpose(0, 1).flatten(1) @ net.weights[block + "attn_out"].T
        h = net._norm(x, block + "ff_norm")
        hidden = F.silu(h @ net.weights[block + "ff_proj"].T) * (
            h @ net.weights[block + "up_proj"].T
        )
        return x + hidden @ net.weights[block + "ff_out"].T

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        net = self.network
        head = net.weights["wte" if net.config.get("weight_tying") else "ff_out"]
        return net._norm(x, "ln_f") @ head.T


def weights(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Softmax weights [H, T, S]; scale: what divides the products, sqrt(D) if None."""
    return F.softmax(q @ k.mT / (scale or math.sqrt(q.shape[-1])), dim=-1)


@dataclasses.dataclass
class Step:
    """One evaluation: the rows of each layer, what was chosen in it, and the slots unmasked."""

    rows: list[list[int]]
    chosen: list[Any] = dataclasses.field(default_factory=list)
    unmasked: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Run:
    """A response in progress.

    tokens [P + G]. closest: the smallest gap of numbers that decided anything (confidences, scores
    of a selection, a cosine and its threshold). Rounding may decide where it is tiny.
    """

    tokens: torch.Tensor
    prompt: int
    mask_id: int
    steps: list[Step] = dataclasses.field(default_factory=list)
    closest: float = math.inf

    @classmethod
    def start(cls, prompt: torch.Tensor, gen_length: int, mask_id: int) -> Run:
        return cls(F.pad(prompt, (0, gen_length), value=mask_id), len(prompt), mask_id)

    @property
    def response(self) -> list[int]:
        return self.tokens[self.prompt :].tolist()

    def masks(self, start: int, stop: int) -> torch.Tensor:
        """Positions of the masks in this span."""
        return start + (self.tokens[start:stop] == self.mask_id).nonzero()[:, 0]

    def fill(self, masks: torch.Tensor, prediction, count: int) -> None:
        """Replaces the `count` most confident of these masks. prediction: tokens, confidences."""
        tokens, confidence = prediction
        values, order = confidence.sort(descending=True, stable=True)
        if 0 < count < len(order):
            self.closest = min(self.closest, float(values[count - 1] - values[count]))
        self.tokens[masks[order[:count]]] = tokens[order[:count]]
        self.steps[-1].unmasked = sorted(masks[order[:count]].tolist())

    def best(self, scores: torch.Tensor, count: int, torch_ties: bool = False) -> list[int]:
        """Indices of the largest scores [n], sorted. Of equal ones those with the lowest index.

        torch_ties: as torch.topk on a CPU takes them, in no promised order. On GPUs it takes the
        lowest index.
        """
        values, order = scores.sort(descending=True, stable=True)
        if 0 < count < len(order):
            gaps = (values[:-1] - values[1:])[max(0, count - 1) :]
            behind = gaps[gaps > 0]
            before = (values[:-1] - values[1:])[:count]
            before = before[before > 0]
            if values[count - 1] > values[count]:
                near = [values[count - 1] - values[count]]
            else:  # Equal scores on both sides: their neighbours might have changed places.
                near = [*behind[:1], *before[-1:]]
            self.closest = min([self.closest, *map(float, near)])
        if torch_ties:
            order = scores.topk(count).indices
        return sorted(order[:count].tolist())


def predict(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaDA's greedy prediction: logits [n, V] -> tokens, confidences in float64."""
    return logits.argmax(-1), F.softmax(logits.double(), dim=-1).max(-1).values


def quota(masked: int, steps: int, step: int) -> int:
    """LLaDA's schedule: tokens due at a step of a block that began with `masked` masks."""
    return masked // steps + (step < masked % steps)
