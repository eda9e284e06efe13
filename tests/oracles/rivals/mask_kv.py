"""MaskKV (arXiv 2510.09309) in PyTorch, one prompt at a time. From the paper alone.

dLLM-Cache (`dllm_cache`), and of the prompt's keys and values each KV head keeps `budget`:

  importance  of a key for a KV head: the weights, of the softmax over all keys, that the masks give
              to it in the first evaluation, summed over masks and the head's query heads.
  kept        the most important ones, from the second evaluation on; the earlier one at a tie. A
              refresh of the prompt recomputes all its rows, which then attend to all keys, as do
              the response's in that evaluation. The kept positions stay those of the first.

The prompt has no cached outputs: layer 0 does not recompute it. The row in front of the response,
which predicts Dream's first slot, keeps its logits until the prompt is refreshed.

What the paper leaves open, and how it is read here: grouped heads share their kept keys; an
evaluation that refreshes the prompt attends to all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.oracles import generation
from tests.oracles.rivals.dllm_cache import DLLMCache


class MaskKV(DLLMCache):
    """The network with MaskKV: a `generation.Forward` of one sequence, to be called in order.

    budget: prompt positions that every KV head keeps; or such numbers [layer][KV head].
    kept: of every layer and KV head, the kept positions of the prompt, in rising order.
    """

    def __init__(
        self,
        network: generation.Network,
        prompt_length: int,
        *,
        budget: int | Sequence[Sequence[int]],
        prompt_interval: int = 50,
        response_interval: int = 5,
        **settings: Any,
    ) -> None:
        intervals = {"prompt_interval": prompt_interval, "response_interval": response_interval}
        super().__init__(network, prompt_length, **intervals, **settings)
        if isinstance(budget, int):
            budget = [[budget] * network.kv_heads] * network.config["n_layers"]
        self.budget, self.kept = budget, []

    def due(self, layer: int) -> tuple[bool, bool]:
        return (len(self.rows) - 1) % self.prompt_interval == 0, super().due(layer)[1]

    def seen(self, layer: int) -> torch.Tensor | None:
        if self.due(layer)[0]:
            return None
        length = self.layers[layer]["k"].shape[1]
        seen = torch.ones(self.network.kv_heads, length, dtype=torch.bool)
        seen[:, : self.prompt_length] = False
        for head, positions in enumerate(self.kept[layer]):
            seen[head, positions] = True
        return seen

    def attended(self, layer: int, rows: torch.Tensor, weights: torch.Tensor) -> None:
        if len(self.rows) > 1:
            return
        masks = weights[:, self.prompt_length :, : self.prompt_length].sum(1)
        importance = masks.unflatten(0, (self.network.kv_heads, -1)).sum(1)
        order = importance.sort(descending=True, stable=True)
        self.kept.append([])
        for head, count in enumerate(self.budget[layer]):
            values = order.values[head]
            if 0 < count < len(values):
                self.closest = min(self.closest, float(values[count - 1] - values[count]))
            self.kept[-1].append(sorted(order.indices[head, :count].tolist()))
