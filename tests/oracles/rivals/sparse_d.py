"""SparseD (its public code): all rows at every step, attention over chosen tiles of keys.

Steps 0 .. int(steps * skip) + 1 attend to everything. At the last of these every layer, head and
tile of queries chooses tiles of keys, which all later steps use:

  1. softmax over all keys; the int(tiles * select) + 1 tiles with the largest sums of weights over
     the tile of queries; of these the tiles of the response are dropped;
  2. softmax over the response's keys; the int(response tiles * select) + 1 best of its tiles.

A tile is of the response if no more than gen_length rows begin with it, or if it is the last: a
tile that straddles the prompt's end belongs to the prompt. A tile at the end that is not full has a
smaller sum. No more tiles are chosen than there are (the published code fails there).

Quirk: for LLaDA the products are divided by sqrt(heads) where tiles are chosen, not by
sqrt(head size), which attention itself and Dream use.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.oracles import dream, generation
from tests.oracles.rivals import parts


def choose(
    run: parts.Run,
    q: torch.Tensor,
    k: torch.Tensor,
    first: int,
    tile: int,
    select: float,
    scale: float,
) -> torch.Tensor:
    """Tiles of keys for a tile of queries q [H, t, D]: bool [H, n].

    first: the response's first tile.
    """
    n = -(-k.shape[1] // tile)
    chosen = torch.zeros(len(q), n, dtype=torch.bool)
    for span in (0, first):
        weights = parts.weights(q, k[:, span * tile :], scale)
        score = [part.sum((1, 2)) / tile**2 for part in weights.split(tile, dim=2)]
        count = min(int((n - span) * select) + 1, n - span)
        for h, row in enumerate(torch.stack(score, 1)):
            best = [span + j for j in run.best(row, count)]
            chosen[h, [j for j in best if span == first or j < first]] = True
    return chosen


def generate(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    steps: int,
    mask_id: int,
    block_length: int | None = None,
    tile: int = 128,
    select: float = 0.3,
    skip: float = 0.2,
    heads_scale: bool | None = None,
    response_rows: int | None = None,
    alg: str = "maskgit_plus",
    eps: float = 1e-3,
    **settings: Any,
) -> parts.Run:
    """Generates greedily: LLaDA's linear schedule in blocks, or Dream's for a `dream.Network`.

    prompt [P]. block_length: LLaDA's, gen_length by default. alg, eps, settings: Dream's.
    heads_scale: the quirk above; None: as published, for LLaDA alone.
    response_rows: rows of the response where its tiles are found, gen_length by default. The code
      of an earlier version has `steps` there.

    `chosen` of the step that chooses: for each layer bool [H, tiles of queries, tiles of keys].
    """
    run, layers = parts.Run.start(prompt, gen_length, mask_id), parts.Layers(network)
    total, every = len(run.tokens), torch.arange(len(run.tokens))
    block_length = gen_length if layers.shift else block_length or gen_length
    n_blocks = gen_length // block_length
    assert gen_length % block_length == 0
    assert steps % n_blocks == 0
    if heads_scale is None:
        heads_scale = not layers.shift
    scale = math.sqrt(network.heads if heads_scale else network.head_dim)
    n = -(-total // tile)
    response_rows = gen_length if response_rows is None else response_rows
    first = next(j for j in range(n) if total - j * tile <= response_rows or j == n - 1)
    last_full, seen = int(steps * skip) + 1, {}
    times, sampler = torch.linspace(1, eps, steps + 1), dream.Sampler(alg, **settings)
    for step in range(steps):
        block, at = divmod(step, steps // n_blocks)
        stop = run.prompt + (block + 1) * block_length
        if at == 0:
            masked = len(run.masks(stop - block_length, stop))
        run.steps.append(parts.Step([every.tolist()] * layers.count))
        x = layers.embed(run.tokens)
        for i in range(layers.count):
            q, k, v = layers.qkv(i, x, every)
            weights = parts.weights(q, k)
            if step == last_full:
                tiles = [choose(run, t, k, first, tile, select, scale) for t in q.split(tile, 1)]
                seen[i] = torch.stack(tiles, 1)
                run.steps[-1].chosen.append(seen[i])
            elif step > last_full:
                mask = seen[i].repeat_interleave(tile, 1).repeat_interleave(tile, 2)
                products = (q @ k.mT) / math.sqrt(network.head_dim)
                products[~mask[:, :total, :total]] = -torch.inf
                weights = products.softmax(-1)
            x = layers.finish(i, x, weights @ v)
        logits = layers.logits(x)
        masks = run.masks(0, stop)
        if layers.shift:
            count = dream.due(len(masks), times, step) if len(masks) else 0
            prediction = sampler.predict(dream.shifted(logits)[masks])
        else:
            count = parts.quota(masked, steps // n_blocks, at)
            prediction = parts.predict(logits[masks])
        run.fill(masks, prediction, min(count, len(masks)))
    return run
