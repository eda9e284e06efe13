"""One pass of a network over any rows of a sequence, the other rows from a cache."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from tests.oracles import generation


@dataclasses.dataclass
class Pass:
    """What a pass computed.

    logits [T, V]: of the rows that ran, `fill` elsewhere. cache: of all rows. weights: of every
    layer, the attention weights [H, rows, T].
    """

    logits: torch.Tensor
    cache: generation.Cache
    weights: list[torch.Tensor]


@torch.no_grad()
def run_rows(
    network: generation.Network,
    ids: torch.Tensor,
    rows: torch.Tensor,
    cache: generation.Cache | None,
    fill: float = 0.0,
) -> Pass:
    """Runs rows [R] (rising) of ids [T]; they attend to all T rows, themselves as computed now."""
    x, weights, updated = network.weights["wte"][ids[rows]][None], [], []
    for i in range(network.config["n_layers"]):
        block = f"blocks.{i}."
        h = network._norm(x, block + "attn_norm")
        q = network._rotate(network._project(h, block + "q_proj", network.heads), rows)
        k = network._rotate(network._project(h, block + "k_proj", network.kv_heads), rows)
        v = network._project(h, block + "v_proj", network.kv_heads)
        if cache is None:
            assert len(rows) == len(ids)
        else:
            fresh_k, fresh_v = k, v
            k, v = (old.clone() for old in cache[i])
            k[:, :, rows], v[:, :, rows] = fresh_k, fresh_v
        updated.append((k, v))
        groups = network.heads // network.kv_heads
        scores = q @ k.repeat_interleave(groups, dim=1).mT / math.sqrt(network.head_dim)
        weights.append(F.softmax(scores, dim=-1)[0])
        mixed = weights[-1][None] @ v.repeat_interleave(groups, dim=1)
        x = x + mixed.transpose(1, 2).flatten(2) @ network.weights[block + "attn_out"].T
        h = network._norm(x, block + "ff_norm")
        gate = F.silu(h @ network.weights[block + "ff_proj"].T)
        up = h @ network.weights[block + "up_proj"].T
        x = x + (gate * up) @ network.weights[block + "ff_out"].T
    head = network.weights["wte" if network.config.get("weight_tying") else "ff_out"]
    logits = torch.full((len(ids), head.shape[0]), fill, dtype=x.dtype)
    logits[rows] = (network._norm(x, "ln_f") @ head.T)[0]
    return Pass(logits, updated, weights)
