"""A forward for `rules` by which they run with Fast-dLLM's dual cache, and WINO with shadow rows.

No author publishes these rules with a cache. Defined here: a block's first evaluation runs the
whole sequence, the others the block alone, against the keys and values that the first one gave the
other rows. Their logits stay as they were. Rows behind the sequence go along in every evaluation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.oracles.generation import Cache, Network


class DualForward:
    """ids [1, T], or also positions [1, T] and an additive mask [1, 1, T, T] -> logits [1, T, E].

    Rows from `length` on are no part of the sequence. A block ends when it holds no mask, which the
    next call shows: `blocks` are the first and last position (exclusive) of each.
    """

    def __init__(self, network: Network, blocks: list[tuple[int, int]], mask_id: int) -> None:
        self.network, self.blocks, self.mask_id = network, blocks, mask_id
        self.length = blocks[-1][1]
        self.current = -1
        self.cache: Cache = []
        self.logits = torch.zeros(0)

    @torch.no_grad()
    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = ids.shape[1]
        at = torch.arange(total) if positions is None else positions[0]
        sees = torch.zeros(1, 1, total, total) if mask is None else mask
        masked = ids[0] == self.mask_id
        block = next(i for i, (a, b) in enumerate(self.blocks) if masked[a:b].any())
        rows = torch.arange(total)
        if block == self.current:
            start, stop = self.blocks[block]
            rows = rows[((rows >= start) & (rows < stop)) | (rows >= self.length)]
        else:
            self.current, self.cache = block, []
            self.logits = torch.zeros(1, total, 1)
        logits, self.cache = self._run(ids[:, rows], rows, at[rows], sees[..., rows, :])
        self.logits = self.logits.expand(-1, -1, logits.shape[-1]).clone()
        self.logits[:, rows] = logits
        return self.logits

    def _run(
        self, ids: torch.Tensor, rows: torch.Tensor, at: torch.Tensor, sees: torch.Tensor
    ) -> tuple[torch.Tensor, Cache]:
        net, cache = self.network, []
        x = net.weights["wte"][ids]
        for i in range(net.config["n_layers"]):
            block = f"blocks.{i}."
            h = net._norm(x, block + "attn_norm")
            q = net._rotate(net._project(h, block + "q_proj", net.heads), at)
            k = net._rotate(net._project(h, block + "k_proj", net.kv_heads), at)
            v = net._project(h, block + "v_proj", net.kv_heads)
            if self.cache:
                old_k, old_v = (old.clone() for old in self.cache[i])
                old_k[:, :, rows], old_v[:, :, rows] = k, v
                k, v = old_k, old_v
            cache.append((k, v))
            groups = net.heads // net.kv_heads
            scores = q @ k.repeat_interleave(groups, dim=1).mT / math.sqrt(net.head_dim) + sees
            mixed = F.softmax(scores, dim=-1) @ v.repeat_interleave(groups, dim=1)
            x = x + mixed.transpose(1, 2).flatten(2) @ net.weights[block + "attn_out"].T
            h = net._norm(x, block + "ff_norm")
            gate = F.silu(h @ net.weights[block + "ff_proj"].T)
            x = (
                x
                + (gate * (h @ net.weights[block + "up_proj"].T)) @ net.weights[block + "ff_out"].T
            )
        head = net.weights["wte" if net.config.get("weight_tying") else "ff_out"]
        return net._norm(x, "ln_f") @ head.T, cache
